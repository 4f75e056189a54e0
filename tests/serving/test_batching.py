"""Micro-batching: full batches under load, no lost item, no hanging caller."""

import threading
from concurrent.futures import Future, wait

import pytest

from pixelplay.serving.batching import Batcher


def squares(items: list[int]) -> list[int]:
    return [item * item for item in items]


def test_batcher_returns_each_item_its_own_result() -> None:
    batcher: Batcher[int, int] = Batcher(squares, batch_size=4, n_threads=3)
    futures: dict[int, Future[int]] = {}

    def submit(start: int) -> None:
        futures.update(zip(range(start, start + 25), batcher.submit(range(start, start + 25)), strict=True))

    threads = [threading.Thread(target=submit, args=(start,)) for start in range(0, 200, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {i: future.result(10) for i, future in futures.items()} == {i: i * i for i in range(200)}
    batcher.close()


def test_items_that_arrive_during_a_batch_form_the_next_batch() -> None:
    batches: list[list[int]] = []
    is_working, may_go_on = threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int]:
        batches.append(items)
        is_working.set()
        may_go_on.wait(10)
        return items

    batcher: Batcher[int, int] = Batcher(work, batch_size=4)
    first = batcher.submit([0])
    assert is_working.wait(10)  # a single item does not wait for others
    later = [future for i in range(1, 7) for future in batcher.submit([i])]
    may_go_on.set()
    wait([*first, *later], 10)
    batcher.close()
    assert batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_batch_error_reaches_all_its_callers_and_the_next_batch_runs() -> None:
    def divide(items: list[int]) -> list[float]:
        return [1 / item for item in items]

    batcher: Batcher[int, float] = Batcher(divide, batch_size=8)
    for future in batcher.submit([1, 0]):
        with pytest.raises(ZeroDivisionError):
            future.result(10)
    assert batcher.submit([4])[0].result(10) == 0.25
    assert batcher.is_alive
    batcher.close()


def test_cancelled_items_are_not_processed() -> None:
    seen: list[int] = []
    is_working, may_go_on = threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int]:
        seen.extend(items)
        is_working.set()
        may_go_on.wait(10)
        return items

    batcher: Batcher[int, int] = Batcher(work, batch_size=1)
    batcher.submit([0])
    assert is_working.wait(10)
    cancelled, kept = batcher.submit([1, 2])
    assert cancelled.cancel()
    may_go_on.set()
    assert kept.result(10) == 2
    batcher.close()
    assert seen == [0, 2]


def test_closing_processes_what_was_submitted_and_refuses_more() -> None:
    batcher: Batcher[int, int] = Batcher(squares, batch_size=2)
    futures = batcher.submit(range(9))
    batcher.close()
    assert [future.result(0) for future in futures] == [i * i for i in range(9)]
    assert not batcher.is_alive
    with pytest.raises(RuntimeError):
        batcher.submit([1])
