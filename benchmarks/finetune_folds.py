"""Cross-validated gain of fine-tuning over the linear probe, paired image by image.

The predefined test split is not used. Each fold is the test split of two whole commands, one with the
settings, one with `--finetune none` instead of their --finetune; everything is chosen inside the rest. The
interval of the gain is a bootstrap of the paired difference that resamples duplicates together.

Expected (two CPU cores): TrashNet with `--time-budget 5m` gains 2 to 3 points of accuracy. Solar cells
with `--metric macro_f1 --time-budget 10m` reach a macro-F1 above the probe's 0.59, and functional against
defective (`--positive-from 2`: classes 2 and 3 against 0 and 1) above its 0.88.

Usage: python benchmarks/finetune_folds.py DATA [--settings "--finetune auto --time-budget 5m"]
           [--folds 0 1 2 3 4] [--no-probe] [--positive-from 2]
"""

import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from commands import run_pixelplay, write_split_table
from pixelplay.array_types import Float64Array, IntArray
from pixelplay.data.audit import digest_bytes, find_duplicates
from pixelplay.data.sources import open_dataset
from pixelplay.data.splits import assign_folds, join_groups
from pixelplay.evaluation.intervals import Bootstrap
from pixelplay.evaluation.metrics import LABEL_METRICS, count_labels
from records import Record, difference, make_parser, summarize

N_FOLDS, N_RESAMPLES = 5, 2000
Predicted = dict[str, tuple[int, Float64Array]]  # path → predicted class, probabilities (K,)


def probe_settings(settings: str) -> str:
    """Replace --finetune in the options of pixelplay train; a repeated option is refused."""
    words = re.sub(r"--finetune[ =]\S+", "", settings).split()
    return " ".join([*words, "--finetune none"])


def predict_fold(
    table: Path, images_dir: str, settings: str, classes: tuple[str, ...]
) -> tuple[Predicted, float]:
    """Train on a table; return the predictions of its test split and the time of the command, in s."""
    options = ["--images-dir", images_dir, *shlex.split(settings)]
    with run_pixelplay("train", table, options) as run:
        rows = run.read_table("predictions.csv")
    found = {
        row["path"]: (
            classes.index(row["prediction"]),
            np.array([float(row.get(f"prob_{name}", 0)) for name in classes]),
        )
        for row in rows
    }
    return found, run.seconds


def compare(
    metric: str, predicted: list[IntArray], labels: IntArray, groups: IntArray
) -> list[dict[str, Any]]:
    """Return a metric of each method and, of two, their difference with a 95 % bootstrap interval."""
    measure, n_classes = LABEL_METRICS[metric], int(labels.max()) + 1  # type: ignore[index]
    values = [float(measure(count_labels(each, labels, n_classes))) for each in predicted]
    found = [summarize(value) for value in values]
    if len(values) == 2:
        bootstrap = Bootstrap(n=len(labels), groups=groups, n_resamples=N_RESAMPLES, seed=0)
        differences = np.concatenate(
            [
                measure(count_labels(predicted[0], labels, n_classes, weights))
                - measure(count_labels(predicted[1], labels, n_classes, weights))
                for weights in bootstrap.weights()
            ]
        )
        found.append(difference(values[0] - values[1], *np.quantile(differences, [0.025, 0.975])))
    return found


def main() -> None:
    """Train on every fold with and without fine-tuning and compare."""
    parser = make_parser(__doc__)
    parser.add_argument("data")
    parser.add_argument("--settings", default="--finetune auto --time-budget 5m", help="of pixelplay train")
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(N_FOLDS)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--positive-from", type=int, metavar="K", help="also two classes: K and above are positive"
    )
    parser.add_argument("--no-probe", action="store_true", help="do not train the linear probe")
    args = parser.parse_args()
    dataset = open_dataset(args.data)
    dataset = dataset.select(~dataset.in_split("test") & (dataset.labels >= 0))
    images_dir = args.data if Path(args.data).is_dir() else str(Path(args.data).parent)
    digests = tuple(digest_bytes(dataset.storage.read(path)) for path in dataset.paths)
    groups = join_groups(dataset, find_duplicates(dataset, digests))
    folds = assign_folds(dataset.labels, groups, N_FOLDS, args.seed)
    methods = [args.settings] if args.no_probe else [args.settings, probe_settings(args.settings)]
    predicted = [np.full(len(dataset), -1) for _ in methods]
    probs = [np.zeros((len(dataset), len(dataset.classes))) for _ in methods]
    seconds: list[list[float]] = [[] for _ in methods]
    with tempfile.TemporaryDirectory() as folder:
        for fold in args.folds:
            table, rows = Path(folder) / "fold.csv", folds == fold
            write_split_table(
                table, dataset, {i: "test" if rows[i] else "train" for i in range(len(dataset))}
            )
            for m, settings in enumerate(methods):
                found, took = predict_fold(
                    table, images_dir, f"{settings} --seed {args.seed}", dataset.classes
                )
                seconds[m].append(took)
                for i in np.flatnonzero(rows):
                    predicted[m][i], probs[m][i] = found[dataset.paths[i]]
                accuracy = float((predicted[m][rows] == dataset.labels[rows]).mean())
                print(f"fold {fold}, {settings}: accuracy {accuracy:.4f}, {took:.0f} s", flush=True)
    held_out = predicted[0] >= 0
    labels, groups = dataset.labels[held_out], groups[held_out]
    compared = {
        metric.replace("_", " ").replace("macro f1", "macro-F1"): compare(
            metric, [each[held_out] for each in predicted], labels, groups
        )
        for metric in LABEL_METRICS
    }
    if args.positive_from is not None:
        positive = [(p[held_out, args.positive_from :].sum(axis=1) >= 0.5).astype(np.int64) for p in probs]
        is_positive = (labels >= args.positive_from).astype(np.int64)
        compared["accuracy of two classes"] = compare("accuracy", positive, is_positive, groups)
    record = Record(
        "Accuracy", f"Fine-tuning and linear probe in {N_FOLDS} folds, {args.settings}", args.record
    )
    names = ["fine-tuned", "linear probe", "gain"][: 1 if args.no_probe else 3]
    for m, name in enumerate(names):
        metrics = {metric: values[m] for metric, values in compared.items()}
        shown = ", ".join(f"{metric} {value['mean']:.4f}" for metric, value in metrics.items())
        print(f"{name}: {shown}")
        record.add(
            args.data,
            f"train + val, folds {', '.join(map(str, args.folds))}",
            name,
            metrics,
            seeds=[args.seed],
            seconds=seconds[m] if m < len(methods) else (),
        )
    record.write()


if __name__ == "__main__":
    main()
