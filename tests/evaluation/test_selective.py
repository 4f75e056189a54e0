"""The risk-coverage curve is correct, a target accuracy is kept, and operating points reach a precision."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pixelplay.errors import ConfigError, DataError
from pixelplay.evaluation.intervals import Bootstrap
from pixelplay.evaluation.selective import (
    OperatingPoint,
    check_precision_arguments,
    find_positive_class,
    fit_confidence_threshold,
    fit_operating_point,
    risk_coverage,
)


def test_risk_coverage_counts_errors_among_the_most_confident() -> None:
    points, aurc = risk_coverage(np.array([0.9, 0.6, 0.8, 0.6]), np.array([True, False, False, True]))
    np.testing.assert_allclose(points, [(0.25, 0.0), (0.5, 0.5), (1.0, 0.5)])
    assert aurc == pytest.approx((0 + 0.5 + 0.5 + 0.5) / 4)


def test_risk_coverage_of_many_images_has_twenty_points() -> None:
    confidence = np.linspace(1, 0, 1000)
    points, _ = risk_coverage(confidence, confidence > 0.5)
    np.testing.assert_allclose([coverage for coverage, _ in points], np.arange(1, 21) / 20)
    np.testing.assert_allclose([risk for _, risk in points][::10], [0, 1 - 500 / 550])


def test_a_better_order_has_a_lower_aurc() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(2000)
    correct = rng.random(2000) < confidence
    assert risk_coverage(confidence, correct)[1] < risk_coverage(rng.random(2000), correct)[1]


@pytest.mark.parametrize("target", [0.8, 0.9])
def test_confidence_threshold_keeps_a_target_accuracy_in_19_of_20_cases(target: float) -> None:
    rng, kept, coverages, repeats = np.random.default_rng(1), 0, [], 200
    for _ in range(repeats):
        confidence = rng.beta(4, 1, 1500)
        correct = rng.random(1500) < confidence  # so P(correct | at least c) is known
        threshold, coverage, accuracy, bound = fit_confidence_threshold(confidence, correct, target)
        fresh = rng.beta(4, 1, 20_000)
        kept += fresh[fresh >= threshold].mean() >= target
        coverages.append(coverage)
        assert accuracy >= bound >= target
    assert kept / repeats >= 0.95
    assert np.mean(coverages) > 0.25  # not by abstaining from everything


def test_a_target_accuracy_that_cannot_be_guaranteed_is_rejected() -> None:
    confidence = np.linspace(0.5, 1, 40)
    with pytest.raises(DataError, match=r"target_accuracy=0\.99.* 40 held-out images"):
        fit_confidence_threshold(confidence, np.ones(40, dtype=np.bool_), 0.99)
    with pytest.raises(DataError, match=r"target_accuracy=0\.5.* is 0\.0;"):
        fit_confidence_threshold(np.linspace(0, 1, 50), np.zeros(50, dtype=np.bool_), 0.5)
    with pytest.raises(DataError, match="no held-out images"):
        fit_confidence_threshold(np.empty(0), np.empty(0, dtype=np.bool_), 0.5)


def operating_point(
    scores: NDArray[Any], labels: NDArray[Any], precision: float, groups: NDArray[Any] | None = None
) -> OperatingPoint:
    bootstrap = Bootstrap(n=len(labels), groups=groups, n_resamples=100, seed=0)
    return fit_operating_point(scores, labels == 1, "bad", precision, bootstrap)


def test_operating_point_is_the_smallest_threshold_with_the_precision() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.7, 0.6, 0.5, 0.4])
    got = operating_point(scores, np.array([1, 1, 0, 1, 1, 0, 0]), 0.8)
    assert (got.positive, got.target_precision, got.threshold) == ("bad", 0.8, 0.6)
    assert got.precision is not None
    assert got.precision.value == pytest.approx(0.8)
    assert got.precision.method == "wilson"
    assert got.recall.value == 1
    assert got.highest_precision == 1


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30), st.floats(0.05, 1))
@settings(max_examples=40, deadline=None)
def test_no_threshold_has_more_recall_at_the_precision_of_an_operating_point(
    rows: list[tuple[int, bool]], precision: float
) -> None:
    scores, labels = (np.array(column) for column in zip(*[(0.5, True), *rows], strict=True))
    scores, labels = scores / 6, labels.astype(int)
    got = operating_point(scores, labels, precision)
    accepted = [scores >= threshold for threshold in np.unique(scores)]
    recalls = [labels[yes].sum() / labels.sum() for yes in accepted if labels[yes].mean() >= precision]
    assert got.recall.value == pytest.approx(max(recalls, default=0))
    assert (got.threshold is None) == (not recalls)


def test_an_unreachable_precision_reports_the_highest() -> None:
    got = operating_point(np.array([0.9, 0.8, 0.3]), np.array([0, 1, 1]), 0.95).to_json()
    assert got["threshold"] is got["precision"] is None
    assert got["recall"]["value"] == 0
    assert got["highest_precision"] == pytest.approx(2 / 3)


def test_operating_point_with_groups_has_bootstrap_intervals() -> None:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 80)
    scores = rng.random(80) * 0.5 + labels * 0.4
    got = operating_point(scores, labels, 0.7, groups=np.arange(80) // 4)
    assert got.threshold is not None
    assert got.recall.value == pytest.approx((scores >= got.threshold)[labels == 1].mean())
    assert got.recall.method == "bootstrap by group"


def test_the_positive_class_is_the_second_unless_named() -> None:
    labels = np.array([0, 1])
    assert find_positive_class(labels, ("a", "b"), None, 0.9) == 1
    assert find_positive_class(labels, ("a", "b"), "a", 0.9) == 0


@pytest.mark.parametrize(
    ("classes", "positive", "precision", "error", "message"),
    [
        (("a", "b", "c"), None, 0.9, DataError, "the model has 3 classes but at_precision needs 2"),
        (("a", "b"), "owl", 0.9, DataError, "class 'owl' is unknown"),
        (("a", "b"), None, 1.5, ConfigError, r"at_precision=1\.5"),
        (("a", "b"), None, "0.9", ConfigError, r"at_precision='0\.9'"),
        (("a", "b"), "b", 0.9, DataError, "class 'b' has 0 of the 3 images"),
    ],
)
def test_an_impossible_operating_point_is_rejected(
    classes: tuple[str, ...], positive: str | None, precision: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        find_positive_class(np.zeros(3, int), classes, positive, precision)


def test_a_positive_class_without_a_precision_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"positive='b' .*--at-precision"):
        check_precision_arguments("b", None)
    check_precision_arguments("b", 0.9)
    check_precision_arguments(None, None)
