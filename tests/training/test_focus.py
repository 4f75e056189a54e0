"""What focus.py promises: times that add up, stay within bounds and follow the misses; fair rounding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixelplay.data.sampling import MOST_DRAWS, expected_draws, whole_draws

MISSES = st.lists(st.floats(0, 1), min_size=1, max_size=60).map(np.array)
FOCUS = st.floats(0, 0.99)


@given(misses=MISSES, hard_example_frac=FOCUS)
def test_times_add_up_and_stay_within_bounds(misses: np.ndarray, hard_example_frac: float) -> None:
    times = expected_draws(misses, hard_example_frac)
    assert times.sum() == pytest.approx(len(misses))
    assert times.min() >= 1 - hard_example_frac - 1e-9
    assert times.max() <= MOST_DRAWS + 1e-9


@given(misses=MISSES, hard_example_frac=FOCUS)
def test_what_was_more_wrong_comes_no_less_often(misses: np.ndarray, hard_example_frac: float) -> None:
    order = np.argsort(misses, kind="stable")
    assert (np.diff(expected_draws(misses, hard_example_frac)[order]) >= -1e-9).all()


@pytest.mark.parametrize("level", [0.0, 1e-9, 0.3, 1.0])
def test_all_come_alike_where_all_were_as_wrong(level: float) -> None:
    np.testing.assert_allclose(expected_draws(np.full(7, level), 0.8), 1)


def test_the_share_beyond_the_uniform_one_goes_by_misses() -> None:
    misses = np.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(expected_draws(misses, 0.5), 0.5 + 0.5 * 4 * misses / misses.sum())


def test_what_the_limit_holds_back_goes_to_the_others() -> None:
    times = expected_draws(np.array([1.0, 0.02, 0.01, 0.01, 0.0, 0.0]), 0.5)
    assert times[0] == MOST_DRAWS
    np.testing.assert_allclose(times[1] - 0.5, 2 * (times[2] - 0.5))  # as their misses
    assert times.sum() == pytest.approx(6)


@given(misses=MISSES, hard_example_frac=FOCUS, seed=st.integers(0, 1000))
def test_whole_times_are_next_to_those_asked_for_and_keep_their_sum(
    misses: np.ndarray, hard_example_frac: float, seed: int
) -> None:
    times = expected_draws(misses, hard_example_frac)
    drawn = whole_draws(times, np.random.default_rng(seed))
    assert drawn.sum() == len(misses)
    assert (np.abs(drawn - times) < 1 + 1e-9).all()


def test_whole_times_are_right_on_average() -> None:
    times = expected_draws(np.array([0.9, 0.01, 0.3, 0.02, 0.6, 0.05]), 0.6)
    rng = np.random.default_rng(0)
    mean = np.mean([whole_draws(times, rng) for _ in range(20_000)], axis=0)
    np.testing.assert_allclose(mean, times, atol=0.015)
