"""Learning curve: would more training images help?"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pixelplay.array_types import BoolArray, IntArray
from pixelplay.evaluation.comparison import newcombe
from pixelplay.evaluation.decision_rule import DecisionRule
from pixelplay.evaluation.intervals import wilson
from pixelplay.training.feature_weights import column_factors
from pixelplay.training.imbalance import fit_probe_on_subset
from pixelplay.training.linear_probe import folds_to_search
from pixelplay.training.trained_classifier import TrainedClassifier
from pixelplay.training.training_data import TrainingData

FRACTIONS = (0.25, 0.5)  # of each class; all images are measured anyway
MIN_IMAGES = 8  # per class: a quarter of fewer is hardly any


def measure_learning_curve(
    data: TrainingData, classifier: TrainedClassifier, rule: DecisionRule, seed: int
) -> Mapping[str, Any] | None:
    """Fit the linear probe on a quarter and on half of each class, and measure out of fold.

    C, weighting and decision rule stay the same, so a gain comes from the additional images alone.

    Returns:
        JSON-ready metrics per fraction and, overall and per class, the paired gain from the second half;
        None for a fine-tuned network, or if most classes have too few images for a quarter.
    """
    rows, folds, chosen = classifier.held_out, classifier.folds, classifier.chosen
    if classifier.finetune != "none" or folds is None or "value" not in chosen.get("C", {}):
        return None
    features, labels = data.features[rows], data.labels[rows]
    if np.median(np.bincount(labels, minlength=data.n_known)) * min(FRACTIONS) < 1:
        return None
    folds = folds_to_search(features, labels, folds)
    C, weighting, weights = float(chosen["C"]["value"]), chosen["imbalance"]["value"], chosen["features"]
    factors = None
    if data.feature_groups is not None and weights["value"] == "by_group":
        factors = column_factors(data.feature_groups, weights["weights"])
    is_fitted = {frac: choose_fraction(labels, frac, seed) for frac in FRACTIONS}
    logits = {
        frac: fit_probe_on_subset(weighting, features, labels, folds, C, subset, factors)
        for frac, subset in is_fitted.items()
    }
    is_fitted[1.0], logits[1.0] = np.ones(len(labels), bool), classifier.logits
    is_measured = folds >= 0
    is_correct = {frac: (rule.apply(each)[1] == labels)[is_measured] for frac, each in logits.items()}
    n_fitted = {frac: _count_fitted(labels[own], folds[own], data) for frac, own in is_fitted.items()}
    counts, measured = np.bincount(labels, minlength=data.n_known), labels[is_measured]
    by_class = {
        name: _compare(is_correct, measured == k, {frac: int(n[k]) for frac, n in n_fitted.items()})
        for k, name in enumerate(data.known_classes)
        if counts[k] >= MIN_IMAGES and (measured == k).any()
    }
    n_all = {frac: int(n.sum()) for frac, n in n_fitted.items()}
    overall = _compare(is_correct, np.ones(len(measured), bool), n_all)
    return {"measured_on": "oof", "all": overall, "by_class": by_class}


def _count_fitted(labels: IntArray, folds: IntArray, data: TrainingData) -> IntArray:
    """Return the images per class (K,) that the head of a fold is fitted on, averaged over folds."""
    is_held_out = folds >= 0
    n_folds = len(np.unique(folds[is_held_out]))
    counts = np.bincount(labels, minlength=data.n_known)
    n_held_out = np.bincount(labels[is_held_out], minlength=data.n_known) / n_folds
    return np.asarray(np.round(counts - n_held_out), dtype=np.int64)


def choose_fraction(labels: IntArray, frac: float, seed: int) -> BoolArray:
    """Select (N,) a random fraction of each class, rounded up; smaller fractions are nested in larger."""
    order = np.random.default_rng(seed).permutation(len(labels))
    is_chosen = np.zeros(len(labels), bool)
    for k in np.unique(labels):
        own = order[labels[order] == k]
        is_chosen[own[: int(np.ceil(frac * len(own)))]] = True
    return is_chosen


def _compare(
    is_correct: Mapping[float, BoolArray], rows: BoolArray, n_fitted: Mapping[float, int]
) -> dict[str, Any]:
    """Return accuracy at each fraction and the paired gain of all images over half of them."""
    points = [
        {"n_train": n_fitted[frac], **wilson(int(correct[rows].sum()), int(rows.sum())).to_json()}
        for frac, correct in is_correct.items()
    ]
    return {"points": points, "gain": newcombe(is_correct[1.0][rows], is_correct[0.5][rows]).to_json()}
