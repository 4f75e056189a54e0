"""Reads and decodes ahead of the network, in order, in threads.

Threads, not processes: Pillow releases the interpreter lock while it decodes and resizes, and
nothing has to be imported or copied again on systems that spawn their workers.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import TypeVar

from pixelplay.data.crew import Crew, Job
from pixelplay.data.silence import silence_pillow

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_WORKERS = 16


def default_workers() -> int:
    """One thread a core that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores)


def map_ahead(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_workers: int | None = None,
    ahead: int = 64,
    prepare: Callable[[], object] | None = None,
) -> Iterator[Result]:
    """Yield work(item) for each item in order, at most `ahead` of them computed in advance.

    Args:
        work: runs in threads.
        items: taken one by one, as places become free; a generator is closed in the end.
        prepare: what each thread does first.
    """
    pending: deque[Job[Result]] = deque()
    with silence_pillow(), Crew(num_workers or default_workers(), prepare) as crew:
        try:
            for item in items:
                pending.append(crew.give(partial(work, item)))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            crew.forget()  # closing the items may take long
            if isinstance(items, Generator):
                items.close()  # now, and not when the traceback of an error has gone
