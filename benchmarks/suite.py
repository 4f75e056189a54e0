"""Ten small, different datasets: linear probe against `--finetune auto`, paired by test image.

Every run is a new process without a cache. Runs that are in the record already are not repeated, so an
interrupted benchmark continues. The difference is that of the mean accuracy over the seeds, with a bootstrap
interval over test images.

Expected (two CPU cores): within 3 minutes no set loses accuracy, and the mean gain is about 2.5 points.

Usage: python benchmarks/suite.py SUITE [--sets flowers17 …] [--seeds 0 1 2] [--budgets 3m]
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from commands import FinishedRun, run_pixelplay
from pixelplay.array_types import Float64Array
from pixelplay.evaluation.conformal import fit_conformal_threshold
from pixelplay.evaluation.intervals import Bootstrap
from pixelplay.model.bundle import read_bundle
from records import Record, difference, make_parser

METRICS = {"accuracy": "accuracy", "balanced accuracy": "balanced_accuracy", "NLL": "log_loss", "ECE": "ece"}
COVERAGE = 0.9  # of the prediction sets
N_RESAMPLES = 2000
Run = dict[str, Any]


def read_run(run: FinishedRun) -> Run:
    """Collect what the tables need; `correct` maps each test image to its result."""
    metrics, test, rows = run.metrics, run.metrics["test"], run.read_table("predictions.csv")
    probs = np.array([float(row[f"prob_{row['label']}"]) for row in rows])
    threshold = fit_conformal_threshold(read_bundle(str(run.folder / "model")).held_out.lac, COVERAGE)
    found = {
        **{name: test[key]["value"] for name, key in METRICS.items()},
        "coverage": float((1 - probs <= threshold).mean()),
    }
    losses = []
    if (run.folder / "history.csv").is_file():
        losses = [float(row["train_loss"] or "nan") for row in run.read_table("history.csv")]
    return {
        "metrics": found,
        "finetune": metrics["finetune"],
        "seconds": run.seconds,
        "train_losses": losses,
        "correct": {row["path"]: row["label"] == row["prediction"] for row in rows},
        "notes": metrics["notes"],
    }


def load_or_run(data: Path, method: Sequence[str], seed: int, folder: Path) -> Run:
    """Train and evaluate on one set, unless an earlier call has; its result stays in `folder`."""
    name = "-".join([data.name, str(seed), *(word.strip("-") for word in method)])
    path = folder / f"{name}.json"
    if not path.is_file():
        options = [*method, "--seed", str(seed)]
        with run_pixelplay("train", data, options) as run:
            path.write_text(json.dumps(read_run(run)), encoding="utf-8")
    content: Run = json.loads(path.read_text(encoding="utf-8"))
    return content


def compare(runs: Sequence[Run], others: Sequence[Run]) -> dict[str, Any]:
    """Return the difference of mean accuracies over seeds, with a 95 % interval over test images."""
    paths = sorted(runs[0]["correct"])
    gains: Float64Array = np.mean(
        [[a["correct"][p] - b["correct"][p] for p in paths] for a, b in zip(runs, others, strict=True)],
        axis=0,
    )
    bootstrap = Bootstrap(n=len(paths), groups=None, n_resamples=N_RESAMPLES, seed=0)
    means = [weights @ gains / weights.sum(1) for weights in bootstrap.weights()]
    return difference(float(gains.mean()), *np.quantile(np.concatenate(means), [0.025, 0.975]))


def main() -> None:
    """Run all sets, seeds and budgets, and record a row for each set and method."""
    parser = make_parser(__doc__)
    parser.add_argument("suite", type=Path, help="folder with one folder per set: NAME/{train,test}/CLASS")
    parser.add_argument("--sets", nargs="+", help="names (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=["3m"])
    parser.add_argument("--results", type=Path, required=True, help="folder for the result of each run")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    names = args.sets or sorted(path.name for path in args.suite.iterdir() if path.is_dir())
    record = Record("Accuracy", "Ten small datasets, their test splits", args.record)
    gains: dict[str, list[float]] = {budget: [] for budget in args.budgets}
    for name in names:
        methods = [["--finetune", "none"], *(["--time-budget", budget] for budget in args.budgets)]
        probes: list[Run] = []
        for method in methods:
            runs = [load_or_run(args.suite / name, method, seed, args.results) for seed in args.seeds]
            values = {key: [run["metrics"][key] for run in runs] for key in runs[0]["metrics"]}
            metrics: dict[str, Any] = dict(values)
            if probes:
                metrics["accuracy gain"] = compare(runs, probes)
                gains[method[1]].append(metrics["accuracy gain"]["mean"])
            else:
                probes = runs
            chosen = ", ".join(run["finetune"] for run in runs)
            seconds = [run["seconds"] for run in runs]
            record.add(name, "test", " ".join(method), metrics, seeds=args.seeds, seconds=seconds)
            shown = ", ".join(f"{key} {statistics.mean(each):.3f}" for key, each in values.items())
            gain = f", gain {metrics['accuracy gain']['mean']:+.3f}" if runs is not probes else ""
            print(
                f"{name}, {' '.join(method)} ({chosen}): {shown}{gain}, {statistics.median(seconds):.0f} s",
                flush=True,
            )
    for budget, each in gains.items():
        print(f"mean gain within {budget}: {statistics.mean(each):+.4f}")
    record.write()


if __name__ == "__main__":
    main()
