"""Reads and decodes ahead of the network, in order, in threads.

Threads, not processes: Pillow releases the interpreter lock while it decodes and resizes, and
nothing has to be imported or copied again on systems that spawn their workers.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pixelplay.data.silence import silence_pillow

T = TypeVar("T")
MAX_WORKERS = 16


def default_workers() -> int:
    """One thread a core that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores)


def map_ahead(
    load: Callable[[int], T], n: int, *, num_workers: int | None = None, ahead: int = 64
) -> Iterator[T]:
    """Yield load(0), load(1), … load(n-1) in order, at most `ahead` of them computed in advance."""
    pending: deque[Future[T]] = deque()
    with silence_pillow(), ThreadPoolExecutor(num_workers or default_workers()) as pool:
        try:
            for i in range(n):
                pending.append(pool.submit(load, i))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
