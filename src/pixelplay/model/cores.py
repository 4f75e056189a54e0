"""Work that runs a network, on a CPU side by side on its cores instead of on all of them together."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from pixelplay.thread_pool import map_ahead

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def cores_to_share() -> Iterator[int]:
    """Give the number of cores that torch may use, to be shared out among threads.

    A thread takes its part with `torch.set_num_threads`, which also says what threads that start later have,
    anywhere in the process. So the first job that enters notes the number and the last that leaves restores
    it, however the jobs overlap.
    """
    with _CORES.lock:
        if not _CORES.n_jobs:
            _CORES.n_usual = torch.get_num_threads()
        _CORES.n_jobs += 1
    try:
        yield _CORES.n_usual
    finally:
        with _CORES.lock:
            _CORES.n_jobs -= 1
            if not _CORES.n_jobs:
                torch.set_num_threads(_CORES.n_usual)


class _Cores:
    """How many jobs share the cores out, and how many there are."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.n_jobs = 0
        self.n_usual = 1


_CORES = _Cores()


def on_every_core(work: Callable[[Item], Result], items: Iterable[Item], device: str) -> Iterator[Result]:
    """Yield what the network makes of each item, in order; on a CPU each core takes an item of its own.

    Cores that share every layer wait for each other after every layer, and all of them for one that also
    decodes a photograph: together they take 1.4 times as long (benchmarks/LOG.md). What a core makes of an
    item does not depend on how many cores there are.

    Args:
        work: runs a network; on a CPU in threads.
    """
    if device != "cpu":
        yield from map(work, items)
        return
    with cores_to_share() as n_cores:
        yield from map_ahead(
            work, items, num_workers=n_cores, ahead=n_cores, prepare=lambda: torch.set_num_threads(1)
        )
