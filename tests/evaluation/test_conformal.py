"""Prediction sets contain the true class with the requested coverage and are never empty."""

import numpy as np
import pytest

from pixelplay.config import ConformalScore
from pixelplay.errors import DataError
from pixelplay.evaluation.conformal import (
    fit_conformal_threshold,
    nonconformity_scores,
    prediction_sets,
    true_class_scores,
)

SCORES: list[ConformalScore] = ["lac", "aps"]


def _draw(n: int, seed: int, n_classes: int = 6, sharpness: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Return over-confident probabilities, and labels drawn from the calibrated ones."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, n_classes))
    calibrated = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (calibrated.cumsum(1) > rng.random((n, 1))).argmax(1)
    sharp = np.exp(sharpness * logits)
    return sharp / sharp.sum(1, keepdims=True), labels


@pytest.mark.parametrize("method", SCORES)
@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_conformal_sets_have_the_requested_coverage(method: ConformalScore, coverage: float) -> None:
    covered = []
    for seed in range(60):
        probs, labels = _draw(1400, seed)
        threshold = fit_conformal_threshold(true_class_scores(probs[:400], labels[:400], method), coverage)
        in_set = nonconformity_scores(probs[400:], method) <= threshold
        covered.append(in_set[np.arange(1000), labels[400:]].mean())
    assert coverage - 0.006 <= np.mean(covered) <= coverage + 0.012


@pytest.mark.parametrize("method", SCORES)
def test_no_prediction_set_is_empty_and_the_argmax_is_in_it(method: ConformalScore) -> None:
    probs, labels = _draw(500, 0)
    threshold = fit_conformal_threshold(true_class_scores(probs, labels, method), 0.3)
    assert (nonconformity_scores(probs, method) <= threshold).any(axis=1).all() == (method == "aps")
    in_set = prediction_sets(probs, threshold, method)
    assert in_set[np.arange(500), probs.argmax(1)].all()


@pytest.mark.parametrize("method", SCORES)
def test_prediction_sets_grow_with_coverage_and_contain_all_more_probable_classes(
    method: ConformalScore,
) -> None:
    probs, labels = _draw(300, 1)
    scores = true_class_scores(probs, labels, method)
    small, large = (prediction_sets(probs, fit_conformal_threshold(scores, c), method) for c in (0.7, 0.95))
    assert (small <= large).all()
    assert small.sum() < large.sum()
    ranks = (-probs).argsort(1).argsort(1)
    for row, rank in zip(large, ranks, strict=True):
        assert row[rank < row.sum()].all()


def test_threshold_is_the_rank_of_split_conformal_prediction() -> None:
    scores = np.arange(1, 10) / 10  # nine
    assert fit_conformal_threshold(scores, 0.9) == 0.9
    assert fit_conformal_threshold(scores, 0.5) == 0.5
    assert fit_conformal_threshold(scores, 0.51) == 0.6
    with pytest.raises(
        DataError, match=r"coverage=0\.95 needs 19 held-out images and the model has 9; .* 0\.9$"
    ):
        fit_conformal_threshold(scores, 0.95)
    assert fit_conformal_threshold(np.arange(19) / 19, 0.95) == 18 / 19


def test_a_row_of_nan_has_an_empty_prediction_set() -> None:
    probs = np.array([[np.nan, np.nan], [0.9, 0.1]])
    np.testing.assert_array_equal(prediction_sets(probs, 0.5, "lac"), [[False, False], [True, False]])


def test_aps_sums_all_more_probable_classes() -> None:
    np.testing.assert_allclose(nonconformity_scores(np.array([[0.2, 0.5, 0.3]]), "aps"), [[0.8, 0.0, 0.5]])
    np.testing.assert_allclose(nonconformity_scores(np.array([[0.2, 0.5, 0.3]]), "lac"), [[0.8, 0.5, 0.7]])
