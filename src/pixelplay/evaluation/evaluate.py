"""Probabilities and labels → every figure of an evaluation, each with its interval.

Images of classes that the model does not know count as errors wherever a label is judged; log-loss, Brier
score, ROC-AUC and average precision are about the images of known classes only, and their `n` says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelplay.arrays import BoolArray, Float64Array, IntArray
from pixelplay.errors import DataError
from pixelplay.evaluation.estimates import ProbEstimates, estimate_label_metrics, estimate_prob_metrics
from pixelplay.evaluation.intervals import Bootstrap, Estimate, wilson
from pixelplay.evaluation.metrics import (
    ECE_BINS,
    balanced_accuracy,
    check_labels,
    expected_calibration_error,
    macro_f1,
)
from pixelplay.evaluation.selective import OperatingPoint, find_positive, fit_operating_point, risk_coverage

_OF_CLASS = ("precision", "recall", "f1", "roc_auc", "average_precision")
_ESTIMATES = (
    "accuracy", "balanced_accuracy", "macro_f1", "log_loss", "brier", "roc_auc", "average_precision",
)  # fmt: skip
_MIN_RESAMPLES, _MAX_RESAMPLES = 100, 1000
_MAX_DRAWS = 10**9  # resamples × images × classes: some seconds of work


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """The figures of one class; None where undefined: no image of it, never predicted, or not known.

    ROC-AUC and average precision are one-vs-rest over the images of known classes.
    """

    name: str
    n: int
    precision: Estimate | None
    recall: Estimate | None
    f1: Estimate | None
    roc_auc: Estimate | None
    average_precision: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values; the name stands under "class"."""
        record = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {"class": record.pop("name")} | record


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """All figures of one model on one set of labelled images.

    Attributes:
        classes: names, the model's first, then those that only the labels know.
        log_loss: mean negative log-likelihood, nats.
        brier: squared error summed over the classes; halved for two classes, as scikit-learn has it.
        ece: over all images, unknown classes included; equal-width bins, L1 norm.
        aurc: mean share of wrong answers over all shares of the surest images answered; lower is better.
        risk_coverage: (share of the images answered, share of wrong answers among them), in some 20 steps.
        roc_auc: mean of the one-vs-rest areas of the classes present.
        per_class: in the order of `classes`.
        confusion: (K, K) int64, rows are true classes, columns predicted ones.
        known_only: the same over the images of known classes; None where those are all or none.
    """

    n: int
    classes: tuple[str, ...]
    accuracy: Estimate
    balanced_accuracy: Estimate
    macro_f1: Estimate
    log_loss: Estimate | None
    brier: Estimate | None
    ece: float
    aurc: float
    risk_coverage: tuple[tuple[float, float], ...]
    roc_auc: Estimate | None
    average_precision: Estimate | None
    per_class: tuple[ClassScores, ...]
    confusion: IntArray
    known_only: "Evaluation | None"
    operating_point: OperatingPoint | None
    n_resamples: int
    resampled_by: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values as they stand in metrics.json: null, never NaN."""
        known = None if self.known_only is None else self.known_only.to_json()
        if known is not None:
            del known["known_only"]
        return {
            "n": self.n,
            "accuracy": _plain(self.accuracy),
            "balanced_accuracy": _plain(self.balanced_accuracy),
            "macro_f1": _plain(self.macro_f1),
            "log_loss": _plain(self.log_loss),
            "brier": _plain(self.brier),
            "ece": {"value": self.ece, "n_bins": ECE_BINS},
            "aurc": self.aurc,
            "risk_coverage": [{"coverage": c, "risk": r} for c, r in self.risk_coverage],
            "roc_auc": _plain(self.roc_auc),
            "average_precision": _plain(self.average_precision),
            "per_class": [_plain(scores) for scores in self.per_class],
            "confusion": {"classes": list(self.classes), "matrix": self.confusion.tolist()},
            "known_only": known,
            "operating_point": _plain(self.operating_point),
            "bootstrap": {"n_resamples": self.n_resamples, "by": self.resampled_by},
        }


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What always answering the commonest training class scores."""

    name: str
    accuracy: Estimate
    balanced_accuracy: float
    macro_f1: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values; the name stands under "class"."""
        record = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {"class": record.pop("name")} | record


def majority_baseline(train_counts: IntArray, labels: IntArray, classes: tuple[str, ...]) -> Baseline:
    """Score the answer that needs no model: always the commonest training class.

    Args:
        train_counts: (K,) int, training images per known class.
        labels: (N,) int in [0, len(classes)) of the scored images.
        classes: names; the first K are those of `train_counts`.

    Raises:
        DataError: there is no image, or a label has no name.
    """
    check_labels(labels, len(classes))
    commonest = int(np.argmax(train_counts))
    pred = np.full(len(labels), commonest, dtype=np.int64)
    return Baseline(
        name=classes[commonest],
        accuracy=wilson(int((labels == commonest).sum()), len(labels)),
        balanced_accuracy=balanced_accuracy(pred, labels),
        macro_f1=macro_f1(pred, labels),
    )


def evaluate_probs(
    probs: NDArray[Any],
    pred: IntArray,
    labels: IntArray,
    classes: tuple[str, ...],
    *,
    n_known: int,
    groups: IntArray | None = None,
    at_precision: float | None = None,
    positive: str | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure predictions against labels.

    Args:
        probs: (N, n_known) float, rows sum to 1.
        pred: (N,) int in [0, n_known), the answers; need not be the argmax of `probs`.
        labels: (N,) int in [0, len(classes)).
        classes: names, the model's first, then those that only the labels know.
        n_known: number of classes of the model.
        groups: (N,) int, equal for images that are not independent; None: all are.
        at_precision: in (0, 1]; also find the threshold at which a two-class model reaches it.
        positive: the class that `at_precision` is about; None: the second.
        seed: of the bootstrap.

    Raises:
        DataError: no image, arrays that do not fit each other, probabilities that are not finite, labels out
            of range, `at_precision` without exactly two classes or without an image of the positive one.
        ConfigError: `at_precision` is outside (0, 1].
    """
    _check_inputs(probs, pred, labels, len(classes), n_known)
    asked = None
    if at_precision is not None:
        asked = (find_positive(labels, classes[:n_known], positive, at_precision), at_precision)
    n_resamples = max(_MIN_RESAMPLES, min(_MAX_RESAMPLES, _MAX_DRAWS // probs.size))
    resampling = Bootstrap(n=len(labels), groups=groups, n_resamples=n_resamples, seed=seed)
    scored = _Scored(probs.astype(np.float64, copy=False), pred, labels, classes, resampling)
    is_known = labels < n_known
    known = scored if n_known == len(classes) else scored.only(is_known)
    judged = estimate_prob_metrics(known.probs, known.labels, known.resampling)
    has_both = is_known.any() and not is_known.all()
    known_only = _measure(known, judged, None, asked) if has_both else None
    return _measure(scored, judged, known_only, asked)


def average_evaluations(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The mean of every figure over R evaluations of the same images, the ends of intervals too.

    A mean of intervals holds for one evaluation like these; nothing is gained by measuring the same images
    again. The confusion matrix adds up all R, and the risk-coverage curve is that of the first.
    """
    if len(evaluations) == 1:
        return evaluations[0]
    known = [e.known_only for e in evaluations if e.known_only is not None]
    first = evaluations[0]

    def mean(name: str, k: int | None = None) -> Any:
        of = evaluations if k is None else [e.per_class[k] for e in evaluations]
        return _average([getattr(figures, name) for figures in of])

    per_class = tuple(
        ClassScores(name=scores.name, n=scores.n, **{name: mean(name, k) for name in _OF_CLASS})
        for k, scores in enumerate(first.per_class)
    )
    return replace(
        first,
        **{name: mean(name) for name in _ESTIMATES},
        ece=float(np.mean([e.ece for e in evaluations])),
        aurc=float(np.mean([e.aurc for e in evaluations])),
        per_class=per_class,
        confusion=np.sum([e.confusion for e in evaluations], axis=0),
        known_only=average_evaluations(known) if known else None,
    )


def _average(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """The mean of value and interval; None where one is undefined. Unreliable where one is."""
    defined = [estimate for estimate in estimates if estimate is not None]
    if len(defined) < len(estimates):
        return None
    value, low, high = np.mean([(e.value, e.low, e.high) for e in defined], axis=0)
    is_reliable = all(e.reliable for e in defined)
    return replace(defined[0], value=float(value), low=float(low), high=float(high), reliable=is_reliable)


def _check_inputs(
    probs: NDArray[Any], pred: IntArray, labels: IntArray, n_classes: int, n_known: int
) -> None:
    """Raise DataError unless the arrays fit each other and hold usable values."""
    check_labels(labels, n_classes)
    if probs.shape != (len(labels), n_known) or pred.shape != labels.shape:
        raise DataError(
            f"probs {probs.shape} and pred {pred.shape} do not fit {len(labels)} labels and {n_known} known "
            "classes; give one row of probabilities and one answer per label"
        )
    broken = np.flatnonzero(~np.isfinite(probs).all(axis=1) | (pred < 0) | (pred >= n_known))
    if broken.size:
        raise DataError(
            f"row {broken[0]} has no usable prediction ({broken.size} such rows, 0 allowed); "
            "leave out images that could not be read"
        )


@dataclass(frozen=True, eq=False)
class _Scored:
    """Answers and labels of one set of images, with the way to resample it."""

    probs: Float64Array
    pred: IntArray
    labels: IntArray
    classes: tuple[str, ...]
    resampling: Bootstrap

    def only(self, is_known: BoolArray) -> "_Scored":
        """Return the images of known classes, without the names of the others."""
        groups = self.resampling.groups
        kept = None if groups is None else groups[is_known]
        return _Scored(
            self.probs[is_known],
            self.pred[is_known],
            self.labels[is_known],
            self.classes[: self.probs.shape[1]],
            replace(self.resampling, n=int(is_known.sum()), groups=kept),
        )


def _measure(
    scored: _Scored, judged: ProbEstimates, known_only: Evaluation | None, asked: tuple[int, float] | None
) -> Evaluation:
    """Judge the answers and put all figures together."""
    n_classes, n_known = len(scored.classes), scored.probs.shape[1]
    answers = estimate_label_metrics(scored.pred, scored.labels, n_classes, scored.resampling)
    support = np.bincount(scored.labels, minlength=n_classes)
    confusion = np.bincount(scored.labels * n_classes + scored.pred, minlength=n_classes**2)
    confidence = scored.probs[np.arange(len(scored.pred)), scored.pred]
    curve = risk_coverage(confidence, scored.pred == scored.labels)
    point = None
    if asked is not None:
        point = fit_operating_point(
            scored.probs[:, asked[0]],
            scored.labels == asked[0],
            scored.classes[asked[0]],
            asked[1],
            scored.resampling,
        )
    return Evaluation(
        n=len(scored.labels),
        classes=scored.classes,
        accuracy=answers.accuracy,
        balanced_accuracy=answers.balanced_accuracy,
        macro_f1=answers.macro_f1,
        log_loss=judged.log_loss,
        brier=judged.brier,
        # of the most probable class, whatever tau decides
        ece=expected_calibration_error(scored.probs, scored.probs.argmax(1), scored.labels),
        aurc=curve.aurc,
        risk_coverage=curve.points(),
        roc_auc=judged.roc_auc,
        average_precision=judged.average_precision,
        per_class=tuple(
            ClassScores(
                name=name,
                n=int(support[k]),
                precision=answers.precision[k],
                recall=answers.recall[k],
                f1=answers.f1[k],
                roc_auc=None if k >= n_known else judged.class_roc_auc[k],
                average_precision=None if k >= n_known else judged.class_average_precision[k],
            )
            for k, name in enumerate(scored.classes)
        ),
        confusion=confusion.reshape(n_classes, n_classes),
        known_only=known_only,
        operating_point=point,
        n_resamples=scored.resampling.n_resamples,
        resampled_by=scored.resampling.unit,
    )


def _plain(value: Any) -> Any:
    """Return a record as plain values, and plain values as they are."""
    return value.to_json() if hasattr(value, "to_json") else value
