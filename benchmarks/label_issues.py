"""Planted label errors on TrashNet: how many of them the label issues contain, compared with cleanlab.

Some labels of train and val are moved to another class at random; the test split is not used. `pixelplay
crossval` with a linear probe gives out-of-fold probabilities, which PixelPlay ranks, and cleanlab in a
separate environment (it is AGPL and not a dependency). From the top of each ranking as many images are
used as labels were moved, so precision and recall are equal. TrashNet has label errors of its own, so 1
cannot be reached.

Expected (5 % moved, 3 seeds): about 0.85 of the first 5 % were moved, the same as with cleanlab.

Usage: python benchmarks/label_issues.py TRASHNET [--cleanlab-python PATH] [--frac 0.05] [--seeds 0 1 2]
PATH is the Python of another environment: python -m venv ENV && ENV/bin/pip install cleanlab
"""

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from commands import run_pixelplay, write_table
from pixelplay.array_types import BoolArray, Float64Array, IntArray
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sources import open_dataset
from pixelplay.evaluation.label_issues import find_label_issues
from records import Record, make_parser, summarize

CLEANLAB = """
import json, sys
import numpy as np
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
data = np.load(sys.argv[1])
found = {"issues": find_label_issues(data["labels"], data["probs"]).tolist()}
for method in ("self_confidence", "normalized_margin"):
    quality = get_label_quality_scores(data["labels"], data["probs"], method=method)
    found[method] = quality.argsort(kind="stable").tolist()
print(json.dumps(found))
"""


def move_labels(dataset: ImageDataset, frac: float, seed: int) -> tuple[IntArray, BoolArray]:
    """Move some labels to another class; return the labels (N,) and which were moved (N,)."""
    rng, n_classes = np.random.default_rng(seed), len(dataset.classes)
    is_moved = np.zeros(len(dataset), dtype=np.bool_)
    is_moved[rng.choice(len(dataset), round(frac * len(dataset)), replace=False)] = True
    shift = rng.integers(1, n_classes, len(dataset))
    return np.where(is_moved, (dataset.labels + shift) % n_classes, dataset.labels), is_moved


def cross_validate(dataset: ImageDataset, labels: IntArray, images_dir: str, cache: str) -> Float64Array:
    """Return the out-of-fold probabilities (N, K) of `pixelplay crossval`."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "moved.csv"
        names = [dataset.classes[k] for k in labels]
        write_table(table, ("path", "label"), zip(dataset.paths, names, strict=True))
        options = ["--images-dir", images_dir, "--finetune", "none"]
        with run_pixelplay("crossval", table, options, cache_dir=cache) as run:
            rows = run.read_table("oof.csv")
    assert [row["path"] for row in rows] == list(dataset.paths)
    return np.array([[float(row[f"prob_{name}"]) for name in dataset.classes] for row in rows])


def run_cleanlab(python: str, probs: Float64Array, labels: IntArray) -> dict[str, list[int]]:
    """Return cleanlab's rankings of all images and its mask of issues."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/probs.npz", probs=probs / probs.sum(axis=1, keepdims=True), labels=labels)
        command = [python, "-W", "ignore", "-c", CLEANLAB, f"{folder}/probs.npz"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Plant label errors with each seed and measure how many are found."""
    parser = make_parser(__doc__)
    parser.add_argument("data")
    parser.add_argument("--cleanlab-python", metavar="PATH")
    parser.add_argument("--frac", type=float, default=0.05, help="labels to move, 0–1 [0.05]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    dataset = open_dataset(args.data)
    dataset = dataset.select((dataset.labels >= 0) & ~dataset.in_split("test"))
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for seed in args.seeds:
            labels, is_moved = move_labels(dataset, args.frac, seed)
            probs = cross_validate(dataset, labels, args.data, cache)
            scores, _, is_issue = find_label_issues(probs, labels)
            rankings, masks = {"PixelPlay": np.argsort(scores, kind="stable")}, {"PixelPlay": is_issue}
            if args.cleanlab_python:
                other = run_cleanlab(args.cleanlab_python, probs, labels)
                masks["cleanlab"] = np.array(other.pop("issues"), dtype=np.bool_)
                rankings |= {f"cleanlab, {method}": np.array(order) for method, order in other.items()}
            first = int(is_moved.sum())
            for name, order in rankings.items():
                moved = found.setdefault(name, {}).setdefault("moved among as many of the first", [])
                moved.append(float(is_moved[order[:first]].mean()))
            for name, mask in masks.items():
                metrics = found.setdefault(name, {})
                metrics.setdefault("precision of the list", []).append(float(is_moved[mask].mean()))
                metrics.setdefault("recall of the list", []).append(float(mask[is_moved].mean()))
    title = f"Planted label errors, {args.frac:.0%} of the labels"
    record = Record("Label issues and near-duplicates", title, args.record)
    for name, metrics in found.items():
        shown = ", ".join(f"{metric} {summarize(values)['mean']:.4f}" for metric, values in metrics.items())
        print(f"{name}: {shown}")
        record.add(args.data, "train + val", name, metrics, seeds=args.seeds)
    record.write()


if __name__ == "__main__":
    main()
