"""Out-of-fold probabilities and given labels → labels that look wrong, the most suspicious first."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixelplay.evaluation.intervals import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Suspects:
    """Every image in the order of suspicion, and which of them are suspects.

    Attributes:
        order: (N,) positions, the most suspicious first.
        is_suspect: (N,) by position: another class is as probable as it usually is for its own images.
        proposed: (N,) by position, the class that is; the given one where none is.
        quality: (N,) by position, in [0, 1]: how well the given label fits; the order follows it.
        thresholds: (K,) mean probability of each class among the images that carry it; NaN without any.
    """

    order: IntArray
    is_suspect: NDArray[np.bool_]
    proposed: IntArray
    quality: FloatArray
    thresholds: FloatArray


def find_suspects(probs: FloatArray, labels: IntArray) -> Suspects:
    """Find labels that are likely wrong.

    A class's threshold is its mean probability among the images that carry it: a class that is never
    predicted with certainty is not held to a higher standard than its own images meet. An image is a
    suspect where another class passes its threshold and is the most probable of those that do.

    Args:
        probs: (N, K) class probabilities with natural priors, each from a model that has not learned
            from the image.
        labels: (N,) in [0, K).

    Source: Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels",
    JAIR 70 (2021), arXiv:1911.00068, equations 1 and 2.
    """
    n, n_classes = probs.shape
    given = probs[np.arange(n), labels]  # (N,)
    support = np.bincount(labels, minlength=n_classes)
    sums = np.bincount(labels, given, minlength=n_classes)
    thresholds = np.divide(sums, support, out=np.full(n_classes, np.nan), where=support > 0)
    is_confident = probs >= thresholds  # (N, K); False against NaN
    best = np.where(is_confident, probs, -1.0).argmax(axis=1)
    proposed = np.where(is_confident.any(axis=1), best, labels)
    quality = label_quality(probs, labels)
    return Suspects(
        order=np.argsort(quality, kind="stable"),
        is_suspect=proposed != labels,
        proposed=proposed,
        quality=quality,
        thresholds=thresholds,
    )


def label_quality(probs: FloatArray, labels: IntArray) -> FloatArray:
    """How well each given label fits, (N,) in [0, 1]: half one more than its lead over the best other class.

    Source: the normalized margin of Kuan and Mueller, "Model-agnostic label quality scoring to detect
    real-world label errors", ICML 2022 workshop on data-centric AI.
    """
    rows = np.arange(len(labels))
    others = probs.copy()
    others[rows, labels] = -1.0
    lead: FloatArray = probs[rows, labels] - others.max(axis=1)
    return (1 + lead) / 2
