"""Planted temperatures and priors are found, and perfect data change nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.special import softmax

from pixelplay.config import Metric
from pixelplay.errors import DataError
from pixelplay.evaluation.calibration import fit_temperature, natural_probs
from pixelplay.evaluation.decision_rule import decide, fit_tau
from pixelplay.evaluation.evaluate import balanced_accuracy

LOGITS = arrays(np.float64, (5, 4), elements=st.floats(-50, 50))


def sample_labels(probs: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """Draw one label per row of probabilities."""
    draws = np.random.default_rng(seed).random((len(probs), 1))
    return np.minimum((probs.cumsum(axis=1) < draws).sum(axis=1), probs.shape[1] - 1)


@pytest.mark.parametrize("planted", [0.5, 3.0])
def test_planted_temperature_is_found_within_five_percent(planted: float) -> None:
    logits = np.random.default_rng(0).normal(scale=2, size=(8000, 5))
    labels = sample_labels(softmax(logits, axis=1), seed=1)
    fit = fit_temperature((logits * planted).astype(np.float32), labels)
    assert fit.temperature == pytest.approx(planted, rel=0.05)
    assert fit.nll_after < fit.nll_before
    assert (fit.n, fit.at_bound) == (8000, False)


@pytest.mark.parametrize("margin", [1.0, 8.0, 400.0])
def test_perfect_data_leave_temperature_one(margin: float) -> None:
    labels = np.arange(40) % 4
    fit = fit_temperature(margin * np.eye(4)[labels], labels)
    assert fit.temperature == 1
    assert fit.at_bound
    assert fit.nll_after == fit.nll_before


def test_a_model_that_learned_nothing_leaves_temperature_one() -> None:
    labels = np.arange(40) % 4
    always_wrong = 5 * np.eye(4)[(labels + 1) % 4]
    for logits in (np.zeros((40, 4)), always_wrong):
        fit = fit_temperature(logits, labels)
        assert (fit.temperature, fit.at_bound) == (1, True)


def test_fitted_temperature_is_a_minimum() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(200, 3))
    labels = sample_labels(softmax(2 * logits, axis=1), seed=4)
    fit = fit_temperature(logits, labels)
    for factor in (0.97, 1.03):
        probs = natural_probs(logits, fit.temperature * factor)
        assert -np.log(probs[np.arange(200), labels]).mean() > fit.nll_after


def test_temperature_refuses_what_it_cannot_use() -> None:
    with pytest.raises(DataError, match="label 3 in row 1 is outside the 3 classes"):
        fit_temperature(np.zeros((2, 3)), np.array([0, 3]))
    with pytest.raises(DataError, match="0 images have labels"):
        fit_temperature(np.zeros((0, 3)), np.array([], dtype=np.int64))
    with pytest.raises(DataError, match="row 1 is not finite"):
        fit_temperature(np.array([[0.0, 1.0], [np.nan, 0.0]]), np.array([0, 1]))
    with pytest.raises(DataError, match="3 rows do not fit 2 labels"):
        fit_temperature(np.zeros((3, 2)), np.array([0, 1]))


@given(LOGITS, st.floats(0.05, 20))
@settings(max_examples=50, deadline=None)
def test_natural_probs_are_the_softmax_and_keep_the_ranking(
    logits: NDArray[np.float64], temperature: float
) -> None:
    probs = natural_probs(logits, temperature)
    np.testing.assert_allclose(probs, softmax(logits / temperature, axis=1), rtol=1e-12)
    np.testing.assert_allclose(probs.sum(axis=1), 1)
    chosen = logits[np.arange(5), probs.argmax(axis=1)]
    np.testing.assert_allclose(chosen, logits.max(axis=1), atol=1e-9)


def test_natural_probs_survive_huge_logits_and_keep_missing_rows() -> None:
    probs = natural_probs(np.array([[1e5, 0.0], [np.nan, np.nan]], dtype=np.float32), 1.0)
    np.testing.assert_array_equal(probs[0], [1, 0])
    assert np.isnan(probs[1]).all()
    assert probs.dtype == np.float64


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_natural_probs_refuse_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(DataError, match="temperature is"):
        natural_probs(np.zeros((1, 2)), temperature)


@given(LOGITS, st.floats(0, 2))
@settings(max_examples=50, deadline=None)
def test_equal_priors_or_no_tau_decide_as_argmax(logits: NDArray[np.float64], tau: float) -> None:
    probs = natural_probs(logits, 1.0)
    uneven = np.array([0.7, 0.2, 0.05, 0.05])
    np.testing.assert_array_equal(decide(probs, uneven, 0.0), probs.argmax(axis=1))
    chosen = decide(probs, np.full(4, 0.25), tau)
    np.testing.assert_allclose(probs[np.arange(5), chosen], probs.max(axis=1))


def test_tau_one_chooses_what_rose_most_over_its_prior() -> None:
    probs = np.array([[0.8, 0.2], [0.95, 0.05], [0.0, 1.0], [1.0, 0.0], [np.nan, np.nan]])
    chosen = decide(probs, np.array([0.9, 0.1]), 1.0)
    np.testing.assert_array_equal(chosen, [1, 0, 1, 0, -1])
    assert chosen.dtype == np.int64


def test_decide_names_a_class_without_prior() -> None:
    with pytest.raises(DataError, match="class 1 has prior 0"):
        decide(np.full((1, 2), 0.5), np.array([1.0, 0.0]), 0.5)
    with pytest.raises(DataError, match="3 priors do not fit 2 classes"):
        decide(np.full((1, 2), 0.5), np.full(3, 1 / 3), 0.5)


def draw_uneven(n: int) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Return honest natural probabilities of a 20:3:1 problem, labels drawn from them, and the priors."""
    priors = np.array([20, 3, 1]) / 24
    evidence = np.random.default_rng(0).normal(scale=1.2, size=(n, 3))
    probs = softmax(evidence + np.log(priors), axis=1)
    labels = sample_labels(probs, seed=1)
    return probs, labels, np.bincount(labels, minlength=3) / n


def test_tau_lifts_balanced_accuracy_of_uneven_classes() -> None:
    probs, labels, priors = draw_uneven(3000)
    fit = fit_tau(probs, labels, priors, None, metric="balanced_accuracy", seed=0)
    assert 0.9 <= fit.tau <= 1.1  # 1 is Bayes-optimal
    assert fit.tau == fit.expected_tau
    assert fit.value > fit.value_at_zero + 0.1
    assert fit.value == pytest.approx(balanced_accuracy(decide(probs, priors, fit.tau), labels))


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1"])
@pytest.mark.parametrize("cooling", [0.3, 1.0, 3.0])
def test_tau_is_the_nearest_to_the_expected_within_one_standard_error(metric: Metric, cooling: float) -> None:
    probs, labels, priors = draw_uneven(600)
    probs = softmax(np.log(probs) / cooling, axis=1)  # only at 1 do they mean what they say
    fit = fit_tau(probs, labels, priors, None, metric=metric, seed=0)
    values, grid = np.array(fit.values), np.array(fit.grid)
    within = grid[values >= values.max() - fit.standard_error]
    assert fit.tau in within
    assert np.abs(fit.tau - fit.expected_tau) == pytest.approx(np.abs(within - fit.expected_tau).min())
    np.testing.assert_allclose(fit.grid, np.arange(0, 2.01, 0.05))
    assert fit.value_at_zero == values[0]
    assert fit.standard_error > 0


def test_labels_overrule_probabilities_that_do_not_mean_what_they_say() -> None:
    probs, _, priors = draw_uneven(3000)
    labels = probs.argmax(axis=1)  # the most probable class is right each time
    fit = fit_tau(probs, labels, priors, None, metric="balanced_accuracy", seed=0)
    assert fit.expected_tau > 0.8
    assert (fit.tau, fit.value) == (0, 1)


def test_the_expected_tau_does_not_depend_on_labels() -> None:
    probs, labels, priors = draw_uneven(600)
    fits = [
        fit_tau(probs, given, priors, None, metric="macro_f1", seed=0) for given in (labels, labels[::-1])
    ]
    assert fits[0].expected_tau == fits[1].expected_tau
    assert fits[0].values != fits[1].values


def test_accuracy_never_gets_a_tau() -> None:
    probs, labels, priors = draw_uneven(400)
    fit = fit_tau(probs, labels, priors, None, metric="accuracy", seed=0)
    assert (fit.tau, fit.grid) == (0, (0.0,))
    assert fit.value == fit.value_at_zero == (probs.argmax(axis=1) == labels).mean()


def test_standard_error_is_that_of_a_proportion_and_grows_with_groups() -> None:
    probs, labels, priors = draw_uneven(500)
    single = fit_tau(probs, labels, priors, None, metric="accuracy", seed=0)
    assert single.standard_error == pytest.approx(np.sqrt(single.value * (1 - single.value) / 500), rel=0.2)
    four = [np.repeat(array, 4, axis=0) for array in (probs, labels)]
    groups = np.repeat(np.arange(500), 4)
    grouped = fit_tau(*four, priors, groups, metric="accuracy", seed=0)
    ungrouped = fit_tau(*four, priors, None, metric="accuracy", seed=0)
    assert grouped.standard_error / ungrouped.standard_error == pytest.approx(2, rel=0.25)


def test_tau_refuses_labels_outside_the_model() -> None:
    with pytest.raises(DataError, match="label 2 in row 0 is outside the 2 classes"):
        fit_tau(np.full((1, 2), 0.5), np.array([2]), np.full(2, 0.5), None, metric="macro_f1", seed=0)
