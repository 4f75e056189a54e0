"""Threads that do jobs, and that an interrupt does not leave waiting for each other."""

import _thread
import sys
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")
Work = Callable[[], object]


class Job(Generic[Result]):
    """Work that some thread does or has done."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._outcome: SimpleQueue[tuple[Result | None, BaseException | None]] = SimpleQueue()

    def do(self, before: list[Work]) -> None:
        """Do the work; whatever it raises is kept for `result`.

        Args:
            before: work to be done and taken out first; it stays in where it fails.
        """
        work, outcome = self._work, self._outcome
        del self._work, self  # a job that is done holds its outcome only, which holds no job
        try:
            while before:
                before[0]()
                del before[0]
            outcome.put((work(), None))
        except BaseException as error:
            outcome.put((None, error))
        finally:
            del work, outcome  # an error's traceback holds this frame

    def result(self) -> Result:
        """Wait for the result, or for what the work has raised; to be called once."""
        value, error = self._outcome.get()
        if error is None:
            return value  # type: ignore[return-value] # without an error it is there
        try:
            raise error
        finally:
            del error  # its traceback holds this frame


class Crew:
    """At most `n_threads` threads that take jobs in the order in which they are given.

    An executor of `concurrent.futures` keeps its books under locks that are taken in Python code. A Ctrl-C
    that is noticed between the taking of one and the block that gives it back leaves it taken for good; its
    threads then wait for it, and the program for its threads (benchmarks/LOG.md). Threads share nothing but
    `SimpleQueue`s here, which have no such moment; neither has the start of a bare thread. An interrupt while
    the crew is left, such as a second one, leaves threads idle, which do not keep the program from ending.

    Args:
        n_threads: started as jobs come.
        prepare: what each thread does before its first job.
    """

    def __init__(self, n_threads: int, prepare: Work | None = None) -> None:
        self._n_threads, self._prepare = n_threads, prepare
        self._n_started = 0
        self._is_over = False
        self._members: set[int] = set()
        self._jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *reason: object) -> None:
        """Wait for the jobs that are begun; the others are forgotten, and never have a result."""
        self.forget()
        self._jobs.put(None)
        # A crew that nobody has left is left by the garbage collector: in whatever thread that runs, one of
        # its own included, and when Python ends and its threads can do nothing more.
        if sys.is_finalizing() or _thread.get_ident() in self._members:
            return
        for _ in range(self._n_started):
            self._ended.get()

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
            self._n_started += 1
        return job

    def _serve(self) -> None:
        self._members.add(_thread.get_ident())
        before = [] if self._prepare is None else [self._prepare]
        while (job := self._jobs.get()) is not None:
            if not self._is_over:
                job.do(before)
            del job  # while this thread waits it holds nothing of the last job
        self._jobs.put(None)  # for the next thread
        self._ended.put(None)
