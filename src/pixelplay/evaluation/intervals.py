"""Confidence intervals: Wilson's for proportions, the bootstrap for everything else.

Images of one group (a burst, a scene, a patient) are not independent and are resampled together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from pixelplay.array_types import Float64Array, IntArray
from pixelplay.errors import DataError

CONFIDENCE = 0.95
MIN_UNITS = 10  # with fewer images of a class, or fewer groups in all, a bootstrap is unreliable
_CHUNK_CELLS = 4_000_000  # weights held at once: 32 MB as int64, whatever the number of images


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric with its 95 % interval; low <= value <= high."""

    value: float
    low: float
    high: float
    n: int  # number of images that the metric is computed from
    reliable: bool  # False if there are too few images or groups for the interval to be trusted
    method: str  # for example "wilson", "wilson by class" or "bootstrap by group"
    n_classes: int | None = None  # in a macro average

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values; `n_classes` only for a macro average."""
        record = plain_fields(self)
        if self.n_classes is None:
            del record["n_classes"]
        return record


def plain_fields(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name, with those that have `to_json` as plain values."""
    values = ((field.name, getattr(record, field.name)) for field in fields(record))
    return {name: value.to_json() if hasattr(value, "to_json") else value for name, value in values}


def wilson(successes: int, n: int) -> Estimate:
    """Estimate a proportion of independent images with Wilson's 95 % score interval.

    Unlike value ± 2 standard errors it stays inside [0, 1] and has a width at 0 of n and n of n.

    Raises:
        DataError: n is 0, or successes is outside [0, n].

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927),
    as in Brown, Cai and DasGupta, Statistical Science 16 (2001), equation 4.
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(
            f"{successes} of {n} is not a proportion; n must be at least 1 and successes between 0 and n"
        )
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    value = successes / n
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(value * (1 - value) / n + z * z / (4 * n * n)))
    return Estimate(
        value=value,
        low=min(max(centre - half, 0.0), value),  # rounding can miss 0 and 1 by 1e-17
        high=max(min(centre + half, 1.0), value),
        n=n,
        reliable=True,
        method="wilson",
    )


def macro_average(
    estimates: Sequence[Estimate], *, reliable: bool, correlation: Float64Array | None = None
) -> Estimate:
    """Estimate a macro average from the intervals of its classes.

    The bootstrap is too narrow when a rare class is nearly always correct: with 30 of 1000 images and a true
    recall of 0.97 its 95 % interval of macro F1 covered the truth in 85 % of simulations, this one in 93 %.

    Args:
        estimates: P estimates with Wilson intervals, one per class present.
        reliable: every class has enough images.
        correlation: (P, P) between the errors of `estimates`; None: independent.

    Source: Zou, Huang and Zhang, "A note on confidence interval estimation for a linear function of binomial
    proportions", Computational Statistics and Data Analysis 53 (2009); with correlation: Zou, "Toward using
    confidence intervals to compare correlations", Psychological Methods 12 (2007).
    """
    values, lows, highs = np.array([(e.value, e.low, e.high) for e in estimates]).T  # each (P,)
    mixing = np.eye(len(estimates)) if correlation is None else correlation
    value, below, above = float(values.mean()), values - lows, highs - values
    return Estimate(
        value=value,
        low=value - float(np.sqrt(below @ mixing @ below)) / len(estimates),
        high=value + float(np.sqrt(above @ mixing @ above)) / len(estimates),
        n=sum(e.n for e in estimates),
        reliable=reliable,
        method="wilson by class",
        n_classes=len(estimates),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Bootstrap:
    """A bootstrap of the N images of one evaluation; every use draws the same resamples."""

    n: int
    groups: IntArray | None  # (N,) images resampled together; None: each image on its own
    n_resamples: int
    seed: int

    def weights(self) -> Iterator[IntArray]:
        """Yield the multiplicities of `bootstrap_weights`, the same at every call."""
        return bootstrap_weights(self.groups, self.n, self.n_resamples, self.seed)

    @cached_property
    def n_units(self) -> int:
        """Number of independent units: groups if there are any, otherwise images."""
        return self.n if self.groups is None else len(np.unique(self.groups))

    @property
    def unit(self) -> str:
        """The unit that is resampled: "image" or "group"."""
        return "image" if self.groups is None else "group"

    def estimate(
        self, value: float, samples: Float64Array, *, n: int, enough: bool, n_classes: int | None = None
    ) -> Estimate:
        """Compute the percentile interval of a metric.

        It is unreliable with fewer than `MIN_UNITS` units, and when all resamples agree, as they do when
        every image is correct: a lack of spread is not evidence of certainty.

        Args:
            value: the metric on the images themselves.
            samples: (R,) the metric on each resample, NaN where undefined.
            enough: False if there are too few images for a bootstrap of this metric.
            n, n_classes: as in `Estimate`.
        """
        samples = np.append(samples, value)  # with `value`: never all NaN
        ends = [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2]
        low, high = np.quantile(samples[~np.isnan(samples)], ends).tolist()
        return Estimate(
            value=value,
            low=min(low, value),
            high=max(high, value),
            n=n,
            reliable=enough and self.n_units >= MIN_UNITS and low < high,
            method=f"bootstrap by {self.unit}",
            n_classes=n_classes,
        )


def bootstrap_weights(groups: IntArray | None, n: int, n_resamples: int, seed: int) -> Iterator[IntArray]:
    """Yield how often each image occurs in bootstrap resamples, (R', N) int64, in chunks of bounded size.

    Groups are drawn with replacement, as many as there are, each with all its images; with groups of
    unequal size the rows of a chunk have unequal sums.

    Args:
        groups: (N,) images resampled together; None: each image on its own.
        n_resamples: rows in all chunks together.

    Raises:
        DataError: there is no image, or `groups` has another length.

    Source: Field and Welsh, "Bootstrapping clustered data", JRSS B 69 (2007), "randomized cluster bootstrap".
    """
    if n < 1:
        raise DataError("0 images cannot be resampled; at least 1 is needed; check the folder or the split")
    if groups is not None and groups.shape != (n,):
        raise DataError(f"groups has shape {groups.shape} but there are {n} images; pass one group per image")
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
