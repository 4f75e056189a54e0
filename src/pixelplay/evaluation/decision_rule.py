"""Decision rule: temperature and logit adjustment (tau), fitted on held-out logits, also cross-fitted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelplay.array_types import Float32Array, Float64Array, IntArray
from pixelplay.config import Metric
from pixelplay.data.splits import NEVER_HELD_OUT
from pixelplay.evaluation.calibration import (
    check_held_out,
    fit_temperature,
    log_softmax,
    temperature_softmax,
)
from pixelplay.evaluation.comparison import N_RESAMPLES, compare_predictions
from pixelplay.evaluation.intervals import Bootstrap
from pixelplay.evaluation.metrics import LABEL_METRICS, count_labels, expected_counts

_TAU_GRID = np.arange(41) / 20  # 0 to 2
_TAU_RESAMPLES = 200


def adjusted_argmax(probs: NDArray[Any], priors: NDArray[Any], tau: float) -> IntArray:
    """Predict argmax(log probs − τ·log π) for each image.

    Args:
        probs: (N, K) with natural class priors.
        priors: (K,) class frequencies π of the training data, all > 0.
        tau: 0 predicts the most probable class, 1 the one whose probability exceeds its prior most.

    Returns:
        (N,) int64 in [0, K); −1 for a row with NaN.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, arXiv:2007.07314, equation 9.
    """
    assert priors.shape == probs.shape[1:]
    assert (priors > 0).all()
    if tau == 0:
        pred = np.argmax(probs, axis=1)
    else:
        with np.errstate(divide="ignore"):  # log 0 is −inf: never predicted
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
) -> tuple[float, dict[str, Any]]:
    """Choose tau from a grid on held-out images.

    If the probabilities were calibrated, they alone would determine which tau maximises the expected metric:
    1 for balanced accuracy, less for macro F1. A few images of a rare class provide little evidence, so the
    labels only override it when they are clear: of all tau within one standard error (by bootstrap) of the
    best held-out value, the nearest to the expected one is chosen. For accuracy tau is 0.

    Args:
        probs: (N, K) with natural class priors, at the model's temperature.
        labels: (N,) in [0, K).
        priors: (K,) class frequencies of the training data, all > 0.
        groups: (N,) equal for images that are not independent; None: all are independent.

    Returns:
        tau in [0, 2]. The evidence: "n" images, the "expected" tau, "metric_value" at tau, "metric_at_zero"
        without adjustment, and the "standard_error" of the metric at its best tau.

    Raises:
        DataError: no image, a label outside the model's classes, probabilities that are not finite.

    Source: expected metrics as in Nan et al., "Optimizing F-measures: a tale of two approaches", ICML 2012,
    arXiv:1206.4625; the one-standard-error rule of Breiman et al., "Classification and Regression Trees",
    1984, section 3.4.3.
    """
    check_held_out(probs, labels)
    measure, n_classes = LABEL_METRICS[metric], probs.shape[1]
    grid = _TAU_GRID[:1] if metric == "accuracy" else _TAU_GRID
    preds = [adjusted_argmax(probs, priors, float(tau)) for tau in grid]
    values = np.array([float(measure(count_labels(pred, labels, n_classes))) for pred in preds])
    expected = int(np.argmax([float(measure(expected_counts(pred, probs))) for pred in preds]))
    best = int(np.argmax(values))
    bootstrap = Bootstrap(n=len(labels), groups=groups, n_resamples=_TAU_RESAMPLES, seed=seed)
    samples = [
        measure(count_labels(preds[best], labels, n_classes, weights)) for weights in bootstrap.weights()
    ]
    standard_error = float(np.std(np.concatenate(samples), ddof=1))
    close = np.flatnonzero(values >= values[best] - standard_error)
    chosen = close[np.argmin(np.abs(close - expected))]  # the smaller of two equally near
    return float(grid[chosen]), {
        "n": len(labels),
        "expected": float(grid[expected]),
        "metric_value": float(values[chosen]),
        "metric_at_zero": float(values[0]),
        "standard_error": standard_error,
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class DecisionRule:
    """Temperature, then logit adjustment: `argmax(log softmax(logits / T) − τ·log π)`."""

    temperature: float
    tau: float
    priors: Float64Array  # (K,) class frequencies π of the training data
    evidence: Mapping[str, Mapping[str, Any]]  # "temperature" and "tau", from `fit_temperature` and `fit_tau`

    def apply(self, logits: Float32Array) -> tuple[Float64Array, IntArray]:
        """Return probabilities (N, K) and predicted classes (N,); NaN and -1 for a row with NaN."""
        probs = temperature_softmax(logits, self.temperature)
        return probs, adjusted_argmax(probs, self.priors, self.tau)


def fit_decision_rule(
    logits: Float32Array,
    labels: IntArray,
    groups: IntArray,
    priors: Float64Array,
    *,
    metric: Metric,
    seed: int,
) -> DecisionRule:
    """Fit the temperature by NLL, then tau for the declared metric, on held-out logits.

    Args:
        logits: (N, K) with natural class priors; rows with NaN were not held out and are ignored.
        labels: (N,) in [0, K).
        groups: (N,) images that the bootstrap of `fit_tau` keeps together.
        priors: (K,) class frequencies of the training data.
    """
    held_out = ~np.isnan(logits).any(1)
    logits, labels, groups = logits[held_out], labels[held_out], groups[held_out]
    temperature, of_temperature = fit_temperature(logits, labels)
    probs = temperature_softmax(logits, temperature)
    tau, of_tau = fit_tau(probs, labels, priors, groups, metric=metric, seed=seed)
    evidence = {"temperature": of_temperature, "tau": of_tau}
    return DecisionRule(temperature=temperature, tau=tau, priors=priors, evidence=evidence)


def compare_logits(
    logits: tuple[Float32Array, Float32Array],
    labels: IntArray,
    groups: IntArray,
    priors: Float64Array,
    *,
    metric: Metric,
    seed: int,
) -> tuple[tuple[float, float], float]:
    """Compare the predictions of two classifiers, each with its own temperature and tau.

    Both rules are fitted on the images they are compared on, so both values are slightly optimistic. The
    arguments are those of `fit_decision_rule`.

    Returns:
        The metric of both, and the standard error of the difference.
    """
    first, second = (
        fit_decision_rule(each, labels, groups, priors, metric=metric, seed=seed).apply(each)[1]
        for each in logits
    )
    bootstrap = Bootstrap(n=len(labels), groups=groups, n_resamples=N_RESAMPLES, seed=seed)
    values, samples = compare_predictions((first, second), labels, len(priors), metric, bootstrap)
    return values, float(np.std(samples, ddof=1))


def calibrated_nll(logits: Float32Array, labels: IntArray, priors: Float64Array, metric: Metric) -> float:
    """Compute the NLL at the best temperature, in nats, for model selection; lower is better.

    It responds to every image, where accuracy only responds to those whose prediction changes, and unlike the
    plain NLL it does not punish over-confidence, which the temperature corrects anyway. For balanced accuracy
    and macro F1 it is the mean over classes under uniform priors; otherwise it would prefer logits biased
    towards rare classes. It is infinite if a logit is not finite. The arguments are those of
    `fit_decision_rule`.
    """
    if not np.isfinite(logits).all():
        return float("inf")
    return float(_calibrated_losses(logits, labels, priors, metric).mean())


def compare_nll(
    logits: tuple[Float32Array, Float32Array],
    labels: IntArray,
    groups: IntArray,
    priors: Float64Array,
    *,
    metric: Metric,
    seed: int,
) -> dict[str, Any]:
    """Compare the calibrated NLL and the metric of two classifiers on the same held-out images.

    The arguments are those of `fit_decision_rule`.

    Returns:
        "probe_loss" and "finetuned_loss", the NLLs; the metric of both; "nll_gain" and "metric_gain" of
        the second; and the "standard_error" of "nll_gain", with groups as units.
    """
    first, second = (_calibrated_losses(each, labels, priors, metric) for each in logits)
    gains = first - second  # (N,)
    of_groups = np.bincount(np.unique(groups, return_inverse=True)[1], weights=gains - gains.mean())
    (of_first, of_second), _ = compare_logits(logits, labels, groups, priors, metric=metric, seed=seed)
    return {
        "probe_loss": float(first.mean()),
        "finetuned_loss": float(second.mean()),
        "nll_gain": float(gains.mean()),
        "standard_error": float(np.sqrt((of_groups**2).sum())) / len(gains),
        f"probe_{metric}": of_first,
        f"finetuned_{metric}": of_second,
        "metric_gain": of_second - of_first,
    }


def _calibrated_losses(
    logits: Float32Array, labels: IntArray, priors: Float64Array, metric: Metric
) -> Float64Array:
    """Return losses (N,) at the best temperature whose mean is the score; see `calibrated_nll`."""
    scaled = logits.astype(np.float64) / fit_temperature(logits, labels)[0]  # (N, K)
    if metric != "accuracy":
        scaled -= np.log(priors)
    losses: Float64Array = -log_softmax(scaled)[np.arange(len(labels)), labels]
    if metric == "accuracy":
        return losses
    counts = np.bincount(labels)
    weights: Float64Array = len(labels) / ((counts > 0).sum() * counts[labels])  # the same for every class
    return np.asarray(losses * weights)


def cross_fit_rule(
    logits: Float32Array,
    labels: IntArray,
    groups: IntArray,
    folds: IntArray,
    priors: Float64Array,
    *,
    metric: Metric,
    seed: int,
) -> tuple[Float64Array, IntArray, dict[int, DecisionRule]]:
    """Predict each fold with a temperature and tau that were fitted on the other folds.

    Args:
        logits: (N, K) with natural class priors, each from a classifier not trained on the image.
        folds: (N,) fold in which each image was held out, or `NEVER_HELD_OUT`; the other arguments are those
            of `fit_decision_rule`.

    Returns:
        Probabilities (N, K) and predicted classes (N,), NaN and -1 for images never held out; the rule that
        was applied to each fold.
    """
    probs = np.full(logits.shape, np.nan)
    pred = np.full(len(labels), -1, dtype=np.int64)
    rules: dict[int, DecisionRule] = {}
    for fold in np.unique(folds[folds != NEVER_HELD_OUT]):
        own = folds == fold
        others = ~own & (folds != NEVER_HELD_OUT)
        fitted_on = logits[others], labels[others], groups[others]
        rule = fit_decision_rule(*fitted_on, priors, metric=metric, seed=seed)
        probs[own], pred[own] = rule.apply(logits[own])
        rules[int(fold)] = rule
    return probs, pred, rules
