"""Every metric as a function of how often each image counts.

With every image counted once these are scikit-learn's definitions; with the multiplicities of bootstrap
resamples the same lines yield all resamples at once. Macro means run over the classes present.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pixelplay.arrays import BoolArray, Float64Array, IntArray
from pixelplay.config import Metric
from pixelplay.errors import DataError

ECE_BINS = 15


class Counts(NamedTuple):
    """Numbers of images per class, each (..., K): all that the label metrics need."""

    n_correct: Float64Array
    n_true: Float64Array
    n_pred: Float64Array

    def precision(self) -> Float64Array:
        """Return the share of right answers among those naming the class, (..., K); NaN where none."""
        return _ratio(self.n_correct, self.n_pred)

    def recall(self) -> Float64Array:
        """Return the share of the class's images that is found, (..., K); NaN where it has none."""
        return _ratio(self.n_correct, self.n_true)

    def f1(self) -> Float64Array:
        """Return the harmonic mean of precision and recall, (..., K); NaN where the class has no image."""
        f1 = _ratio(2 * self.n_correct, self.n_true + self.n_pred)
        return np.where(self.n_true > 0, f1, np.nan)

    def accuracy(self) -> Float64Array:
        """Return the share of images with the right label, (...)."""
        return _ratio(self.n_correct.sum(axis=-1), self.n_true.sum(axis=-1))

    def balanced_accuracy(self) -> Float64Array:
        """Return the mean recall over the classes present, (...)."""
        return mean_defined(self.recall())

    def macro_f1(self) -> Float64Array:
        """Return the mean F1 over the classes present, (...)."""
        return mean_defined(self.f1())


LABEL_METRICS: dict[Metric, Callable[[Counts], Float64Array]] = {
    "accuracy": Counts.accuracy,
    "balanced_accuracy": Counts.balanced_accuracy,
    "macro_f1": Counts.macro_f1,
}


def count_labels(
    pred: IntArray, labels: IntArray, n_classes: int, weights: NDArray[Any] | None = None
) -> Counts:
    """Count right, true and predicted images of each class, once or under R sets of weights.

    Args:
        pred: (N,) int below K; a negative one is right for no class.
        labels: (N,) int in [0, K).
        n_classes: K.
        weights: (R, N) multiplicities; None: every image once.

    Returns:
        Counts of (K,), or of (R, K) with weights.
    """
    right, answered = np.flatnonzero(pred == labels), np.flatnonzero(pred >= 0)
    rows = np.concatenate([labels[right], n_classes + labels, 2 * n_classes + pred[answered]])
    if weights is None:
        sums = np.bincount(rows, minlength=3 * n_classes).astype(np.float64)  # (3K,)
    else:
        images = np.concatenate([right, np.arange(len(labels)), answered])
        sums = (
            _indicator(rows, images, (3 * n_classes, len(labels))) @ weights.T.astype(np.float64)
        ).T  # (R, 3K)
    return Counts(*np.split(sums, 3, axis=-1))


def expect_labels(pred: IntArray, probs: Float64Array) -> Counts:
    """Counts (K,) to be expected if the probabilities (N, K) mean what they say; predictions are given."""
    n_classes = probs.shape[1]
    sure = probs[np.arange(len(pred)), pred]  # (N,)
    n_correct = np.bincount(pred, sure, n_classes).astype(np.float64)
    return Counts(n_correct, probs.sum(axis=0), np.bincount(pred, minlength=n_classes).astype(np.float64))


def label_metric(metric: Metric, pred: IntArray, labels: IntArray) -> float:
    """Return one metric of predicted labels.

    Raises:
        DataError: there is no image.
    """
    check_some(labels)
    n_classes = int(max(labels.max(), pred.max())) + 1
    return float(LABEL_METRICS[metric](count_labels(pred, labels, n_classes)))


def accuracy(pred: IntArray, labels: IntArray) -> float:
    """Return the share of images with the right label."""
    return label_metric("accuracy", pred, labels)


def balanced_accuracy(pred: IntArray, labels: IntArray) -> float:
    """Return the mean recall over the classes present in `labels`."""
    return label_metric("balanced_accuracy", pred, labels)


def macro_f1(pred: IntArray, labels: IntArray) -> float:
    """Return the mean F1 over the classes present in `labels`; one never predicted has F1 0."""
    return label_metric("macro_f1", pred, labels)


def expected_calibration_error(
    probs: Float64Array, pred: IntArray, labels: IntArray, n_bins: int = ECE_BINS
) -> float:
    """Return the mean gap between confidence and accuracy: equal-width bins, L1 norm.

    Confidence is the probability of the predicted class, which need not be the largest of its row. The figure
    is biased upwards on few images, therefore it has no interval.

    Args:
        probs: (N, K) float, rows sum to 1.
        pred: (N,) int in [0, K).
        labels: (N,) int; one outside [0, K) is always an error.
        n_bins: number of bins on [0, 1], each closed on the right, the first also on the left.

    Returns:
        The gap in [0, 1], bins weighted by their number of images.

    Raises:
        DataError: there is no image.

    Source: Guo et al., ICML 2017, arXiv:1706.04599, equation 3.
    """
    check_some(labels)
    confidence = probs[np.arange(len(labels)), pred]
    bins = confidence_bins(confidence, n_bins)
    gaps = np.bincount(bins, weights=(pred == labels) - confidence, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(labels))


def confidence_bins(confidence: Float64Array, n_bins: int) -> IntArray:
    """Bin (N,) of each confidence: equal widths on [0, 1], closed on the right, the first on the left too."""
    return np.clip(np.ceil(confidence * n_bins).astype(np.int64) - 1, 0, n_bins - 1)


def log_losses(probs: Float64Array, labels: IntArray) -> Float64Array:
    """Return −log of the true class's probability per image, (N,) in nats, clipped as scikit-learn does."""
    eps = np.finfo(np.float64).eps
    return -np.log(np.clip(probs[np.arange(len(labels)), labels], eps, 1 - eps))


def brier_losses(probs: Float64Array, labels: IntArray) -> Float64Array:
    """Return the squared error summed over the classes per image, (N,); halved for two classes.

    The halving is scikit-learn's `scale_by_half="auto"`; it makes the two-class score the usual one.
    """
    true = probs[np.arange(len(labels)), labels]
    losses: Float64Array = (probs * probs).sum(axis=1) - 2 * true + 1
    return losses / 2 if probs.shape[1] == 2 else losses


@dataclass(frozen=True, eq=False)
class Ranking:
    """Images in the order of their score for one class, ready for any weights.

    Only the G distinct scores of positive images matter: `buckets` sums weights into 2G + 1 rows for
    negatives (below the lowest, tied with it, between it and the next, …) and G rows for positives.

    Attributes:
        buckets: (3G + 1, N) sparse 0/1 matrix.
        n_scores: G.
    """

    buckets: Any
    n_scores: int

    def areas(self, weights: Float64Array) -> Float64Array:
        """Return ROC-AUC and average precision under each set of weights.

        Ties count half in ROC-AUC; in average precision all images of one score are let in together.

        Args:
            weights: (N, R) float multiplicities: an image a row, as the sparse product reads them.

        Returns:
            (2, R) float; NaN where positives or negatives have no weight.
        """
        sums = self.buckets @ weights  # (3G + 1, R)
        negatives, positives = sums[: 2 * self.n_scores + 1], sums[2 * self.n_scores + 1 :]
        n_neg, n_pos = negatives.sum(axis=0), positives.sum(axis=0)  # (R,)
        neg_below = np.cumsum(negatives, axis=0)[:-1:2]  # (G, R)
        neg_tied = negatives[1::2]
        pos_let_in = np.cumsum(positives[::-1], axis=0)[::-1]  # score at least this one, (G, R)
        let_in = pos_let_in + n_neg - neg_below
        precision = np.divide(pos_let_in, let_in, out=np.zeros_like(let_in), where=let_in > 0)
        roc_auc = _ratio((positives * (neg_below + 0.5 * neg_tied)).sum(axis=0), n_pos * n_neg)
        average_precision = _ratio((positives * precision).sum(axis=0), n_pos)
        average_precision[n_neg == 0] = np.nan
        return np.stack([roc_auc, average_precision])


def rank(scores: Float64Array, is_positive: BoolArray) -> Ranking:
    """Sort images into the buckets of a `Ranking`.

    Args:
        scores: (N,) float, higher means more likely positive.
        is_positive: (N,) bool, at least one.
    """
    levels = np.unique(scores[is_positive])  # (G,)
    left, right = np.searchsorted(levels, scores, "left"), np.searchsorted(levels, scores, "right")
    rows = np.where(is_positive, 2 * len(levels) + 1 + left, left + right)
    buckets = _indicator(rows, np.arange(len(scores)), (3 * len(levels) + 1, len(scores)))
    return Ranking(buckets, len(levels))


def mean_defined(values: Float64Array) -> Float64Array:
    """Return the mean over the last axis of what is not NaN; NaN where nothing is."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis=-1), defined.sum(axis=-1))


def check_some(labels: IntArray) -> None:
    """Raise DataError where there is no image to measure on."""
    if len(labels) == 0:
        raise DataError(
            "0 images have labels to measure on; at least 1 is needed; check the folder or the split"
        )


def check_labels(labels: IntArray, n_classes: int) -> None:
    """Raise DataError where there is no label or one lies outside [0, n_classes)."""
    check_some(labels)
    outside = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if outside.size:
        raise DataError(
            f"label {labels[outside[0]]} in row {outside[0]} is outside the {n_classes} classes, "
            f"0 to {n_classes - 1}; leave out such rows ({outside.size} in all)"
        )


def _ratio(top: NDArray[Any], bottom: NDArray[Any]) -> Float64Array:
    """Divide; 0/0 is NaN without a warning."""
    undefined = np.full(np.shape(bottom), np.nan)
    quotient: Float64Array = np.divide(top, bottom, out=undefined, where=np.asarray(bottom) > 0)
    return quotient


def _indicator(rows: IntArray, images: IntArray, shape: tuple[int, int]) -> Any:
    """Build the sparse 0/1 matrix that sums the weights of images into rows."""
    from scipy.sparse import csr_array

    return csr_array((np.ones(len(rows)), (rows, images)), shape=shape)
