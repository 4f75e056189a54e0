"""Threads that do jobs, and that an interrupt does not leave waiting for each other."""

import _thread
import atexit
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from pixelplay.data.decode import silence_pillow

Result = TypeVar("Result")


class Job(Generic[Result]):
    """Work that some thread does or has done."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._outcome: SimpleQueue[tuple[Result | None, BaseException | None]] = SimpleQueue()

    def do(self) -> None:
        """Do the work; whatever it raises is kept for `result`."""
        work, outcome = self._work, self._outcome
        # what is done holds no image, nor does the traceback of an error, which holds this frame
        del self._work, self
        try:
            outcome.put((work(), None))
        except BaseException as error:
            outcome.put((None, error))
        finally:
            del work, outcome

    def fail(self, error: BaseException) -> None:
        """Let `result` raise this."""
        self._outcome.put((None, error))

    def result(self) -> Result:
        """Wait for the result, or for what the work has raised; to be called once."""
        value, error = self._outcome.get()
        if error is None:
            return value  # type: ignore[return-value] # without an error it is there
        try:
            raise error
        finally:
            del error  # its traceback holds this frame


class ThreadPool:
    """At most `n_threads` threads that take jobs in the order in which they are given.

    An executor of `concurrent.futures` keeps its books under locks that are taken in Python code. A Ctrl-C
    that is noticed between the taking of one and the block that gives it back leaves it taken for good; its
    threads then wait for it, and the program for its threads (benchmarks/LOG.md). Threads share nothing but
    `SimpleQueue`s here, which have no such moment; neither has the start of a bare thread.

    Args:
        n_threads: started as jobs come.
        prepare: what each thread does first; where it fails, so do the jobs that the thread takes.
    """

    def __init__(self, n_threads: int, prepare: Callable[[], object] | None = None) -> None:
        self._n_threads, self._prepare = n_threads, prepare
        self._n_started = 0
        self._is_over = False
        self._members: set[int] = set()
        self._jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()

    def __enter__(self) -> "ThreadPool":
        atexit.register(self._end)  # a thread at work would be cut off when Python ends
        return self

    def __exit__(self, *reason: object) -> None:
        """Wait for the jobs that are begun; the others are forgotten, and never have a result."""
        atexit.unregister(self._end)
        self._end()

    def forget(self) -> None:
        """Begin no more jobs."""
        self._is_over = True

    def give(self, work: Callable[[], Result]) -> Job[Result]:
        """Let a thread do this as soon as one is free."""
        assert not self._is_over, "nobody would do it"
        job = Job(work)
        self._jobs.put(job)
        if self._n_started < self._n_threads:
            _thread.start_new_thread(self._serve, ())
            self._n_started += 1  # an interrupt before leaves a thread that ends, but is not waited for
        return job

    def _end(self) -> None:
        self.forget()
        self._jobs.put(None)
        # Who has not left the crew leaves it to the garbage collector: in whatever thread that runs, one of
        # the crew's included, and when Python has ended all others.
        if sys.is_finalizing() or _thread.get_ident() in self._members:
            return
        for _ in range(self._n_started):
            self._ended.get()

    def _serve(self) -> None:
        self._members.add(_thread.get_ident())
        failure = None
        try:
            if self._prepare is not None:
                self._prepare()
        except BaseException as error:
            failure = error
        while (job := self._jobs.get()) is not None:
            if failure is not None:
                job.fail(failure)
            elif not self._is_over:
                job.do()
        self._jobs.put(None)  # for the next thread
        self._ended.put(None)


Item = TypeVar("Item")
MAX_WORKERS = 16


def default_workers() -> int:
    """One thread a core that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores)


def prefetch_map(
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
    with silence_pillow(), ThreadPool(num_workers or default_workers(), prepare) as pool:
        try:
            for item in items:
                pending.append(pool.give(partial(work, item)))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.forget()  # closing the items may take long
            if isinstance(items, Generator):
                items.close()  # now, and not when the traceback of an error has gone
