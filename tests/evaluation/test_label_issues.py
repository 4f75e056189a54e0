"""Planted wrong labels are found and come first; right ones of hard classes are left alone."""

import numpy as np
import pytest

from pixelplay.evaluation.label_issues import find_label_issues


def _noisy(n: int, n_classes: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Calibrated probabilities, labels of which some are flipped, and which those are."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (n, n_classes))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (probs.cumsum(1) > rng.random((n, 1))).argmax(1)
    is_flipped = rng.random(n) < share
    labels = np.where(is_flipped, (labels + rng.integers(1, n_classes, n)) % n_classes, labels)
    return probs, labels, is_flipped


def test_planted_flips_come_first() -> None:
    probs, labels, is_flipped = _noisy(4000, 5, 0.05, seed=0)
    found = find_label_issues(probs, labels)
    first = found.order[: is_flipped.sum()]
    assert is_flipped[first].mean() > 0.5  # where the truth itself is uncertain nobody can tell
    assert is_flipped[found.is_issue].mean() > 0.3
    assert found.is_issue[is_flipped].mean() > 0.6
    assert is_flipped[found.order[:50]].mean() > 0.8


def test_what_is_proposed_is_the_best_other_class() -> None:
    probs, labels, _ = _noisy(500, 4, 0.1, seed=1)
    found = find_label_issues(probs, labels)
    assert found.is_issue.any()
    assert (found.proposed != labels).all()
    rows = np.flatnonzero(found.is_issue)
    np.testing.assert_array_equal(found.proposed[rows], probs[rows].argmax(1))
    assert (probs[rows, found.proposed[rows]] > 9 * probs[rows, labels[rows]]).all()


def test_quality_compares_the_given_label_with_the_best_other_one() -> None:
    probs = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.1, 0.3, 0.6], [0.0, 0.0, 1.0]])
    found = find_label_issues(probs, np.array([0, 0, 0, 0, 1]))
    np.testing.assert_allclose(found.quality, [0.5, 1.0, 0.0, 1 / 7, 0.0])
    np.testing.assert_array_equal(found.is_issue, [False, False, True, False, True])


@pytest.mark.parametrize("seed", range(3))
def test_the_order_does_not_depend_on_how_classes_are_numbered(seed: int) -> None:
    probs, labels, _ = _noisy(200, 4, 0.1, seed)
    turned = find_label_issues(probs[:, ::-1].copy(), 3 - labels)
    found = find_label_issues(probs, labels)
    np.testing.assert_array_equal(turned.order, found.order)
    np.testing.assert_array_equal(turned.is_issue, found.is_issue)
    np.testing.assert_array_equal(3 - turned.proposed, found.proposed)
