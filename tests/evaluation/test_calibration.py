"""Planted temperatures are found, and reliability improves with them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.metrics import log_loss

from pixelplay.errors import DataError
from pixelplay.evaluation.calibration import (
    compare_reliability,
    fit_temperature,
    mean_nll,
    measure_reliability,
    remove_temperature,
    temperature_softmax,
)
from pixelplay.evaluation.evaluate import evaluate_probs

LOGITS = arrays(np.float64, (5, 4), elements=st.floats(-50, 50))


def sample_labels(probs: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """Draw one label per row of probabilities."""
    draws = np.random.default_rng(seed).random((len(probs), 1))
    return np.minimum((probs.cumsum(axis=1) < draws).sum(axis=1), probs.shape[1] - 1)


def draw_overconfident(n: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return logits three times too large for the labels drawn from them."""
    calibrated = np.random.default_rng(seed).normal(0, 1.5, (n, 5))
    return 3 * calibrated, sample_labels(softmax(calibrated, axis=1), seed + 1)


@pytest.mark.parametrize("planted", [0.5, 3.0])
def test_planted_temperature_is_found_within_five_percent(planted: float) -> None:
    logits = np.random.default_rng(0).normal(scale=2, size=(8000, 5))
    labels = sample_labels(softmax(logits, axis=1), seed=1)
    temperature, evidence = fit_temperature((logits * planted).astype(np.float32), labels)
    assert temperature == pytest.approx(planted, rel=0.05)
    assert evidence["nll_after"] < evidence["nll_before"]
    assert (evidence["n"], evidence["at_bound"]) == (8000, False)


@pytest.mark.parametrize("margin", [1.0, 8.0, 400.0])
def test_perfect_logits_have_temperature_one(margin: float) -> None:
    labels = np.arange(40) % 4
    temperature, evidence = fit_temperature(margin * np.eye(4)[labels], labels)
    assert temperature == 1
    assert evidence["at_bound"]
    assert evidence["nll_after"] == evidence["nll_before"]


def test_logits_no_better_than_chance_have_temperature_one() -> None:
    labels = np.arange(40) % 4
    always_wrong = 5 * np.eye(4)[(labels + 1) % 4]
    for logits in (np.zeros((40, 4)), always_wrong):
        temperature, evidence = fit_temperature(logits, labels)
        assert (temperature, evidence["at_bound"]) == (1, True)


def test_fitted_temperature_minimises_nll() -> None:
    logits = np.random.default_rng(3).normal(size=(200, 3))
    labels = sample_labels(softmax(2 * logits, axis=1), seed=4)
    temperature, evidence = fit_temperature(logits, labels)
    for factor in (0.97, 1.03):
        probs = temperature_softmax(logits, temperature * factor)
        assert -np.log(probs[np.arange(200), labels]).mean() > evidence["nll_after"]


def test_temperature_rejects_unusable_logits_and_labels() -> None:
    with pytest.raises(DataError, match="label 3 in row 1 is outside the 3 classes"):
        fit_temperature(np.zeros((2, 3)), np.array([0, 3]))
    with pytest.raises(DataError, match="0 images"):
        fit_temperature(np.zeros((0, 3)), np.array([], dtype=np.int64))
    with pytest.raises(DataError, match="row 1 is not finite"):
        fit_temperature(np.array([[0.0, 1.0], [np.nan, 0.0]]), np.array([0, 1]))


@given(LOGITS, st.floats(0.05, 20))
@settings(max_examples=50, deadline=None)
def test_probs_are_the_softmax_and_temperature_keeps_the_ranking(
    logits: NDArray[np.float64], temperature: float
) -> None:
    probs = temperature_softmax(logits, temperature)
    np.testing.assert_allclose(probs, softmax(logits / temperature, axis=1), rtol=1e-12)
    np.testing.assert_allclose(probs.sum(axis=1), 1)
    chosen = logits[np.arange(5), probs.argmax(axis=1)]
    np.testing.assert_allclose(chosen, logits.max(axis=1), atol=1e-9)


def test_probs_of_huge_logits_are_finite_and_nan_rows_stay_nan() -> None:
    probs = temperature_softmax(np.array([[1e5, 0.0], [np.nan, np.nan]], dtype=np.float32), 1.0)
    np.testing.assert_array_equal(probs[0], [1, 0])
    assert np.isnan(probs[1]).all()
    assert probs.dtype == np.float64


def test_nll_equals_scikit_learns_log_loss() -> None:
    logits = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    labels = sample_labels(softmax(logits, axis=1), seed=1)
    expected = log_loss(labels, softmax(logits.astype(np.float64), axis=1))
    assert mean_nll(logits, labels) == pytest.approx(expected, abs=1e-9)
    assert mean_nll(np.zeros((7, 5), np.float32), np.arange(7) % 5) == pytest.approx(np.log(5))


def test_nll_of_huge_logits_does_not_overflow() -> None:
    logits = np.array([[1e5, 0], [-1e5, 3e4]], np.float32)
    assert mean_nll(logits, np.array([0, 1])) == 0
    assert mean_nll(logits, np.array([1, 1])) == pytest.approx(5e4)


def test_temperature_at_least_halves_the_ece_of_an_over_confident_model() -> None:
    logits, labels = draw_overconfident(4000, 0)
    T, _ = fit_temperature(logits[:2000], labels[:2000])
    fresh, own = logits[2000:], labels[2000:]
    found = compare_reliability(temperature_softmax(fresh, 1.0), temperature_softmax(fresh, T), own, "test")
    assert found is not None
    before, after = found["before"], found["after"]
    assert after["ece"]["value"] < before["ece"]["value"] / 2
    assert after["log_loss"] < before["log_loss"]
    assert after["brier"] < before["brier"]
    assert found["measured_on"] == "test"


def test_reliability_metrics_equal_those_of_an_evaluation() -> None:
    logits, labels = draw_overconfident(300, 1)
    probs = temperature_softmax(logits, 2.0)
    found = measure_reliability(probs, labels)
    evaluation = evaluate_probs(probs, probs.argmax(1), labels, tuple("abcde"), n_known=5)
    assert evaluation.log_loss is not None
    assert evaluation.brier is not None
    assert (found["ece"]["value"], found["log_loss"], found["brier"]) == pytest.approx(
        (evaluation.ece, evaluation.log_loss.value, evaluation.brier.value)
    )


def test_reliability_bins_add_up_to_the_ece() -> None:
    logits, labels = draw_overconfident(500, 2)
    found = measure_reliability(temperature_softmax(logits, 1.0), labels)
    assert sum(b["n"] for b in found["bins"]) == found["n"] == 500
    gap = sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in found["bins"]) / 500
    assert gap == pytest.approx(found["ece"]["value"])


def test_uncalibrated_probs_are_those_without_the_temperature() -> None:
    logits, _ = draw_overconfident(50, 3)
    np.testing.assert_allclose(
        remove_temperature(temperature_softmax(logits, 2.5), 2.5), temperature_softmax(logits, 1.0), atol=1e-9
    )
    certain = np.array([[1.0, 0.0]])
    np.testing.assert_array_equal(remove_temperature(certain, 2.0), certain)


def test_reliability_ignores_classes_unknown_to_the_model() -> None:
    probs = np.array([[0.9, 0.1], [0.2, 0.8]])
    found = compare_reliability(probs, probs, np.array([0, 2]), "test")
    assert found is not None
    assert found["before"]["n"] == 1
    assert compare_reliability(probs, probs, np.array([2, 2]), "test") is None
