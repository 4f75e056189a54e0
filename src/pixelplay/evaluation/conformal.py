"""Conformal prediction sets, and the held-out scores that a model bundle keeps for them."""

import math
from dataclasses import dataclass

import numpy as np

from pixelplay.array_types import BoolArray, Float64Array, IntArray
from pixelplay.config import ConformalScore
from pixelplay.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutScores:
    """Scores of n held-out images, for prediction sets and confidence thresholds.

    The split is "val" for a validation split, or "oof" for images predicted by the models of their folds;
    then guarantees for the deployed model are approximate.
    """

    split: str
    lac: Float64Array  # (n,) ascending, LAC scores of the true classes (see `nonconformity_scores`)
    aps: Float64Array  # (n,) ascending, APS scores of the true classes
    confidence: Float64Array  # (n,) descending, probability of each prediction
    is_right: BoolArray  # (n,) in the same order


def score_held_out(
    probs: Float64Array, pred: IntArray, labels: IntArray, groups: IntArray, split: str
) -> HeldOutScores:
    """Score held-out images for prediction sets and confidence thresholds.

    Both assume independent images, so only the first image of each group is used.

    Args:
        pred: (N,) predicted classes; -1 for images that were not held out, which are ignored.
        split: "oof" or "val".
    """
    held = np.flatnonzero(pred >= 0)
    kept = held[np.unique(groups[held], return_index=True)[1]]
    probs, pred, labels = probs[kept], pred[kept], labels[kept]
    confidence = probs[np.arange(len(pred)), pred]
    order = np.argsort(-confidence, kind="stable")
    return HeldOutScores(
        split=split,
        lac=true_class_scores(probs, labels, "lac"),
        aps=true_class_scores(probs, labels, "aps"),
        confidence=confidence[order],
        is_right=(pred == labels)[order],
    )


def nonconformity_scores(probs: Float64Array, method: ConformalScore) -> Float64Array:
    """Compute the nonconformity score of every class, (N, K) in [0, 1]; lower fits better.

    LAC: 1 − the probability of the class; its sets are the smallest on average. APS: the total probability
    of all more probable classes; its sets adapt to the difficulty of the image.

    Source: Sadinle, Lei and Wasserman, "Least ambiguous set-valued classifiers with bounded error levels",
    JASA 114 (2019); Romano, Sesia and Candès, "Classification with valid and adaptive coverage", NeurIPS
    2020. Their APS adds a random fraction of the class's own probability. Without it sets are deterministic
    and never empty; with all of it they are three times as large (benchmarks/DECISIONS.md).
    """
    if method == "lac":
        return 1 - probs
    order = np.argsort(-probs, axis=1, kind="stable")
    ranked = np.take_along_axis(probs, order, axis=1)
    before = np.cumsum(ranked, axis=1) - ranked
    scores = np.empty_like(probs)
    np.put_along_axis(scores, order, np.clip(before, 0.0, 1.0), axis=1)
    return scores


def true_class_scores(probs: Float64Array, labels: IntArray, method: ConformalScore) -> Float64Array:
    """Compute the scores of the true classes, (N,) ascending, of probabilities (N, K)."""
    return np.sort(nonconformity_scores(probs, method)[np.arange(len(labels)), labels])


def fit_conformal_threshold(scores: Float64Array, coverage: float) -> float:
    """Find the score up to which classes belong to a prediction set.

    Args:
        scores: (n,) ascending, of the true classes of held-out images.
        coverage: fraction of new images whose set should contain the true class, in (0, 1).

    Raises:
        DataError: too few scores for this coverage.

    Source: Vovk, Gammerman and Shafer, "Algorithmic learning in a random world" (2005), split conformal
    prediction: the ⌈(n + 1) coverage⌉-th smallest score.
    """
    n = len(scores)
    rank = math.ceil((n + 1) * coverage - 1e-9)  # 0.9 × 10 must not round up to 10
    if rank > n:
        needed = math.ceil(1 / (1 - coverage) - 1e-9) - 1
        raise DataError(
            f"coverage={coverage} needs {needed} held-out images and the model has {n}; "
            f"lower it to at most {math.floor(1000 * n / (n + 1)) / 1000}"
        )
    return float(scores[max(rank, 1) - 1])


def prediction_sets(probs: Float64Array, threshold: float, method: ConformalScore) -> BoolArray:
    """Return the classes (N, K) in each image's set; a row of NaN has an empty set."""
    in_set = nonconformity_scores(probs, method) <= threshold
    is_known = ~np.isnan(probs).any(axis=1)
    rows = np.flatnonzero(is_known)
    in_set[rows, probs[rows].argmax(axis=1)] = True  # so that no set is empty
    in_set[~is_known] = False
    return np.asarray(in_set)
