"""Intervals hold what they promise, and bootstrap weights are whole groups."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from pixelplay.errors import DataError
from pixelplay.evaluation.estimates import estimate_label_metrics
from pixelplay.evaluation.intervals import (
    Bootstrap,
    bootstrap_weights,
    mean_of_shares,
    percentile_interval,
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


def test_wilson_has_a_width_when_every_image_is_right() -> None:
    estimate = wilson(20, 20)
    assert estimate.low < 0.85
    assert estimate.high == 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_proportion(successes: int, n: int) -> None:
    with pytest.raises(DataError, match=f"{successes} of {n} is not a proportion"):
        wilson(successes, n)


def test_every_resample_draws_as_many_images_as_there_are() -> None:
    weights = np.concatenate(list(bootstrap_weights(None, 50, 30, seed=0)))
    assert weights.shape == (30, 50)
    assert (weights.sum(axis=1) == 50).all()
    assert len(np.unique(weights, axis=0)) == 30


def test_images_of_one_group_are_drawn_equally_often() -> None:
    groups = np.array([7, 3, 7, 9, 3, 7])
    weights = np.concatenate(list(bootstrap_weights(groups, 6, 40, seed=1)))
    for group in (3, 7, 9):
        members = weights[:, groups == group]
        assert (members == members[:, :1]).all()
    firsts = weights[:, [1, 0, 3]]
    assert (firsts.sum(axis=1) == 3).all()


def test_weights_do_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(bootstrap_weights(None, 40, 23, seed=5)))
    monkeypatch.setattr("pixelplay.evaluation.intervals._CHUNK_CELLS", 100)
    chunks = list(bootstrap_weights(None, 40, 23, seed=5))
    assert len(chunks) == 12
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_a_chunk_of_many_images_stays_small() -> None:
    first = next(bootstrap_weights(None, 100_000, 1000, seed=0))
    assert first.nbytes <= 32_000_000


def test_weights_refuse_no_images_and_groups_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="0 images cannot be resampled"):
        next(bootstrap_weights(None, 0, 10, seed=0))
    with pytest.raises(DataError, match=r"groups has shape \(3,\) but there are 4 images"):
        next(bootstrap_weights(np.arange(3), 4, 10, seed=0))


def test_percentiles_leave_undefined_samples_out() -> None:
    samples = np.append(np.arange(101.0), np.nan)
    assert percentile_interval(samples) == pytest.approx((2.5, 97.5))


def test_an_interval_without_spread_is_marked_unreliable() -> None:
    resampling = Bootstrap(n=50, groups=None, n_resamples=100, seed=0)
    assert not resampling.estimate(1.0, np.ones(100), n=50, is_enough=True).reliable


def test_fewer_than_ten_groups_are_marked_unreliable() -> None:
    samples = np.random.default_rng(0).normal(size=100)
    few = Bootstrap(n=90, groups=np.arange(90) // 10, n_resamples=100, seed=0)
    enough = Bootstrap(n=90, groups=np.arange(90) // 9, n_resamples=100, seed=0)
    assert not few.estimate(0.0, samples, n=90, is_enough=True).reliable
    assert enough.estimate(0.0, samples, n=90, is_enough=True).reliable


def test_mean_of_one_proportion_is_that_proportion() -> None:
    share, mean = wilson(7, 9), mean_of_shares([wilson(7, 9)], reliable=True)
    assert (mean.value, mean.low, mean.high) == pytest.approx((share.value, share.low, share.high))
    assert (mean.n, mean.n_classes, mean.method) == (9, 1, "wilson by class")


@pytest.mark.parametrize("recalls", [(0.95, 0.9, 0.8, 0.6), (0.99, 0.99, 0.98, 0.97)])
def test_intervals_cover_the_truth_of_uneven_classes(recalls: tuple[float, ...]) -> None:
    """Nominal 95 %; the rarest class has some 40 of 1000 images; the standard error of the share is 1.1 %.

    The plain bootstrap fails in the second case: a rare class is then mostly seen without an error.
    """
    rng = np.random.default_rng(2)
    mix = np.array([0.6, 0.3, 0.06, 0.04])
    joint = np.diag(mix * recalls)  # rows true, columns predicted
    joint[1:, 0] = mix[1:] * (1 - np.array(recalls[1:]))  # every error says the commonest class …
    joint[0, 1] = mix[0] * (1 - recalls[0])  # … which itself is taken for the second
    truths = (
        np.trace(joint),
        np.mean(recalls),
        np.mean(2 * np.diag(joint) / (joint.sum(axis=0) + joint.sum(axis=1))),
    )
    covered = []
    for seed in range(400):
        cells = rng.choice(16, size=1000, p=joint.ravel())
        resampling = Bootstrap(n=1000, groups=None, n_resamples=100, seed=seed)
        judged = estimate_label_metrics(cells % 4, cells // 4, 4, resampling)
        estimates = (judged.accuracy, judged.balanced_accuracy, judged.macro_f1)
        covered.append([e.low <= truth <= e.high for e, truth in zip(estimates, truths, strict=True)])
    assert (np.mean(covered, axis=0) >= 0.93).all()


def test_groups_never_narrow_an_interval() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [60, 30, 12])
    pred = np.where(rng.random(102) < 0.95, labels, 0)
    alone = estimate_label_metrics(pred, labels, 3, Bootstrap(n=102, groups=None, n_resamples=200, seed=0))
    singles = estimate_label_metrics(
        pred, labels, 3, Bootstrap(n=102, groups=np.arange(102), n_resamples=200, seed=0)
    )
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        narrow, wide = getattr(alone, name), getattr(singles, name)
        assert wide.low <= narrow.low <= narrow.high <= wide.high
        assert wide.method == "bootstrap by group"
