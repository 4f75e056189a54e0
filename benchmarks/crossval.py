"""A cross-validation of probes beside one probe: the time of both whole commands, and what the table holds.

The test part that TrashNet gives takes no part in either, and is read once by each run.

Expected (two CPU cores): five folds take 1.2 to 1.5 times as long as one probe, for the backbone sees every
image once in both; the table has one row for each image of train and val, and a figure for all of
them but copies of test images.

Usage: python benchmarks/crossval.py TRASHNET [--repeats 3] [--n-folds 5]
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def run_once(data: str, command: str, options: list[str]) -> tuple[float, dict[str, Any], int]:
    """Seconds of one cold command, its metrics.json, and the rows of its table."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "pixelplay", command, data, "--out", f"{folder}/run", "--quiet"]
        words += ["--finetune", "none", "--cache-dir", f"{folder}/cache", *options]
        start = time.perf_counter()
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        with open(f"{folder}/run/oof.csv", newline="", encoding="utf-8") as file:
            n_rows = sum(row["status"] == "ok" for row in csv.DictReader(file))
        return seconds, json.loads(Path(f"{folder}/run/metrics.json").read_text()), n_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-folds", type=int, default=5)
    args = parser.parse_args()
    took: dict[str, list[float]] = {"train": [], "crossval": []}
    for _ in range(args.repeats):
        for command, options in (("train", []), ("crossval", ["--n-folds", str(args.n_folds)])):
            seconds, metrics, n_rows = run_once(args.data, command, options)
            took[command].append(seconds)
            headline = metrics["headline"]
            shown = f"{headline['measured_on']} accuracy {headline['value']:.4f}, {n_rows} rows out of fold"
            print(f"{command}: {seconds:.1f} s, {shown}", flush=True)
    medians = {command: statistics.median(values) for command, values in took.items()}
    ratios = sorted(b / a for a, b in zip(took["train"], took["crossval"], strict=True))
    print(
        f"one probe {medians['train']:.1f} s, {args.n_folds} folds {medians['crossval']:.1f} s: "
        f"{statistics.median(ratios):.2f} times as long ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
