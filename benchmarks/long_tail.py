"""Class imbalance: TrashNet cut to 100 : 1, with each method of --imbalance, on several random subsets.

Train and val are cut so that class sizes fall exponentially from 80 % of the largest class to a hundredth
of that. The images cut away, some 1,450 and at least a fifth of every class, are the test split;
TrashNet's own test split is not used. Differences are paired by subset; intervals are Student's t, 95 %.

Expected: balanced accuracy of `auto` 1 to 2 points above `sampler`.

Usage: python benchmarks/long_tail.py TRASHNET [--settings "--finetune none"] [--subsets 5]
"""

import shlex
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from commands import run_pixelplay, write_split_table
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sources import open_dataset
from records import Record, difference, make_parser

METHODS = ("none", "sampler", "auto")
RATIO = 100


def write_subset(dataset: ImageDataset, seed: int, path: Path) -> list[int]:
    """Write one long-tailed table with its test split; return the class sizes in training."""
    rng = np.random.default_rng(seed)
    counts = dataset.class_counts()
    order = np.argsort(-counts, kind="stable")
    largest = int(0.8 * counts[order[0]])
    splits: dict[int, str] = {}
    sizes = []
    for place, k in enumerate(order):
        members = rng.permutation(np.flatnonzero(dataset.labels == k))
        n_train = max(1, round(largest * RATIO ** (-place / (len(order) - 1))))
        sizes.append(min(n_train, round(0.8 * len(members))))
        splits |= {int(i): "train" if n < sizes[-1] else "test" for n, i in enumerate(members)}
    write_split_table(path, dataset, splits)
    return sizes


def main() -> None:
    """Train with each method on each subset and compare."""
    parser = make_parser(__doc__)
    parser.add_argument("data")
    parser.add_argument("--settings", default="--finetune none", help="options of pixelplay train")
    parser.add_argument("--subsets", type=int, default=5)
    args = parser.parse_args()
    dataset = open_dataset(args.data)
    dataset = dataset.select(~dataset.in_split("test"))
    values: dict[str, list[float]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.subsets):
            table = Path(folder) / "subset.csv"
            sizes = write_subset(dataset, seed, table)
            for method in METHODS:
                options = ["--images-dir", args.data, "--metric", "balanced_accuracy", "--imbalance", method]
                options += ["--seed", str(seed), *shlex.split(args.settings)]
                with run_pixelplay("train", table, options, cache_dir=f"{folder}/cache") as run:
                    values[method].append(float(run.metrics["test"]["balanced_accuracy"]["value"]))
            shown = ", ".join(f"{method} {values[method][-1]:.4f}" for method in METHODS)
            print(f"subset {seed} {sizes}: {shown}", flush=True)
    record = Record("Class imbalance", f"TrashNet cut to {RATIO} : 1, {args.settings}", args.record)
    for method in METHODS:
        accuracy = {"balanced accuracy": values[method]}
        print(f"{method}: {np.mean(values[method]):.4f} ± {np.std(values[method], ddof=1):.4f}")
        record.add(args.data, "images cut away", f"--imbalance {method}", accuracy, seeds=range(args.subsets))
    for other in ("sampler", "none"):
        gains = np.array(values["auto"]) - np.array(values[other])
        half = student.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
        mean = gains.mean()
        print(f"auto − {other}: {mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})")
        gain = {"balanced accuracy": difference(mean, mean - half, mean + half)}
        record.add(args.data, "images cut away", f"auto − {other}", gain)
    record.write()


if __name__ == "__main__":
    main()
