"""How unlike everything that was learned from an image is.

Two things tell: how far its features lie from those of the nearest image that was learned from, and how
little its logits speak for any class (their energy). Neither is the better one on all data; their sum is on
most (benchmarks/LOG.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelplay.arrays import Float32Array, Float64Array, IntArray

MAX_REFERENCES = 1000
LEAST_DISTANCE = 1e-3  # below it lie copies
LEAST_MOVE = 0.01  # of the median deviation of features
BLOCK = 1024  # images compared with all references at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Novelty:
    """A scale of novelty, set by images that were held out.

    Attributes:
        mean, scale: (D,) of the features of what was learned from.
        references: (R, D) float16, scaled features of some of it.
        centre, spread: (2,) of log distance and energy among the held-out images.
        scores: (n,) of those, ascending: the sum of both, standardised.
    """

    mean: Float32Array
    scale: Float32Array
    references: NDArray[np.float16]
    centre: Float64Array
    spread: Float64Array
    scores: Float64Array

    def measure(self, features: NDArray[Any], logits: NDArray[Any]) -> Float64Array:
        """Place images on the scale.

        Args:
            features: (N, D or more) of which the first D are compared.
            logits: (N, K).

        Returns:
            (N,) in [0, 1]: the share of the held-out images that are less novel; beyond the most novel
            of them it goes on towards 1.
        """
        scaled = (features[:, : len(self.mean)] - self.mean) / self.scale
        distances = nearest_distances(scaled, self.references.astype(np.float32))
        scores = _standardised(distances, logits, self.centre, self.spread).sum(axis=1)
        n = len(self.scores)
        shares = np.interp(scores, self.scores, np.arange(1, n + 1) / (n + 1))
        beyond = np.maximum(scores - self.scores[-1], 0)
        return np.asarray(1 - (1 - shares) * np.exp(-beyond))


def fit_novelty(
    references: Float32Array,
    reference_folds: IntArray,
    held_out: Float32Array,
    folds: IntArray,
    logits: Float32Array,
) -> Novelty:
    """Set the scale.

    Args:
        references: (R, D) features of images that were learned from.
        reference_folds: (R,) fold of each.
        held_out: (n, D) features of images that were held out, n >= 1.
        folds: (n,) fold of each: it is compared with references of other folds only, as its logits come from
            a model that has not learned from its own.
        logits: (n, K) finite.
    """
    mean = references.mean(axis=0, dtype=np.float64).astype(np.float32)
    scale = _scale_of(references)
    scaled = ((references - mean) / scale).astype(np.float16)
    compared = scaled.astype(np.float32)
    distances = np.full(len(held_out), np.inf)
    for fold in np.unique(folds):
        own = folds == fold
        others = compared[reference_folds != fold]
        distances[own] = nearest_distances((held_out[own] - mean) / scale, others)
    raw = _raw(distances, logits)  # (n, 2)
    deviations = raw.std(axis=0)
    centre, spread = raw.mean(axis=0), np.where(deviations > 0, deviations, 1.0)
    scores = np.sort(_standardised(distances, logits, centre, spread).sum(axis=1))
    return Novelty(
        mean=mean,
        scale=scale,
        references=scaled,
        centre=centre,
        spread=spread,
        scores=scores,
    )


def _scale_of(references: Float32Array) -> Float32Array:
    """Deviations (D,) of features (R, D); of what hardly moves a share of the median one.

    Else a channel that was as good as constant would find every image new for its last digits.
    """
    deviation = references.std(axis=0, dtype=np.float64)
    moves = deviation > 0
    least = LEAST_MOVE * np.median(deviation[moves]) if moves.any() else 1.0
    return np.asarray(np.maximum(deviation, least), dtype=np.float32)


def choose_references(labels: IntArray, n: int, seed: int) -> IntArray:
    """Choose up to n positions, ascending, of each class alike while it lasts: the rare are all there.

    Args:
        labels: (N,) classes.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class])
    turn = np.arange(len(labels)) - starts  # when each is its class's next
    return np.asarray(np.sort(by_class[np.argsort(turn, kind="stable")][:n]))


def nearest_distances(rows: NDArray[Any], references: NDArray[Any]) -> Float64Array:
    """Euclidean distance (N,) of rows (N, D) to the nearest of references (R, D), per square root of D."""
    lengths = np.square(references).sum(axis=1)
    found = [
        np.asarray((np.square(block).sum(axis=1)[:, None] + lengths - 2 * block @ references.T).min(axis=1))
        for block in _blocks(rows)
    ]
    squares = np.concatenate([np.empty(0), *found])
    return np.asarray(np.sqrt(np.maximum(squares, 0) / rows.shape[1]))


def _blocks(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))


def _raw(distances: Float64Array, logits: NDArray[Any]) -> Float64Array:
    """Log distance and energy, (N, 2)."""
    values = logits.astype(np.float64)
    largest = values.max(axis=1)
    energy = -largest - np.log(np.exp(values - largest[:, None]).sum(axis=1))
    return np.stack([np.log(np.maximum(distances, LEAST_DISTANCE)), energy], axis=1)


def _standardised(
    distances: Float64Array, logits: NDArray[Any], centre: Float64Array, spread: Float64Array
) -> Float64Array:
    return (_raw(distances, logits) - centre) / spread
