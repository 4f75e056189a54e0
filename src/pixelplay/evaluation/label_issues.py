"""Out-of-fold probabilities and given labels → labels that look wrong, the most suspicious first."""

from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import BoolArray, Float64Array, IntArray

SUSPICIOUS = 0.1  # the best other class is nine times as probable (benchmarks/LOG.md)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelIssues:
    """Every image in the order of suspicion, and which of them are suspects.

    Attributes:
        order: (N,) positions, the most suspicious first.
        is_suspect: (N,) by position.
        proposed: (N,) by position, the most probable class beside the given one.
        quality: (N,) by position, in [0, 1]: how well the given label fits; the order follows it.
    """

    order: IntArray
    is_issue: BoolArray
    proposed: IntArray
    quality: Float64Array


def find_label_issues(probs: Float64Array, labels: IntArray) -> LabelIssues:
    """Find labels that are likely wrong.

    The quality of a label is its probability if only it and the best other class were possible. That found
    more planted wrong labels than the lead over the other class and than the thresholds of confident
    learning, and as many as the plain probability, which calls labels wrong where many classes share it.

    Args:
        probs: (N, K) class probabilities with natural priors, each from a model that has not learned
            from the image; K >= 2.
        labels: (N,) in [0, K).

    Source: after Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset
    Labels", JAIR 70 (2021), arXiv:1911.00068, who rank by the given label's probability.
    """
    rows = np.arange(len(labels))
    given = probs[rows, labels]  # (N,)
    others = probs.copy()
    others[rows, labels] = -1.0
    proposed = others.argmax(axis=1)
    both = given + others[rows, proposed]
    quality = np.divide(given, both, out=np.full(len(labels), 0.5), where=both > 0)
    return LabelIssues(
        order=np.argsort(quality, kind="stable"),
        is_issue=quality < SUSPICIOUS,
        proposed=proposed,
        quality=quality,
    )
