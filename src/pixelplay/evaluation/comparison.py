"""Two answers to the same images → which is better, and how sure that is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pixelplay.arrays import BoolArray, Float64Array, IntArray
from pixelplay.config import Metric
from pixelplay.evaluation.intervals import MIN_UNITS, Bootstrap, Estimate, bootstrap_weights, wilson
from pixelplay.evaluation.metrics import LABEL_METRICS, count_labels, log_losses

N_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """One metric of two answers, image by image.

    Attributes:
        values: of the first and of the second.
        samples: (R,) the second less the first, on resamples of the images or of their groups.
    """

    values: tuple[float, float]
    samples: Float64Array

    @property
    def difference(self) -> float:
        """The second less the first."""
        return self.values[1] - self.values[0]

    @property
    def standard_error(self) -> float:
        """Of the difference."""
        return float(np.std(self.samples, ddof=1))


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """How two models differ on the same images.

    Attributes:
        n: number of images.
        values: figure → its value for the first model and for the second.
        differences: figure → the first less the second, with its interval. For log-loss lower is better.
        n_only_first_right: images that the first model has right and the second wrong.
        n_only_second_right: the other way round.
        p_value: McNemar's, two-sided, as mid-p: how probable so uneven a pair of these numbers is if
            both models err alike. None where images come in groups, which the test cannot heed.
    """

    n: int
    values: Mapping[str, tuple[float, float]]
    differences: Mapping[str, Estimate]
    n_only_first_right: int
    n_only_second_right: int
    p_value: float | None

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


def compare_preds(
    preds: tuple[IntArray, IntArray],
    labels: IntArray,
    groups: IntArray | None,
    n_classes: int,
    *,
    metric: Metric,
    seed: int,
) -> Comparison:
    """Compare predicted classes on the same images.

    Args:
        preds: (N,) each, below K.
        labels: (N,) in [0, K).
        groups: (N,) equal for images that are not independent; None: all are.
        n_classes: K.
        seed: of the bootstrap.
    """
    measure = LABEL_METRICS[metric]
    first, second = (float(measure(count_labels(pred, labels, n_classes))) for pred in preds)
    samples = []
    for times in bootstrap_weights(groups, len(labels), N_RESAMPLES, seed):
        drawn = [measure(count_labels(pred, labels, n_classes, times)) for pred in preds]
        samples.append(drawn[1] - drawn[0])
    return Comparison(values=(first, second), samples=np.concatenate(samples))


def compare_models(
    preds: tuple[IntArray, IntArray],
    probs: tuple[Float64Array, Float64Array],
    labels: IntArray,
    groups: IntArray | None,
    *,
    is_known: BoolArray,
    seed: int = 0,
) -> PairedComparison:
    """Compare everything that two models say about the same images.

    Args:
        preds: (N,) each, in [0, K).
        probs: (N, K) each; 0 for a class that the model does not know.
        labels: (N,) in [0, K), N >= 1.
        groups: (N,) equal for images that are not independent; None: all are.
        is_known: (N,) images of classes that both models know: log-loss is about those.
    """
    n_classes = probs[0].shape[1]
    resampling = Bootstrap(n=len(labels), groups=groups, n_resamples=N_RESAMPLES, seed=seed)
    is_right = tuple(pred == labels for pred in preds)
    only_first, only_second = int((is_right[0] & ~is_right[1]).sum()), int((is_right[1] & ~is_right[0]).sum())
    support = np.bincount(labels)
    is_enough = only_first + only_second >= MIN_UNITS
    has_enough_of_each = is_enough and bool(support[support > 0].min() >= MIN_UNITS)
    values: dict[str, tuple[float, float]] = {}
    differences: dict[str, Estimate] = {}
    for metric in LABEL_METRICS:
        # the second less the first is what is compared everywhere else
        found = compare_preds(preds[::-1], labels, groups, n_classes, metric=metric, seed=seed)
        values[metric] = found.values[::-1]
        enough = is_enough if metric == "accuracy" else has_enough_of_each
        spread = resampling.estimate(found.difference, found.samples, n=len(labels), is_enough=enough)
        differences[metric] = spread
    differences["accuracy"] = _at_least(
        differences["accuracy"], newcombe(is_right[0], is_right[1]), has_groups=groups is not None
    )
    if is_known.any():
        values["log_loss"], differences["log_loss"] = _compare_losses(probs, labels, groups, is_known, seed)
    return PairedComparison(
        n=len(labels),
        values=values,
        differences=differences,
        n_only_first_right=only_first,
        n_only_second_right=only_second,
        p_value=mcnemar(only_first, only_second) if groups is None else None,
    )


def newcombe(is_right: BoolArray, other: BoolArray) -> Estimate:
    """Estimate the difference of two shares of the same independent images.

    Made of both shares' Wilson intervals and the correlation between them; unlike a percentile of
    resamples it has a width where the two hardly differ.

    Args:
        is_right: (N,) bool, N >= 1.
        other: (N,) bool; its share is subtracted.

    Source: Newcombe, "Improved confidence intervals for the difference between binomial proportions based
    on paired data", Statistics in Medicine 17 (1998), method 10.
    """
    n = len(is_right)
    first, second = wilson(int(is_right.sum()), n), wilson(int(other.sum()), n)
    both, neither = int((is_right & other).sum()), int((~is_right & ~other).sum())
    only_first, only_second = int((is_right & ~other).sum()), int((~is_right & other).sum())
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    covariance = float(both * neither - only_first * only_second)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)  # the paper's correction for continuity
    correlation = covariance / np.sqrt(float(margins)) if margins else 0.0

    def reach(mine: float, theirs: float) -> float:
        return float(np.sqrt(max(mine**2 - 2 * correlation * mine * theirs + theirs**2, 0.0)))

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
    """How probable so uneven a pair of discordant counts is if both models err alike: mid-p, two-sided.

    Source: McNemar, Psychometrika 12 (1947); mid-p as recommended by Fagerland, Lydersen and Laake, "The
    McNemar test for binary matched-pairs data", BMC Medical Research Methodology 13 (2013).
    """
    from scipy.special import bdtr

    n, fewer = n_only_first + n_only_second, min(n_only_first, n_only_second)
    if n == 0:
        return 1.0
    so_few, fewer_still = bdtr(fewer, n, 0.5), bdtr(fewer - 1, n, 0.5) if fewer else 0.0
    is_even = n_only_first == n_only_second  # both tails hold the middle, which counts once
    return float(1 - (so_few - fewer_still) / 2 if is_even else so_few + fewer_still)


def _at_least(spread: Estimate, alone: Estimate, *, has_groups: bool) -> Estimate:
    """The interval of independent images; with groups the bootstrap's, which may only widen it."""
    if not has_groups:
        return alone
    return replace(spread, low=min(spread.low, alone.low), high=max(spread.high, alone.high))


def _compare_losses(
    probs: tuple[Float64Array, Float64Array],
    labels: IntArray,
    groups: IntArray | None,
    is_known: BoolArray,
    seed: int,
) -> tuple[tuple[float, float], Estimate]:
    """Log-loss of both, and of the first less the second the mean with its interval."""
    losses = np.stack([log_losses(p[is_known], labels[is_known]) for p in probs], axis=1)  # (n, 2)
    change = losses[:, 0] - losses[:, 1]
    known_groups = None if groups is None else groups[is_known]
    resampling = Bootstrap(n=len(change), groups=known_groups, n_resamples=N_RESAMPLES, seed=seed)
    samples = np.concatenate([times @ change / times.sum(axis=1) for times in resampling.weights()])
    first, second = losses.mean(axis=0)
    spread = resampling.estimate(
        float(change.mean()), samples, n=len(change), is_enough=len(change) >= MIN_UNITS
    )
    return (float(first), float(second)), spread
