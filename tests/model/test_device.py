"""Cores process items in parallel, and the number of torch threads is restored."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pixelplay.errors import ConfigError
from pixelplay.model.device import map_on_cores, share_cores

pytestmark = pytest.mark.usefixtures("four_threads")


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_each_core_processes_its_own_item() -> None:
    meeting = threading.Barrier(4, timeout=20)  # passes only if all four work at once

    def work(i: int) -> tuple[int, int]:
        meeting.wait()
        return i, torch.get_num_threads()

    assert list(map_on_cores(work, iter(range(8)), "cpu")) == [(i, 1) for i in range(8)]


def test_map_on_cores_is_sequential_on_a_gpu() -> None:
    threads = set(map_on_cores(lambda _: threading.get_ident(), range(8), "cuda"))
    assert threads == {threading.get_ident()}


def test_error_on_one_core_stops_the_work() -> None:
    done, closed = [], []

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.append(True)

    def work(i: int) -> int:
        if i == 3:
            raise ConfigError("three")
        done.append(i)
        return i

    results = map_on_cores(work, items(), "cpu")
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ConfigError, match="three"):
        next(results)
    assert len(done) < 20
    assert closed


@pytest.mark.parametrize("end", ["all", "early", "error"])
def test_threads_started_later_have_all_cores(end: str) -> None:
    assert threads_of_a_new_thread() == 4

    def work(i: int) -> int:
        if end == "error" and i == 5:
            raise ConfigError("five")
        return i

    results = map_on_cores(work, range(10), "cpu")
    assert next(results) == 0
    assert threads_of_a_new_thread() == 1
    if end == "all":
        list(results)
    elif end == "early":
        results.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(ConfigError):
            list(results)
    assert threads_of_a_new_thread() == torch.get_num_threads() == 4


def test_concurrent_jobs_restore_the_number_of_threads() -> None:
    first = map_on_cores(lambda i: i, range(10), "cpu")
    next(first)

    def second() -> int:
        with share_cores() as n_cores:
            return n_cores

    with ThreadPoolExecutor(1) as pool:  # a new thread, whose default is 1 meanwhile
        assert pool.submit(second).result() == 4
    assert threads_of_a_new_thread() == 1
    list(first)
    assert threads_of_a_new_thread() == 4
