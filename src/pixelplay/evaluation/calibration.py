"""Calibration: softmax with a temperature, fitting it, and the reliability diagram before and after."""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pixelplay.array_types import Float64Array, IntArray
from pixelplay.errors import DataError
from pixelplay.evaluation.metrics import (
    ECE_BINS,
    brier_losses,
    check_labels,
    confidence_bins,
    expected_calibration_error,
    log_losses,
)

Float = TypeVar("Float", np.float32, np.float64)
TEMPERATURE_RANGE = (0.05, 20.0)


def log_softmax(logits: NDArray[Float]) -> NDArray[Float]:
    """Compute the log-softmax along the last axis without overflow."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def mean_nll(logits: NDArray[Any], labels: IntArray) -> float:
    """Compute the mean negative log-likelihood in nats."""
    return float(-log_softmax(logits.astype(np.float64))[np.arange(len(labels)), labels].mean())


def temperature_softmax(logits: NDArray[Any], temperature: float) -> Float64Array:
    """Compute softmax(logits / T), (N, K); a row with NaN stays NaN.

    Raises:
        DataError: T is not positive and finite.
    """
    if not 0 < temperature < np.inf:
        raise DataError(f"temperature is {temperature}; it must be positive and finite; train again")
    return np.exp(log_softmax(logits.astype(np.float64) / temperature))


def fit_temperature(logits: NDArray[Any], labels: IntArray) -> tuple[float, dict[str, Any]]:
    """Fit the temperature that minimises NLL on held-out logits.

    One positive scalar changes confidence but never the ranking of classes, so the argmax is unchanged.

    Args:
        logits: (N, K) with natural class priors, from images the model was not trained on.
        labels: (N,) in [0, K).

    Returns:
        T > 0, dimensionless; above 1 the model was over-confident. The evidence: "n" images, "nll_before" at
        T = 1 and "nll_after" in nats, and "at_bound": True if NLL has no minimum within range (all images
        correct, or no better than chance), in which case T is 1.

    Raises:
        DataError: no image, a label outside the model's classes, logits that are not finite.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599, section 4.2.
    """
    from scipy.optimize import minimize_scalar

    check_held_out(logits, labels)
    logits = logits.astype(np.float64)

    def nll(log_temperature: float) -> float:
        return mean_nll(logits / np.exp(log_temperature), labels)

    # searched in log T: T stays positive and the scale is symmetric; NLL is convex in 1/T, so unimodal here
    bounds = np.log(TEMPERATURE_RANGE)
    found = minimize_scalar(nll, bounds=tuple(bounds), method="bounded", options={"xatol": 1e-5})
    # compare values, not positions: NLL can underflow to a plateau of 0 long before the bound
    at_bound = min(nll(bound) for bound in bounds) <= nll(float(found.x))
    temperature = 1.0 if at_bound else float(np.exp(found.x))
    return temperature, {
        "n": len(labels),
        "nll_before": nll(0.0),
        "nll_after": nll(float(np.log(temperature))),
        "at_bound": at_bound,
    }


def check_held_out(values: NDArray[Any], labels: IntArray) -> None:
    """Raise DataError unless there is one finite row per label and all labels are in range."""
    check_labels(labels, values.shape[1])
    if len(values) != len(labels):
        raise DataError(f"{len(values)} rows do not match {len(labels)} labels; pass one row per label")
    broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if broken.size:
        raise DataError(f"row {broken[0]} is not finite ({broken.size} such rows); remove unreadable images")


def measure_reliability(probs: Float64Array, labels: IntArray) -> dict[str, Any]:
    """Compare confidence with accuracy, overall and in each bin that is not empty.

    Args:
        probs: (N, K), rows sum to 1, N >= 1.
        labels: (N,) in [0, K).
    """
    pred = probs.argmax(axis=1)
    confidence, correct = probs.max(axis=1), pred == labels
    bins = confidence_bins(confidence)
    counts, confidences, hits = np.bincount(bins), np.bincount(bins, confidence), np.bincount(bins, correct)
    return {
        "n": len(labels),
        "ece": {"value": expected_calibration_error(probs, pred, labels), "n_bins": ECE_BINS},
        "log_loss": float(log_losses(probs, labels).mean()),
        "brier": float(brier_losses(probs, labels).mean()),
        "bins": [
            {"n": int(n), "confidence": float(total / n), "accuracy": float(right / n)}
            for n, total, right in zip(counts, confidences, hits, strict=True)
            if n
        ],
    }


def remove_temperature(probs: Float64Array, temperature: float) -> Float64Array:
    """Return the probabilities (N, K) as they were before the temperature was applied."""
    with np.errstate(divide="ignore"):  # log 0 is -inf and stays so
        return temperature_softmax(temperature * np.log(probs), 1.0)


def compare_reliability(
    before: NDArray[Any], after: NDArray[Any], labels: IntArray, measured_on: str
) -> dict[str, Any] | None:
    """Measure reliability before and after calibration, on images that did not fit the temperature.

    Args:
        before: (N, K) probabilities at T = 1.
        after: (N, K) calibrated.
        labels: (N,); images with labels of K or more are ignored, and without any left the result is None.
        measured_on: name of these images.
    """
    kept = labels < after.shape[1]
    if not kept.any():
        return None
    return {
        "measured_on": measured_on,
        "before": measure_reliability(before[kept], labels[kept]),
        "after": measure_reliability(after[kept], labels[kept]),
    }
