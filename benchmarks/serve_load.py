"""Load on `pixelplay serve`: throughput, latency, errors and memory, with and without batching.

Each client sends one image after the other on its own connection. Every answer is compared with the row of
`Predictor` for the same image. Without batching, the network processes one image at a time.

Expected on two cores: no error, no wrong row, flat memory, and at least twice the throughput with batching.

Usage: python benchmarks/serve_load.py RUN IMAGES [--seconds 60] [--clients 64]
"""

import asyncio
import itertools
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from pixelplay.config import ComputeConfig, DataConfig
from pixelplay.data.sources import list_images
from pixelplay.inference.predictor import Predictor
from records import Record, make_parser

WARM_UP_S = 3.0


@dataclass
class Load:
    """What the clients saw."""

    seconds: list[float] = field(default_factory=list)  # of each answer
    n_errors: int = 0
    n_wrong: int = 0


def main() -> None:
    """Put the same load on a server with and without batching."""
    parser = make_parser(__doc__)
    parser.add_argument("run")
    parser.add_argument("images")
    parser.add_argument("--seconds", type=float, default=60, help="of load for each server [60]")
    parser.add_argument("--clients", type=int, default=64, help="connections at once [64]")
    parser.add_argument("--n", type=int, default=200, help="different images [200]")
    args = parser.parse_args()
    dataset = list_images(args.images, DataConfig())
    contents = [dataset.storage.read(path) for path in dataset.paths[: args.n]]
    record = Record("Speed", f"HTTP service under load from {args.clients} clients", args.record)
    for method, batch_size in (("batching", None), ("without batching", 1)):
        expected = Predictor(args.run, ComputeConfig(batch_size=batch_size)).predict(contents).prediction
        options = [] if batch_size is None else ["--batch-size", str(batch_size)]
        with serve(args.run, options) as (url, pid):
            asyncio.run(put_load(url, contents, expected, args.clients, WARM_UP_S))
            before = resident_mb(pid)
            load = asyncio.run(put_load(url, contents, expected, args.clients, args.seconds))
            growth = resident_mb(pid) - before
        metrics = summarize_load(load, args.seconds, growth)
        print(method, metrics)
        record.add(args.images, f"{len(contents)} images", method, metrics, seconds=args.seconds)
    record.write()


def summarize_load(load: Load, seconds: float, growth_mb: float) -> dict[str, float]:
    """Return the metrics of one row."""
    percentiles = statistics.quantiles(load.seconds, n=100)
    return {
        "img/s": len(load.seconds) / seconds,
        "p50 ms": 1000 * percentiles[49],
        "p99 ms": 1000 * percentiles[98],
        "errors": load.n_errors,
        "wrong rows": load.n_wrong,
        "memory growth MB": growth_mb,
    }


@contextmanager
def serve(run: str, options: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Start a server on a free port; yield its address and process id."""
    command = [sys.executable, "-m", "pixelplay", "serve", run, "--port", "0", "--quiet", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start")
        yield found[0], process.pid
        process.terminate()


async def put_load(
    url: str, contents: Sequence[bytes], expected: Sequence[str | None], n_clients: int, seconds: float
) -> Load:
    """Send images from all clients until the time is over."""
    load, numbers, end = Load(), itertools.count(), time.monotonic() + seconds
    limits = httpx2.Limits(max_connections=n_clients)
    async with httpx2.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def work() -> None:
            while time.monotonic() < end:
                i = next(numbers) % len(contents)
                start = time.monotonic()
                headers = {"content-type": "application/octet-stream"}
                answer = await client.post("/v1/predict", content=contents[i], headers=headers)
                load.seconds.append(time.monotonic() - start)
                if answer.status_code != 200:
                    load.n_errors += 1
                elif answer.json()["predictions"][0]["prediction"] != expected[i]:
                    load.n_wrong += 1

        await asyncio.gather(*(work() for _ in range(n_clients)))
    return load


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process on Linux, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
