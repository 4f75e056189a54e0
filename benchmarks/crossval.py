"""Time of a cross-validation of linear probes, relative to one linear probe; both are whole cold commands.

Expected (two CPU cores): five folds take 1.2 to 1.5 times as long as one probe, because each image passes
through the backbone once in both. oof.csv has one row for each image of train and val except duplicates
of test images.

Usage: python benchmarks/crossval.py TRASHNET [--repeats 3] [--n-folds 5]
"""

import statistics

from commands import run_pixelplay
from records import Record, make_parser


def main() -> None:
    """Time both commands in turn."""
    parser = make_parser(__doc__)
    parser.add_argument("data")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-folds", type=int, default=5)
    args = parser.parse_args()
    commands = {"train": [], "crossval": ["--n-folds", str(args.n_folds)]}
    seconds: dict[str, list[float]] = {command: [] for command in commands}
    accuracy = {}
    for _ in range(args.repeats):
        for command, options in commands.items():
            with run_pixelplay(command, args.data, ["--finetune", "none", *options]) as run:
                seconds[command].append(run.seconds)
                headline = run.metrics["headline"]
                n_rows = sum(row["status"] == "ok" for row in run.read_table("oof.csv"))
            accuracy[command] = headline["value"]
            print(
                f"{command}: {run.seconds:.1f} s, {headline['measured_on']} accuracy "
                f"{headline['value']:.4f}, {n_rows} rows in oof.csv",
                flush=True,
            )
    ratios = [b / a for a, b in zip(seconds["train"], seconds["crossval"], strict=True)]
    print(
        f"{args.n_folds} folds take {statistics.median(ratios):.2f} times as long as one probe "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )
    record = Record("Speed", "Cross-validation of linear probes relative to one probe", args.record)
    record.add(args.data, "test", "one probe", {"accuracy": accuracy["train"]}, seconds=seconds["train"])
    record.add(
        args.data,
        "train + val, out of fold",
        f"{args.n_folds} folds",
        {"accuracy": accuracy["crossval"], "time relative to one probe": ratios},
        seconds=seconds["crossval"],
    )
    record.write()


if __name__ == "__main__":
    main()
