"""What crew.py promises: every job is done once, and whenever an interrupt comes the program can end."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import pixelplay
from pixelplay.thread_pool import ThreadPool

# Python notices a signal when a function begins, when a call comes back and when a loop goes on. A
# KeyboardInterrupt is raised at the n-th of the first two of the main thread: n = 1, 2, 3 ...
INTERRUPTED = """
import sys, time
from pixelplay.data.loader import map_ahead

def run():
    return list(map_ahead(lambda i: time.sleep(0.0002) or i, range(6), num_workers=2, ahead=2))

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


# The generator is closed when Python ends, or never; a thread is at work until then.
LEFT_OPEN = """
import time
from pixelplay.data.loader import map_ahead

def work(i):
    time.sleep(0.2 * i)
    print("done", i, flush=True)

results = map_ahead(work, range(100), num_workers=1, ahead=3)
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


def test_whenever_an_interrupt_comes_the_work_ends() -> None:
    assert int(_run(INTERRUPTED)) > 50


def test_python_ends_work_that_nobody_has_ended_and_cuts_none_off() -> None:
    assert _run(LEFT_OPEN) == "done 0\nend\ndone 1\n"


def test_jobs_are_done_once_and_in_the_order_of_giving() -> None:
    done: list[int] = []
    with ThreadPool(1) as pool:
        jobs = [pool.give(partial(done.append, i)) for i in range(50)]
        for job in jobs:
            job.result()
    assert done == list(range(50))


@pytest.mark.parametrize(("n_threads", "n_jobs", "n_at_work"), [(2, 10, 2), (4, 2, 2)])
def test_as_many_threads_work_as_there_are_jobs_and_places(
    n_threads: int, n_jobs: int, n_at_work: int
) -> None:
    all_at_work = threading.Barrier(n_at_work, timeout=20)

    def work() -> int:
        all_at_work.wait()
        return threading.get_ident()

    with ThreadPool(n_threads) as pool:
        jobs = [pool.give(work) for _ in range(n_jobs)]
        assert len({job.result() for job in jobs}) == n_at_work == pool._n_started


def test_each_thread_is_prepared_before_its_first_job() -> None:
    prepared: list[int] = []
    with ThreadPool(2, prepare=lambda: prepared.append(threading.get_ident())) as pool:
        jobs = [pool.give(lambda: threading.get_ident() in prepared) for _ in range(20)]
        assert all(job.result() for job in jobs)
    assert len(prepared) == len(set(prepared)) <= 2


@pytest.mark.parametrize("error", [ValueError("work"), SystemExit(3), KeyboardInterrupt()])
def test_what_a_job_raises_is_raised_where_it_is_asked_for(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with ThreadPool(1) as pool:
        job, other = pool.give(fail), pool.give(lambda: 7)
        with pytest.raises(type(error)) as caught:
            job.result()
        assert caught.value is error
        assert other.result() == 7


def test_no_job_is_done_by_a_thread_that_cannot_be_prepared() -> None:
    def fail() -> None:
        raise OSError("no room")

    with ThreadPool(1, prepare=fail) as pool:
        for job in [pool.give(lambda: 7), pool.give(lambda: 7)]:
            with pytest.raises(OSError, match="no room"):
                job.result()


def test_leaving_waits_for_what_is_begun_and_forgets_the_rest() -> None:
    done: list[int] = []
    begun = threading.Event()

    def work(i: int) -> None:
        begun.set()
        deadline = time.monotonic() + 20
        while not pool._is_over and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        done.append(i)

    with ThreadPool(1) as pool:
        for i in range(10):
            pool.give(partial(work, i))
        assert begun.wait(20)
    assert done == [0]
    with pytest.raises(AssertionError, match="nobody would do it"):
        pool.give(time.monotonic)


def test_a_crew_that_is_left_in_a_thread_of_its_own_does_not_wait_for_it() -> None:
    pool = ThreadPool(1)  # the garbage collector may do this in any thread
    pool.give(lambda: pool.__exit__(None, None, None)).result()


class Image:
    """Something that a weak reference can watch."""


def _is_gone(held: "weakref.ref[Image]") -> bool:
    deadline = time.monotonic() + 10
    while held() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    return held() is None


@pytest.mark.parametrize("work", [id, len], ids=["done", "failed"])
@pytest.mark.parametrize("is_asked_for", [True, False])
def test_a_job_that_is_done_holds_no_photograph(work: Callable[[object], object], is_asked_for: bool) -> None:
    gc.collect()
    gc.disable()  # nothing is left to it
    try:
        with ThreadPool(1) as pool:
            image = Image()
            held = weakref.ref(image)
            job = pool.give(partial(work, image))
            if is_asked_for:
                with suppress(TypeError):
                    job.result()
            del image
            assert _is_gone(held)
            del job
    finally:
        gc.enable()
