"""What held-out images teach about how far a model can be trusted; it travels with the model."""

import math
from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import BoolArray, Float64Array, IntArray
from pixelplay.config import ConformalScore, check_share
from pixelplay.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutScores:
    """Scores of images that the model, or one like it, had not learned from.

    Attributes:
        part: "oof": each was predicted by a model of its own fold, so that what follows for the deployed
            one holds approximately; "val": a validation part.
        lac: (n,) ascending, scores of the true classes (`conformal.class_scores`).
        aps: (n,) likewise.
        confidence: (n,) probability of each answer, descending.
        is_right: (n,) whether it was right.
    """

    split: str
    lac: Float64Array
    aps: Float64Array
    confidence: Float64Array
    is_right: BoolArray

    def set_scores(self, method: ConformalScore) -> Float64Array:
        """What the thresholds of prediction sets are taken from."""
        return self.lac if method == "lac" else self.aps


def score_held_out(
    probs: Float64Array, pred: IntArray, labels: IntArray, groups: IntArray, split: str
) -> HeldOutScores:
    """Keep of held-out images what prediction sets and abstention need.

    Both count on independent images, so of each group the first one stands for all.

    Args:
        probs: (N, K); rows of NaN were not held out and take no part.
        pred: (N,) answers; -1 likewise.
        labels: (N,) in [0, K).
        groups: (N,) equal for images that are not independent.
    """
    held = np.flatnonzero(pred >= 0)
    kept = held[np.unique(groups[held], return_index=True)[1]]
    probs, pred, labels = probs[kept], pred[kept], labels[kept]
    confidence = probs[np.arange(len(pred)), pred]
    order = np.argsort(-confidence, kind="stable")
    return HeldOutScores(
        split=split,
        lac=held_out_scores(probs, labels, "lac"),
        aps=held_out_scores(probs, labels, "aps"),
        confidence=confidence[order],
        is_right=(pred == labels)[order],
    )


def class_scores(probs: Float64Array, method: ConformalScore) -> Float64Array:
    """How badly each class fits each image, (N, K) in [0, 1]; lower fits better.

    LAC: one less its probability. Its sets are the smallest on average, and the smallest where the model is
    sure. APS: the probability of all more probable classes; its sets adapt to how hard an image is.

    Source: Sadinle, Lei and Wasserman, "Least ambiguous set-valued classifiers with bounded error levels",
    JASA 114 (2019); Romano, Sesia and Candès, "Classification with valid and adaptive coverage", NeurIPS
    2020. Their score adds a random share of the class's own probability; none of it leaves sets that are
    the same every time and never empty. All of it would make them three times as large (benchmarks/LOG.md).
    """
    if method == "lac":
        return 1 - probs
    order = np.argsort(-probs, axis=1, kind="stable")
    ranked = np.take_along_axis(probs, order, axis=1)
    before = np.cumsum(ranked, axis=1) - ranked
    scores = np.empty_like(probs)
    np.put_along_axis(scores, order, np.clip(before, 0.0, 1.0), axis=1)
    return scores


def held_out_scores(probs: Float64Array, labels: IntArray, method: ConformalScore) -> Float64Array:
    """Scores (N,) of the true classes, ascending: what thresholds are taken from.

    Args:
        probs: (N, K) of images that the model has not learned from.
        labels: (N,) in [0, K).
    """
    return np.sort(class_scores(probs, method)[np.arange(len(labels)), labels])


def fit_threshold(scores: Float64Array, coverage: float) -> float:
    """The score up to which classes belong to a set.

    Args:
        scores: (n,) of true classes of held-out images, ascending.
        coverage: share of new images like these whose set is to hold the true class, in (0, 1).

    Raises:
        ConfigError: `coverage` is outside (0, 1).
        DataError: there are too few scores to promise so much.

    Source: Vovk, Gammerman and Shafer, "Algorithmic learning in a random world" (2005), split conformal
    prediction: the ⌈(n + 1) coverage⌉-th smallest score.
    """
    check_share("coverage", coverage)
    n = len(scores)
    rank = math.ceil((n + 1) * coverage - 1e-9)  # 0.9 * 10 is not to become 10
    if rank > n:
        needed = math.ceil(1 / (1 - coverage) - 1e-9) - 1
        raise DataError(
            f"coverage={coverage} needs {needed} held-out images and the model has {n}; "
            f"ask for at most {math.floor(1000 * n / (n + 1)) / 1000}"
        )
    return float(scores[max(rank, 1) - 1])


def prediction_sets(probs: Float64Array, threshold: float, method: ConformalScore) -> BoolArray:
    """Which classes (N, K) belong to each image's set; the most probable one always does.

    A row of NaN has an empty set.
    """
    is_in = class_scores(probs, method) <= threshold
    is_known = ~np.isnan(probs).any(axis=1)
    rows = np.flatnonzero(is_known)
    is_in[rows, probs[rows].argmax(axis=1)] = True  # an empty set would help nobody
    is_in[~is_known] = False
    return np.asarray(is_in)
