"""A thread pool that survives Ctrl-C, and a map that computes results ahead."""

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

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_WORKERS = 16


class Future(Generic[Result]):
    """The result of a call that a thread makes or has made.

    Like `concurrent.futures.Future`, but without locks acquired in Python code: see `ThreadPool`.
    """

    def __init__(self, call: Callable[[], Result]) -> None:
        self._call = call
        self._outcome: SimpleQueue[tuple[Result | None, BaseException | None]] = SimpleQueue()

    def run(self) -> None:
        """Make the call; keep its value or error for `result`."""
        call, outcome = self._call, self._outcome
        # a finished call must not keep its images alive, and the traceback of an error holds this frame
        del self._call, self
        try:
            outcome.put((call(), None))
        except BaseException as error:
            outcome.put((None, error))
        finally:
            del call, outcome

    def set_exception(self, error: BaseException) -> None:
        """Make `result` raise this error."""
        self._outcome.put((None, error))

    def result(self) -> Result:
        """Wait for the call, then return its result or raise its error; can be called once."""
        value, error = self._outcome.get()
        if error is None:
            return value  # type: ignore[return-value] # without an error there is a value
        try:
            raise error
        finally:
            del error  # its traceback holds this frame


class ThreadPool:
    """Run calls in at most `n_threads` threads, in the order of submission.

    The interface follows `concurrent.futures.ThreadPoolExecutor`. That class and its futures guard their
    state with locks acquired in Python code: a Ctrl-C between acquiring one and entering the block that
    releases it leaves the lock held forever, or released twice, and the program hangs (measured; see
    benchmarks/DECISIONS.md). Here threads share nothing but `SimpleQueue`s, which have no such gap, and
    are started with `_thread`.

    `initializer` is called first in each thread; if it raises, so do the calls that this thread runs.
    """

    def __init__(self, n_threads: int, initializer: Callable[[], object] | None = None) -> None:
        self._n_threads, self._prepare = n_threads, initializer
        self._n_started = 0
        self._is_shut_down = False
        self._thread_ids: set[int] = set()
        self._queue: SimpleQueue[Future[Any] | None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()

    def __enter__(self) -> "ThreadPool":
        atexit.register(self.shutdown)  # otherwise Python would cut off running threads when it exits
        return self

    def __exit__(self, *reason: object) -> None:
        atexit.unregister(self.shutdown)
        self.shutdown()

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Schedule `function(*args)`."""
        assert not self._is_shut_down, "the thread pool is shut down"
        future = Future(partial(function, *args))
        self._queue.put(future)
        if self._n_started < self._n_threads:
            _thread.start_new_thread(self._serve, ())
            self._n_started += 1  # an interrupt before this line leaves a thread that is not waited for
        return future

    def shutdown(self, wait: bool = True) -> None:
        """Drop the calls that have not started, and optionally wait for the running ones.

        The futures of dropped calls never get a result.
        """
        self._is_shut_down = True
        self._queue.put(None)
        # a pool that was never closed is collected in any thread, even its own, or after Python has ended
        # all others: none of them can wait
        if not wait or sys.is_finalizing() or _thread.get_ident() in self._thread_ids:
            return
        n_waited, self._n_started = self._n_started, 0
        for _ in range(n_waited):
            self._ended.get()

    def _serve(self) -> None:
        self._thread_ids.add(_thread.get_ident())
        failure = None
        try:
            if self._prepare is not None:
                self._prepare()
        except BaseException as error:
            failure = error
        while (future := self._queue.get()) is not None:
            if failure is not None:
                future.set_exception(failure)
            elif not self._is_shut_down:
                future.run()
        self._queue.put(None)  # stops the next thread
        self._ended.put(None)


def default_workers() -> int:
    """Count the CPU cores that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores)


def prefetch_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_workers: int | None = None,
    ahead: int = 64,
    initializer: Callable[[], object] | None = None,
) -> Iterator[Result]:
    """Yield function(item) for each item in order, computing at most `ahead` results in advance.

    Items are consumed one by one as results are consumed; a generator is closed at the end. `initializer` is
    called first in each thread.
    """
    pending: deque[Future[Result]] = deque()
    with silence_pillow(), ThreadPool(num_workers or default_workers(), initializer) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False)  # closing the items can take long
            if isinstance(items, Generator):
                items.close()  # now, not when the traceback of an error is collected
