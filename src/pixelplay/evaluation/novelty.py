"""Novelty (out-of-distribution score) of an image.

Two signals are added: the distance of its features from those of the nearest training image, and the energy
of its logits. Neither is better on all datasets; their sum is best on most (benchmarks/DECISIONS.md).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelplay.array_types import Float32Array, Float64Array, IntArray

MAX_REFERENCES = 1000
NOVELTY_THRESHOLD = 0.95  # one in twenty held-out images of known classes is more novel
# fraction of images of classes left out of training that are more novel: mean, lowest and highest of ten
# datasets (benchmarks/results/novelty-suite.json)
BENCHMARK_DETECTION = (0.35, 0.10, 0.97)
MIN_DISTANCE = 1e-3  # nearer images are duplicates
_BLOCK = 1024  # images compared with all references at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Novelty:
    """A novelty scale fitted on held-out images."""

    mean: Float32Array  # (D,) of the training features
    scale: Float32Array  # (D,) √(std² + median std²): features that vary little stay small
    references: NDArray[np.float16]  # (R, D) standardised features of some training images
    centre: Float64Array  # (2,) mean log distance and energy of the held-out images
    spread: Float64Array  # (2,) their standard deviation
    scores: Float64Array  # (n,) ascending, sums of both standardised signals on the held-out images

    def measure(self, features: NDArray[Any], logits: NDArray[Any]) -> Float64Array:
        """Compute the novelty (N,) of images with features (N, D or more) and logits (N, K).

        It is the fraction in [0, 1] of held-out images that are less novel; beyond the most novel of them it
        continues towards 1.
        """
        scaled = (features[:, : len(self.mean)] - self.mean) / self.scale
        distances = nearest_distances(scaled, self.references.astype(np.float32))
        scores = ((_signals(distances, logits) - self.centre) / self.spread).sum(axis=1)
        n = len(self.scores)
        fractions = np.interp(scores, self.scores, np.arange(1, n + 1) / (n + 1))
        beyond = np.maximum(scores - self.scores[-1], 0)
        return np.asarray(1 - (1 - fractions) * np.exp(-beyond))


def fit_novelty(
    references: Float32Array,
    reference_folds: IntArray,
    held_out: Float32Array,
    folds: IntArray,
    logits: Float32Array,
) -> Novelty:
    """Fit the novelty scale.

    Args:
        references: (R, D) features of training images, with their folds (R,).
        held_out: (n, D) features of held-out images, n >= 1, with their folds and finite logits (n, K). Each
            is compared with references of other folds only, as its logits are from a model that was not
            trained on its own fold.
    """
    mean = references.mean(axis=0, dtype=np.float64).astype(np.float32)
    deviation = references.std(axis=0, dtype=np.float64)
    varies = deviation > 0
    # divided by their own deviation, channels that hardly vary would make every image novel
    scale = np.hypot(deviation, np.median(deviation[varies]) if varies.any() else 1.0).astype(np.float32)
    scaled = ((references - mean) / scale).astype(np.float16)
    compared = scaled.astype(np.float32)
    distances = np.full(len(held_out), np.inf)
    for fold in np.unique(folds):
        own = folds == fold
        others = compared[reference_folds != fold]
        distances[own] = nearest_distances((held_out[own] - mean) / scale, others)
    signals = _signals(distances, logits)  # (n, 2)
    centre, deviations = signals.mean(axis=0), signals.std(axis=0)
    spread = np.where(deviations > 0, deviations, 1.0)
    return Novelty(
        mean=mean,
        scale=scale,
        references=scaled,
        centre=centre,
        spread=spread,
        scores=np.sort(((signals - centre) / spread).sum(axis=1)),
    )


def choose_references(labels: IntArray, n: int, seed: int) -> IntArray:
    """Choose up to n positions, ascending, balanced over the classes (N,); rare classes are complete."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class])
    rank_in_class = np.arange(len(labels)) - starts
    return np.asarray(np.sort(by_class[np.argsort(rank_in_class, kind="stable")][:n]))


def nearest_distances(rows: NDArray[Any], references: NDArray[Any]) -> Float64Array:
    """Return the Euclidean distance (N,) of rows (N, D) to the nearest of references (R, D), over √D.

    A matrix product finds the nearest, but its rounding depends on N; the distance itself does not.
    """
    lengths = np.square(references).sum(axis=1)
    squares = [np.empty(0)]
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        pairwise = np.square(block).sum(axis=1)[:, None] + lengths - 2 * block @ references.T  # (B, R)
        squares.append(np.square(block - references[pairwise.argmin(axis=1)]).sum(axis=1))
    return np.asarray(np.sqrt(np.concatenate(squares) / rows.shape[1]))


def _signals(distances: Float64Array, logits: NDArray[Any]) -> Float64Array:
    """Return log distance and energy, (N, 2)."""
    values = logits.astype(np.float64)
    largest = values.max(axis=1)
    energy = -largest - np.log(np.exp(values - largest[:, None]).sum(axis=1))
    return np.stack([np.log(np.maximum(distances, MIN_DISTANCE)), energy], axis=1)
