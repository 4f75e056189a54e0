"""Evaluate predictions: every metric of one model on labelled images, with intervals.

Images of classes unknown to the model count as errors in the label metrics; log loss, Brier score, ROC-AUC
and average precision use the images of known classes only, and their `n` says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelplay.array_types import Float64Array, IntArray
from pixelplay.errors import DataError
from pixelplay.evaluation.estimates import estimate_label_metrics, estimate_prob_metrics
from pixelplay.evaluation.intervals import Bootstrap, Estimate, plain_fields, wilson
from pixelplay.evaluation.metrics import (
    ECE_BINS,
    LABEL_METRICS,
    check_labels,
    expected_calibration_error,
    label_metric,
)
from pixelplay.evaluation.selective import (
    OperatingPoint,
    find_positive_class,
    fit_operating_point,
    risk_coverage,
)
from pixelplay.text import counted

_PER_CLASS_METRICS = ("precision", "recall", "f1", "roc_auc", "average_precision")
_PROB_METRICS = ("log_loss", "brier", "roc_auc", "average_precision")
_MIN_RESAMPLES, _MAX_RESAMPLES = 100, 1000
_MAX_DRAWS = 10**9  # resamples × images × classes: a few seconds


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """Metrics of one class; None where undefined: no images, never predicted, or unknown to the model.

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
        """Return plain values; the name is "class"."""
        record = plain_fields(self)
        return {"class": record.pop("name")} | record


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Evaluation:
    """All metrics of one model on one set of labelled images.

    Attributes:
        classes: names, the model's first, then those only found in the labels.
        log_loss: mean negative log-likelihood, nats.
        brier: squared error summed over the classes; halved for two classes, as in scikit-learn.
        ece: of the argmax class, over all images including unknown classes; equal-width bins, L1 norm.
        aurc: area under the risk-coverage curve; lower is better.
        risk_coverage: about 20 points (coverage, risk).
        roc_auc: macro average, one-vs-rest.
        confusion: (K, K) int64, rows are labels, columns predictions.
        known_only: the same over the images of known classes; None if those are all or none.
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
    per_class: tuple[ClassMetrics, ...]
    confusion: IntArray
    known_only: "Evaluation | None"
    operating_point: OperatingPoint | None
    n_resamples: int
    resampled_by: str

    def __repr__(self) -> str:
        names = ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "roc_auc")
        rows = [f"  {name:<18}{getattr(self, name) or '-'}" for name in names]
        return "\n".join([f"{counted(self.n, 'image')} in {counted(len(self.classes), 'class')}", *rows])

    def to_json(self) -> dict[str, Any]:
        """Return plain values as in metrics.json; undefined metrics are null, never NaN."""
        record = plain_fields(self)
        del record["classes"], record["n_resamples"], record["resampled_by"]
        if self.known_only is not None:
            del record["known_only"]["known_only"]
        return record | {
            "ece": {"value": self.ece, "n_bins": ECE_BINS},
            "risk_coverage": [{"coverage": c, "risk": r} for c, r in self.risk_coverage],
            "per_class": [scores.to_json() for scores in self.per_class],
            "confusion": {"classes": list(self.classes), "matrix": self.confusion.tolist()},
            "bootstrap": {"n_resamples": self.n_resamples, "by": self.resampled_by},
        }


def majority_baseline(train_counts: IntArray, labels: IntArray, classes: tuple[str, ...]) -> dict[str, Any]:
    """Evaluate always predicting the most frequent training class.

    The K entries of `train_counts` are the training images of the first K `classes`.
    """
    check_labels(labels, len(classes))
    majority = int(np.argmax(train_counts))
    pred = np.full(len(labels), majority, dtype=np.int64)
    return {
        "class": classes[majority],
        "accuracy": wilson(int((labels == majority).sum()), len(labels)).to_json(),
        "balanced_accuracy": label_metric("balanced_accuracy", pred, labels),
        "macro_f1": label_metric("macro_f1", pred, labels),
    }


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
    """Evaluate predictions against labels.

    Args:
        probs: (N, n_known), rows sum to 1.
        pred: (N,) predicted classes in [0, n_known); need not be the argmax of `probs`.
        labels: (N,) in [0, len(classes)).
        classes: names, the model's first, then those only found in the labels.
        n_known: number of classes of the model.
        groups: (N,) equal for images that are not independent; None: all are independent.
        at_precision: in (0, 1]; find the threshold at which a two-class model reaches this precision.
        positive: class of `at_precision`; None: the second.
        seed: of the bootstrap.

    Raises:
        DataError: no image, probabilities that are not finite, labels out of range, `at_precision` without
            exactly two classes or without an image of the positive one.
        ConfigError: `at_precision` is outside (0, 1].
    """
    check_labels(labels, len(classes))
    assert probs.shape == (len(labels), n_known)
    assert pred.shape == labels.shape
    broken = np.flatnonzero(~np.isfinite(probs).all(axis=1) | (pred < 0) | (pred >= n_known))
    if broken.size:
        raise DataError(
            f"row {broken[0]} has no usable prediction ({broken.size} such rows); remove unreadable images"
        )
    target = None
    if at_precision is not None:
        target = (find_positive_class(labels, classes[:n_known], positive, at_precision), at_precision)
    n_resamples = max(_MIN_RESAMPLES, min(_MAX_RESAMPLES, _MAX_DRAWS // probs.size))
    bootstrap = Bootstrap(n=len(labels), groups=groups, n_resamples=n_resamples, seed=seed)
    return _evaluate(probs.astype(np.float64, copy=False), pred, labels, classes, bootstrap, target)


def _evaluate(
    probs: Float64Array,
    pred: IntArray,
    labels: IntArray,
    classes: tuple[str, ...],
    bootstrap: Bootstrap,
    target: tuple[int, float] | None,
) -> Evaluation:
    """Compute all metrics; `target` is the positive class and the precision of an operating point."""
    n_classes, n_known = len(classes), probs.shape[1]
    is_known, known_only = labels < n_known, None
    overall: dict[str, Any]
    if is_known.any() and not is_known.all():
        groups = None if bootstrap.groups is None else bootstrap.groups[is_known]
        of_known = replace(bootstrap, n=int(is_known.sum()), groups=groups)
        known_only = _evaluate(
            probs[is_known], pred[is_known], labels[is_known], classes[:n_known], of_known, target
        )
        overall = {name: getattr(known_only, name) for name in _PROB_METRICS}
        by_class = {
            name: [getattr(scores, name) for scores in known_only.per_class]
            for name in ("roc_auc", "average_precision")
        }
    else:
        subset = slice(None) if n_known == n_classes else is_known
        overall, by_class = estimate_prob_metrics(probs[subset], labels[subset], bootstrap)
    labels_overall, labels_by_class = estimate_label_metrics(pred, labels, n_classes, bootstrap)
    overall |= labels_overall
    unknown = [None] * (n_classes - n_known)
    by_class = {**labels_by_class, **{name: values + unknown for name, values in by_class.items()}}
    support = np.bincount(labels, minlength=n_classes)
    confusion = np.bincount(labels * n_classes + pred, minlength=n_classes**2)
    curve, aurc = risk_coverage(probs[np.arange(len(pred)), pred], pred == labels)
    return Evaluation(
        n=len(labels),
        classes=classes,
        # of the argmax class, whatever tau decides
        ece=expected_calibration_error(probs, probs.argmax(1), labels),
        aurc=aurc,
        risk_coverage=curve,
        per_class=tuple(
            ClassMetrics(name=name, n=int(support[k]), **{m: by_class[m][k] for m in _PER_CLASS_METRICS})
            for k, name in enumerate(classes)
        ),
        confusion=confusion.reshape(n_classes, n_classes),
        known_only=known_only,
        operating_point=target
        and fit_operating_point(
            probs[:, target[0]], labels == target[0], classes[target[0]], target[1], bootstrap
        ),
        n_resamples=bootstrap.n_resamples,
        resampled_by=bootstrap.unit,
        **overall,
    )


def average_evaluations(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Average every metric and the ends of its interval over R evaluations of the same images.

    An averaged interval describes a single evaluation: measuring the same images again adds no evidence. The
    confusion matrix is the sum over all R, the risk-coverage curve that of the first.
    """
    if len(evaluations) == 1:
        return evaluations[0]
    known = [e.known_only for e in evaluations if e.known_only is not None]
    by_class = zip(*(e.per_class for e in evaluations), strict=True)
    return replace(
        evaluations[0],
        **_averages(evaluations, (*LABEL_METRICS, *_PROB_METRICS)),
        ece=float(np.mean([e.ece for e in evaluations])),
        aurc=float(np.mean([e.aurc for e in evaluations])),
        per_class=tuple(replace(each[0], **_averages(each, _PER_CLASS_METRICS)) for each in by_class),
        confusion=np.sum([e.confusion for e in evaluations], axis=0),
        known_only=average_evaluations(known) if known else None,
    )


def _averages(records: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Average values and intervals of some metrics; None if one is undefined, unreliable if one is."""
    averages: dict[str, Estimate | None] = {}
    for name in names:
        estimates = [getattr(record, name) for record in records]
        averages[name] = None
        if None not in estimates:
            value, low, high = np.mean([(e.value, e.low, e.high) for e in estimates], axis=0).tolist()
            reliable = all(e.reliable for e in estimates)
            averages[name] = replace(estimates[0], value=value, low=low, high=high, reliable=reliable)
    return averages
