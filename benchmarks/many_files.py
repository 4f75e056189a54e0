"""Start-up time, and time and peak memory of `pixelplay scan --names-only` on 200,000 small files.

Expected on two cores: --help and import within 0.5 s; the scan within 30 s and 500 MB.

Usage: python benchmarks/many_files.py [--n 200000] [--repeats 5]
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from records import Record, make_parser


def time_process(command: list[str]) -> float:
    """Return the wall-clock time of one process, in s."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Time start-up and a scan."""
    parser = make_parser(__doc__)
    parser.add_argument("--n", type=int, default=200_000, help="files to write and scan [200,000]")
    parser.add_argument("--repeats", type=int, default=5, help="of the start-up")
    args = parser.parse_args()
    record = Record("Speed", "Start-up and large folders", args.record)
    program = [sys.executable, "-m", "pixelplay"]
    for name, command in {
        "pixelplay --help": [*program, "--help"],
        "import pixelplay": [sys.executable, "-c", "import pixelplay"],
    }.items():
        times = [time_process(command) for _ in range(args.repeats)]
        print(f"{name}: {statistics.median(times):.2f} s")
        record.add("–", "", name, {"s": times})
    with tempfile.TemporaryDirectory() as folder:
        for k in range(20):
            os.mkdir(f"{folder}/class{k}")
        for i in range(args.n):
            with open(f"{folder}/class{i % 20}/photo{i}.jpg", "wb") as file:
                file.write(b"\xff\xd8\xff" + i.to_bytes(8, "big") * (1 + i % 7))
        scan_s = time_process([*program, "scan", folder, "--names-only", "--quiet"])
    peak_mb = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
    print(f"scan --names-only of {args.n:,} files: {scan_s:.1f} s, {peak_mb} MB")
    metrics = {"s": scan_s, "peak memory, MB": peak_mb}
    record.add(f"{args.n:,} files", "", "pixelplay scan --names-only", metrics)
    record.write()


if __name__ == "__main__":
    main()
