"""TrashNet's official split: accuracy, macro-F1 and whole-command time of some settings beside each other.

Learns from train (and val, as the depth has it) and reads the test part once per row. Every run is a fresh
process without cache.

Expected (two CPU cores, bf16): a probe of lite0 0.92 to 0.93 test accuracy and 0.91 to 0.92 macro-F1 in a
minute; tuned within 5 minutes 0.935 to 0.950, within 15 minutes 0.940 to 0.950; the original recipe on lite0
0.93 to 0.94 after more than half an hour.

Usage: python benchmarks/trashnet.py TRASHNET [--seeds 0 1 2]
       --settings "--finetune none" "--finetune auto --time-budget 5m"
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def run_once(data: str, settings: str, seed: int) -> tuple[dict[str, Any], float]:
    """What metrics.json says, and wall-clock seconds, of one cold `pixelplay train`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "pixelplay", "train", data, "--out", str(out), "--quiet"]
        command += ["--seed", str(seed), "--cache-dir", str(Path(folder) / "cache")]
        start = time.perf_counter()
        subprocess.run([*command, *shlex.split(settings)], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        return json.loads((out / "metrics.json").read_text()), seconds


def _sd(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data")
    parser.add_argument(
        "--settings", nargs="+", default=["--finetune none", "--finetune auto --time-budget 5m"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    for settings in args.settings:
        accuracy, macro_f1, seconds = [], [], []
        for seed in args.seeds:
            metrics, took = run_once(args.data, settings, seed)
            accuracy.append(metrics["test"]["accuracy"]["value"])
            macro_f1.append(metrics["test"]["macro_f1"]["value"])
            seconds.append(took)
            shown = f"accuracy {accuracy[-1]:.4f}, macro-F1 {macro_f1[-1]:.4f}, {took:.1f} s"
            print(f"{settings or 'defaults'}, seed {seed}: {metrics['depth']}, {shown}", flush=True)
        figures = [f"{statistics.mean(x):.4f} ± {_sd(x):.4f}" for x in (accuracy, macro_f1)]
        print(
            f"{settings or 'defaults'}: test accuracy {figures[0]}, macro-F1 {figures[1]}, "
            f"whole command {statistics.median(seconds):.1f} s (median of {len(seconds)})",
            flush=True,
        )


if __name__ == "__main__":
    main()
