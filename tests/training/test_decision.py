import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import log_loss

from pixelplay.config import Metric
from pixelplay.evaluation.calibration import nll_of
from pixelplay.evaluation.decision_rule import DecisionRule, fit_decision_rule, held_out_score


def draw_logits(n: int, temperature: float, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits that are `temperature` times too large for labels drawn from them; three uneven classes."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 3)) * 1.5 + np.log([0.7, 0.25, 0.05])
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (probs.cumsum(1) < rng.random((n, 1))).sum(1)
    return (logits * temperature).astype(np.float32), labels.astype(np.int64)


def fit(
    logits: NDArray[np.float32], labels: NDArray[np.int64], metric: Metric = "accuracy", seed: int = 0
) -> DecisionRule:
    priors = np.bincount(labels, minlength=3) / len(labels)
    return fit_decision_rule(logits, labels, np.arange(len(labels)), priors, metric=metric, seed=seed)


def test_a_planted_temperature_is_found() -> None:
    rule = fit(*draw_logits(20_000, 3.0))
    assert rule.temperature.temperature == pytest.approx(3, rel=0.05)
    assert rule.temperature.nll_after < rule.temperature.nll_before


def test_accuracy_needs_no_correction_of_priors() -> None:
    logits, labels = draw_logits(2000, 1.0)
    rule = fit(logits, labels, "accuracy")
    _, pred = rule.apply(logits)
    assert rule.tau.tau == 0
    np.testing.assert_array_equal(pred, logits.argmax(1))


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1"])
def test_rare_classes_get_a_correction_that_pays(metric: Metric) -> None:
    rule = fit(*draw_logits(4000, 2.0), metric)
    assert rule.tau.tau > 0
    assert rule.tau.value > rule.tau.value_at_zero


def test_decisions_follow_the_formula() -> None:
    logits, labels = draw_logits(1000, 2.0)
    rule = fit(logits, labels, "balanced_accuracy")
    probs, pred = rule.apply(logits)
    scaled = np.exp(logits.astype(np.float64) / rule.temperature.temperature)
    expected = scaled / scaled.sum(1, keepdims=True)
    np.testing.assert_allclose(probs, expected, atol=1e-12)
    corrected = np.log(expected) - rule.tau.tau * np.log(rule.priors)
    np.testing.assert_array_equal(pred, corrected.argmax(1))
    assert (pred != expected.argmax(1)).any()  # with tau > 0 the answer need not be the most probable


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy"])
def test_rows_that_were_not_held_out_take_no_part(metric: Metric) -> None:
    logits, labels = draw_logits(600, 2.0)
    held_out = np.arange(600) % 3 > 0
    with_gaps = np.where(held_out[:, None], logits, np.float32(np.nan))
    priors = np.bincount(labels, minlength=3) / 600
    groups = np.arange(600)
    found = fit_decision_rule(with_gaps, labels, groups, priors, metric=metric, seed=0)
    expected = fit_decision_rule(
        logits[held_out], labels[held_out], groups[held_out], priors, metric=metric, seed=0
    )
    assert found.temperature == expected.temperature
    assert found.tau == expected.tau
    assert found.temperature.n == found.tau.n == held_out.sum()


def test_a_row_of_nan_stays_without_answer() -> None:
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


def test_perfect_held_out_logits_fix_no_temperature() -> None:
    labels = np.arange(90) % 3
    rule = fit((np.eye(3)[labels] * 50).astype(np.float32), labels)
    assert rule.temperature.at_bound
    assert rule.temperature.temperature == 1


METRICS: list[Metric] = ["accuracy", "balanced_accuracy", "macro_f1"]


def score(logits: NDArray[np.float32], labels: NDArray[np.int64], metric: Metric) -> float:
    """The score where training had as many of each class."""
    n_classes = logits.shape[1]
    return held_out_score(logits, labels, np.full(n_classes, 1 / n_classes), metric)


def plant_logits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images whose labels are as frequent as their probabilities say: no temperature beats 1."""
    probs = np.repeat([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], [4, 10], axis=0)
    labels = np.repeat([0, 1, 2, 0, 1, 2], [2, 1, 1, 8, 1, 1])
    return np.log(probs).astype(np.float32), labels


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0, 8.0])
def test_the_planted_score_is_found_at_any_temperature(temperature: float, metric: Metric) -> None:
    logits, labels = plant_logits()
    first = 2 * np.log(2) - 8 * np.log(0.8)  # of the ten images of the first class
    others = np.log(4) + np.log(10)  # of the two of each other class
    expected = (first + 2 * others) / 14 if metric == "accuracy" else (first / 10 + others) / 3
    found = score(logits * np.float32(temperature), labels, metric)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_the_score_does_not_depend_on_how_sure_a_network_is(metric: Metric) -> None:
    logits, labels = draw_logits(2000, 1.0)
    scores = [score(logits * np.float32(t), labels, metric) for t in (0.25, 1, 2, 6)]
    np.testing.assert_allclose(scores, scores[1], atol=1e-5)
    assert nll_of(logits * np.float32(6), labels) > nll_of(logits, labels) + 0.5


@pytest.mark.parametrize("metric", METRICS)
def test_the_score_does_not_depend_on_order_or_on_a_shift_of_all_logits(metric: Metric) -> None:
    logits, labels = draw_logits(500, 1.0)
    expected = score(logits, labels, metric)
    order = np.random.default_rng(0).permutation(500)
    assert score(logits[order], labels[order], metric) == pytest.approx(expected, abs=1e-6)
    assert score(logits + np.float32(7), labels, metric) == pytest.approx(expected, abs=1e-5)


def test_for_accuracy_the_score_is_the_nll_at_the_fitted_temperature() -> None:
    logits, labels = draw_logits(2000, 3.0)
    found = score(logits, labels, "accuracy")
    assert found == pytest.approx(fit(logits, labels).temperature.nll_after, abs=1e-6)
    assert found < nll_of(logits, labels)


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1"])
def test_where_classes_count_alike_the_score_is_the_mean_of_theirs(metric: Metric) -> None:
    logits, labels = draw_logits(2000, 2.0)
    cooled = logits / fit(logits, labels).temperature.temperature
    expected = np.mean([nll_of(cooled[labels == k], labels[labels == k]) for k in range(3)])
    assert score(logits, labels, metric) == pytest.approx(expected, abs=1e-6)
    assert expected > score(logits, labels, "accuracy") + 0.1  # rare classes are harder


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("lean", [-0.7, 0.7])
def test_no_score_prefers_logits_that_lean_towards_rare_or_common_classes(
    lean: float, metric: Metric
) -> None:
    logits, labels = draw_logits(4000, 1.0)
    priors = np.bincount(labels, minlength=3) / len(labels)
    leaning = (logits - lean * np.log(priors)).astype(np.float32)
    natural = held_out_score(logits, labels, priors, metric)
    assert held_out_score(leaning, labels, priors, metric) > natural + 0.01


def test_a_class_without_photographs_has_no_part_in_the_score() -> None:
    logits, labels = plant_logits()
    with_another = np.hstack([logits, np.full((14, 1), -100, np.float32)])
    found = score(with_another, labels, "macro_f1")
    assert found == pytest.approx(score(logits, labels, "macro_f1"), abs=1e-4)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_have_the_worst_score(broken: float, metric: Metric) -> None:
    logits, labels = draw_logits(100, 1.0)
    logits[17, 1] = broken
    assert score(logits, labels, metric) == float("inf")


def test_better_logits_have_a_lower_score() -> None:
    logits, labels = draw_logits(1000, 1.0)
    helped = logits + 0.5 * np.eye(3, dtype=np.float32)[labels]
    for metric in METRICS:
        assert score(helped, labels, metric) < score(logits, labels, metric)


def test_perfect_logits_score_almost_nothing() -> None:
    labels = np.arange(90) % 3
    logits = (np.eye(3)[labels] * 50).astype(np.float32)
    assert score(logits, labels, "macro_f1") == pytest.approx(0, abs=1e-12)


def test_the_nll_is_the_mean_log_loss() -> None:
    logits, labels = draw_logits(400, 2.0)
    shifted = np.exp(logits.astype(np.float64))
    probs = shifted / shifted.sum(1, keepdims=True)
    assert nll_of(logits, labels) == pytest.approx(log_loss(labels, probs), abs=1e-9)
    assert nll_of(np.zeros((7, 5), np.float32), np.arange(7) % 5) == pytest.approx(np.log(5))


def test_the_nll_of_huge_logits_does_not_overflow() -> None:
    logits = np.array([[1e5, 0], [-1e5, 3e4]], np.float32)
    assert nll_of(logits, np.array([0, 1])) == 0
    assert nll_of(logits, np.array([1, 1])) == pytest.approx(5e4)
