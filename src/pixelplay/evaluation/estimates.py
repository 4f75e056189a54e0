"""Label and probability metrics, overall and per class, each with its interval."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from pixelplay.array_types import BoolArray, Float64Array, IntArray
from pixelplay.evaluation.intervals import MIN_UNITS, Bootstrap, Estimate, macro_average, wilson
from pixelplay.evaluation.metrics import (
    LABEL_METRICS,
    ClassCounts,
    areas_under_curves,
    brier_losses,
    count_labels,
    log_losses,
    nan_mean,
    rank_buckets,
)

ClassEstimates = dict[str, list[Estimate | None]]  # metric -> one estimate per class, None where undefined
_RANKED_CELLS = 20_000_000  # images × classes ranked at once: 320 MB
_RATE_RESAMPLES = 1000
_LOSSES, _AREAS = ("log_loss", "brier"), ("roc_auc", "average_precision")
_CLASS_METRICS = {"precision": ClassCounts.precision, "recall": ClassCounts.recall, "f1": ClassCounts.f1}


def estimate_label_metrics(
    pred: IntArray, labels: IntArray, n_classes: int, bootstrap: Bootstrap
) -> tuple[dict[str, Estimate], ClassEstimates]:
    """Estimate the metrics of predicted labels.

    Without groups every interval is Wilson's or derived from it. With groups it is the bootstrap's, but
    never narrower than without: a group holds no more information than as many independent images.

    Args:
        pred, labels: (N,) in [0, K), N >= 1; K includes classes unknown to the model.

    Returns:
        Accuracy, balanced accuracy and macro F1; precision, recall and F1 of each class.
    """
    counts = count_labels(pred, labels, n_classes)
    drawn = [count_labels(pred, labels, n_classes, weights) for weights in bootstrap.weights()]
    samples = ClassCounts(*(np.concatenate(chunks) for chunks in zip(*drawn, strict=True)))  # each (R, K)
    overall, by_class = _estimate_independent(counts, samples)
    if bootstrap.groups is None:
        return overall, by_class

    def widen(single: Estimate, spread: Float64Array) -> Estimate:
        enough = single.reliable and single.n >= MIN_UNITS
        grouped = bootstrap.estimate(
            single.value, spread, n=single.n, enough=enough, n_classes=single.n_classes
        )
        return replace(grouped, low=min(grouped.low, single.low), high=max(grouped.high, single.high))

    return (
        {name: widen(overall[name], metric(samples)) for name, metric in LABEL_METRICS.items()},
        {
            name: [
                single and widen(single, spread)
                for single, spread in zip(by_class[name], metric(samples).T, strict=True)
            ]
            for name, metric in _CLASS_METRICS.items()
        },
    )


def _estimate_independent(
    counts: ClassCounts, samples: ClassCounts
) -> tuple[dict[str, Estimate], ClassEstimates]:
    """Estimate as if all images were independent; samples give the correlation of the classes' F1."""
    correct, true, pred = (each.astype(np.int64).tolist() for each in counts)
    by_class: ClassEstimates = {
        "precision": [wilson(c, n) if n else None for c, n in zip(correct, pred, strict=True)],
        "recall": [wilson(c, n) if n else None for c, n in zip(correct, true, strict=True)],
        "f1": [_wilson_f1(*each) if each[1] else None for each in zip(correct, true, pred, strict=True)],
    }
    present = counts.n_true > 0
    reliable = bool(counts.n_true[present].min() >= MIN_UNITS)
    errors = np.nan_to_num(samples.f1()[:, present] - counts.f1()[present])  # (R, P); 0 if not drawn
    length = np.linalg.norm(errors, axis=0)
    unit = np.divide(errors, length, out=np.zeros_like(errors), where=length > 0)
    correlation = unit.T @ unit  # (P, P)
    np.fill_diagonal(correlation, 1)  # also for a class without any error
    recalls, f1s = ([e for e in by_class[name] if e] for name in ("recall", "f1"))
    overall = {
        "accuracy": wilson(sum(correct), sum(true)),
        "balanced_accuracy": macro_average(recalls, reliable=reliable),
        "macro_f1": macro_average(f1s, reliable=reliable, correlation=correlation),
    }
    return overall, by_class


def _wilson_f1(n_correct: int, n_true: int, n_pred: int) -> Estimate:
    """Estimate F1 from the Jaccard index J of true and predicted images: F1 = 2J / (1 + J)."""
    jaccard = wilson(n_correct, n_true + n_pred - n_correct)
    value, low, high = (2 * end / (1 + end) for end in (jaccard.value, jaccard.low, jaccard.high))
    return replace(jaccard, value=value, low=low, high=high, n=n_true)


def estimate_rate(is_hit: BoolArray, groups: IntArray | None, seed: int) -> Estimate:
    """Estimate the fraction of images (N,), N >= 1, for which something is true; groups are (N,)."""
    bootstrap = Bootstrap(n=len(is_hit), groups=groups, n_resamples=_RATE_RESAMPLES, seed=seed)
    overall, _ = estimate_label_metrics(is_hit.astype(np.int64), np.ones(len(is_hit), np.int64), 2, bootstrap)
    return overall["accuracy"]


def estimate_prob_metrics(
    probs: Float64Array, labels: IntArray, bootstrap: Bootstrap
) -> tuple[dict[str, Estimate | None], ClassEstimates]:
    """Estimate the metrics of predicted probabilities (N, K); without any image every metric is None.

    Returns:
        Log loss, Brier score, ROC-AUC and average precision; the last two of each class, one-vs-rest.
    """
    n, n_classes = probs.shape
    if n == 0:
        return dict.fromkeys(_LOSSES + _AREAS), {name: [None] * n_classes for name in _AREAS}
    support = np.bincount(labels, minlength=n_classes)
    present = np.flatnonzero(support)
    enough = bool(support[present].min() >= MIN_UNITS)
    losses = np.stack([log_losses(probs, labels), brier_losses(probs, labels)], axis=1)  # (N, 2)
    means = np.concatenate(  # (1 + R, 2)
        [w @ losses / w.sum(axis=1, keepdims=True) for w in _unit_and_resampled(bootstrap)]
    )
    overall: dict[str, Estimate | None] = {
        name: bootstrap.estimate(float(means[0, i]), means[1:, i], n=n, enough=enough)
        for i, name in enumerate(_LOSSES)
    }
    areas = np.full((2, bootstrap.n_resamples + 1, n_classes), np.nan)
    # rankings take about 16 bytes per image and class: too much to hold for 1,000 classes at once
    n_at_once = max(1, _RANKED_CELLS // n)
    for start in range(0, len(present), n_at_once):
        some = present[start : start + n_at_once]
        areas[:, :, some] = _areas_of_classes(some, probs, labels, bootstrap)
    macro = nan_mean(areas)  # (2, 1 + R)
    has_enough = np.minimum(support, n - support) >= MIN_UNITS  # (K,)
    n_areas = int((~np.isnan(areas[0, 0])).sum())
    by_class: ClassEstimates = {}
    for i, name in enumerate(_AREAS):
        overall[name] = None
        by_class[name] = [None] * n_classes
        if n_areas:
            overall[name] = bootstrap.estimate(
                float(macro[i, 0]), macro[i, 1:], n=n, enough=enough, n_classes=n_areas
            )
        for k in np.flatnonzero(~np.isnan(areas[i, 0])):
            value, samples, is_enough = float(areas[i, 0, k]), areas[i, 1:, k], bool(has_enough[k])
            by_class[name][k] = bootstrap.estimate(value, samples, n=int(support[k]), enough=is_enough)
    return overall, by_class


def _areas_of_classes(
    classes: IntArray, probs: Float64Array, labels: IntArray, bootstrap: Bootstrap
) -> Float64Array:
    """Return ROC-AUC and average precision of some classes, unweighted and resampled: (2, 1 + R, some)."""
    buckets = [rank_buckets(probs[:, k], labels == k) for k in classes]
    drawn = []
    for weights in _unit_and_resampled(bootstrap):
        columns = np.ascontiguousarray(weights.T, dtype=np.float64)  # (N, R')
        drawn.append(np.stack([areas_under_curves(each, columns) for each in buckets], axis=2))
    return np.concatenate(drawn, axis=1)


def _unit_and_resampled(bootstrap: Bootstrap) -> Iterator[IntArray]:
    """Yield unit weights, (1, N), then the weights of all resamples."""
    yield np.ones((1, bootstrap.n), dtype=np.int64)
    yield from bootstrap.weights()
