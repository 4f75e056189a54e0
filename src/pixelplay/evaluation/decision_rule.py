"""Held-out logits → how probabilities are made and how a class is decided."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelplay.arrays import Float32Array, Float64Array, IntArray
from pixelplay.config import Metric
from pixelplay.data.splits import NEVER_HELD_OUT
from pixelplay.errors import DataError
from pixelplay.evaluation.calibration import (
    TemperatureFit,
    check_held_out,
    fit_temperature,
    log_softmax,
    natural_probs,
    nll_of,
)
from pixelplay.evaluation.comparison import Comparison, compare_preds
from pixelplay.evaluation.intervals import bootstrap_weights
from pixelplay.evaluation.metrics import LABEL_METRICS, count_labels, expect_labels

_TAU_GRID = np.arange(41) / 20  # 0 to 2
_TAU_RESAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class TauFit:
    """The strength of prior correction in `decide`, and how it was found.

    Attributes:
        tau: of those within one standard error of the best value, the one nearest to `expected_tau`.
        expected_tau: the best if the probabilities mean what they say.
        value: the metric at `tau`.
        value_at_zero: the metric without correction.
        standard_error: of the metric at its best τ.
        n: number of held-out images.
        grid: the τ tried, ascending.
        values: (len(grid),) the metric at each.
    """

    tau: float
    expected_tau: float
    value: float
    value_at_zero: float
    standard_error: float
    n: int
    grid: tuple[float, ...]
    values: tuple[float, ...]


def decide(probs: NDArray[Any], priors: NDArray[Any], tau: float) -> IntArray:
    """Choose argmax(log probs − τ·log π_data) for each image.

    Args:
        probs: (N, K) float with natural priors.
        priors: (K,) class frequencies π_data in training, all > 0.
        tau: 0 answers the most probable class; 1 the one whose probability rose most over its prior.

    Returns:
        (N,) int64 in [0, K); −1 for a row with NaN.

    Raises:
        DataError: `priors` has another length or a value that is not positive.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, arXiv:2007.07314, equation 9.
    """
    if priors.shape != probs.shape[1:]:
        raise DataError(f"{priors.size} priors do not fit {probs.shape[1]} classes; give one per class")
    if not (priors > 0).all():
        worst = int(np.argmin(priors))
        raise DataError(
            f"class {worst} has prior {priors[worst]}; each must be positive; leave the class out"
        )
    if tau == 0:
        pred = np.argmax(probs, axis=1)
    else:
        with np.errstate(divide="ignore"):  # log 0 is −inf: never chosen
            pred = np.argmax(np.log(probs) - tau * np.log(priors), axis=1)
    return np.where(np.isnan(probs).any(axis=1), -1, pred)


def fit_tau(
    probs: NDArray[Any],
    labels: IntArray,
    priors: NDArray[Any],
    groups: IntArray | None,
    *,
    metric: Metric,
    seed: int,
) -> TauFit:
    """Choose τ on held-out images: what their probabilities call for, unless their labels speak against it.

    Were the probabilities right, they alone would tell which τ has the best metric: for balanced accuracy it
    is 1, for macro-F1 less. A few images of a rare class say little about it. So their labels are heard only
    where they are clear: τ stays within one standard error, by bootstrap of groups, of the best held-out
    value. For accuracy τ is 0: natural probabilities need no correction there.

    Args:
        probs: (N, K) float with natural priors, at the model's temperature.
        labels: (N,) int in [0, K).
        priors: (K,) class frequencies in training, all > 0.
        groups: (N,) int, equal for images that are not independent; None: all are.
        metric: what the user wants to be good at.
        seed: of the bootstrap.

    Raises:
        DataError: no image, a label outside the model's classes, probabilities that are not finite, or priors
            that `decide` refuses.

    Source: expected metrics as in Nan et al., "Optimizing F-measures: a tale of two approaches", ICML 2012,
    arXiv:1206.4625; the one-standard-error rule of Breiman et al., "Classification and Regression Trees",
    1984, section 3.4.3.
    """
    check_held_out(probs, labels)
    measure, n_classes = LABEL_METRICS[metric], probs.shape[1]
    grid = _TAU_GRID[:1] if metric == "accuracy" else _TAU_GRID
    preds = [decide(probs, priors, float(tau)) for tau in grid]
    values = np.array([float(measure(count_labels(pred, labels, n_classes))) for pred in preds])
    expected = int(np.argmax([float(measure(expect_labels(pred, probs))) for pred in preds]))
    best = int(np.argmax(values))
    samples = [
        measure(count_labels(preds[best], labels, n_classes, weights))
        for weights in bootstrap_weights(groups, len(labels), _TAU_RESAMPLES, seed)
    ]
    standard_error = float(np.std(np.concatenate(samples), ddof=1))
    close = np.flatnonzero(values >= values[best] - standard_error)
    chosen = close[np.argmin(np.abs(close - expected))]  # of two that are as near the smaller
    return TauFit(
        tau=float(grid[chosen]),
        expected_tau=float(grid[expected]),
        value=float(values[chosen]),
        value_at_zero=float(values[0]),
        standard_error=standard_error,
        n=len(labels),
        grid=tuple(grid.tolist()),
        values=tuple(values.tolist()),
    )


@dataclass(frozen=True, kw_only=True)
class DecisionRule:
    """Temperature, then prior correction: `argmax(log softmax(logits / T) − τ·log π)`.

    Attributes:
        temperature: its value and the evidence for it.
        tau: its value and the evidence for it.
        priors: (K,) class frequencies π in training.
    """

    temperature: TemperatureFit
    tau: TauFit
    priors: Float64Array

    def apply(self, logits: Float32Array) -> tuple[Float64Array, IntArray]:
        """Probabilities (N, K) and decided classes (N,) of logits (N, K); NaN rows give NaN and -1."""
        probs = natural_probs(logits, self.temperature.temperature)
        return probs, decide(probs, self.priors, self.tau.tau)


def fit_decision_rule(
    logits: Float32Array,
    labels: IntArray,
    groups: IntArray,
    priors: Float64Array,
    *,
    metric: Metric,
    seed: int,
) -> DecisionRule:
    """Fit temperature by NLL, then tau for the declared metric, on held-out logits.

    Args:
        logits: (N, K) natural-prior logits; rows of NaN were not held out and take no part.
        labels: (N,) in [0, K).
        groups: (N,) what the bootstrap behind tau's standard error keeps together.
    """
    held_out = ~np.isnan(logits).any(1)
    logits, labels, groups = logits[held_out], labels[held_out], groups[held_out]
    temperature = fit_temperature(logits, labels)
    probs = natural_probs(logits, temperature.temperature)
    tau = fit_tau(probs, labels, priors, groups, metric=metric, seed=seed)
    return DecisionRule(temperature=temperature, tau=tau, priors=priors)


def compare_logits(
    logits: tuple[Float32Array, Float32Array],
    labels: IntArray,
    groups: IntArray,
    priors: Float64Array,
    *,
    metric: Metric,
    seed: int,
) -> Comparison:
    """Compare what two classifiers decide, each at its own temperature and tau.

    These were fitted on the images that are compared on, so that both values are slightly optimistic,
    in the same way.

    Args:
        logits: (N, K) finite, of each.
        labels: (N,) in [0, K).
        groups: (N,) what the bootstrap keeps together.
        priors: (K,) class frequencies in training.
    """
    first, second = (
        fit_decision_rule(each, labels, groups, priors, metric=metric, seed=seed).apply(each)[1]
        for each in logits
    )
    return compare_preds((first, second), labels, groups, len(priors), metric=metric, seed=seed)


def held_out_score(logits: Float32Array, labels: IntArray, priors: Float64Array, metric: Metric) -> float:
    """Negative log-likelihood after the best temperature, in nats; lower is better.

    It moves with every image, where accuracy moves with the few that change sides; and unlike the
    plain one it does not punish a network for being too sure, which the temperature mends anyway. For
    metrics that count classes alike it is the mean over classes, of probabilities as they were if all
    classes were as frequent; else it would prefer logits that lean towards rare classes.

    Args:
        logits: (N, K) with natural priors; where one is not finite the score is infinite.
        labels: (N,) in [0, K).
        priors: (K,) class frequencies in training, all > 0.
    """
    if not np.isfinite(logits).all():
        return float("inf")
    cooled = logits.astype(np.float64) / fit_temperature(logits, labels).temperature
    if metric == "accuracy":
        return nll_of(cooled, labels)
    losses = -log_softmax(cooled - np.log(priors))[np.arange(len(labels)), labels]
    return float(np.mean([losses[labels == k].mean() for k in np.unique(labels)]))


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossFittedRule:
    """Decisions for images that neither their classifier nor their T and tau have seen.

    Attributes:
        probs: (N, K) float64; NaN for an image that was never held out.
        pred: (N,) int64; -1 likewise.
        decisions: fold → what the other folds have chosen for it.
    """

    probs: Float64Array
    pred: IntArray
    rules: dict[int, DecisionRule]


def cross_fit_rule(
    logits: Float32Array,
    labels: IntArray,
    groups: IntArray,
    folds: IntArray,
    priors: Float64Array,
    *,
    metric: Metric,
    seed: int,
) -> CrossFittedRule:
    """Choose T and tau for each fold on all others, and decide.

    Args:
        logits: (N, K) natural-prior logits, each from the classifier that did not see the image.
        labels: (N,) in [0, K).
        groups: (N,) what the bootstrap behind tau's standard error keeps together.
        folds: (N,) in which each was held out; -1 for never.
        priors: (K,) class frequencies in training.
    """
    probs = np.full(logits.shape, np.nan)
    pred = np.full(len(labels), -1, dtype=np.int64)
    rules: dict[int, DecisionRule] = {}
    for fold in np.unique(folds[folds != NEVER_HELD_OUT]):
        own = folds == fold
        others = ~own & (folds != NEVER_HELD_OUT)
        rule = fit_decision_rule(
            logits[others], labels[others], groups[others], priors, metric=metric, seed=seed
        )
        probs[own], pred[own] = rule.apply(logits[own])
        rules[int(fold)] = rule
    return CrossFittedRule(probs=probs, pred=pred, rules=rules)
