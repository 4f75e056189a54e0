"""Not answering: the curve is counted right, and an asked accuracy is kept."""

import numpy as np
import pytest

from pixelplay.errors import ConfigError, DataError
from pixelplay.evaluation.selective import fit_confidence_threshold, risk_coverage


def test_curve_counts_errors_among_the_surest() -> None:
    found = risk_coverage(np.array([0.9, 0.6, 0.8, 0.6]), np.array([True, False, False, True]))
    np.testing.assert_allclose(found.coverage, [0.25, 0.5, 1.0])
    np.testing.assert_allclose(found.risk, [0.0, 0.5, 0.5])
    assert found.aurc == pytest.approx((0 + 0.5 + 0.5 + 0.5) / 4)


def test_a_better_order_has_less_area() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(2000)
    is_right = rng.random(2000) < confidence
    assert risk_coverage(confidence, is_right).aurc < risk_coverage(rng.random(2000), is_right).aurc


@pytest.mark.parametrize("target", [0.8, 0.9])
def test_an_asked_accuracy_is_kept_in_19_of_20_cases(target: float) -> None:
    rng, kept, coverages, repeats = np.random.default_rng(1), 0, [], 200
    for _ in range(repeats):
        confidence = rng.beta(4, 1, 1500)
        is_right = rng.random(1500) < confidence  # so P(right | at least c) is known
        cut = fit_confidence_threshold(confidence, is_right, target)
        fresh = rng.beta(4, 1, 20_000)
        kept += fresh[fresh >= cut.threshold].mean() >= target
        coverages.append(cut.coverage)
        assert cut.accuracy >= cut.bound >= target
    assert kept / repeats >= 0.95
    assert np.mean(coverages) > 0.25  # it does not keep its promise by answering nobody


def test_what_cannot_be_promised_is_refused_with_what_can() -> None:
    confidence = np.linspace(0.5, 1, 40)
    with pytest.raises(DataError, match=r"promises an accuracy of 0\.99 on 40 held-out images"):
        fit_confidence_threshold(confidence, np.ones(40, dtype=np.bool_), 0.99)
    with pytest.raises(DataError, match="no held-out images"):
        fit_confidence_threshold(np.empty(0), np.empty(0, dtype=np.bool_), 0.5)


@pytest.mark.parametrize("target", [0.0, 1.0, 1.5, float("nan")])
def test_target_outside_its_range_is_refused(target: float) -> None:
    with pytest.raises(ConfigError, match="outside its range"):
        fit_confidence_threshold(np.ones(9), np.ones(9, dtype=np.bool_), target)


def test_all_wrong_promises_nothing() -> None:
    with pytest.raises(DataError, match=r"best that can be promised is 0\.0;"):
        fit_confidence_threshold(np.linspace(0, 1, 50), np.zeros(50, dtype=np.bool_), 0.5)
