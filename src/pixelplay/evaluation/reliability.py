"""Whether probabilities mean what they say, before and after a temperature."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelplay.arrays import Float64Array, IntArray
from pixelplay.evaluation.calibration import natural_probs
from pixelplay.evaluation.weighted import (
    ECE_BINS,
    brier_losses,
    confidence_bins,
    expected_calibration_error,
    log_losses,
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
