"""What crew.py promises: every job is done once, and an interrupt at any instant ends it all."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from pathlib import Path

import pytest

import pixelplay
from pixelplay.data.crew import Crew

# Python notices a signal when a function begins and when a call comes back. A KeyboardInterrupt is raised at
# the n-th of these instants of the main thread: n = 1, 2, 3 ...
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


def test_an_interrupt_at_any_instant_ends_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        env={**os.environ, "PYTHONPATH": str(Path(pixelplay.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert int(done.stdout) > 50


def test_jobs_are_done_once_and_in_the_order_of_giving() -> None:
    done: list[int] = []
    with Crew(1) as crew:
        jobs = [crew.give(partial(done.append, i)) for i in range(50)]
        for job in jobs:
            job.result()
    assert done == list(range(50))


def test_no_more_threads_work_than_there_are_jobs_or_places() -> None:
    seen: set[int] = set()
    lock, both = threading.Lock(), threading.Barrier(2, timeout=20)

    def work() -> None:
        both.wait()
        with lock:
            seen.add(threading.get_ident())

    with Crew(2) as crew:
        for job in [crew.give(work) for _ in range(10)]:
            job.result()
    assert len(seen) == 2


def test_each_thread_is_prepared_before_its_first_job() -> None:
    prepared: list[int] = []
    with Crew(2, prepare=lambda: prepared.append(threading.get_ident())) as crew:
        found = [job.result() for job in [crew.give(threading.get_ident) for _ in range(20)]]
    assert set(found) <= set(prepared)
    assert len(prepared) == len(set(prepared)) <= 2


@pytest.mark.parametrize("error", [ValueError("work"), SystemExit(3), KeyboardInterrupt()])
def test_what_a_job_raises_is_raised_where_it_is_asked_for(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with Crew(1) as crew:
        job, other = crew.give(fail), crew.give(lambda: 7)
        with pytest.raises(type(error)) as caught:
            job.result()
        assert caught.value is error
        assert other.result() == 7


def test_what_cannot_be_prepared_is_told_by_the_first_job() -> None:
    def fail() -> None:
        raise OSError("no room")

    with Crew(1, prepare=fail) as crew, pytest.raises(OSError, match="no room"):
        crew.give(lambda: 7).result()


def test_leaving_waits_for_what_is_begun_and_forgets_the_rest() -> None:
    done: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def work(i: int) -> None:
        begun.set()
        assert go_on.wait(20)
        time.sleep(0.02)
        done.append(i)

    with Crew(1) as crew:
        for i in range(10):
            crew.give(partial(work, i))
        assert begun.wait(20)
        go_on.set()
    assert done == [0]


def test_a_thread_that_waits_holds_nothing() -> None:
    class Photograph:
        pass

    with Crew(1) as crew:
        held = weakref.ref(crew.give(Photograph).result())
        crew.give(time.monotonic).result()
        gc.collect()
        assert held() is None
