"""Tests of pixelplay.thread_pool."""

import _thread
import gc
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pixelplay
from pixelplay.thread_pool import MAX_WORKERS, ThreadPool, default_workers, prefetch_map

# Python handles signals when a function starts, when a call returns and at loop jumps. A KeyboardInterrupt is
# raised at the n-th of the first two kinds in the main thread: n = 1, 2, 3 ...
INTERRUPTED = """
import sys, time
from pixelplay.thread_pool import prefetch_map

def run():
    return list(prefetch_map(lambda i: time.sleep(0.0002) or i, range(6), num_workers=2, ahead=2))

def interrupt(n):
    left = n

    def watch(frame, event, argument):
        nonlocal left
        left -= event in ("call", "c_return")
        if left == 0:
            left = -1
            raise KeyboardInterrupt

    sys.setprofile(watch)
    try:
        run()
    except KeyboardInterrupt:
        pass
    sys.setprofile(None)
    return left < 0

n = 1
while interrupt(n):
    n += 1
assert run() == [0, 1, 2, 3, 4, 5]
print(n)
"""


# The generator is closed when Python exits, or never; a thread is running until then.
LEFT_OPEN = """
import time
from pixelplay.thread_pool import prefetch_map

def work(i):
    time.sleep(0.2 * i)
    print("done", i, flush=True)

results = prefetch_map(work, range(100), num_workers=1, ahead=3)
next(results)
time.sleep(0.1)
print("end", flush=True)
"""


def _run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(pixelplay.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_interrupt_at_any_moment_ends_the_thread_pool() -> None:
    assert int(_run(INTERRUPTED)) > 50


def test_thread_pool_never_closed_finishes_running_calls_at_exit() -> None:
    assert _run(LEFT_OPEN) == "done 0\nend\ndone 1\n"


def test_calls_run_once_and_in_order_of_submission() -> None:
    done: list[int] = []
    with ThreadPool(1) as pool:
        futures = [pool.submit(done.append, i) for i in range(50)]
        for future in futures:
            future.result()
    assert done == list(range(50))


@pytest.mark.parametrize(("n_threads", "n_futures", "n_at_work"), [(2, 10, 2), (4, 2, 2)])
def test_thread_pool_starts_as_many_threads_as_needed(n_threads: int, n_futures: int, n_at_work: int) -> None:
    all_at_work = threading.Barrier(n_at_work, timeout=20)

    def work() -> int:
        all_at_work.wait()
        return threading.get_ident()

    with ThreadPool(n_threads) as pool:
        futures = [pool.submit(work) for _ in range(n_futures)]
        assert len({future.result() for future in futures}) == n_at_work == pool._n_started


def test_each_thread_is_initialized_before_its_first_call() -> None:
    prepared: list[int] = []
    with ThreadPool(2, initializer=lambda: prepared.append(threading.get_ident())) as pool:
        futures = [pool.submit(lambda: threading.get_ident() in prepared) for _ in range(20)]
        assert all(future.result() for future in futures)
    assert len(prepared) == len(set(prepared)) <= 2


@pytest.mark.parametrize("error", [ValueError("work"), SystemExit(3), KeyboardInterrupt()])
def test_future_raises_the_error_of_its_call(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with ThreadPool(1) as pool:
        future, other = pool.submit(fail), pool.submit(lambda: 7)
        with pytest.raises(type(error)) as caught:
            future.result()
        assert caught.value is error
        assert other.result() == 7


def test_calls_raise_the_error_of_the_initializer() -> None:
    def fail() -> None:
        raise OSError("no room")

    with ThreadPool(1, initializer=fail) as pool:
        for future in [pool.submit(lambda: 7), pool.submit(lambda: 7)]:
            with pytest.raises(OSError, match="no room"):
                future.result()


def test_shutdown_waits_for_running_calls_and_drops_the_rest() -> None:
    done: list[int] = []
    begun = threading.Event()

    def work(i: int) -> None:
        begun.set()
        deadline = time.monotonic() + 20
        while not pool._is_shut_down and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        done.append(i)

    with ThreadPool(1) as pool:
        for i in range(10):
            pool.submit(work, i)
        assert begun.wait(20)
    assert done == [0]
    with pytest.raises(AssertionError, match="shut down"):
        pool.submit(time.monotonic)


def test_shutdown_can_be_repeated() -> None:
    with ThreadPool(2) as pool:
        assert pool.submit(divmod, 7, 2).result() == (3, 1)
        pool.shutdown(wait=False)
        pool.shutdown()


def test_shutdown_in_a_thread_of_the_pool_does_not_wait() -> None:
    pool = ThreadPool(1)  # the garbage collector can do this in any thread
    pool.submit(lambda: pool.__exit__(None, None, None)).result()


class Image:
    """An object that supports weak references."""


def _is_gone(held: "weakref.ref[Image]") -> bool:
    deadline = time.monotonic() + 10
    while held() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    return held() is None


@pytest.mark.parametrize("work", [id, len], ids=["done", "failed"])
@pytest.mark.parametrize("has_result", [True, False])
def test_finished_call_does_not_keep_its_arguments_alive(
    work: Callable[[object], object], has_result: bool
) -> None:
    gc.collect()
    gc.disable()  # reference counts must suffice
    try:
        with ThreadPool(1) as pool:
            image = Image()
            held = weakref.ref(image)
            future = pool.submit(work, image)
            if has_result:
                with suppress(TypeError):
                    future.result()
            del image
            assert _is_gone(held)
            del future
    finally:
        gc.enable()


# prefetch_map


@given(st.integers(0, 50), st.integers(1, 8), st.integers(0, 60))
def test_prefetch_map_keeps_the_order(n: int, num_workers: int, ahead: int) -> None:
    results = list(prefetch_map(lambda i: i * i, range(n), num_workers=num_workers, ahead=ahead))
    assert results == [i * i for i in range(n)]


def test_prefetch_map_keeps_the_order_of_slow_items() -> None:
    def load(i: int) -> int:
        time.sleep(0.002 * (i % 3 == 0))
        return i

    assert list(prefetch_map(load, range(40), num_workers=4)) == list(range(40))


@pytest.mark.parametrize("ahead", [1, 5])
def test_prefetch_map_computes_at_most_ahead_results_in_advance(ahead: int) -> None:
    started: list[int] = []
    results = prefetch_map(lambda i: started.append(i), range(100), num_workers=3, ahead=ahead)
    assert started == []  # nothing runs before the first result is requested
    for n_taken in range(1, 20):
        next(results)
        time.sleep(0.002)
        assert n_taken <= len(started) <= n_taken + ahead
    results.close()
    assert len(started) <= 19 + ahead


def test_prefetch_map_computes_while_the_consumer_works() -> None:
    second = threading.Event()
    results = prefetch_map(lambda i: second.set() if i == 1 else None, range(2), num_workers=1)
    next(results)
    assert second.wait(5)
    results.close()


def test_prefetch_map_uses_all_threads() -> None:
    meeting = threading.Barrier(3, timeout=5)
    assert sorted(prefetch_map(lambda i: meeting.wait(), range(3), num_workers=3)) == [0, 1, 2]


def _threads_come_down_to(n: int) -> bool:
    """Wait for threads to disappear, which takes a moment after they end."""
    deadline = time.monotonic() + 10
    while _thread._count() > n and time.monotonic() < deadline:
        time.sleep(0.001)
    return _thread._count() <= n


def test_prefetch_map_raises_an_error_at_its_item() -> None:
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


def test_closing_prefetch_map_stops_its_threads() -> None:
    n_threads = _thread._count()
    done: list[int] = []
    results = prefetch_map(done.append, range(10_000), num_workers=4, ahead=16)
    next(results)
    assert _thread._count() > n_threads
    results.close()
    n_done = len(done)
    assert _threads_come_down_to(n_threads)
    assert len(done) == n_done <= 17


def test_prefetch_map_starts_no_call_while_closing_its_items() -> None:
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


def test_prefetch_map_silences_pillow() -> None:
    logger = logging.getLogger("PIL")
    before = (logger.level, warnings.filters[:])
    assert list(prefetch_map(lambda i: logger.isEnabledFor(logging.CRITICAL), range(3))) == [False] * 3
    assert (logger.level, warnings.filters[:]) == before


def test_default_workers_is_one_per_core_and_at_most_16() -> None:
    assert 1 <= default_workers() <= MAX_WORKERS == 16
