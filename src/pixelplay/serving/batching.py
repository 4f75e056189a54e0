"""Micro-batching: items of many requests are processed together."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Threads that each process what is waiting, at most one batch at a time.

    A thread that becomes free takes all waiting items up to the batch size. It never waits for a batch to
    fill: an idle server answers a single item at once, and under load the items that arrive during one batch
    form the next. The number of waiting items is bounded by whoever submits them (see `Admission`).

    Args:
        work: processes a batch and returns a result for each item.
        batch_size: most items in a batch.
        n_threads: batches that are processed at once.
        initializer: called first in each thread.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Result]],
        *,
        batch_size: int,
        n_threads: int = 1,
        initializer: Callable[[], object] = lambda: None,
    ) -> None:
        self._work, self._batch_size, self._prepare = work, batch_size, initializer
        self._waiting: deque[tuple[Item, Future[Result]]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        # daemons: a process that is told twice to stop does not wait for the network
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(n_threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, items: Sequence[Item]) -> list[Future[Result]]:
        """Add items to the queue; a cancelled future takes its item out of it.

        Raises:
            RuntimeError: the batcher is closed.
        """
        added: list[tuple[Item, Future[Result]]] = [(item, Future()) for item in items]
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the batcher is closed")
            self._waiting.extend(added)
            self._changed.notify_all()
        return [future for _, future in added]

    def close(self) -> None:
        """Process everything that was submitted, then end the threads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def is_alive(self) -> bool:
        """Return whether all threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        self._prepare()
        while batch := self._take():
            items, futures = [item for item, _ in batch], [future for _, future in batch]
            try:
                results = self._work(items)
                assert len(results) == len(items)
            except BaseException as error:
                for future in futures:
                    future.set_exception(error)
            else:
                for future, result in zip(futures, results, strict=True):
                    future.set_result(result)
            del batch, items, futures  # their images are not needed while waiting for the next ones

    def _take(self) -> list[tuple[Item, Future[Result]]]:
        """Wait for items and take a batch of them; an empty one ends the thread."""
        batch: list[tuple[Item, Future[Result]]] = []
        with self._changed:
            while not batch:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if not self._waiting:
                    return []
                while self._waiting and len(batch) < self._batch_size:
                    item, future = self._waiting.popleft()
                    if future.set_running_or_notify_cancel():
                        batch.append((item, future))
        return batch
