"""The five-fold ensemble of partially tuned models beside one such model, on TrashNet's test part.

Both learn from train and val: `pixelplay crossval` five times with a fifth held out, `pixelplay train` once
with the given val part held out until it has chosen. Each training has the same time budget, so that the
ensemble takes some five times as long. The time of an answer is that of `Predictor.predict` over the test
part, decoding included, after a first pass.

Expected (5m): the ensemble is right as often or a little more, its log-loss is lower by a tenth or more, and
an answer takes it about twice as long, for all five share the frozen front.

Usage: python benchmarks/ensemble.py TRASHNET [--time-budget 5m] [--seeds 0] [--repeats 3]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pixelplay import Predictor
from pixelplay.data.sources import scan_source


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one deployed model is worth."""

    accuracy: float
    log_loss: float
    learned_s: float
    answer_ms: float


def measure(command: list[str], data: str, folder: Path, args: argparse.Namespace, seed: int) -> Measured:
    """Learn in a process of its own, then answer for the test part in this one."""
    run = folder / command[0]
    line = [sys.executable, "-m", "pixelplay", *command, data, "--out", str(run), "--finetune", "partial"]
    line += ["--time-budget", args.time_budget, "--seed", str(seed), "--cache-dir", str(folder / "cache")]
    start = time.perf_counter()
    subprocess.run([*line, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    learned_s = time.perf_counter() - start
    test = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["test"]
    dataset = scan_source(data)
    dataset = dataset.select(dataset.in_split("test"))
    predictor, times = Predictor(run), []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        predictor.predict(dataset)
        times.append(time.perf_counter() - start)
    return Measured(
        accuracy=test["accuracy"]["value"],
        log_loss=test["log_loss"]["value"],
        learned_s=learned_s,
        answer_ms=1000 * statistics.median(times[1:]) / len(dataset),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", help="images with train, val and test parts")
    parser.add_argument("--time-budget", default="5m", help="of each training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print("| seed | deployed | test accuracy | log-loss | learned in, s | an answer, ms |")
    print("|---|---|---|---|---|---|")
    for seed in args.seeds:
        for command, name in ((["train"], "one model"), (["crossval", "--n-folds", "5"], "five folds")):
            with tempfile.TemporaryDirectory() as folder:
                found = measure(command, args.data, Path(folder), args, seed)
            print(
                f"| {seed} | {name} | {found.accuracy:.4f} | {found.log_loss:.4f} | {found.learned_s:.0f} "
                f"| {found.answer_ms:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
