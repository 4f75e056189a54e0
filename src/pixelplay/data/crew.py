"""Threads that do jobs, and that an interrupt at any instant leaves able to end."""

import _thread
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Job(Generic[Result]):
    """Work that some thread does or has done."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._outcome: SimpleQueue[tuple[Result | None, BaseException | None]] = SimpleQueue()

    def do(self, prepare: Callable[[], object] | None) -> None:
        """Do the work, after what the thread has to do before its first; in whatever way it ends."""
        try:
            if prepare is not None:
                prepare()
            self._outcome.put((self._work(), None))
        except BaseException as error:
            self._outcome.put((None, error))

    def result(self) -> Result:
        """Wait for the result; to be asked for once. What the work has raised is raised here."""
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
    threads then wait for it, and the program for its threads. One Ctrl-C in thirty did this. A `SimpleQueue`
    is all that is shared here, which has no such moment; neither has the start of a bare thread.

    Args:
        n_threads: started as jobs come.
        prepare: what each thread does before its first job.
    """

    def __init__(self, n_threads: int, prepare: Callable[[], object] | None = None) -> None:
        self._n_threads, self._prepare = n_threads, prepare
        self._n_started = 0
        self._jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *reason: object) -> None:
        """Forget the jobs that nobody has begun, and wait for the others."""
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        for _ in range(self._n_threads):  # an interrupt may have come before a thread was counted
            self._jobs.put(None)
        for _ in range(self._n_started):
            self._ended.get()

    def give(self, work: Callable[[], Result]) -> Job[Result]:
        """Let a thread do this as soon as one is free."""
        job = Job(work)
        self._jobs.put(job)
        if self._n_started < self._n_threads:
            _thread.start_new_thread(self._serve, ())
            self._n_started += 1
        return job

    def _serve(self) -> None:
        prepare = self._prepare
        while (job := self._jobs.get()) is not None:
            job.do(prepare)
            prepare = None
            del job  # while this thread waits, nothing of the last job is held
        self._ended.put(None)
