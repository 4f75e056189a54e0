"""At which probability a two-class model must say yes to be right as often as asked."""

import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelplay.arrays import BoolArray, Float64Array, IntArray
from pixelplay.errors import ConfigError, DataError
from pixelplay.evaluation.estimates import judge_labels
from pixelplay.evaluation.intervals import Estimate, Resampling


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


def check_asked(positive: str | None, at_precision: float | None) -> None:
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
    resampling: Resampling,
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
    judged = judge_labels(accepted.astype(np.int64), is_positive.astype(np.int64), 2, resampling)
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
