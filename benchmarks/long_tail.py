"""Rare classes: TrashNet cut to 100:1, with each way of helping them, on five subsets.

Train + val is cut so that class sizes fall exponentially from the largest, less a fifth, to a hundredth of
that. What is cut away measures: some 1,450 images, a fifth at least of every class. The test part of
TrashNet is not read. Differences are paired by subset; the interval is Student's.

Expected: balanced accuracy of `auto` 1 to 2 points above `sampler`.

Usage: python benchmarks/long_tail.py TRASHNET [--settings "--finetune none"] [--subsets 5]
"""

import argparse
import csv
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sources import scan_source

WAYS = ("none", "sampler", "auto")
RATIO = 100


def write_subset(dataset: ImageDataset, seed: int, path: Path) -> list[int]:
    """Write one long-tailed table with its test part; returns the class sizes in training."""
    rng = np.random.default_rng(seed)
    counts = dataset.class_counts()
    order = np.argsort(-counts, kind="stable")
    largest = int(0.8 * counts[order[0]])
    rows, sizes = [], []
    for place, k in enumerate(order):
        members = rng.permutation(np.flatnonzero(dataset.labels == k))
        n_train = max(1, round(largest * RATIO ** (-place / (len(order) - 1))))
        sizes.append(min(n_train, round(0.8 * len(members))))
        rows += [(i, "train" if n < sizes[-1] else "test") for n, i in enumerate(members)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "part"])
        writer.writerows(
            (dataset.paths[i], dataset.classes[dataset.labels[i]], part) for i, part in sorted(rows)
        )
    return sizes


def measure(table: Path, images_dir: str, way: str, settings: str, seed: int) -> float:
    """Balanced accuracy of one whole command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pixelplay", "train", str(table), "--images-dir", images_dir]
        command += ["--out", f"{folder}/run", "--quiet", "--metric", "balanced_accuracy"]
        command += ["--imbalance", way, "--seed", str(seed), *shlex.split(settings)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        metrics = json.loads(Path(f"{folder}/run/metrics.json").read_text())
    return float(metrics["test"]["balanced_accuracy"]["value"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data")
    parser.add_argument("--settings", default="--finetune none")
    parser.add_argument("--subsets", type=int, default=5)
    args = parser.parse_args()
    dataset = scan_source(args.data)
    dataset = dataset.select(~dataset.in_split("test"))
    values: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.subsets):
            table = Path(folder) / "subset.csv"
            sizes = write_subset(dataset, seed, table)
            for way in WAYS:
                values[way].append(measure(table, args.data, way, args.settings, seed))
            shown = ", ".join(f"{way} {values[way][-1]:.4f}" for way in WAYS)
            print(f"subset {seed} {sizes}: {shown}", flush=True)
    for way in WAYS:
        print(f"{way}: balanced accuracy {np.mean(values[way]):.4f} ± {np.std(values[way], ddof=1):.4f}")
    for other in ("sampler", "none"):
        difference = np.array(values["auto"]) - np.array(values[other])
        half = student.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / np.sqrt(len(difference))
        mean = difference.mean()
        print(f"auto - {other}: {mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})")


if __name__ == "__main__":
    main()
