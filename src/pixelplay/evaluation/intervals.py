"""How far a figure may lie from the truth: Wilson's interval for proportions, the bootstrap for the rest.

Images of one group (a burst, a scene, a patient) are not independent: they are drawn together or not at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from pixelplay.arrays import BoolArray, Float64Array, IntArray
from pixelplay.errors import DataError

CONFIDENCE = 0.95
MIN_UNITS = 10  # fewer images of a class, or fewer groups in all, and a bootstrap says too little
_CHUNK_CELLS = 4_000_000  # weights held at once: 32 MB as int64, whatever the number of images


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval.

    Attributes:
        low: lower end of the interval, at most `value`.
        high: upper end of the interval, at least `value`.
        n: number of images that the figure is about.
        reliable: False where the interval rests on too little to be believed.
        method: "wilson", "wilson by class", "newcombe, paired", "bootstrap by image" or "bootstrap by group".
        n_classes: number of classes that a macro mean runs over; None for other figures.
    """

    value: float
    low: float
    high: float
    n: int
    reliable: bool
    method: str
    n_classes: int | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values, without `n_classes` where there is none."""
        fields: dict[str, Any] = {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "reliable": self.reliable,
            "method": self.method,
        }
        return fields if self.n_classes is None else fields | {"n_classes": self.n_classes}


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """Estimate a proportion of independent images with Wilson's score interval.

    Unlike value ± 2 standard errors it stays inside [0, 1] and has a width at 0 of n and n of n.

    Raises:
        DataError: n is 0, or successes lies outside [0, n].

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927),
    as in Brown, Cai and DasGupta, Statistical Science 16 (2001), equation 4.
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(
            f"{successes} of {n} is not a proportion; it needs n >= 1 and 0 <= successes <= n; count again"
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    value = successes / n
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(value * (1 - value) / n + z * z / (4 * n * n)))
    return Estimate(
        value=value,
        low=min(max(centre - half, 0.0), value),  # rounding may leave 1e-17 beside 0 and 1
        high=max(min(centre + half, 1.0), value),
        n=n,
        reliable=True,
        method="wilson",
    )


def mean_of_shares(
    shares: Sequence[Estimate], *, reliable: bool, correlation: Float64Array | None = None
) -> Estimate:
    """Estimate a macro mean from the intervals of its classes.

    The bootstrap is too sure where a rare class is nearly always right: with 30 of 1000 images and a true
    recall of 0.97 its 95 % interval of macro-F1 held in 85 % of simulations, this one in 93 %.

    Args:
        shares: K estimates with Wilson intervals, one per class present.
        reliable: whether each rests on images enough.
        correlation: (K, K) between the errors of `shares`; None: independent.

    Source: Zou, Huang and Zhang, "A note on confidence interval estimation for a linear function of binomial
    proportions", Computational Statistics and Data Analysis 53 (2009); with correlation: Zou, "Toward using
    confidence intervals to compare correlations", Psychological Methods 12 (2007).
    """
    values, lows, highs = np.array([(share.value, share.low, share.high) for share in shares]).T  # each (K,)
    mixing = np.eye(len(shares)) if correlation is None else correlation
    value, below, above = float(values.mean()), values - lows, highs - values
    return Estimate(
        value=value,
        low=value - float(np.sqrt(below @ mixing @ below)) / len(shares),
        high=value + float(np.sqrt(above @ mixing @ above)) / len(shares),
        n=sum(share.n for share in shares),
        reliable=reliable,
        method="wilson by class",
        n_classes=len(shares),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Bootstrap:
    """How the images of one evaluation are drawn again.

    Attributes:
        n: number of images.
        groups: (N,) int64, images that belong together; None: each image on its own.
    """

    n: int
    groups: IntArray | None
    n_resamples: int
    seed: int

    def weights(self) -> Iterator[IntArray]:
        """Yield the multiplicities of `bootstrap_weights`; every call repeats the same ones."""
        return bootstrap_weights(self.groups, self.n, self.n_resamples, self.seed)

    @cached_property
    def n_units(self) -> int:
        """Number of things drawn independently: groups where there are any, images otherwise."""
        return self.n if self.groups is None else len(np.unique(self.groups))

    @property
    def unit(self) -> str:
        """What is drawn: "image" or "group"."""
        return "image" if self.groups is None else "group"

    def estimate(
        self, value: float, samples: Float64Array, *, n: int, is_enough: bool, n_classes: int | None = None
    ) -> Estimate:
        """Put a percentile interval around a figure.

        It is unreliable where the caller says so, where fewer than ten units are drawn, and where all
        resamples agree, as they do when every image is right: no spread is no evidence of certainty.

        Args:
            value: the figure on the images themselves.
            samples: (R,) the figure on each resample, NaN where it is undefined.
            n: number of images that the figure is about.
            is_enough: whether there are images enough for a bootstrap of this figure.
            n_classes: number of classes in a macro mean.
        """
        low, high = percentile_interval(np.append(samples, value))  # with itself: never empty
        return Estimate(
            value=value,
            low=min(low, value),
            high=max(high, value),
            n=n,
            reliable=is_enough and self.n_units >= MIN_UNITS and low < high,
            method=f"bootstrap by {self.unit}",
            n_classes=n_classes,
        )

    def estimates(
        self, values: Float64Array, samples: Float64Array, n: IntArray, is_enough: BoolArray
    ) -> list[Estimate | None]:
        """Put intervals around S figures, (S,) with samples (R, S); None where one is NaN."""
        return [
            None
            if np.isnan(value)
            else self.estimate(float(value), samples[:, i], n=int(n[i]), is_enough=bool(is_enough[i]))
            for i, value in enumerate(values)
        ]


def bootstrap_weights(groups: IntArray | None, n: int, n_resamples: int, seed: int) -> Iterator[IntArray]:
    """Yield how often each image occurs in each bootstrap resample, in chunks of bounded size.

    As many groups are drawn with replacement as there are, each with all its images, so with groups of
    unequal size the rows of a chunk have unequal sums.

    Args:
        groups: (N,) int, images that belong together; None: each image is its own group.
        n: number of images.
        n_resamples: rows in all chunks together.
        seed: the same seed gives the same weights.

    Yields:
        (R', N) int64 multiplicities; the R' add up to `n_resamples`.

    Raises:
        DataError: there is no image, or `groups` has another length.

    Source: Field and Welsh, "Bootstrapping clustered data", JRSS B 69 (2007), "randomized cluster bootstrap".
    """
    if n < 1:
        raise DataError("0 images cannot be resampled; at least 1 is needed; check the folder or the split")
    if groups is not None and groups.shape != (n,):
        raise DataError(f"groups has shape {groups.shape} but there are {n} images; give one group per image")
    member_of = None if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)  # (N,)
    n_units = n if member_of is None else int(member_of.max()) + 1
    rng = np.random.default_rng(seed)
    rows_at_once = max(1, _CHUNK_CELLS // n)
    for start in range(0, n_resamples, rows_at_once):
        rows = min(rows_at_once, n_resamples - start)
        drawn = rng.integers(n_units, size=(rows, n_units))
        drawn += np.arange(rows)[:, None] * n_units  # one histogram over all rows instead of one per row
        times = np.bincount(drawn.ravel(), minlength=rows * n_units).reshape(rows, n_units)
        yield times if member_of is None else times[:, member_of]  # (R', N)


def percentile_interval(samples: Float64Array, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the two quantiles that enclose `confidence` of the samples; NaN ones, not all, are left out."""
    defined = samples[~np.isnan(samples)]
    low, high = np.quantile(defined, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
