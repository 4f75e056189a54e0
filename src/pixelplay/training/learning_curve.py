"""Would more images help? The same probe learned from fewer, measured on the same images."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pixelplay.arrays import BoolArray, IntArray
from pixelplay.evaluation.comparison import newcombe
from pixelplay.evaluation.decision_rule import DecisionRule
from pixelplay.evaluation.intervals import wilson
from pixelplay.training.imbalance import fit_probe_on_subset
from pixelplay.training.probe_or_finetune import TrainedClassifier
from pixelplay.training.training_data import TrainingData

SHARES = (0.25, 0.5)  # of each class; all of it is measured anyway
MIN_LEARNED = 8  # images of a class: a quarter of fewer is hardly any


def measure_curve(
    data: TrainingData, learned: TrainedClassifier, rule: DecisionRule, seed: int
) -> Mapping[str, Any] | None:
    """Learn from a quarter and from half of each class, out of fold, as all of it was.

    Strength, weighting and decision stay as they are, so the gain is of images alone.

    Returns:
        What metrics.json has: figures at each share, and for all and for each class what the second half
        has gained, image by image; None where the classifier is no plain probe.
    """
    rows = learned.held_out
    if learned.finetune != "none" or learned.folds is None or "value" not in learned.chosen.get("C", {}):
        return None
    features, labels, folds = data.features[rows], data.labels[rows], learned.folds
    chosen = learned.chosen
    C, imbalance = float(chosen["C"]["value"]), chosen["imbalance"]["value"]
    learns = {share: choose_share(labels, share, seed) for share in SHARES}
    logits = {
        share: fit_probe_on_subset(imbalance, features, labels, folds, C, some)
        for share, some in learns.items()
    }
    learns[1.0], logits[1.0] = np.ones(len(labels), bool), learned.logits
    measured = folds >= 0
    right = {share: (rule.apply(found)[1] == labels)[measured] for share, found in logits.items()}
    n_learned = {share: _count_learned(labels[some], folds[some], data) for share, some in learns.items()}
    counts, own = np.bincount(labels, minlength=data.n_known), labels[measured]
    by_class = {
        name: _compare(right, own == k, {share: int(n[k]) for share, n in n_learned.items()})
        for k, name in enumerate(data.known_classes)
        if counts[k] >= MIN_LEARNED and (own == k).any()
    }
    n_all = {share: int(n.sum()) for share, n in n_learned.items()}
    everything = np.ones(len(own), bool)
    return {"measured_on": "oof", "all": _compare(right, everything, n_all), "by_class": by_class}


def _count_learned(labels: IntArray, folds: IntArray, data: TrainingData) -> IntArray:
    """Images of each class (K,) that the head of a fold has learned from, the mean over the folds."""
    held_out = folds >= 0
    n_folds = len(np.unique(folds[held_out]))
    counts = np.bincount(labels, minlength=data.n_known)
    excluded = np.bincount(labels[held_out], minlength=data.n_known) / n_folds
    return np.asarray(np.round(counts - excluded), dtype=np.int64)


def choose_share(labels: IntArray, share: float, seed: int) -> BoolArray:
    """Mark (N,) a share of each class at random, rounded up; a smaller share is part of a larger."""
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = np.zeros(len(labels), bool)
    for k in np.unique(labels):
        own = order[labels[order] == k]
        chosen[own[: int(np.ceil(share * len(own)))]] = True
    return chosen


def _compare(
    right: Mapping[float, BoolArray], rows: BoolArray, n_learned: Mapping[float, int]
) -> dict[str, Any]:
    """Share of right answers at each share learned from, and the paired gain of the second half."""
    points = [
        {"n_learned": n_learned[share], **wilson(int(is_right[rows].sum()), int(rows.sum())).to_json()}
        for share, is_right in right.items()
    ]
    return {"points": points, "gain": newcombe(right[1.0][rows], right[0.5][rows]).to_json()}
