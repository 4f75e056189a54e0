"""TrashNet's official split: accuracy, macro-F1 and time of whole commands with some settings.

Trains on train, and on val after a model has been selected; the test split is read once by each run.
Every run is a new process without a cache.

Expected (two CPU cores, bf16): linear probe of lite0, 0.92 to 0.93 accuracy and 0.91 to 0.92 macro-F1 in
a minute; fine-tuned within 5 minutes 0.935 to 0.950, within 15 minutes 0.940 to 0.950; the original
recipe on lite0 0.93 to 0.94 after more than half an hour.

Usage: python benchmarks/trashnet.py TRASHNET [--seeds 0 1 2]
       --settings "--finetune none" "--finetune auto --time-budget 5m"
"""

import shlex
import statistics

from commands import run_pixelplay
from records import Record, make_parser


def main() -> None:
    """Train and evaluate with each setting and seed."""
    parser = make_parser(__doc__)
    parser.add_argument("data")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["--finetune none", "--finetune auto --time-budget 5m"],
        help="options of pixelplay train, one string for each method",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    record = Record("Accuracy", "TrashNet, official test split", args.record)
    for settings in args.settings:
        metrics: dict[str, list[float]] = {"accuracy": [], "macro_f1": []}
        seconds = []
        for seed in args.seeds:
            options = ["--seed", str(seed), *shlex.split(settings)]
            with run_pixelplay("train", args.data, options) as run:
                content = run.metrics
            seconds.append(run.seconds)
            for name, values in metrics.items():
                values.append(content["test"][name]["value"])
            shown = ", ".join(f"{name} {values[-1]:.4f}" for name, values in metrics.items())
            print(f"{settings}, seed {seed}: {content['finetune']}, {shown}, {run.seconds:.1f} s", flush=True)
        means = ", ".join(f"{name} {statistics.mean(values):.4f}" for name, values in metrics.items())
        print(f"{settings}: mean {means}, median {statistics.median(seconds):.1f} s", flush=True)
        named = {"accuracy": metrics["accuracy"], "macro-F1": metrics["macro_f1"]}
        record.add(args.data, "official test", settings, named, seeds=args.seeds, seconds=seconds)
    record.write()


if __name__ == "__main__":
    main()
