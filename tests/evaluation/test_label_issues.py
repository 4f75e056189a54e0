"""Planted label errors get the lowest scores; correct labels of hard classes are not label issues."""

import numpy as np
import pytest

from pixelplay.evaluation.label_issues import find_label_issues


def _flip_labels(
    n: int, n_classes: int, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return calibrated probabilities, labels with some flipped, and the mask of those."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (n, n_classes))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (probs.cumsum(1) > rng.random((n, 1))).argmax(1)
    is_flipped = rng.random(n) < fraction
    labels = np.where(is_flipped, (labels + rng.integers(1, n_classes, n)) % n_classes, labels)
    return probs, labels, is_flipped


def test_flipped_labels_are_found_as_label_issues() -> None:
    probs, labels, is_flipped = _flip_labels(4000, 5, 0.05, seed=0)
    scores, _, is_issue = find_label_issues(probs, labels)
    order = np.argsort(scores)
    assert is_flipped[order[: is_flipped.sum()]].mean() > 0.5  # the truth itself is partly uncertain
    assert is_flipped[is_issue].mean() > 0.3
    assert is_issue[is_flipped].mean() > 0.6
    assert is_flipped[order[:50]].mean() > 0.8


def test_the_suggested_label_is_the_most_probable_other_class() -> None:
    probs, labels, _ = _flip_labels(500, 4, 0.1, seed=1)
    _, suggested, is_issue = find_label_issues(probs, labels)
    assert is_issue.any()
    assert (suggested != labels).all()
    rows = np.flatnonzero(is_issue)
    np.testing.assert_array_equal(suggested[rows], probs[rows].argmax(1))
    assert (probs[rows, suggested[rows]] > 9 * probs[rows, labels[rows]]).all()


def test_the_score_compares_a_label_with_the_best_other_class() -> None:
    probs = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.1, 0.3, 0.6], [0.0, 0.0, 1.0]])
    scores, _, is_issue = find_label_issues(probs, np.array([0, 0, 0, 0, 1]))
    np.testing.assert_allclose(scores, [0.5, 1.0, 0.0, 1 / 7, 0.0])
    np.testing.assert_array_equal(is_issue, [False, False, True, False, True])


@pytest.mark.parametrize("seed", range(3))
def test_label_issues_do_not_depend_on_the_order_of_classes(seed: int) -> None:
    probs, labels, _ = _flip_labels(200, 4, 0.1, seed)
    reversed_scores, reversed_suggested, reversed_is_issue = find_label_issues(
        probs[:, ::-1].copy(), 3 - labels
    )
    scores, suggested, is_issue = find_label_issues(probs, labels)
    np.testing.assert_array_equal(reversed_scores, scores)
    np.testing.assert_array_equal(reversed_is_issue, is_issue)
    np.testing.assert_array_equal(3 - reversed_suggested, suggested)
