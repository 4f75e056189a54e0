"""Planted wrong labels on TrashNet: how many of the most suspicious are wrong, beside cleanlab's ranking.

Some labels of train and val are moved to another class at random; the test part plays no part. A probe is
cross-validated on what results, as `pixelplay crossval` does it, and its out-of-fold probabilities are ranked
by PixelPlay, and by cleanlab in a process of its own (it is AGPL: nothing of it comes near the package). As
many are taken as labels were moved, so that precision and recall are the same number. TrashNet has wrong
labels of its own, so that nobody can reach 1.

Expected (5 % moved, 3 seeds): about 0.85 of the most suspicious 5 % were moved, as many as by cleanlab's.

Usage: python benchmarks/suspects.py TRASHNET [--cleanlab-python PATH] [--share 0.05] [--seeds 0 1 2]
where PATH is the Python of an environment of its own: python -m venv ENV && ENV/bin/pip install cleanlab
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sources import scan_source
from pixelplay.evaluation.label_issues import find_label_issues

CLEANLAB = """
import json, sys
import numpy as np
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
kept = np.load(sys.argv[1])
found = {"issues": find_label_issues(kept["labels"], kept["probs"]).tolist()}
for way in ("self_confidence", "normalized_margin"):
    quality = get_label_quality_scores(kept["labels"], kept["probs"], method=way)
    found[way] = quality.argsort(kind="stable").tolist()
print(json.dumps(found))
"""


def move_labels(
    dataset: ImageDataset, share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Labels (N,) of which some are moved to another class, and which those are."""
    rng, n_classes = np.random.default_rng(seed), len(dataset.classes)
    is_moved = np.zeros(len(dataset), dtype=np.bool_)
    is_moved[rng.choice(len(dataset), round(share * len(dataset)), replace=False)] = True
    shift = rng.integers(1, n_classes, len(dataset))
    return np.where(is_moved, (dataset.labels + shift) % n_classes, dataset.labels), is_moved


def cross_validate(
    dataset: ImageDataset, labels: NDArray[np.int64], images_dir: str, cache: Path
) -> NDArray[np.float64]:
    """Out-of-fold probabilities (N, K) of `pixelplay crossval` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "moved.csv"
        with open(table, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label"])
            writer.writerows(
                (path, dataset.classes[k]) for path, k in zip(dataset.paths, labels, strict=True)
            )
        command = [sys.executable, "-m", "pixelplay", "crossval", str(table), "--images-dir", images_dir]
        command += ["--out", f"{folder}/run", "--finetune", "none", "--quiet", "--cache-dir", str(cache)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(f"{folder}/run/oof.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == list(dataset.paths)
    return np.array([[float(row[f"prob_{name}"]) for name in dataset.classes] for row in rows])


def ask_cleanlab(python: str, probs: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, list[int]]:
    """Its orders of all images, and a mask of what it calls issues."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/probs.npz", probs=probs / probs.sum(axis=1, keepdims=True), labels=labels)
        done = subprocess.run(
            [python, "-W", "ignore", "-c", CLEANLAB, f"{folder}/probs.npz"],
            check=True,
            capture_output=True,
            text=True,
        )
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data")
    parser.add_argument("--cleanlab-python")
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    dataset = scan_source(args.data)
    dataset = dataset.select((dataset.labels >= 0) & ~dataset.in_split("test"))
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for seed in args.seeds:
            labels, is_moved = move_labels(dataset, args.share, seed)
            probs = cross_validate(dataset, labels, args.data, Path(cache))
            label_scores, _, is_issue = find_label_issues(probs, labels)
            n = int(is_moved.sum())
            orders = {"PixelPlay": np.argsort(label_scores, kind="stable")}
            masks = {"PixelPlay": is_issue}
            if args.cleanlab_python:
                theirs = ask_cleanlab(args.cleanlab_python, probs, labels)
                masks["cleanlab"] = np.array(theirs.pop("issues"), dtype=np.bool_)
                orders |= {f"cleanlab, {way}": np.array(order) for way, order in theirs.items()}
            for name, order in orders.items():
                found.setdefault(f"{name}: moved among the first {n}", []).append(is_moved[order[:n]].mean())
            for name, mask in masks.items():
                found.setdefault(f"{name}: precision of what is listed", []).append(is_moved[mask].mean())
                found.setdefault(f"{name}: recall of what is listed", []).append(mask[is_moved].mean())
    for name, values in found.items():
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name}: {statistics.mean(values):.4f} ± {sd:.4f} ({len(values)} seeds)")


if __name__ == "__main__":
    main()
