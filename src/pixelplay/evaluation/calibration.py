"""Natural-prior logits → probabilities that mean what they say, and answers for the metric that counts."""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pixelplay.arrays import Float64Array, IntArray
from pixelplay.config import Metric
from pixelplay.errors import DataError
from pixelplay.evaluation.intervals import bootstrap_weights
from pixelplay.evaluation.weighted import LABEL_METRICS, check_labels, count_labels, expect_labels

__all__ = [
    "TauFit",
    "TemperatureFit",
    "decide",
    "fit_tau",
    "fit_temperature",
    "log_softmax",
    "natural_probs",
    "nll_of",
]

Float = TypeVar("Float", np.float32, np.float64)

TEMPERATURE_RANGE = (0.05, 20.0)
_TAU_GRID = np.arange(41) / 20  # 0 to 2
_TAU_RESAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class TemperatureFit:
    """The temperature of a model and what it does to held-out data.

    Attributes:
        temperature: T > 0; above 1 the model was over-confident.
        nll_before: mean negative log-likelihood at T = 1, nats.
        nll_after: the same at T.
        n: number of held-out images.
        at_bound: the search ran to the end of its range, so the data fix no temperature and T is 1.
    """

    temperature: float
    nll_before: float
    nll_after: float
    n: int
    at_bound: bool


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


def log_softmax(logits: NDArray[Float]) -> NDArray[Float]:
    """Logits minus the log of the sum of their exponentials along the last axis, without overflow."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def nll_of(logits: NDArray[Any], labels: IntArray) -> float:
    """Mean negative log-likelihood in nats."""
    return float(-log_softmax(logits.astype(np.float64))[np.arange(len(labels)), labels].mean())


def natural_probs(logits: NDArray[Any], temperature: float) -> Float64Array:
    """Return softmax(logits / T).

    Args:
        logits: (N, K) float with natural priors; a row with NaN yields a row of NaN.
        temperature: T > 0.

    Returns:
        (N, K) float64, rows sum to 1.

    Raises:
        DataError: T is not positive and finite.
    """
    if not 0 < temperature < np.inf:
        raise DataError(f"temperature is {temperature}; it must be positive and finite; fit the model again")
    return np.exp(log_softmax(logits.astype(np.float64) / temperature))


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


def fit_temperature(logits: NDArray[Any], labels: IntArray) -> TemperatureFit:
    """Find the temperature that minimises NLL on held-out logits.

    Dividing logits by one positive scalar changes confidence but never the ranking of classes. Where no
    temperature in range is best (every image right, or nothing learned) T stays 1.

    Args:
        logits: (N, K) float, natural priors, from images that the model was not trained on.
        labels: (N,) int in [0, K).

    Raises:
        DataError: no image, a label outside the model's classes, logits that are not finite.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599, section 4.2.
    """
    from scipy.optimize import minimize_scalar

    _check_held_out(logits, labels)
    logits = logits.astype(np.float64)

    def nll(log_temperature: float) -> float:
        return nll_of(logits / np.exp(log_temperature), labels)

    # searched in log T: T stays positive and the scale is symmetric; NLL is convex in 1/T, so unimodal here
    bounds = np.log(TEMPERATURE_RANGE)
    found = minimize_scalar(nll, bounds=tuple(bounds), method="bounded", options={"xatol": 1e-5})
    best = nll(float(found.x))
    # not by the place: NLL may underflow to a plateau of 0 long before the bound
    at_bound = min(nll(bound) for bound in bounds) <= best
    temperature = 1.0 if at_bound else float(np.exp(found.x))
    return TemperatureFit(
        temperature=temperature,
        nll_before=nll(0.0),
        nll_after=nll(float(np.log(temperature))),
        n=len(labels),
        at_bound=at_bound,
    )


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
    _check_held_out(probs, labels)
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


def _check_held_out(values: NDArray[Any], labels: IntArray) -> None:
    """Raise DataError unless there is one finite row of the model per label inside its classes."""
    check_labels(labels, values.shape[1])
    if len(values) != len(labels):
        raise DataError(f"{len(values)} rows do not fit {len(labels)} labels; give one row per label")
    broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if broken.size:
        raise DataError(
            f"row {broken[0]} is not finite ({broken.size} such rows, 0 allowed); "
            "leave out images that could not be read"
        )
