"""Five-fold ensemble of partially fine-tuned models relative to one such model, on the predefined test split.

Both are trained on train and val: `pixelplay crossval` holds out one fifth for each model, `pixelplay
train` holds out the predefined val split until it has selected a model. Every training has the same time
budget, so the ensemble takes about five times as long. Prediction time is that of `Predictor.predict` on
the test split, decoding included, after a first pass.

Expected (5m): accuracy equal or slightly higher, log-loss lower by a tenth or more, and about twice the
prediction time, because the five models share the frozen stages.

Usage: python benchmarks/ensemble.py TRASHNET [--time-budget 5m] [--seeds 0] [--repeats 3]
"""

import statistics
import time
from pathlib import Path

from commands import run_pixelplay
from pixelplay import Predictor
from pixelplay.data.sources import open_dataset
from records import Record, make_parser

METHODS = {"one model": ("train", []), "ensemble of five folds": ("crossval", ["--n-folds", "5"])}


def time_predictions(run: Path, data: str, repeats: int) -> float:
    """Return the median time to predict one image of the test split, in ms."""
    dataset = open_dataset(data)
    dataset = dataset.select(dataset.in_split("test"))
    predictor, times = Predictor(run), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        predictor.predict(dataset)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:]) / len(dataset)


def main() -> None:
    """Train and measure both models for each seed."""
    parser = make_parser(__doc__)
    parser.add_argument("data", help="images with train, val and test splits")
    parser.add_argument("--time-budget", default="5m", help="of each training [5m]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--repeats", type=int, default=3, help="timed passes over the test split [3]")
    args = parser.parse_args()
    title = f"Fold ensemble and single model, partial fine-tuning, {args.time_budget} for each training"
    record = Record("Accuracy", title, args.record)
    for name, (command, extra) in METHODS.items():
        values: dict[str, list[float]] = {"accuracy": [], "log-loss": [], "prediction, ms/image": []}
        seconds = []
        for seed in args.seeds:
            options = [
                "--finetune",
                "partial",
                "--time-budget",
                args.time_budget,
                "--seed",
                str(seed),
                *extra,
            ]
            with run_pixelplay(command, args.data, options) as run:
                test = run.metrics["test"]
                measured = [test[metric]["value"] for metric in ("accuracy", "log_loss")]
                measured.append(time_predictions(run.folder, args.data, args.repeats))
            seconds.append(run.seconds)
            for numbers, value in zip(values.values(), measured, strict=True):
                numbers.append(value)
            shown = ", ".join(f"{metric} {numbers[-1]:.4f}" for metric, numbers in values.items())
            print(f"seed {seed}, {name}: {shown}, trained in {run.seconds:.0f} s", flush=True)
        record.add(args.data, "test", name, values, seeds=args.seeds, seconds=seconds)
    record.write()


if __name__ == "__main__":
    main()
