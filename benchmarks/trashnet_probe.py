"""TrashNet, frozen backbone: accuracy and whole-command time, lite0 and lite2 beside each other.

Learns from the official train + val parts and reads the test part once per row. Every run is a
fresh process without cache. The split is given, so a seed only moves the folds that choose C and T.

Expected (two CPU cores, bf16): lite0 with mirror view about 0.92 test accuracy and 0.90 macro-F1;
whole command under 110 s with mirror view, under 60 s without.

Usage: python benchmarks/trashnet_probe.py TRASHNET [--backbones lite0 lite2] [--seeds 0 1 2]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run_once(data: str, backbone: str, hflip: bool, seed: int) -> tuple[float, float, float]:
    """Test accuracy, macro-F1 and wall-clock seconds of one cold `pixelplay train`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "pixelplay", "train", data, "--out", str(out), "--quiet"]
        command += ["--tune", "probe", "--backbone", backbone, "--seed", str(seed), "--cache-gb", "0"]
        command += [] if hflip else ["--no-hflip"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        test = json.loads((out / "metrics.json").read_text())["test"]
    return test["accuracy"]["value"], test["macro_f1"]["value"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data")
    parser.add_argument("--backbones", nargs="+", default=["lite0", "lite2"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    print("backbone  mirror  test accuracy      macro-F1           whole command, s (median)")
    for backbone in args.backbones:
        for hflip in (False, True):
            rows = [run_once(args.data, backbone, hflip, seed) for seed in args.seeds]
            accuracy, macro_f1, seconds = zip(*rows, strict=True)
            figures = [f"{statistics.mean(x):.4f} ± {statistics.pstdev(x):.4f}" for x in (accuracy, macro_f1)]
            median_s = statistics.median(seconds)
            mirror = "yes" if hflip else "no"
            print(f"{backbone:8}  {mirror:6}  {'    '.join(figures)}    {median_s:.1f}", flush=True)


if __name__ == "__main__":
    main()
