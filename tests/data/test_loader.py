"""What loader.py promises: in order, ahead but bounded, and no thread left behind."""

import _thread
import logging
import threading
import time
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixelplay.thread_pool import MAX_WORKERS, default_workers, prefetch_map


@given(st.integers(0, 50), st.integers(1, 8), st.integers(0, 60))
def test_results_come_in_order_whatever_the_workers(n: int, num_workers: int, ahead: int) -> None:
    results = list(prefetch_map(lambda i: i * i, range(n), num_workers=num_workers, ahead=ahead))
    assert results == [i * i for i in range(n)]


def test_slow_items_do_not_lose_their_place() -> None:
    def load(i: int) -> int:
        time.sleep(0.002 * (i % 3 == 0))
        return i

    assert list(prefetch_map(load, range(40), num_workers=4)) == list(range(40))


@pytest.mark.parametrize("ahead", [1, 5])
def test_at_most_ahead_items_are_computed_in_advance(ahead: int) -> None:
    started: list[int] = []
    results = prefetch_map(lambda i: started.append(i), range(100), num_workers=3, ahead=ahead)
    assert started == []  # nothing happens before the first is asked for
    for n_taken in range(1, 20):
        next(results)
        time.sleep(0.002)
        assert n_taken <= len(started) <= n_taken + ahead
    results.close()
    assert len(started) <= 19 + ahead


def test_items_are_computed_while_the_consumer_works() -> None:
    second = threading.Event()
    results = prefetch_map(lambda i: second.set() if i == 1 else None, range(2), num_workers=1)
    next(results)
    assert second.wait(5)
    results.close()


def test_work_is_spread_over_the_threads() -> None:
    meeting = threading.Barrier(3, timeout=5)
    assert sorted(prefetch_map(lambda i: meeting.wait(), range(3), num_workers=3)) == [0, 1, 2]


def _threads_come_down_to(n: int) -> bool:
    """A thread is gone a moment after its last word."""
    deadline = time.monotonic() + 10
    while _thread._count() > n and time.monotonic() < deadline:
        time.sleep(0.001)
    return _thread._count() <= n


def test_an_error_arrives_at_its_place_and_ends_the_stream() -> None:
    def load(i: int) -> int:
        if i == 3:
            raise ValueError("image 3")
        return i

    n_threads = _thread._count()
    results = prefetch_map(load, range(1000), num_workers=2, ahead=8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="image 3"):
        next(results)
    assert next(results, None) is None
    assert _threads_come_down_to(n_threads)


def test_closing_early_stops_the_threads_and_the_work() -> None:
    n_threads = _thread._count()
    done: list[int] = []
    results = prefetch_map(done.append, range(10_000), num_workers=4, ahead=16)
    next(results)
    assert _thread._count() > n_threads
    results.close()
    n_done = len(done)
    assert _threads_come_down_to(n_threads)
    assert len(done) == n_done <= 17


def test_no_work_begins_while_the_items_are_closed() -> None:
    begun: list[int] = []
    n_late: list[int] = []

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            n_before = len(begun)
            time.sleep(0.05)
            n_late.append(len(begun) - n_before)

    def work(i: int) -> None:
        begun.append(i)
        time.sleep(0.002)

    results = prefetch_map(work, items(), num_workers=1, ahead=50)
    next(results)
    results.close()
    assert n_late[0] <= 1


def test_pillow_is_quiet_meanwhile_and_as_before_afterwards() -> None:
    logger = logging.getLogger("PIL")
    before = (logger.level, warnings.filters[:])
    assert list(prefetch_map(lambda i: logger.isEnabledFor(logging.CRITICAL), range(3))) == [False] * 3
    assert (logger.level, warnings.filters[:]) == before


def test_the_default_is_one_thread_a_core_and_at_most_16() -> None:
    assert 1 <= default_workers() <= MAX_WORKERS == 16
