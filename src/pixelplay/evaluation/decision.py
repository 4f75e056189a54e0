"""Held-out logits → how probabilities are made and how a class is decided."""

from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import Float32Array, Float64Array, IntArray
from pixelplay.config import Metric
from pixelplay.evaluation.calibration import (
    TauFit,
    TemperatureFit,
    decide,
    fit_tau,
    fit_temperature,
    log_softmax,
    natural_probs,
    nll_of,
)
from pixelplay.evaluation.comparison import Comparison, compare_preds


@dataclass(frozen=True, kw_only=True)
class Decision:
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


def fit_decision(
    logits: Float32Array,
    labels: IntArray,
    groups: IntArray,
    priors: Float64Array,
    *,
    metric: Metric,
    seed: int,
) -> Decision:
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
    return Decision(temperature=temperature, tau=tau, priors=priors)


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

    These were fitted on the photographs that are compared on, so that both values are slightly optimistic,
    in the same way.

    Args:
        logits: (N, K) finite, of each.
        labels: (N,) in [0, K).
        groups: (N,) what the bootstrap keeps together.
        priors: (K,) class frequencies in training.
    """
    first, second = (
        fit_decision(each, labels, groups, priors, metric=metric, seed=seed).apply(each)[1] for each in logits
    )
    return compare_preds((first, second), labels, groups, len(priors), metric=metric, seed=seed)


def held_out_score(logits: Float32Array, labels: IntArray, priors: Float64Array, metric: Metric) -> float:
    """Negative log-likelihood after the best temperature, in nats; lower is better.

    It moves with every photograph, where accuracy moves with the few that change sides; and unlike the
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
