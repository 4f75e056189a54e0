"""Wilson intervals equal SciPy's, and bootstrap weights resample whole groups."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from pixelplay.evaluation.intervals import (
    Bootstrap,
    macro_average,
    wilson,
)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=50, deadline=None)
def test_wilson_equals_scipy(case: tuple[int, int]) -> None:
    successes, n = case
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    estimate = wilson(successes, n)
    assert estimate.low == pytest.approx(expected.low, abs=1e-12)
    assert estimate.high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_wilson_has_a_width_if_every_image_is_correct() -> None:
    estimate = wilson(20, 20)
    assert estimate.low < 0.85
    assert estimate.high == 1


def test_every_bootstrap_resample_has_as_many_images_as_the_data() -> None:
    weights = np.concatenate(list(Bootstrap(n=50, groups=None, n_resamples=30, seed=0).weights()))
    assert weights.shape == (30, 50)
    assert (weights.sum(axis=1) == 50).all()
    assert len(np.unique(weights, axis=0)) == 30


def test_bootstrap_draws_images_of_one_group_equally_often() -> None:
    groups = np.array([7, 3, 7, 9, 3, 7])
    weights = np.concatenate(list(Bootstrap(n=6, groups=groups, n_resamples=40, seed=1).weights()))
    for group in (3, 7, 9):
        members = weights[:, groups == group]
        assert (members == members[:, :1]).all()
    firsts = weights[:, [1, 0, 3]]
    assert (firsts.sum(axis=1) == 3).all()


def test_bootstrap_weights_do_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(Bootstrap(n=40, groups=None, n_resamples=23, seed=5).weights()))
    monkeypatch.setattr("pixelplay.evaluation.intervals._CHUNK_CELLS", 100)
    chunks = list(Bootstrap(n=40, groups=None, n_resamples=23, seed=5).weights())
    assert len(chunks) == 12
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_a_chunk_of_bootstrap_weights_is_bounded_for_many_images() -> None:
    first = next(Bootstrap(n=100_000, groups=None, n_resamples=1000, seed=0).weights())
    assert first.nbytes <= 32_000_000


def test_percentile_interval_ignores_undefined_samples() -> None:
    samples = np.append(np.arange(101.0)[np.arange(101) != 50], np.nan)
    found = Bootstrap(n=50, groups=None, n_resamples=101, seed=0).estimate(50.0, samples, n=50, enough=True)
    assert (found.low, found.high) == pytest.approx((2.5, 97.5))


def test_a_bootstrap_interval_without_spread_is_unreliable() -> None:
    bootstrap = Bootstrap(n=50, groups=None, n_resamples=100, seed=0)
    assert not bootstrap.estimate(1.0, np.ones(100), n=50, enough=True).reliable


def test_a_bootstrap_of_fewer_than_ten_groups_is_unreliable() -> None:
    samples = np.random.default_rng(0).normal(size=100)
    few = Bootstrap(n=90, groups=np.arange(90) // 10, n_resamples=100, seed=0)
    enough = Bootstrap(n=90, groups=np.arange(90) // 9, n_resamples=100, seed=0)
    assert not few.estimate(0.0, samples, n=90, enough=True).reliable
    assert enough.estimate(0.0, samples, n=90, enough=True).reliable


def test_macro_average_of_one_class_is_its_estimate() -> None:
    single, mean = wilson(7, 9), macro_average([wilson(7, 9)], reliable=True)
    assert (mean.value, mean.low, mean.high) == pytest.approx((single.value, single.low, single.high))
    assert (mean.n, mean.n_classes, mean.method) == (9, 1, "wilson by class")
