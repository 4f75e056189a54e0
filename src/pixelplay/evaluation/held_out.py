"""What held-out images teach about how far a model can be trusted; it travels with the model."""

from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import BoolArray, Float64Array, IntArray
from pixelplay.config import SetMethod
from pixelplay.evaluation.conformal import held_out_scores


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Scores of images that the model, or one like it, had not learned from.

    Attributes:
        part: "oof": each was predicted by a model of its own fold, so that what follows for the deployed
            one holds approximately; "val": a validation part.
        lac: (n,) ascending, scores of the true classes (`conformal.class_scores`).
        aps: (n,) likewise.
        confidence: (n,) probability of each answer, descending.
        is_right: (n,) whether it was right.
    """

    part: str
    lac: Float64Array
    aps: Float64Array
    confidence: Float64Array
    is_right: BoolArray

    def set_scores(self, method: SetMethod) -> Float64Array:
        """What the thresholds of prediction sets are taken from."""
        return self.lac if method == "lac" else self.aps


def score_held_out(
    probs: Float64Array, pred: IntArray, labels: IntArray, groups: IntArray, part: str
) -> HeldOut:
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
    return HeldOut(
        part=part,
        lac=held_out_scores(probs, labels, "lac"),
        aps=held_out_scores(probs, labels, "aps"),
        confidence=confidence[order],
        is_right=(pred == labels)[order],
    )
