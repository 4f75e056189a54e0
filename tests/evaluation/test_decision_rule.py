"""Tau and temperature follow their formulas, tau pays for rare classes, and cross-fitting does not leak."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.special import softmax

from pixelplay.config import Metric
from pixelplay.errors import DataError
from pixelplay.evaluation.calibration import fit_temperature, mean_nll, temperature_softmax
from pixelplay.evaluation.decision_rule import (
    DecisionRule,
    adjusted_argmax,
    calibrated_nll,
    cross_fit_rule,
    fit_decision_rule,
    fit_tau,
)
from pixelplay.evaluation.metrics import label_metric

LOGITS = arrays(np.float64, (5, 4), elements=st.floats(-50, 50))
METRICS: list[Metric] = ["accuracy", "balanced_accuracy", "macro_f1"]


def sample_labels(probs: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """Draw one label per row of probabilities."""
    draws = np.random.default_rng(seed).random((len(probs), 1))
    return np.minimum((probs.cumsum(axis=1) < draws).sum(axis=1), probs.shape[1] - 1)


def draw_imbalanced(n: int) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Return calibrated probabilities of a 20:3:1 problem, labels drawn from them, and the priors."""
    priors = np.array([20, 3, 1]) / 24
    evidence = np.random.default_rng(0).normal(scale=1.2, size=(n, 3))
    probs = softmax(evidence + np.log(priors), axis=1)
    labels = sample_labels(probs, seed=1)
    return probs, labels, np.bincount(labels, minlength=3) / n


def draw_logits(n: int, temperature: float, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return logits `temperature` times too large for labels drawn from them; three imbalanced classes."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 3)) * 1.5 + np.log([0.7, 0.25, 0.05])
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (probs.cumsum(1) < rng.random((n, 1))).sum(1)
    return (logits * temperature).astype(np.float32), labels.astype(np.int64)


# --- logit adjustment ---


@given(LOGITS, st.floats(0, 2))
@settings(max_examples=50, deadline=None)
def test_uniform_priors_or_tau_zero_predict_the_argmax(logits: NDArray[np.float64], tau: float) -> None:
    probs = temperature_softmax(logits, 1.0)
    uneven = np.array([0.7, 0.2, 0.05, 0.05])
    np.testing.assert_array_equal(adjusted_argmax(probs, uneven, 0.0), probs.argmax(axis=1))
    chosen = adjusted_argmax(probs, np.full(4, 0.25), tau)
    np.testing.assert_allclose(probs[np.arange(5), chosen], probs.max(axis=1))


def test_tau_one_predicts_the_class_that_exceeds_its_prior_most() -> None:
    probs = np.array([[0.8, 0.2], [0.95, 0.05], [0.0, 1.0], [1.0, 0.0], [np.nan, np.nan]])
    chosen = adjusted_argmax(probs, np.array([0.9, 0.1]), 1.0)
    np.testing.assert_array_equal(chosen, [1, 0, 1, 0, -1])
    assert chosen.dtype == np.int64


# --- fitting tau ---


def test_tau_raises_balanced_accuracy_of_imbalanced_classes() -> None:
    probs, labels, priors = draw_imbalanced(3000)
    tau, evidence = fit_tau(probs, labels, priors, None, metric="balanced_accuracy", seed=0)
    assert 0.9 <= tau <= 1.1  # 1 is Bayes-optimal
    assert tau == evidence["expected"]
    assert evidence["metric_value"] > evidence["metric_at_zero"] + 0.1
    value = label_metric("balanced_accuracy", adjusted_argmax(probs, priors, tau), labels)
    assert evidence["metric_value"] == pytest.approx(value)


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_tau_is_the_nearest_to_the_expected_within_one_standard_error(
    metric: Metric, temperature: float
) -> None:
    probs, labels, priors = draw_imbalanced(600)
    probs = softmax(np.log(probs) / temperature, axis=1)  # calibrated at 1 only
    tau, evidence = fit_tau(probs, labels, priors, None, metric=metric, seed=0)
    grid = np.arange(41) / 20
    values = np.array([label_metric(metric, adjusted_argmax(probs, priors, t), labels) for t in grid])
    within = grid[values >= values.max() - evidence["standard_error"]]
    assert tau in within
    assert abs(tau - evidence["expected"]) == pytest.approx(np.abs(within - evidence["expected"]).min())
    assert evidence["metric_value"] == pytest.approx(values[grid == tau][0])
    assert evidence["metric_at_zero"] == pytest.approx(values[0])
    assert evidence["standard_error"] > 0


def test_labels_override_the_expected_tau_of_uncalibrated_probabilities() -> None:
    probs, _, priors = draw_imbalanced(3000)
    labels = probs.argmax(axis=1)  # the most probable class is always correct
    tau, evidence = fit_tau(probs, labels, priors, None, metric="balanced_accuracy", seed=0)
    assert evidence["expected"] > 0.8
    assert (tau, evidence["metric_value"]) == (0, 1)


def test_the_expected_tau_does_not_depend_on_labels() -> None:
    probs, labels, priors = draw_imbalanced(600)
    first, second = (
        fit_tau(probs, own, priors, None, metric="macro_f1", seed=0)[1] for own in (labels, labels[::-1])
    )
    assert first["expected"] == second["expected"]
    assert first["metric_at_zero"] != second["metric_at_zero"]


def test_tau_is_zero_for_accuracy() -> None:
    probs, labels, priors = draw_imbalanced(400)
    tau, evidence = fit_tau(probs, labels, priors, None, metric="accuracy", seed=0)
    assert tau == evidence["expected"] == 0
    accuracy = (probs.argmax(axis=1) == labels).mean()
    assert evidence["metric_value"] == evidence["metric_at_zero"] == accuracy


def test_standard_error_of_tau_is_that_of_a_proportion_and_grows_with_groups() -> None:
    probs, labels, priors = draw_imbalanced(500)
    _, single = fit_tau(probs, labels, priors, None, metric="accuracy", seed=0)
    value = single["metric_value"]
    assert single["standard_error"] == pytest.approx(np.sqrt(value * (1 - value) / 500), rel=0.2)
    four = [np.repeat(array, 4, axis=0) for array in (probs, labels)]
    groups = np.repeat(np.arange(500), 4)
    _, grouped = fit_tau(*four, priors, groups, metric="accuracy", seed=0)
    _, ungrouped = fit_tau(*four, priors, None, metric="accuracy", seed=0)
    assert grouped["standard_error"] / ungrouped["standard_error"] == pytest.approx(2, rel=0.25)


def test_tau_rejects_labels_outside_the_model() -> None:
    with pytest.raises(DataError, match="label 2 in row 0 is outside the 2 classes"):
        fit_tau(np.full((1, 2), 0.5), np.array([2]), np.full(2, 0.5), None, metric="macro_f1", seed=0)


# --- the rule ---


def fit(
    logits: NDArray[np.float32], labels: NDArray[np.int64], metric: Metric = "accuracy", seed: int = 0
) -> DecisionRule:
    priors = np.bincount(labels, minlength=3) / len(labels)
    return fit_decision_rule(logits, labels, np.arange(len(labels)), priors, metric=metric, seed=seed)


def test_a_rule_finds_a_planted_temperature() -> None:
    rule = fit(*draw_logits(20_000, 3.0))
    assert rule.temperature == pytest.approx(3, rel=0.05)
    evidence = rule.evidence["temperature"]
    assert evidence["nll_after"] < evidence["nll_before"]


def test_a_rule_for_accuracy_predicts_the_argmax() -> None:
    logits, labels = draw_logits(2000, 1.0)
    rule = fit(logits, labels, "accuracy")
    _, pred = rule.apply(logits)
    assert rule.tau == 0
    np.testing.assert_array_equal(pred, logits.argmax(1))


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1"])
def test_tau_of_a_rule_improves_metrics_that_weight_classes_equally(metric: Metric) -> None:
    rule = fit(*draw_logits(4000, 2.0), metric)
    assert rule.tau > 0
    assert rule.evidence["tau"]["metric_value"] > rule.evidence["tau"]["metric_at_zero"]


def test_a_rule_applies_temperature_then_logit_adjustment() -> None:
    logits, labels = draw_logits(1000, 2.0)
    rule = fit(logits, labels, "balanced_accuracy")
    probs, pred = rule.apply(logits)
    scaled = np.exp(logits.astype(np.float64) / rule.temperature)
    expected = scaled / scaled.sum(1, keepdims=True)
    np.testing.assert_allclose(probs, expected, atol=1e-12)
    adjusted = np.log(expected) - rule.tau * np.log(rule.priors)
    np.testing.assert_array_equal(pred, adjusted.argmax(1))
    assert (pred != expected.argmax(1)).any()  # with tau > 0 the prediction need not be the argmax


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy"])
def test_a_rule_ignores_rows_that_were_not_held_out(metric: Metric) -> None:
    logits, labels = draw_logits(600, 2.0)
    held_out = np.arange(600) % 3 > 0
    with_gaps = np.where(held_out[:, None], logits, np.float32(np.nan))
    priors = np.bincount(labels, minlength=3) / 600
    groups = np.arange(600)
    found = fit_decision_rule(with_gaps, labels, groups, priors, metric=metric, seed=0)
    expected = fit_decision_rule(
        logits[held_out], labels[held_out], groups[held_out], priors, metric=metric, seed=0
    )
    assert (found.temperature, found.tau) == (expected.temperature, expected.tau)
    assert found.evidence == expected.evidence
    assert found.evidence["temperature"]["n"] == found.evidence["tau"]["n"] == held_out.sum()


def test_a_rule_predicts_nothing_for_a_row_of_nan() -> None:
    logits, labels = draw_logits(300, 1.0)
    rule = fit(logits, labels, "macro_f1")
    holes = logits.copy()
    holes[[0, 7]] = np.nan
    probs, pred = rule.apply(holes)
    whole_probs, whole_pred = rule.apply(logits)
    rest = np.delete(np.arange(300), [0, 7])
    assert np.isnan(probs[[0, 7]]).all()
    np.testing.assert_array_equal(pred[[0, 7]], -1)
    np.testing.assert_array_equal(probs[rest], whole_probs[rest])
    np.testing.assert_array_equal(pred[rest], whole_pred[rest])


def test_a_rule_of_perfect_logits_has_temperature_one() -> None:
    labels = np.arange(90) % 3
    rule = fit((np.eye(3)[labels] * 50).astype(np.float32), labels)
    assert rule.evidence["temperature"]["at_bound"]
    assert rule.temperature == 1


# --- the score for model selection ---


def score(logits: NDArray[np.float32], labels: NDArray[np.int64], metric: Metric) -> float:
    """Return the score under uniform priors."""
    n_classes = logits.shape[1]
    return calibrated_nll(logits, labels, np.full(n_classes, 1 / n_classes), metric)


def plant_logits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return logits whose labels are as frequent as their probabilities: no temperature is better than 1."""
    probs = np.repeat([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], [4, 10], axis=0)
    labels = np.repeat([0, 1, 2, 0, 1, 2], [2, 1, 1, 8, 1, 1])
    return np.log(probs).astype(np.float32), labels


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0, 8.0])
def test_calibrated_nll_equals_a_hand_computed_case(temperature: float, metric: Metric) -> None:
    logits, labels = plant_logits()
    first = 2 * np.log(2) - 8 * np.log(0.8)  # of the ten images of the first class
    others = np.log(4) + np.log(10)  # of the two of each other class
    expected = (first + 2 * others) / 14 if metric == "accuracy" else (first / 10 + others) / 3
    found = score(logits * np.float32(temperature), labels, metric)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_calibrated_nll_does_not_depend_on_the_temperature_of_logits(metric: Metric) -> None:
    logits, labels = draw_logits(2000, 1.0)
    scores = [score(logits * np.float32(t), labels, metric) for t in (0.25, 1, 2, 6)]
    np.testing.assert_allclose(scores, scores[1], atol=1e-5)
    assert mean_nll(logits * np.float32(6), labels) > mean_nll(logits, labels) + 0.5


@pytest.mark.parametrize("metric", METRICS)
def test_calibrated_nll_does_not_depend_on_order_or_on_a_shift_of_all_logits(metric: Metric) -> None:
    logits, labels = draw_logits(500, 1.0)
    expected = score(logits, labels, metric)
    order = np.random.default_rng(0).permutation(500)
    assert score(logits[order], labels[order], metric) == pytest.approx(expected, abs=1e-6)
    assert score(logits + np.float32(7), labels, metric) == pytest.approx(expected, abs=1e-5)


def test_calibrated_nll_for_accuracy_is_the_nll_at_the_fitted_temperature() -> None:
    logits, labels = draw_logits(2000, 3.0)
    found = score(logits, labels, "accuracy")
    assert found == pytest.approx(fit_temperature(logits, labels)[1]["nll_after"], abs=1e-6)
    assert found < mean_nll(logits, labels)


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1"])
def test_calibrated_nll_for_balanced_metrics_is_the_mean_over_classes(metric: Metric) -> None:
    logits, labels = draw_logits(2000, 2.0)
    scaled = logits / fit_temperature(logits, labels)[0]
    expected = np.mean([mean_nll(scaled[labels == k], labels[labels == k]) for k in range(3)])
    assert score(logits, labels, metric) == pytest.approx(expected, abs=1e-6)
    assert expected > score(logits, labels, "accuracy") + 0.1  # rare classes are harder


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bias", [-0.7, 0.7])
def test_calibrated_nll_does_not_prefer_logits_biased_towards_rare_or_common_classes(
    bias: float, metric: Metric
) -> None:
    logits, labels = draw_logits(4000, 1.0)
    priors = np.bincount(labels, minlength=3) / len(labels)
    biased = (logits - bias * np.log(priors)).astype(np.float32)
    natural = calibrated_nll(logits, labels, priors, metric)
    assert calibrated_nll(biased, labels, priors, metric) > natural + 0.01


def test_calibrated_nll_ignores_a_class_without_images() -> None:
    logits, labels = plant_logits()
    with_another = np.hstack([logits, np.full((14, 1), -100, np.float32)])
    found = score(with_another, labels, "macro_f1")
    assert found == pytest.approx(score(logits, labels, "macro_f1"), abs=1e-4)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_calibrated_nll_of_logits_that_are_not_finite_is_infinite(broken: float, metric: Metric) -> None:
    logits, labels = draw_logits(100, 1.0)
    logits[17, 1] = broken
    assert score(logits, labels, metric) == float("inf")


@pytest.mark.parametrize("metric", METRICS)
def test_better_logits_have_a_lower_calibrated_nll(metric: Metric) -> None:
    logits, labels = draw_logits(1000, 1.0)
    better = logits + 0.5 * np.eye(3, dtype=np.float32)[labels]
    assert score(better, labels, metric) < score(logits, labels, metric)


def test_calibrated_nll_of_perfect_logits_is_nearly_zero() -> None:
    labels = np.arange(90) % 3
    logits = (np.eye(3)[labels] * 50).astype(np.float32)
    assert score(logits, labels, "macro_f1") == pytest.approx(0, abs=1e-12)


# --- cross-fitting ---


def draw_folds(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Return logits twice too large, labels and folds of 900 images; the last image is in no fold."""
    rng = np.random.default_rng(seed)
    calibrated = rng.normal(0, 1.5, (900, 3))
    labels = (softmax(calibrated, axis=1).cumsum(1) > rng.random((900, 1))).argmax(1)
    folds = rng.permutation(np.arange(900) % 3)
    folds[-1] = -1
    logits = (2 * calibrated).astype(np.float32)
    logits[-1] = np.nan
    return logits, labels, folds


def cross_fit(
    logits: NDArray[np.float32], labels: NDArray[np.int64], folds: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], dict[int, DecisionRule]]:
    return cross_fit_rule(logits, labels, np.arange(900), folds, np.full(3, 1 / 3), metric="macro_f1", seed=0)


def test_labels_of_a_fold_do_not_change_its_own_cross_fitted_temperature() -> None:
    logits, labels, folds = draw_folds()
    corrupted = np.where(folds == 1, (labels + 1) % 3, labels)
    probs, _, rules = cross_fit(logits, labels, folds)
    other_probs, _, other_rules = cross_fit(logits, corrupted, folds)
    assert rules[1].temperature == other_rules[1].temperature
    np.testing.assert_array_equal(probs[folds == 1], other_probs[folds == 1])
    for fold in (0, 2):
        assert other_rules[fold].temperature > 1.2 * rules[fold].temperature


def test_cross_fitting_finds_temperatures_and_skips_images_never_held_out() -> None:
    probs, pred, rules = cross_fit(*draw_folds(1))
    assert [rule.temperature for rule in rules.values()] == pytest.approx([2] * 3, rel=0.3)
    assert np.isnan(probs[-1]).all()
    assert pred[-1] == -1
    np.testing.assert_allclose(probs[:-1].sum(1), 1)
