"""Confidence on held-out images → when not to answer, and what that is worth."""

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelplay.arrays import BoolArray, Float64Array, IntArray
from pixelplay.config import check_share
from pixelplay.errors import ConfigError, DataError
from pixelplay.evaluation.estimates import estimate_label_metrics
from pixelplay.evaluation.intervals import Bootstrap, Estimate

CONFIDENCE = 0.95  # with which an asked accuracy is promised
N_CUTS = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class RiskCoverage:
    """Share of wrong answers if only the surest images are answered, for every share of them.

    Attributes:
        coverage: (M,) share of the images answered, ascending; images of equal confidence come together.
        risk: (M,) share of wrong answers among them.
        aurc: area under the curve: mean risk over all coverages; lower is better.
    """

    coverage: Float64Array
    risk: Float64Array
    aurc: float

    def points(self) -> tuple[tuple[float, float], ...]:
        """Coverage and risk where each further 5 % of the images is reached."""
        steps = np.searchsorted(self.coverage, np.arange(1, N_CUTS + 1) / N_CUTS - 1e-9)
        return tuple((float(self.coverage[i]), float(self.risk[i])) for i in np.unique(steps))


@dataclass(frozen=True, kw_only=True)
class ConfidenceThreshold:
    """The confidence from which on answers are given.

    Attributes:
        threshold: images with at least this confidence are answered.
        coverage: share of the held-out images that are.
        accuracy: among those.
        bound: what the accuracy on new images is at least, with 95 % confidence.
    """

    threshold: float
    coverage: float
    accuracy: float
    bound: float


def risk_coverage(confidence: Float64Array, is_right: BoolArray) -> RiskCoverage:
    """Sort images by confidence and count errors.

    Args:
        confidence: (N,) probability of the answer.
        is_right: (N,).

    Source: Geifman, Uziel and El-Yaniv, "Bias-reduced uncertainty estimation for deep neural classifiers",
    ICLR 2019, arXiv:1805.08206.
    """
    order = np.argsort(-confidence, kind="stable")
    last = np.flatnonzero(np.append(np.diff(confidence[order]) != 0, True))
    wrong = np.cumsum(~is_right[order])[last]
    n_answered = last + 1
    risk = wrong / n_answered
    steps = np.diff(n_answered, prepend=0)  # images that came in together share their risk
    return RiskCoverage(
        coverage=n_answered / len(confidence), risk=risk, aurc=float(steps @ risk / len(confidence))
    )


def fit_confidence_threshold(
    confidence: Float64Array, is_right: BoolArray, target_accuracy: float
) -> ConfidenceThreshold:
    """Find the lowest confidence from which on answers are right as often as asked, with a guarantee.

    Twenty cuts are tried, one for each further 5 % of the images. Every bound allows for that, so that it
    holds for the cut that is taken.

    Args:
        confidence: (N,) of held-out images, probability of the answer.
        is_right: (N,).
        target_accuracy: in (0, 1).

    Raises:
        ConfigError: `target_accuracy` is outside (0, 1).
        DataError: no cut can promise it; the best that can be promised is named.

    Source: Angelopoulos et al., "Learn then test: calibrating predictive algorithms to achieve risk control",
    2021, arXiv:2110.01052, with Bonferroni's correction and Clopper and Pearson's bound.
    """
    check_share("target_accuracy", target_accuracy)
    n = len(confidence)
    if n == 0:
        raise DataError("no held-out images to choose a confidence on; at least 1 is needed")
    order = np.argsort(-confidence, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(confidence[order]) != 0, True))  # equal ones come together
    asked = np.ceil(np.arange(1, N_CUTS + 1) * n / N_CUTS).astype(np.int64) - 1
    last = np.unique(ends[np.searchsorted(ends, asked)])  # (M,) the least sure that each cut answers
    n_wrong, n_answered = np.cumsum(~is_right[order], dtype=np.int64)[last], last + 1
    bounds = 1 - _highest_error(n_wrong, n_answered, (1 - CONFIDENCE) / N_CUTS)  # (M,)
    kept = np.flatnonzero(bounds >= target_accuracy)
    if not len(kept):
        raise DataError(
            f"no confidence promises an accuracy of {target_accuracy} on {n} held-out images; "
            f"the best that can be promised is {math.floor(1000 * bounds.max()) / 1000}; ask for less"
        )
    cut = int(kept[-1])
    return ConfidenceThreshold(
        threshold=float(confidence[order][last[cut]]),
        coverage=float(n_answered[cut] / n),
        accuracy=float(1 - n_wrong[cut] / n_answered[cut]),
        bound=float(bounds[cut]),
    )


def _highest_error(n_wrong: IntArray, n: IntArray, alpha: float) -> Float64Array:
    """Upper end of Clopper and Pearson's one-sided interval of an error rate."""
    from scipy.special import betaincinv

    inside = betaincinv(n_wrong + 1, np.maximum(n - n_wrong, 1), 1 - alpha)
    return np.where(n_wrong >= n, 1.0, inside)


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """The threshold at which a two-class model reaches an asked precision.

    It is chosen and measured on the same images, so it is a little optimistic for others.

    Attributes:
        threshold: images with at least this probability of `positive` are accepted; None: none reaches it.
        precision: among the accepted images; None without a threshold.
        recall: accepted share of the positive images; 0 without a threshold.
        highest_precision: the highest that any threshold reaches.
    """

    positive: str
    asked_precision: float
    threshold: float | None
    precision: Estimate | None
    recall: Estimate
    highest_precision: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "positive": self.positive,
            "asked_precision": self.asked_precision,
            "threshold": self.threshold,
            "precision": None if self.precision is None else self.precision.to_json(),
            "recall": self.recall.to_json(),
            "highest_precision": self.highest_precision,
        }


def check_precision_arguments(positive: str | None, at_precision: float | None) -> None:
    """Raise ConfigError where a positive class is named and no precision is asked for."""
    if positive is not None and at_precision is None:
        raise ConfigError(
            f"positive={positive!r} says nothing without a precision; add --at-precision 0.95, say"
        )


def find_positive(
    labels: IntArray, classes: tuple[str, ...], positive: str | None, asked_precision: float
) -> int:
    """Return the position of the class that an operating point is about, or refuse at once.

    Args:
        labels: (N,) int, the images to choose a threshold on.
        classes: the model's names.
        positive: one of them; None: the second.
        asked_precision: in (0, 1].

    Raises:
        ConfigError: `asked_precision` is outside (0, 1].
        DataError: the model has not exactly two classes, `positive` is none of them or has no image.
    """
    if not isinstance(asked_precision, numbers.Real) or not 0 < asked_precision <= 1:
        raise ConfigError(
            f"precision {asked_precision!r} was asked for; it must be above 0 and at most 1; "
            "ask for 0.95, say"
        )
    if len(classes) != 2:
        raise DataError(
            f"a precision was asked for but the model has {len(classes)} classes and a threshold needs 2; "
            "leave the precision out, or train on two classes"
        )
    name = classes[1] if positive is None else positive
    if name not in classes:
        raise DataError(f"positive class {name!r} is unknown; choose {classes[0]!r} or {classes[1]!r}")
    column = classes.index(name)
    if not (labels == column).any():
        raise DataError(
            f"class {name!r} has 0 of the {len(labels)} images but a threshold needs at least 1; "
            "add some, or make the other class the positive one"
        )
    return column


def fit_operating_point(
    scores: Float64Array,
    is_positive: BoolArray,
    positive: str,
    asked_precision: float,
    resampling: Bootstrap,
) -> OperatingPoint:
    """Find the smallest threshold that reaches a precision: it has the highest recall of those that do.

    Args:
        scores: (N,) float, probability of the positive class.
        is_positive: (N,) bool, at least one; images of unknown classes are not.
        positive: its name.
        asked_precision: in (0, 1].
        resampling: of these N images, for the intervals.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # equal scores are accepted together
    precisions = np.cumsum(is_positive[order])[last] / (last + 1)
    reached = np.flatnonzero(precisions >= asked_precision)
    threshold = float(scores[order][last[reached[-1]]]) if reached.size else None
    accepted = scores >= (np.inf if threshold is None else threshold)
    judged = estimate_label_metrics(accepted.astype(np.int64), is_positive.astype(np.int64), 2, resampling)
    recall = judged.recall[1]
    assert recall is not None  # there is a positive image
    return OperatingPoint(
        positive=positive,
        asked_precision=asked_precision,
        threshold=threshold,
        precision=judged.precision[1],
        recall=recall,
        highest_precision=float(precisions.max()),
    )
