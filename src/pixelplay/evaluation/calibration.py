"""Natural-prior logits → probabilities that mean what they say, and answers for the metric that counts."""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pixelplay.arrays import Float64Array, IntArray
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

    check_held_out(logits, labels)
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


def check_held_out(values: NDArray[Any], labels: IntArray) -> None:
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


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """How far confidence and accuracy are apart, in figures and bin by bin.

    Attributes:
        n: number of images.
        ece: equal-width bins, L1 norm, of the most probable class; no interval, for it is biased upwards.
        nll: mean negative log-likelihood, nats.
        brier: as scikit-learn has it.
        bins: of each bin that holds images: their number, mean confidence and accuracy.
    """

    n: int
    ece: float
    nll: float
    brier: float
    bins: tuple[tuple[int, float, float], ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "n": self.n,
            "ece": {"value": self.ece, "n_bins": ECE_BINS},
            "log_loss": self.nll,
            "brier": self.brier,
            "bins": [
                {"n": n, "confidence": confidence, "accuracy": accuracy}
                for n, confidence, accuracy in self.bins
            ],
        }


def measure_reliability(probs: Float64Array, labels: IntArray) -> Reliability:
    """Compare confidence with accuracy.

    Args:
        probs: (N, K), rows sum to 1, N >= 1.
        labels: (N,) in [0, K).
    """
    pred = probs.argmax(axis=1)
    confidence, is_right = probs.max(axis=1), pred == labels
    bins = confidence_bins(confidence, ECE_BINS)
    counts = np.bincount(bins, minlength=ECE_BINS)
    sums = np.bincount(bins, confidence, ECE_BINS), np.bincount(bins, is_right, ECE_BINS)
    return Reliability(
        n=len(labels),
        ece=expected_calibration_error(probs, pred, labels),
        nll=float(log_losses(probs, labels).mean()),
        brier=float(brier_losses(probs, labels).mean()),
        bins=tuple(
            (int(counts[b]), float(sums[0][b] / counts[b]), float(sums[1][b] / counts[b]))
            for b in np.flatnonzero(counts)
        ),
    )


def uncalibrated(probs: Float64Array, temperature: float) -> Float64Array:
    """The probabilities (N, K) that a model would give without its temperature."""
    with np.errstate(divide="ignore"):  # log 0 is -inf and stays so
        return natural_probs(temperature * np.log(probs), 1.0)


def compare_reliability(
    before: NDArray[Any], after: NDArray[Any], labels: IntArray, measured_on: str
) -> dict[str, Any] | None:
    """Figures before and after calibration on images that did not fit it; None without any image.

    Args:
        before: (N, K) probabilities at T = 1.
        after: (N, K) calibrated.
        labels: (N,); those outside [0, K) are left out.
    """
    kept = labels < after.shape[1]
    if not kept.any():
        return None
    figures = [measure_reliability(probs[kept], labels[kept]).to_json() for probs in (before, after)]
    return {"measured_on": measured_on, "before": figures[0], "after": figures[1]}
