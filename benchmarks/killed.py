"""Killed is not lost: runs killed at random instants, twice each, end with the weights of one left alone.

A small set of drawn images or the first images of each class of DATA; every run is a whole command
in its own process, killed with SIGKILL after a random part of the time that the undisturbed run took, then
continued with --resume. The model's files are compared byte for byte.

Expected: all of them equal, and nothing left beside the run.

Usage: python benchmarks/killed.py DATA [--runs 10] [--per-class 20]
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pixelplay.data.sources import scan_source

# from chance: no epoch is then as good as the probe, which would be taken instead of so short a tuning
FROM_CHANCE = ["--head-init", "random", "--ensemble-probe", "off"]
DEPTHS = {
    "probe": ["--finetune", "none"],
    "partial": ["--finetune", "partial", *FROM_CHANCE],
    "full": ["--finetune", "full", *FROM_CHANCE],
}


def content_of(run: Path) -> dict[str, bytes]:
    """The files of a model."""
    return {path.name: path.read_bytes() for path in sorted((run / "model").iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--depths", nargs="+", default=list(DEPTHS))
    args = parser.parse_args()
    rng = random.Random(0)
    dataset = scan_source(args.data)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        with open(table, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label"])
            for k, name in enumerate(dataset.classes):
                for i in np.flatnonzero(dataset.labels == k)[: args.per_class]:
                    writer.writerow([dataset.paths[i], name])
        for method in args.finetune:
            command = [sys.executable, "-m", "pixelplay", "train", str(table), "--images-dir", args.data]
            command += [*DEPTHS[method], "--quiet", "--cache-dir", f"{folder}/cache"]
            command += [] if method == "probe" else ["--epochs", str(args.epochs)]
            alone = Path(folder) / f"{method}-alone"
            subprocess.run([*command, "--out", str(alone)], check=True, stdout=subprocess.DEVNULL)
            start = time.perf_counter()
            subprocess.run([*command, "--out", str(alone), "--force"], check=True, stdout=subprocess.DEVNULL)
            usual_s = time.perf_counter() - start
            n_equal, n_killed = 0, 0
            for n in range(args.runs):
                out = Path(folder) / f"{method}-{n}"
                for _ in range(2):
                    process = subprocess.Popen(
                        [*command, "--out", str(out), "--resume"],
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                    time.sleep(rng.uniform(0, usual_s))
                    n_killed += process.poll() is None
                    process.kill()
                    process.wait()
                if not out.exists():
                    subprocess.run(
                        [*command, "--out", str(out), "--resume"], check=True, stdout=subprocess.DEVNULL
                    )
                left = [path.name for path in Path(folder).iterdir() if path.name.startswith(f"{out.name}.")]
                n_equal += content_of(out) == content_of(alone) and not left
            print(
                f"{method}: {n_equal} of {args.runs} equal, {n_killed} kills, {usual_s:.0f} s undisturbed",
                flush=True,
            )


if __name__ == "__main__":
    main()
