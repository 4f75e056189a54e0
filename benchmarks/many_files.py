"""Start-up time, and `scan --names-only` on 200,000 small files: seconds and peak memory.

Expected on two cores: help and import within 0.5 s; the scan within 30 s and 500 MB.

Usage: python benchmarks/many_files.py [--n 200000] [--repeats 5]
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time


def seconds(command: list[str]) -> float:
    """Wall-clock seconds of one whole process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    program = [sys.executable, "-m", "pixelplay"]
    for name, command in {
        "pixelplay --help": [*program, "--help"],
        "import pixelplay": [sys.executable, "-c", "import pixelplay"],
    }.items():
        print(f"{name}: {statistics.median(seconds(command) for _ in range(args.repeats)):.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        for k in range(20):
            os.mkdir(f"{folder}/class{k}")
        for i in range(args.n):
            with open(f"{folder}/class{i % 20}/photo{i}.jpg", "wb") as file:
                file.write(b"\xff\xd8\xff" + i.to_bytes(8, "big") * (1 + i % 7))
        took = seconds([*program, "scan", folder, "--names-only", "--quiet"])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"scan --names-only of {args.n:,} files: {took:.1f} s, {peak:.0f} MB")


if __name__ == "__main__":
    main()
