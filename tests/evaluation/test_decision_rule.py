"""A fold's temperature and tau come from the other folds, and from nothing of its own."""

import numpy as np
import pytest

from pixelplay.evaluation.decision_rule import CrossFittedRule, cross_fit_rule


def _draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits twice too large, labels and folds of 900 images; the last is in no fold."""
    rng = np.random.default_rng(seed)
    mild = rng.normal(0, 1.5, (900, 3))
    probs = np.exp(mild) / np.exp(mild).sum(1, keepdims=True)
    labels = (probs.cumsum(1) > rng.random((900, 1))).argmax(1)
    folds = rng.permutation(np.arange(900) % 3)
    folds[-1] = -1
    logits = (2 * mild).astype(np.float32)
    logits[-1] = np.nan
    return logits, labels, folds


def _fit(logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> CrossFittedRule:
    priors = np.full(3, 1 / 3)
    return cross_fit_rule(logits, labels, np.arange(900), folds, priors, metric="macro_f1", seed=0)


def test_labels_of_a_fold_do_not_move_its_own_decision() -> None:
    logits, labels, folds = _draw()
    spoilt = np.where(folds == 1, (labels + 1) % 3, labels)
    before, after = _fit(logits, labels, folds), _fit(logits, spoilt, folds)
    own = [fit.rules[1].temperature.temperature for fit in (before, after)]
    assert own[0] == own[1]
    np.testing.assert_array_equal(before.probs[folds == 1], after.probs[folds == 1])
    for fold in (0, 2):
        others = [fit.rules[fold].temperature.temperature for fit in (before, after)]
        assert others[1] > 1.2 * others[0]


def test_temperatures_are_found_and_what_was_never_held_out_has_no_answer() -> None:
    logits, labels, folds = _draw(1)
    found = _fit(logits, labels, folds)
    assert [d.temperature.temperature for d in found.rules.values()] == pytest.approx([2] * 3, rel=0.3)
    assert np.isnan(found.probs[-1]).all()
    assert found.pred[-1] == -1
    np.testing.assert_allclose(found.probs[:-1].sum(1), 1)
