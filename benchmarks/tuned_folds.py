"""Cross-validated gain of tuning over the probe: paired, image by image.

Images that the data itself puts in the test part are left alone. Each fold is the test part of two
whole commands, one with the settings given, one with `--finetune none`; everything is chosen inside the rest.
The interval of the gain is a bootstrap of the paired difference, in which equal files are drawn together.

Expected (two CPU cores): TrashNet with `--time-budget 5m` gains 2 to 3 points of accuracy; solar cells with
`--metric macro_f1 --time-budget 10m` reach a macro-F1 above the probe's 0.59, functional against defective
(`--positive-from 2`: classes 2 and 3 against 0 and 1) above its 0.88.

Usage: python benchmarks/tuned_folds.py DATA [--settings "--finetune auto --time-budget 5m"] [--folds 0 1 2 3 4]
[--alone: leave the probe out]
"""

import argparse
import csv
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pixelplay.data.audit import digest_bytes, find_duplicates
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sources import scan_source
from pixelplay.data.splits import assign_folds, join_groups
from pixelplay.evaluation.intervals import bootstrap_weights
from pixelplay.evaluation.metrics import LABEL_METRICS, count_labels

N_FOLDS, N_RESAMPLES = 5, 2000


def write_table(dataset: ImageDataset, folds: NDArray[np.int64], fold: int, path: Path) -> None:
    """A table in which one fold is the test part."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "part"])
        for i, name in enumerate(dataset.paths):
            part = "test" if folds[i] == fold else "train"
            writer.writerow([name, dataset.classes[dataset.labels[i]], part])


def run_fold(
    table: Path, images_dir: str, settings: str, classes: tuple[str, ...]
) -> tuple[dict[str, tuple[int, NDArray[np.float64]]], float]:
    """Path → decided class and probabilities on the fold, and seconds of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pixelplay", "train", str(table), "--images-dir", images_dir]
        command += ["--out", f"{folder}/run", "--quiet", *shlex.split(settings)]
        command += ["--cache-dir", f"{folder}/cache"]  # no fold helps the next one
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        with open(f"{folder}/run/predictions.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    found = {
        row["path"]: (
            classes.index(row["label"]),
            np.array([float(row.get(f"prob_{name}", 0)) for name in classes]),
        )
        for row in rows
    }
    return found, seconds


def describe(
    name: str,
    metric: str,
    preds: list[NDArray[np.int64]],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
) -> str:
    """Values of both and their difference with a 95 % bootstrap interval; of one its value."""
    measure, n_classes = LABEL_METRICS[metric], int(labels.max()) + 1  # type: ignore[index]
    values = [float(measure(count_labels(pred, labels, n_classes))) for pred in preds]
    if len(values) == 1:
        return f"{name} {metric}: tuned {values[0]:.4f}"
    drawn = np.concatenate(
        [
            measure(count_labels(preds[0], labels, n_classes, times))
            - measure(count_labels(preds[1], labels, n_classes, times))
            for times in bootstrap_weights(groups, len(labels), N_RESAMPLES, 0)
        ]
    )
    low, high = np.quantile(drawn, [0.025, 0.975])
    gain = f"{values[0] - values[1]:+.4f} ({low:+.4f} to {high:+.4f})"
    return f"{name} {metric}: tuned {values[0]:.4f}, probe {values[1]:.4f}, gain {gain}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data")
    parser.add_argument("--settings", default="--finetune auto --time-budget 5m")
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(N_FOLDS)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--positive-from", type=int)
    parser.add_argument("--alone", action="store_true", help="leave the probe out")
    args = parser.parse_args()
    dataset = scan_source(args.data)
    dataset = dataset.select(~dataset.in_split("test") & (dataset.labels >= 0))
    images_dir = args.data if Path(args.data).is_dir() else str(Path(args.data).parent)
    digests = tuple(digest_bytes(dataset.storage.read(path)) for path in dataset.paths)
    groups = join_groups(dataset, find_duplicates(dataset, digests))
    folds = assign_folds(dataset.labels, groups, N_FOLDS, args.seed)
    sides = [args.settings] if args.alone else [args.settings, f"{args.settings} --finetune none"]
    preds = [np.full(len(dataset), -1) for _ in sides]
    probs = [np.zeros((len(dataset), len(dataset.classes))) for _ in preds]
    with tempfile.TemporaryDirectory() as folder:
        for fold in args.folds:
            table = Path(folder) / "fold.csv"
            write_table(dataset, folds, fold, table)
            for side, settings in enumerate(sides):
                settings += f" --seed {args.seed}"
                found, seconds = run_fold(table, images_dir, settings, dataset.classes)
                for i in np.flatnonzero(folds == fold):
                    preds[side][i], probs[side][i] = found[dataset.paths[i]]
                rows = folds == fold
                right = float((preds[side][rows] == dataset.labels[rows]).mean())
                print(f"fold {fold}, {settings}: accuracy {right:.4f}, {seconds:.0f} s", flush=True)
    seen = preds[0] >= 0
    labels, together = dataset.labels[seen], groups[seen]
    for metric in LABEL_METRICS:
        print(describe("all", metric, [pred[seen] for pred in preds], labels, together))
    if args.positive_from is not None:
        is_positive = [(p[seen, args.positive_from :].sum(1) >= 0.5).astype(np.int64) for p in probs]
        print(describe("two-class", "accuracy", is_positive, (labels >= args.positive_from) * 1, together))


if __name__ == "__main__":
    main()
