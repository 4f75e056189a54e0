"""Paired comparison of two models on the same images: intervals of differences and McNemar's test."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pixelplay.array_types import BoolArray, Float64Array, IntArray
from pixelplay.config import Metric
from pixelplay.evaluation.intervals import MIN_UNITS, Bootstrap, Estimate, wilson
from pixelplay.evaluation.metrics import LABEL_METRICS, count_labels, log_losses

N_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Differences between two models on the same images."""

    n: int
    values: Mapping[str, tuple[float, float]]  # metric → its value for the first and the second model
    differences: Mapping[str, Estimate]  # metric → first minus second; a lower log loss is better
    n_only_first_right: int
    n_only_second_right: int
    p_value: float | None  # of McNemar's two-sided mid-p test; None with groups, which it does not support

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "n": self.n,
            **{
                name: {"values": list(self.values[name]), "difference": difference.to_json()}
                for name, difference in self.differences.items()
            },
            "n_only_first_right": self.n_only_first_right,
            "n_only_second_right": self.n_only_second_right,
            "mcnemar_p": self.p_value,
        }


def compare_predictions(
    preds: tuple[IntArray, IntArray],
    labels: IntArray,
    n_classes: int,
    metric: Metric,
    bootstrap: Bootstrap,
) -> tuple[tuple[float, float], Float64Array]:
    """Compare one metric of two predictions (N,) of the same images.

    Returns:
        The metric of both; second minus first on resamples, (R,).
    """
    measure = LABEL_METRICS[metric]
    first, second = (float(measure(count_labels(pred, labels, n_classes))) for pred in preds)
    samples = []
    for weights in bootstrap.weights():
        drawn = [measure(count_labels(pred, labels, n_classes, weights)) for pred in preds]
        samples.append(drawn[1] - drawn[0])
    return (first, second), np.concatenate(samples)


def compare_models(
    preds: tuple[IntArray, IntArray],
    probs: tuple[Float64Array, Float64Array],
    labels: IntArray,
    groups: IntArray | None,
    *,
    is_known: BoolArray,
    seed: int = 0,
) -> PairedComparison:
    """Compare the predictions and probabilities of two models on the same images.

    Args:
        probs: (N, K) each, N >= 1; 0 for a class unknown to the model.
        groups: (N,) equal for images that are not independent; None: all are independent.
        is_known: (N,) images of classes known to both models, for the log loss.
    """
    n_classes = probs[0].shape[1]
    bootstrap = Bootstrap(n=len(labels), groups=groups, n_resamples=N_RESAMPLES, seed=seed)
    first, second = (pred == labels for pred in preds)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    support = np.bincount(labels)
    enough = only_first + only_second >= MIN_UNITS
    enough_of_each = enough and bool(support[support > 0].min() >= MIN_UNITS)
    values: dict[str, tuple[float, float]] = {}
    differences: dict[str, Estimate] = {}
    for metric in LABEL_METRICS:
        # reversed: compare_predictions subtracts the first from the second
        (of_second, of_first), samples = compare_predictions(
            preds[::-1], labels, n_classes, metric, bootstrap
        )
        values[metric] = of_first, of_second
        differences[metric] = bootstrap.estimate(
            of_first - of_second,
            samples,
            n=len(labels),
            enough=enough if metric == "accuracy" else enough_of_each,
        )
    spread, single = differences["accuracy"], newcombe(first, second)
    if groups is not None:  # groups may only widen the interval of independent images
        single = replace(spread, low=min(spread.low, single.low), high=max(spread.high, single.high))
    differences["accuracy"] = single
    if is_known.any():
        losses = np.stack([log_losses(p[is_known], labels[is_known]) for p in probs], axis=1)  # (n, 2)
        values["log_loss"] = tuple(losses.mean(axis=0).tolist())
        change = losses[:, 0] - losses[:, 1]
        known_groups = None if groups is None else groups[is_known]
        bootstrap = replace(bootstrap, n=len(change), groups=known_groups)
        samples = np.concatenate([times @ change / times.sum(axis=1) for times in bootstrap.weights()])
        differences["log_loss"] = bootstrap.estimate(
            float(change.mean()), samples, n=len(change), enough=len(change) >= MIN_UNITS
        )
    return PairedComparison(
        n=len(labels),
        values=values,
        differences=differences,
        n_only_first_right=only_first,
        n_only_second_right=only_second,
        p_value=mcnemar(only_first, only_second) if groups is None else None,
    )


def newcombe(first_correct: BoolArray, second_correct: BoolArray) -> Estimate:
    """Estimate the difference of two proportions of the same independent images, first minus second.

    It combines both Wilson intervals and the correlation between them; unlike a bootstrap percentile
    interval it has a width even if the two hardly differ.

    Source: Newcombe, "Improved confidence intervals for the difference between binomial proportions based
    on paired data", Statistics in Medicine 17 (1998), method 10.
    """
    n = len(first_correct)
    first, second = wilson(int(first_correct.sum()), n), wilson(int(second_correct.sum()), n)
    counts = np.bincount(2 * first_correct + second_correct, minlength=4)
    neither, only_second, only_first, both = counts.tolist()
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    covariance = float(both * neither - only_first * only_second)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)  # the paper's continuity correction
    correlation = covariance / np.sqrt(float(margins)) if margins else 0.0

    def reach(a: float, b: float) -> float:
        return float(np.sqrt(max(a**2 - 2 * correlation * a * b + b**2, 0.0)))

    value = (only_first - only_second) / n
    return Estimate(
        value=value,
        low=value - reach(first.value - first.low, second.high - second.value),
        high=value + reach(first.high - first.value, second.value - second.low),
        n=n,
        reliable=only_first + only_second >= MIN_UNITS,
        method="newcombe, paired",
    )


def mcnemar(n_only_first: int, n_only_second: int) -> float:
    """Compute the two-sided mid-p value of McNemar's test from the discordant counts.

    Source: McNemar, Psychometrika 12 (1947); mid-p as recommended by Fagerland, Lydersen and Laake, "The
    McNemar test for binary matched-pairs data", BMC Medical Research Methodology 13 (2013).
    """
    from scipy.special import bdtr

    n, fewer = n_only_first + n_only_second, min(n_only_first, n_only_second)
    if n == 0:
        return 1.0
    up_to, below = bdtr(fewer, n, 0.5), bdtr(fewer - 1, n, 0.5) if fewer else 0.0
    is_even = n_only_first == n_only_second  # both tails contain the middle, which counts once
    return float(1 - (up_to - below) / 2 if is_even else up_to + below)
