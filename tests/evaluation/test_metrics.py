"""Metrics equal scikit-learn's, also under sample weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from pixelplay.evaluation.metrics import (
    areas_under_curves,
    count_labels,
    expected_calibration_error,
    expected_counts,
    label_metric,
    rank_buckets,
)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_label_metrics_equal_scikit_learn_with_missing_classes(pairs: list[tuple[int, int]]) -> None:
    pred, labels = (np.array(column) for column in zip(*pairs, strict=True))
    present = np.unique(labels)
    recalls = reference.recall_score(labels, pred, labels=present, average="macro", zero_division=0)
    f1 = reference.f1_score(labels, pred, labels=present, average="macro", zero_division=0)
    assert label_metric("accuracy", pred, labels) == pytest.approx((pred == labels).mean())
    assert label_metric("balanced_accuracy", pred, labels) == pytest.approx(recalls)
    assert label_metric("macro_f1", pred, labels) == pytest.approx(f1)


def test_weighted_counts_equal_counts_of_repeated_images() -> None:
    rng = np.random.default_rng(0)
    pred, labels = rng.integers(0, 5, 80), rng.integers(0, 5, 80)
    weights = rng.integers(0, 4, (7, 80))
    together = count_labels(pred, labels, 5, weights)
    for r in range(7):
        one = count_labels(np.repeat(pred, weights[r]), np.repeat(labels, weights[r]), 5)
        np.testing.assert_array_equal(np.stack(together)[:, r], np.stack(one))


def test_expected_counts_are_the_mean_over_labels_drawn_from_the_probabilities() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([3, 1, 1], size=40)
    pred = rng.integers(0, 2, 40)  # the third class is never predicted
    drawn = (probs.cumsum(axis=1)[:, None] < rng.random((40, 4000, 1))).sum(axis=2)  # (N, R)
    means = np.mean([np.stack(count_labels(pred, labels, 3)) for labels in drawn.T], axis=0)
    np.testing.assert_allclose(np.stack(expected_counts(pred, probs)), means, atol=0.2)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_weighted_roc_auc_and_average_precision_equal_scikit_learn_with_ties(
    rows: list[tuple[int, bool, int]],
) -> None:
    levels, positive, times = (np.array(column) for column in zip(*rows, strict=True))
    scores = levels / 4
    if not positive.any():
        return
    buckets = rank_buckets(scores, positive)
    roc_auc, average_precision = areas_under_curves(buckets, times[:, None].astype(float))[:, 0]
    if not times[positive].any() or not times[~positive].any():
        assert np.isnan([roc_auc, average_precision]).all()
        return
    assert roc_auc == pytest.approx(reference.roc_auc_score(positive, scores, sample_weight=times))
    repeated, repeated_scores = np.repeat(positive, times), np.repeat(scores, times)
    assert average_precision == pytest.approx(reference.average_precision_score(repeated, repeated_scores))


def test_ece_equals_a_hand_computed_case() -> None:
    """Bin (0.8, 0.867]: two images at 0.85, one correct; bin (0.533, 0.6]: one image at 0.6, correct."""
    probs = np.array([[0.85, 0.15], [0.85, 0.15], [0.4, 0.6]])
    pred, labels = np.array([0, 0, 1]), np.array([0, 1, 1])
    assert expected_calibration_error(probs, pred, labels) == pytest.approx((2 * 0.35 + 0.4) / 3)


def test_ece_of_calibrated_probabilities_is_small() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([1, 1, 1], size=20_000)
    labels = (probs.cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)
    assert expected_calibration_error(probs, probs.argmax(axis=1), labels) < 0.015
