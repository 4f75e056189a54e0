"""Logits of a cross-validation → decisions, each fold's by what the other folds say."""

from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import Float32Array, Float64Array, IntArray
from pixelplay.config import Metric
from pixelplay.data.splits import NEVER_HELD_OUT
from pixelplay.evaluation.decision import Decision, fit_decision


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossFit:
    """Decisions for images that neither their classifier nor their T and tau have seen.

    Attributes:
        probs: (N, K) float64; NaN for an image that was never held out.
        pred: (N,) int64; -1 likewise.
        decisions: fold → what the other folds have chosen for it.
    """

    probs: Float64Array
    pred: IntArray
    decisions: dict[int, Decision]


def cross_fit(
    logits: Float32Array,
    labels: IntArray,
    groups: IntArray,
    folds: IntArray,
    priors: Float64Array,
    *,
    metric: Metric,
    seed: int,
) -> CrossFit:
    """Choose T and tau for each fold on all others, and decide.

    Args:
        logits: (N, K) natural-prior logits, each from the classifier that did not see the image.
        labels: (N,) in [0, K).
        groups: (N,) what the bootstrap behind tau's standard error keeps together.
        folds: (N,) in which each was held out; -1 for never.
        priors: (K,) class frequencies in training.
    """
    probs = np.full(logits.shape, np.nan)
    pred = np.full(len(labels), -1, dtype=np.int64)
    decisions: dict[int, Decision] = {}
    for fold in np.unique(folds[folds != NEVER_HELD_OUT]):
        own = folds == fold
        others = ~own & (folds != NEVER_HELD_OUT)
        decision = fit_decision(
            logits[others], labels[others], groups[others], priors, metric=metric, seed=seed
        )
        probs[own], pred[own] = decision.apply(logits[own])
        decisions[int(fold)] = decision
    return CrossFit(probs=probs, pred=pred, decisions=decisions)
