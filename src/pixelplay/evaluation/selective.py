"""Selective prediction: risk-coverage curve, confidence threshold and operating point."""

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelplay.array_types import BoolArray, Float64Array, IntArray
from pixelplay.errors import ConfigError, DataError
from pixelplay.evaluation.estimates import estimate_label_metrics
from pixelplay.evaluation.intervals import Bootstrap, Estimate, plain_fields

CONFIDENCE = 0.95  # of the guarantee on a target accuracy
N_CUTS = 20


def risk_coverage(
    confidence: Float64Array, correct: BoolArray
) -> tuple[tuple[tuple[float, float], ...], float]:
    """Compute the error rate among the most confident predictions (N,), for every fraction of them.

    Returns:
        (coverage, risk) at the first coverage to reach each further 5 % of the images, where images of equal
        confidence are predicted together; and the area under the entire curve (AURC), the mean risk over all
        coverages; lower is better.

    Source: Geifman, Uziel and El-Yaniv, "Bias-reduced uncertainty estimation for deep neural classifiers",
    ICLR 2019, arXiv:1805.08206.
    """
    order, last = _descending(confidence)
    n_predicted = last + 1
    coverage, risk = n_predicted / len(confidence), np.cumsum(~correct[order])[last] / n_predicted
    steps = np.diff(n_predicted, prepend=0)  # images of equal confidence share their risk
    shown = np.unique(np.searchsorted(coverage, np.arange(1, N_CUTS + 1) / N_CUTS - 1e-9))
    points = tuple((float(coverage[i]), float(risk[i])) for i in shown)
    return points, float(steps @ risk / len(confidence))


def _descending(scores: Float64Array) -> tuple[IntArray, IntArray]:
    """Return the descending order (N,) and, within it, the last position of each distinct score (G,)."""
    order = np.argsort(-scores, kind="stable")
    return order, np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))


def fit_confidence_threshold(
    confidence: Float64Array, correct: BoolArray, target_accuracy: float
) -> tuple[float, float, float, float]:
    """Find the lowest confidence from which predictions reach a target accuracy, with a guarantee.

    Twenty cuts are tried, one for each further 5 % of the images, and every bound is corrected for that, so
    that it holds for the selected cut.

    Args:
        confidence: (N,) probability of the prediction of each held-out image.
        target_accuracy: in (0, 1).

    Returns:
        The threshold, below which the model abstains; the fraction of held-out images at or above it; the
        accuracy among those; the lower bound of the accuracy on new images with 95 % confidence.

    Raises:
        DataError: no cut can guarantee it; the message names the highest possible accuracy.

    Source: Angelopoulos et al., "Learn then test: calibrating predictive algorithms to achieve risk control",
    2021, arXiv:2110.01052, with Bonferroni's correction and Clopper and Pearson's bound.
    """
    from scipy.special import betaincinv

    n = len(confidence)
    if n == 0:
        raise DataError("no held-out images to fit a confidence threshold on; at least 1 is needed")
    order, ends = _descending(confidence)
    cuts = np.ceil(np.arange(1, N_CUTS + 1) * n / N_CUTS).astype(np.int64) - 1
    last = np.unique(ends[np.searchsorted(ends, cuts)])  # (M,) the least confident image of each cut
    n_wrong, n_predicted = np.cumsum(~correct[order], dtype=np.int64)[last], last + 1
    alpha = (1 - CONFIDENCE) / N_CUTS
    largest = betaincinv(n_wrong + 1, np.maximum(n_predicted - n_wrong, 1), 1 - alpha)  # error rate, (M,)
    bounds = 1 - np.where(n_wrong >= n_predicted, 1.0, largest)
    sufficient = np.flatnonzero(bounds >= target_accuracy)
    if not len(sufficient):
        raise DataError(
            f"target_accuracy={target_accuracy} cannot be guaranteed with {n} held-out images; "
            f"the highest possible is {math.floor(1000 * bounds.max()) / 1000}; lower it"
        )
    cut = int(sufficient[-1])
    return (
        float(confidence[order][last[cut]]),
        float(n_predicted[cut] / n),
        float(1 - n_wrong[cut] / n_predicted[cut]),
        float(bounds[cut]),
    )


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """The threshold at which a two-class model reaches a target precision.

    It is chosen and measured on the same images and therefore slightly optimistic.
    """

    positive: str
    target_precision: float
    threshold: float | None  # images with at least this probability of `positive` are accepted
    precision: Estimate | None  # among the accepted images; None without a threshold
    recall: Estimate  # accepted fraction of the positive images; 0 without a threshold
    highest_precision: float  # of all thresholds

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return plain_fields(self)


def check_precision_arguments(positive: str | None, at_precision: float | None) -> None:
    """Raise ConfigError if a positive class is named without a precision."""
    if positive is not None and at_precision is None:
        raise ConfigError(
            f"positive={positive!r} has no effect without at_precision; add --at-precision 0.95, for example"
        )


def find_positive_class(
    labels: IntArray, classes: tuple[str, ...], positive: str | None, target_precision: float
) -> int:
    """Return the index of the positive class of an operating point.

    The default is the second class.

    Raises:
        ConfigError: `target_precision` is outside (0, 1].
        DataError: the model has not exactly two classes, `positive` is none of them or has no image.
    """
    if not isinstance(target_precision, numbers.Real) or not 0 < target_precision <= 1:
        raise ConfigError(
            f"at_precision={target_precision!r} is outside its range; it must be above 0 and at most 1, "
            "for example 0.95"
        )
    if len(classes) != 2:
        raise DataError(
            f"the model has {len(classes)} classes but at_precision needs 2; remove --at-precision or train "
            "on two classes"
        )
    name = classes[1] if positive is None else positive
    if name not in classes:
        raise DataError(f"positive class {name!r} is unknown; use {classes[0]!r} or {classes[1]!r}")
    column = classes.index(name)
    if not (labels == column).any():
        raise DataError(
            f"class {name!r} has 0 of the {len(labels)} images but a threshold needs at least 1; "
            "add images or make the other class the positive one"
        )
    return column


def fit_operating_point(
    scores: Float64Array, positives: BoolArray, positive: str, target_precision: float, bootstrap: Bootstrap
) -> OperatingPoint:
    """Find the smallest threshold that reaches a precision; it has the highest recall of those that do.

    Args:
        scores: (N,) probability of the positive class.
        positives: (N,) images of that class, at least one.
        positive: its name.
    """
    order, last = _descending(scores)
    precisions = np.cumsum(positives[order])[last] / (last + 1)
    reached = np.flatnonzero(precisions >= target_precision)
    threshold = float(scores[order][last[reached[-1]]]) if reached.size else None
    accepted = scores >= (np.inf if threshold is None else threshold)
    _, by_class = estimate_label_metrics(accepted.astype(np.int64), positives.astype(np.int64), 2, bootstrap)
    recall = by_class["recall"][1]
    assert recall is not None  # there is a positive image
    return OperatingPoint(
        positive=positive,
        target_precision=target_precision,
        threshold=threshold,
        precision=by_class["precision"][1],
        recall=recall,
        highest_precision=float(precisions.max()),
    )
