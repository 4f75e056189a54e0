"""Confidence on held-out images → when not to answer, and what that is worth."""

import math
from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import BoolArray, Float64Array, IntArray
from pixelplay.config import check_share
from pixelplay.errors import DataError

CONFIDENCE = 0.95  # with which an asked accuracy is promised
N_CUTS = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class RiskCoverage:
    """Share of wrong answers if only the surest images are answered, for every share of them.

    Attributes:
        coverage: (M,) share of the images answered, ascending; images of equal confidence come together.
        risk: (M,) share of wrong answers among them.
        aurc: area under the curve: mean risk over all coverages; lower is better.
    """

    coverage: Float64Array
    risk: Float64Array
    aurc: float

    def points(self) -> tuple[tuple[float, float], ...]:
        """Coverage and risk where each further 5 % of the images is reached."""
        steps = np.searchsorted(self.coverage, np.arange(1, N_CUTS + 1) / N_CUTS - 1e-9)
        return tuple((float(self.coverage[i]), float(self.risk[i])) for i in np.unique(steps))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The confidence from which on answers are given.

    Attributes:
        threshold: images with at least this confidence are answered.
        coverage: share of the held-out images that are.
        accuracy: among those.
        bound: what the accuracy on new images is at least, with 95 % confidence.
    """

    threshold: float
    coverage: float
    accuracy: float
    bound: float


def risk_coverage(confidence: Float64Array, is_right: BoolArray) -> RiskCoverage:
    """Sort images by confidence and count errors.

    Args:
        confidence: (N,) probability of the answer.
        is_right: (N,).

    Source: Geifman, Uziel and El-Yaniv, "Bias-reduced uncertainty estimation for deep neural classifiers",
    ICLR 2019, arXiv:1805.08206.
    """
    order = np.argsort(-confidence, kind="stable")
    last = np.flatnonzero(np.append(np.diff(confidence[order]) != 0, True))
    wrong = np.cumsum(~is_right[order])[last]
    n_answered = last + 1
    risk = wrong / n_answered
    steps = np.diff(n_answered, prepend=0)  # images that came in together share their risk
    return RiskCoverage(
        coverage=n_answered / len(confidence), risk=risk, aurc=float(steps @ risk / len(confidence))
    )


def fit_cut(confidence: Float64Array, is_right: BoolArray, target_accuracy: float) -> Cut:
    """Find the lowest confidence from which on answers are right as often as asked, with a guarantee.

    Twenty cuts are tried, one for each further 5 % of the images. Every bound allows for that, so that it
    holds for the cut that is taken.

    Args:
        confidence: (N,) of held-out images, probability of the answer.
        is_right: (N,).
        target_accuracy: in (0, 1).

    Raises:
        ConfigError: `target_accuracy` is outside (0, 1).
        DataError: no cut can promise it; the best that can be promised is named.

    Source: Angelopoulos et al., "Learn then test: calibrating predictive algorithms to achieve risk control",
    2021, arXiv:2110.01052, with Bonferroni's correction and Clopper and Pearson's bound.
    """
    check_share("target_accuracy", target_accuracy)
    n = len(confidence)
    if n == 0:
        raise DataError("no held-out photographs to choose a confidence on; at least 1 is needed")
    order = np.argsort(-confidence, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(confidence[order]) != 0, True))  # equal ones come together
    asked = np.ceil(np.arange(1, N_CUTS + 1) * n / N_CUTS).astype(np.int64) - 1
    last = np.unique(ends[np.searchsorted(ends, asked)])  # (M,) the least sure that each cut answers
    n_wrong, n_answered = np.cumsum(~is_right[order], dtype=np.int64)[last], last + 1
    bounds = 1 - _highest_error(n_wrong, n_answered, (1 - CONFIDENCE) / N_CUTS)  # (M,)
    kept = np.flatnonzero(bounds >= target_accuracy)
    if not len(kept):
        raise DataError(
            f"no confidence promises an accuracy of {target_accuracy} on {n} held-out photographs; "
            f"the best that can be promised is {math.floor(1000 * bounds.max()) / 1000}; ask for less"
        )
    cut = int(kept[-1])
    return Cut(
        threshold=float(confidence[order][last[cut]]),
        coverage=float(n_answered[cut] / n),
        accuracy=float(1 - n_wrong[cut] / n_answered[cut]),
        bound=float(bounds[cut]),
    )


def _highest_error(n_wrong: IntArray, n: IntArray, alpha: float) -> Float64Array:
    """Upper end of Clopper and Pearson's one-sided interval of an error rate."""
    from scipy.special import betaincinv

    inside = betaincinv(n_wrong + 1, np.maximum(n - n_wrong, 1), 1 - alpha)
    return np.where(n_wrong >= n, 1.0, inside)
