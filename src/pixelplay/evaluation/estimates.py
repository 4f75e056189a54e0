"""What answers and probabilities are worth: figures of `weighted`, each with its interval."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from pixelplay.arrays import Float64Array, IntArray
from pixelplay.evaluation.intervals import MIN_UNITS, Bootstrap, Estimate, mean_of_shares, wilson
from pixelplay.evaluation.metrics import Counts, brier_losses, count_labels, log_losses, mean_defined, rank

_RANKED_CELLS = 20_000_000  # images × classes ranked at once: 320 MB


@dataclass(frozen=True, kw_only=True)
class LabelEstimates:
    """What the answers are worth; lists hold one entry per class, None where undefined."""

    accuracy: Estimate
    balanced_accuracy: Estimate
    macro_f1: Estimate
    precision: list[Estimate | None]
    recall: list[Estimate | None]
    f1: list[Estimate | None]


@dataclass(frozen=True, kw_only=True)
class ProbEstimates:
    """What the probabilities are worth; lists hold one entry per class, None where undefined."""

    log_loss: Estimate | None
    brier: Estimate | None
    roc_auc: Estimate | None
    average_precision: Estimate | None
    class_roc_auc: list[Estimate | None]
    class_average_precision: list[Estimate | None]


def estimate_label_metrics(
    pred: IntArray, labels: IntArray, n_classes: int, resampling: Bootstrap
) -> LabelEstimates:
    """Estimate everything that depends on the answers alone.

    Without groups every interval is Wilson's or made of Wilson's. With groups it is the bootstrap's, but
    never narrower than without: images of one group say no more than as many independent ones.

    Args:
        pred: (N,) int in [0, K).
        labels: (N,) int in [0, K), N >= 1.
        n_classes: K, classes that the model does not know included.
        resampling: of these N images.
    """
    counts = count_labels(pred, labels, n_classes)
    drawn = [count_labels(pred, labels, n_classes, weights) for weights in resampling.weights()]
    samples = Counts(*(np.concatenate(parts) for parts in zip(*drawn, strict=True)))  # each (R, K)
    alone = _judge_independent(counts, samples)
    if resampling.groups is None:
        return alone

    def widen(share: Estimate, spread: Float64Array) -> Estimate:
        is_enough = share.reliable and share.n >= MIN_UNITS
        grouped = resampling.estimate(
            share.value, spread, n=share.n, is_enough=is_enough, n_classes=share.n_classes
        )
        return replace(grouped, low=min(grouped.low, share.low), high=max(grouped.high, share.high))

    def widen_each(shares: list[Estimate | None], spreads: Float64Array) -> list[Estimate | None]:
        return [share and widen(share, spread) for share, spread in zip(shares, spreads.T, strict=True)]

    return LabelEstimates(
        accuracy=widen(alone.accuracy, samples.accuracy()),
        balanced_accuracy=widen(alone.balanced_accuracy, samples.balanced_accuracy()),
        macro_f1=widen(alone.macro_f1, samples.macro_f1()),
        precision=widen_each(alone.precision, samples.precision()),
        recall=widen_each(alone.recall, samples.recall()),
        f1=widen_each(alone.f1, samples.f1()),
    )


def _judge_independent(counts: Counts, samples: Counts) -> LabelEstimates:
    """Estimate as if no image depended on another; samples give only the correlation of the classes' F1."""
    correct, true, pred = (split.astype(np.int64).tolist() for split in counts)
    recall = [wilson(c, n) if n else None for c, n in zip(correct, true, strict=True)]
    f1 = [_wilson_f1(*parts) if parts[1] else None for parts in zip(correct, true, pred, strict=True)]
    present = counts.n_true > 0
    is_enough = bool(counts.n_true[present].min() >= MIN_UNITS)
    errors = np.nan_to_num(samples.f1()[:, present] - counts.f1()[present])  # (R, P); 0 where not drawn
    length = np.linalg.norm(errors, axis=0)
    unit = np.divide(errors, length, out=np.zeros_like(errors), where=length > 0)
    correlation = unit.T @ unit  # (P, P)
    np.fill_diagonal(correlation, 1)  # also for a class without a single error
    return LabelEstimates(
        accuracy=wilson(sum(correct), sum(true)),
        balanced_accuracy=mean_of_shares([share for share in recall if share], reliable=is_enough),
        macro_f1=mean_of_shares(
            [share for share in f1 if share], reliable=is_enough, correlation=correlation
        ),
        precision=[wilson(c, n) if n else None for c, n in zip(correct, pred, strict=True)],
        recall=recall,
        f1=f1,
    )


def _wilson_f1(n_correct: int, n_true: int, n_pred: int) -> Estimate:
    """Estimate F1 through the share J of right images among those true or predicted: F1 = 2J / (1 + J)."""
    share = wilson(n_correct, n_true + n_pred - n_correct)
    value, low, high = (2 * end / (1 + end) for end in (share.value, share.low, share.high))
    return replace(share, value=value, low=low, high=high, n=n_true)


def estimate_prob_metrics(probs: Float64Array, labels: IntArray, resampling: Bootstrap) -> ProbEstimates:
    """Estimate everything that depends on the probabilities.

    Args:
        probs: (N, K) float.
        labels: (N,) int in [0, K); without any image every figure is None.
        resampling: of these N images.
    """
    n, n_classes = probs.shape
    support = np.bincount(labels, minlength=n_classes)
    present = np.flatnonzero(support)
    if n == 0:
        return ProbEstimates(
            log_loss=None,
            brier=None,
            roc_auc=None,
            average_precision=None,
            class_roc_auc=[None] * n_classes,
            class_average_precision=[None] * n_classes,
        )
    losses = np.stack([log_losses(probs, labels), brier_losses(probs, labels)], axis=1)  # (N, 2)
    drawn = np.concatenate([w @ losses / w.sum(axis=1, keepdims=True) for w in _once_and(resampling)])
    mean, means = drawn[0], drawn[1:]  # (2,), (R, 2)
    areas = np.full((2, resampling.n_resamples + 1, n_classes), np.nan)
    # a ranking takes some 16 bytes for each image: with 1,000 classes too much to hold all at once
    n_at_once = max(1, _RANKED_CELLS // n)
    for start in range(0, len(present), n_at_once):
        some = present[start : start + n_at_once]
        areas[:, :, some] = _areas_of(some, probs, labels, resampling)
    macros = mean_defined(areas)  # (2, 1 + R)
    is_enough = bool(support[present].min() >= MIN_UNITS)
    n_areas = int((~np.isnan(areas[0, 0])).sum())

    def of_classes(which: int) -> list[Estimate | None]:
        enough = np.minimum(support, n - support) >= MIN_UNITS
        return resampling.estimates(areas[which, 0], areas[which, 1:], n=support, is_enough=enough)

    def macro(which: int) -> Estimate | None:
        if n_areas == 0:
            return None
        value, samples = float(macros[which, 0]), macros[which, 1:]
        return resampling.estimate(value, samples, n=n, is_enough=is_enough, n_classes=n_areas)

    return ProbEstimates(
        log_loss=resampling.estimate(float(mean[0]), means[:, 0], n=n, is_enough=is_enough),
        brier=resampling.estimate(float(mean[1]), means[:, 1], n=n, is_enough=is_enough),
        roc_auc=macro(0),
        average_precision=macro(1),
        class_roc_auc=of_classes(0),
        class_average_precision=of_classes(1),
    )


def _areas_of(some: IntArray, probs: Float64Array, labels: IntArray, resampling: Bootstrap) -> Float64Array:
    """ROC-AUC and average precision of some classes, as they are and on each resample: (2, 1 + R, some)."""
    rankings = [rank(probs[:, k], labels == k) for k in some]
    drawn = []
    for weights in _once_and(resampling):
        columns = np.ascontiguousarray(weights.T, dtype=np.float64)  # (N, R')
        drawn.append(np.stack([ranking.areas(columns) for ranking in rankings], axis=2))
    return np.concatenate(drawn, axis=1)


def _once_and(resampling: Bootstrap) -> Iterator[IntArray]:
    """Every image once, (1, N), then the multiplicities of all resamples."""
    yield np.ones((1, resampling.n), dtype=np.int64)
    yield from resampling.weights()
