"""Over-confidence is seen before a temperature and gone after it."""

import numpy as np
import pytest

from pixelplay.evaluation.calibration import (
    compare_reliability,
    fit_temperature,
    measure_reliability,
    natural_probs,
    uncalibrated,
)
from pixelplay.evaluation.evaluate import evaluate_probs


def _draw(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits three times too large, and labels of the milder ones."""
    rng = np.random.default_rng(seed)
    mild = rng.normal(0, 1.5, (n, 5))
    labels = (natural_probs(mild, 1.0).cumsum(1) > rng.random((n, 1))).argmax(1)
    return 3 * mild, labels


def test_a_temperature_halves_the_error_of_an_over_confident_model_at_least() -> None:
    logits, labels = _draw(4000, 0)
    T = fit_temperature(logits[:2000], labels[:2000]).temperature
    fresh, own = logits[2000:], labels[2000:]
    found = compare_reliability(natural_probs(fresh, 1.0), natural_probs(fresh, T), own, "test")
    assert found is not None
    before, after = found["before"], found["after"]
    assert after["ece"]["value"] < before["ece"]["value"] / 2
    assert after["log_loss"] < before["log_loss"]
    assert after["brier"] < before["brier"]
    assert found["measured_on"] == "test"


def test_figures_are_those_of_an_evaluation() -> None:
    logits, labels = _draw(300, 1)
    probs = natural_probs(logits, 2.0)
    found = measure_reliability(probs, labels)
    evaluation = evaluate_probs(probs, probs.argmax(1), labels, tuple("abcde"), n_known=5)
    assert evaluation.log_loss is not None
    assert evaluation.brier is not None
    assert (found.ece, found.nll, found.brier) == pytest.approx(
        (evaluation.ece, evaluation.log_loss.value, evaluation.brier.value)
    )


def test_bins_add_up_to_the_error() -> None:
    logits, labels = _draw(500, 2)
    found = measure_reliability(natural_probs(logits, 1.0), labels)
    assert sum(n for n, _, _ in found.bins) == found.n == 500
    gap = sum(n * abs(confidence - accuracy) for n, confidence, accuracy in found.bins) / 500
    assert gap == pytest.approx(found.ece)


def test_the_temperature_can_be_taken_back() -> None:
    logits, _ = _draw(50, 3)
    np.testing.assert_allclose(
        uncalibrated(natural_probs(logits, 2.5), 2.5), natural_probs(logits, 1.0), atol=1e-9
    )
    sure = np.array([[1.0, 0.0]])
    np.testing.assert_array_equal(uncalibrated(sure, 2.0), sure)


def test_classes_that_the_model_does_not_know_are_left_out() -> None:
    probs = np.array([[0.9, 0.1], [0.2, 0.8]])
    found = compare_reliability(probs, probs, np.array([0, 2]), "test")
    assert found is not None
    assert found["before"]["n"] == 1
    assert compare_reliability(probs, probs, np.array([2, 2]), "test") is None
