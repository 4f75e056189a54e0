import numpy as np
import pytest
from numpy.typing import NDArray

from pixelplay.config import Metric
from pixelplay.evaluation.decision import Decision, fit_decision


def draw_logits(n: int, temperature: float, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits that are `temperature` times too large for labels drawn from them; three uneven classes."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 3)) * 1.5 + np.log([0.7, 0.25, 0.05])
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (probs.cumsum(1) < rng.random((n, 1))).sum(1)
    return (logits * temperature).astype(np.float32), labels.astype(np.int64)


def fit(
    logits: NDArray[np.float32], labels: NDArray[np.int64], metric: Metric = "accuracy", seed: int = 0
) -> Decision:
    priors = np.bincount(labels, minlength=3) / len(labels)
    return fit_decision(logits, labels, np.arange(len(labels)), priors, metric=metric, seed=seed)


def test_a_planted_temperature_is_found() -> None:
    decision = fit(*draw_logits(20_000, 3.0))
    assert decision.temperature.temperature == pytest.approx(3, rel=0.05)
    assert decision.temperature.nll_after < decision.temperature.nll_before


def test_accuracy_needs_no_correction_of_priors() -> None:
    logits, labels = draw_logits(2000, 1.0)
    decision = fit(logits, labels, "accuracy")
    _, pred = decision.apply(logits)
    assert decision.tau.tau == 0
    np.testing.assert_array_equal(pred, logits.argmax(1))


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1"])
def test_rare_classes_get_a_correction_that_pays(metric: Metric) -> None:
    decision = fit(*draw_logits(4000, 2.0), metric)
    assert decision.tau.tau > 0
    assert decision.tau.value > decision.tau.value_at_zero


def test_decisions_follow_the_formula() -> None:
    logits, labels = draw_logits(1000, 2.0)
    decision = fit(logits, labels, "balanced_accuracy")
    probs, pred = decision.apply(logits)
    scaled = np.exp(logits.astype(np.float64) / decision.temperature.temperature)
    expected = scaled / scaled.sum(1, keepdims=True)
    np.testing.assert_allclose(probs, expected, atol=1e-12)
    corrected = np.log(expected) - decision.tau.tau * np.log(decision.priors)
    np.testing.assert_array_equal(pred, corrected.argmax(1))
    assert (pred != expected.argmax(1)).any()  # with tau > 0 the answer need not be the most probable


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy"])
def test_rows_that_were_not_held_out_take_no_part(metric: Metric) -> None:
    logits, labels = draw_logits(600, 2.0)
    held_out = np.arange(600) % 3 > 0
    with_gaps = np.where(held_out[:, None], logits, np.float32(np.nan))
    priors = np.bincount(labels, minlength=3) / 600
    groups = np.arange(600)
    found = fit_decision(with_gaps, labels, groups, priors, metric=metric, seed=0)
    expected = fit_decision(
        logits[held_out], labels[held_out], groups[held_out], priors, metric=metric, seed=0
    )
    assert found.temperature == expected.temperature
    assert found.tau == expected.tau
    assert found.temperature.n == found.tau.n == held_out.sum()


def test_a_row_of_nan_stays_without_answer() -> None:
    logits, labels = draw_logits(300, 1.0)
    decision = fit(logits, labels, "macro_f1")
    holes = logits.copy()
    holes[[0, 7]] = np.nan
    probs, pred = decision.apply(holes)
    whole_probs, whole_pred = decision.apply(logits)
    rest = np.delete(np.arange(300), [0, 7])
    assert np.isnan(probs[[0, 7]]).all()
    np.testing.assert_array_equal(pred[[0, 7]], -1)
    np.testing.assert_array_equal(probs[rest], whole_probs[rest])
    np.testing.assert_array_equal(pred[rest], whole_pred[rest])


def test_perfect_held_out_logits_fix_no_temperature() -> None:
    labels = np.arange(90) % 3
    decision = fit((np.eye(3)[labels] * 50).astype(np.float32), labels)
    assert decision.temperature.at_bound
    assert decision.temperature.temperature == 1
