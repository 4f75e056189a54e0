"""Label issues: a quality score for each label, from out-of-fold probabilities."""

import numpy as np

from pixelplay.array_types import BoolArray, Float64Array, IntArray

MAX_SCORE = 0.1  # of a label issue: the best other class is nine times as probable (benchmarks/DECISIONS.md)


def find_label_issues(probs: Float64Array, labels: IntArray) -> tuple[Float64Array, IntArray, BoolArray]:
    """Score how well each label fits, and find those that are likely wrong.

    The score is the label's probability if only it and the best other class were possible. That found more
    planted label errors than the margin to the other class and the thresholds of confident learning, and as
    many as the plain probability, which flags correct labels when many classes share the probability.

    Args:
        probs: (N, K) with natural class priors, K >= 2, each row from a model not trained on the image.
        labels: (N,) in [0, K).

    Returns:
        Scores (N,) in [0, 1], low for likely errors; suggested labels (N,), the most probable other class;
        and the mask (N,) of label issues.

    Source: after Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset
    Labels", JAIR 70 (2021), arXiv:1911.00068, who rank by the label's probability.
    """
    rows = np.arange(len(labels))
    prob_label = probs[rows, labels]  # (N,)
    others = probs.copy()
    others[rows, labels] = -1.0
    suggested = others.argmax(axis=1)
    both = prob_label + others[rows, suggested]
    scores = np.divide(prob_label, both, out=np.full(len(labels), 0.5), where=both > 0)
    return scores, suggested, scores < MAX_SCORE
