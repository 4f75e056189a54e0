"""Classification metrics under sample weights; with unit weights they equal scikit-learn's.

Weights are the multiplicities of bootstrap resamples, so that all resamples are computed at once. Macro
averages run over the classes present.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pixelplay.array_types import BoolArray, Float64Array, IntArray
from pixelplay.config import Metric
from pixelplay.errors import DataError

ECE_BINS = 15


class ClassCounts(NamedTuple):
    """Correct, true and predicted images per class, each (..., K): all that the label metrics need."""

    n_correct: Float64Array
    n_true: Float64Array
    n_pred: Float64Array

    def precision(self) -> Float64Array:
        """Return the precision per class, (..., K); NaN for a class that is never predicted."""
        return _ratio(self.n_correct, self.n_pred)

    def recall(self) -> Float64Array:
        """Return the recall per class, (..., K); NaN for a class without images."""
        return _ratio(self.n_correct, self.n_true)

    def f1(self) -> Float64Array:
        """Return F1 per class, (..., K); NaN for a class without images."""
        f1 = _ratio(2 * self.n_correct, self.n_true + self.n_pred)
        return np.where(self.n_true > 0, f1, np.nan)

    def accuracy(self) -> Float64Array:
        """Return the accuracy, (...)."""
        return _ratio(self.n_correct.sum(axis=-1), self.n_true.sum(axis=-1))

    def balanced_accuracy(self) -> Float64Array:
        """Return the mean recall over the classes present, (...)."""
        return nan_mean(self.recall())

    def macro_f1(self) -> Float64Array:
        """Return the mean F1 over the classes present, (...)."""
        return nan_mean(self.f1())


LABEL_METRICS: dict[Metric, Callable[[ClassCounts], Float64Array]] = {
    "accuracy": ClassCounts.accuracy,
    "balanced_accuracy": ClassCounts.balanced_accuracy,
    "macro_f1": ClassCounts.macro_f1,
}


def count_labels(
    pred: IntArray, labels: IntArray, n_classes: int, weights: NDArray[Any] | None = None
) -> ClassCounts:
    """Count correct, true and predicted images per class: (K,), or (R, K) with multiplicities (R, N).

    A negative value in `pred` (N,) means no prediction, which is never correct.
    """
    correct, predicted = np.flatnonzero(pred == labels), np.flatnonzero(pred >= 0)
    # rows 0 to K-1 count correct images, K to 2K-1 true ones, 2K to 3K-1 predicted ones
    rows = np.concatenate([labels[correct], n_classes + labels, 2 * n_classes + pred[predicted]])
    if weights is None:
        sums = np.bincount(rows, minlength=3 * n_classes).astype(np.float64)  # (3K,)
    else:
        images = np.concatenate([correct, np.arange(len(labels)), predicted])
        indicator = _indicator(rows, images, (3 * n_classes, len(labels)))
        sums = (indicator @ weights.T.astype(np.float64)).T  # (R, 3K)
    return ClassCounts(*np.split(sums, 3, axis=-1))


def expected_counts(pred: IntArray, probs: Float64Array) -> ClassCounts:
    """Return the counts (K,) to expect of predictions if the probabilities (N, K) are calibrated."""
    n_classes = probs.shape[1]
    confidence = probs[np.arange(len(pred)), pred]  # (N,)
    n_correct = np.bincount(pred, confidence, n_classes).astype(np.float64)
    return ClassCounts(
        n_correct, probs.sum(axis=0), np.bincount(pred, minlength=n_classes).astype(np.float64)
    )


def label_metric(metric: Metric, pred: IntArray, labels: IntArray) -> float:
    """Compute one metric of predicted labels (N,); DataError if N is 0."""
    check_not_empty(labels)
    n_classes = int(max(labels.max(), pred.max())) + 1
    return float(LABEL_METRICS[metric](count_labels(pred, labels, n_classes)))


def expected_calibration_error(probs: Float64Array, pred: IntArray, labels: IntArray) -> float:
    """Compute the expected calibration error: 15 bins of equal width, L1 norm.

    It is biased upwards on few images and therefore reported without an interval.

    Args:
        probs: (N, K), rows sum to 1.
        pred: (N,) in [0, K), need not be the argmax; its probability is the confidence.
        labels: (N,); a label outside [0, K) is always an error.

    Raises:
        DataError: there is no image.

    Source: Guo et al., ICML 2017, arXiv:1706.04599, equation 3.
    """
    check_not_empty(labels)
    confidence = probs[np.arange(len(labels)), pred]
    gaps = np.bincount(confidence_bins(confidence), (pred == labels) - confidence, ECE_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def confidence_bins(confidence: Float64Array) -> IntArray:
    """Return the bin (N,) of each confidence: equal widths on [0, 1], closed on the right, 0 in the first."""
    return np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)


def log_losses(probs: Float64Array, labels: IntArray) -> Float64Array:
    """Return −log of the true class's probability per image, (N,) in nats, clipped as in scikit-learn."""
    eps = np.finfo(np.float64).eps
    return -np.log(np.clip(probs[np.arange(len(labels)), labels], eps, 1 - eps))


def brier_losses(probs: Float64Array, labels: IntArray) -> Float64Array:
    """Return the squared error summed over the classes per image, (N,).

    It is halved for two classes, like scikit-learn's `scale_by_half="auto"`.
    """
    true = probs[np.arange(len(labels)), labels]
    losses: Float64Array = (probs * probs).sum(axis=1) - 2 * true + 1
    return losses / 2 if probs.shape[1] == 2 else losses


def rank_buckets(scores: Float64Array, positive: BoolArray) -> Any:
    """Sort images into buckets from which `areas_under_curves` follow under any weights.

    Only the G distinct scores of positive images matter. Negatives fall into 2G + 1 buckets (below the
    lowest, tied with it, between it and the next, …), positives into G. The result is a sparse 0/1 matrix
    (3G + 1, N). At least one of the N images must be positive.
    """
    levels = np.unique(scores[positive])  # (G,)
    left, right = np.searchsorted(levels, scores, "left"), np.searchsorted(levels, scores, "right")
    rows = np.where(positive, 2 * len(levels) + 1 + left, left + right)
    return _indicator(rows, np.arange(len(scores)), (3 * len(levels) + 1, len(scores)))


def areas_under_curves(buckets: Any, weights: Float64Array) -> Float64Array:
    """Compute ROC-AUC and average precision under each set of weights.

    Ties count half in ROC-AUC; in average precision all images of one score are accepted together.

    Args:
        buckets: (3G + 1, N) from `rank_buckets`.
        weights: (N, R) multiplicities.

    Returns:
        (2, R); NaN where positives or negatives have no weight.
    """
    n_levels = buckets.shape[0] // 3
    sums = buckets @ weights  # (3G + 1, R)
    negatives, positives = sums[: 2 * n_levels + 1], sums[2 * n_levels + 1 :]
    n_neg, n_pos = negatives.sum(axis=0), positives.sum(axis=0)  # (R,)
    neg_below = np.cumsum(negatives, axis=0)[:-1:2]  # (G, R)
    neg_tied = negatives[1::2]  # (G, R)
    true_positives = np.cumsum(positives[::-1], axis=0)[::-1]  # scores at or above each level, (G, R)
    accepted = true_positives + n_neg - neg_below
    precision = np.divide(true_positives, accepted, out=np.zeros_like(accepted), where=accepted > 0)
    roc_auc = _ratio((positives * (neg_below + 0.5 * neg_tied)).sum(axis=0), n_pos * n_neg)
    average_precision = _ratio((positives * precision).sum(axis=0), n_pos)
    average_precision[n_neg == 0] = np.nan
    return np.stack([roc_auc, average_precision])


def nan_mean(values: Float64Array) -> Float64Array:
    """Return the mean over the last axis without NaN; NaN, without a warning, where all are NaN."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis=-1), defined.sum(axis=-1))


def check_not_empty(labels: IntArray) -> None:
    """Raise DataError if there is no image to evaluate."""
    if len(labels) == 0:
        raise DataError("0 images have labels and metrics need at least 1; check the folder or the split")


def check_labels(labels: IntArray, n_classes: int) -> None:
    """Raise DataError if there is no label or one is outside [0, n_classes)."""
    check_not_empty(labels)
    outside = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if outside.size:
        raise DataError(
            f"label {labels[outside[0]]} in row {outside[0]} is outside the {n_classes} classes, "
            f"0 to {n_classes - 1}; remove such rows ({outside.size} in all)"
        )


def _ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> Float64Array:
    """Divide; 0/0 is NaN without a warning."""
    undefined = np.full(np.shape(denominator), np.nan)
    is_defined = np.asarray(denominator) > 0
    quotient: Float64Array = np.divide(numerator, denominator, out=undefined, where=is_defined)
    return quotient


def _indicator(rows: IntArray, images: IntArray, shape: tuple[int, int]) -> Any:
    """Build the sparse 0/1 matrix that sums the weights of images into rows."""
    from scipy.sparse import csr_array

    return csr_array((np.ones(len(rows)), (rows, images)), shape=shape)
