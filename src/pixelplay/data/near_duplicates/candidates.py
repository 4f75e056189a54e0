"""Find pairs of images that may be near-duplicates, by thumbnails and features.

In datasets of similar things every image has close neighbors. The distance of a candidate is therefore
compared with that of the nearest images that cannot all be duplicates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelplay.array_types import BoolArray, Float32Array, IntArray, UInt8Array
from pixelplay.data.near_duplicates.alignment import remove_line_means
from pixelplay.data.near_duplicates.thumbnails import FINGERPRINT_PX, darker_half
from pixelplay.run_log import RunLog

MAX_DUPLICATES, MAX_DUPLICATES_FRAC = 10, 0.01  # sets larger than both are reported, not kept in one split
N_BY_FINGERPRINT, N_BY_FEATURES, N_BY_CROP = 2, 4, 1  # candidates per image and search
CROP_SIDE = 0.9  # side of a corner crop, in fractions
# Distance relative to that of a neighbor: of watermarked duplicates it is at most 0.59 among solar cells and
# 0.29 in TrashNet, of other ones mostly below 0.2.
MAX_DISTANCE_RATIO = 0.6
N_NEIGHBORS = 4
N_GROUPS = 2048  # of other images, to find the nearest few quickly
DIRECTIONS = 256  # of the random projection of features, which hardly changes near neighbors
SAME_COSINE = 0.995  # fingerprints above it are duplicates, however many there are
BLOCK_BYTES = 64 << 20  # of cosines held at once
BLOCK_ROWS = 1024  # thumbnails or rows of features per block


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Pairs to compare more closely, and the neighbors of each image.

    Attributes:
        pairs: (P, 2) positions, the smaller first; a pair can occur with and without mirroring.
        is_mirrored: (P,) one image is to be compared with the other's mirror image.
        is_dark: (P,) the darker halves are similar; never with is_mirrored.
        ratio: (P,) distance relative to that of a neighbor.
        neighbors: (N, R) positions of the nearest images that cannot all be duplicates; R is 0 if there are
            too few images.
    """

    pairs: IntArray
    is_mirrored: BoolArray
    is_dark: BoolArray
    ratio: Float32Array
    neighbors: IntArray

    def select(self, rows: NDArray[Any] | slice | Sequence[int]) -> "Candidates":
        """Keep some pairs, by mask (P,), slice or position."""
        return replace(
            self,
            pairs=self.pairs[rows],
            is_mirrored=self.is_mirrored[rows],
            is_dark=self.is_dark[rows],
            ratio=self.ratio[rows],
        )


def max_duplicates(n: int) -> int:
    """Return the largest number of duplicates of an image, among n images, that are kept in one split."""
    return int(max(MAX_DUPLICATES, MAX_DUPLICATES_FRAC * n))


def find_candidates(thumbnails: UInt8Array, features: Float32Array | None, log: RunLog) -> Candidates:
    """Find images that are much closer than the neighbors of each image.

    Five kinds of search: fingerprints of the whole image, of its mirror image, of its four corner crops and
    of its darker half, which survives clipped highlights; and features.

    Args:
        thumbnails: (N, S, S) uint8.
        features: (N, D) finite; without them only crops at a corner are found reliably.
    """
    whole = _fingerprints(thumbnails, 0, 0, 1)  # (N, s, s)
    straight, mirrored = _rows(whole), _rows(whole[:, :, ::-1])
    dark = _rows(_fingerprints(thumbnails, 0, 0, 1, is_dark=True))
    n_searches = 7 if features is None else 8
    with log.progress("searching near-duplicates", n_searches * len(thumbnails), "comparisons") as bar:
        search = partial(nearest_pairs, on_progress=bar.update)
        whole_pairs, whole_ratios, neighbors = search(straight, straight, N_BY_FINGERPRINT)
        mirrored_pairs, mirrored_ratios, _ = search(straight, mirrored, N_BY_FINGERPRINT)
        dark_pairs, dark_ratios, _ = search(dark, dark, N_BY_FINGERPRINT)
        found = [(whole_pairs, whole_ratios), (dark_pairs, dark_ratios)]
        for top, left in product((0.0, 1 - CROP_SIDE), repeat=2):
            corner = _rows(_fingerprints(thumbnails, top, left, CROP_SIDE))
            found.append(search(corner, straight, N_BY_CROP)[:2])
        if features is not None:
            rows = _project(features)
            found.append(search(rows, rows, N_BY_FEATURES)[:2])
    pairs, ratios = _merge(np.concatenate([each[0] for each in found]), np.concatenate([r for _, r in found]))
    is_mirrored = np.arange(len(pairs) + len(mirrored_pairs)) >= len(pairs)
    pairs = np.concatenate([pairs, mirrored_pairs])
    key = len(thumbnails), 1  # pair → one number
    is_dark = np.isin(pairs @ key, dark_pairs @ key) & ~is_mirrored
    return Candidates(
        pairs=pairs,
        is_mirrored=is_mirrored,
        is_dark=is_dark,
        ratio=np.concatenate([ratios, mirrored_ratios]),
        neighbors=neighbors,
    )


def nearest_pairs(
    rows: Float32Array,
    others: Float32Array,
    k: int,
    max_ratio: float = MAX_DISTANCE_RATIO,
    *,
    on_progress: Callable[[int], object] = lambda n: None,
) -> tuple[IntArray, Float32Array, IntArray]:
    """Pair each of N unit rows (N, D) with those of its k nearest others (N, D) that are close enough.

    Close enough is less than `max_ratio` times the distance to a neighbor. Neighbors are the nearest of each
    of N_GROUPS groups of others: with more images than groups they are slightly too far away. Row i is never
    paired with other i.

    Returns:
        Unique pairs (P, 2), the smaller position first; their smallest ratio (P,); and the neighbors (N, R)
        of each row.
    """
    n, limit = len(rows), max_duplicates(len(rows))
    n_neighbors = min(N_NEIGHBORS, max(0, n - 1 - limit))
    size = -(-n // N_GROUPS)  # images per group
    n_groups = -(-n // size)
    step = max(1, min(n, BLOCK_BYTES // (4 * size * n_groups)))
    padded = np.zeros((size * n_groups, others.shape[1]), np.float32)
    padded[:n] = others
    found, ratios, neighbors = [], [], np.empty((n, n_neighbors), np.int64)
    for start in range(0, n, step):
        block = np.arange(start, min(start + step, n))
        within = np.arange(len(block))
        cosines = rows[block] @ padded.T  # (b, N padded to full groups)
        cosines[:, n:] = -np.inf
        cosines[within, block] = -np.inf
        typical = np.full(len(block), np.inf, np.float32)
        if n_neighbors:
            neighbors[block], typical = _find_neighbors(cosines, limit, n_neighbors, n_groups)
        for _ in range(min(k, n - 1)):  # a few passes are faster than sorting
            nearest = cosines.argmax(1)
            distance = _distance(cosines[within, nearest])
            is_near = distance < max_ratio * typical
            found.append(np.stack([block, nearest], axis=1)[is_near])
            ratios.append(distance[is_near] / typical[is_near])
            cosines[within, nearest] = -np.inf
        on_progress(len(block))
    return *_merge(np.sort(np.concatenate(found), axis=1), np.concatenate(ratios)), neighbors


def _merge(pairs: IntArray, ratios: Float32Array) -> tuple[IntArray, Float32Array]:
    """Return unique pairs (P, 2) in ascending order and their smallest ratio (P,)."""
    order = np.lexsort((ratios, pairs[:, 1], pairs[:, 0]))
    pairs, ratios = pairs[order], ratios[order]
    is_first = np.ones(len(pairs), bool)
    is_first[1:] = (pairs[1:] != pairs[:-1]).any(1)
    return pairs[is_first], ratios[is_first]


def unit_rows(rows: Float32Array) -> Float32Array:
    """Divide rows (N, D) by their length; zero rows stay zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-9), dtype=np.float32)


def _find_neighbors(
    cosines: Float32Array, limit: int, n: int, n_groups: int
) -> tuple[IntArray, Float32Array]:
    """Find the positions (b, n) after the `limit` nearest by cosine (b, N), and the distance of the first.

    If more than `limit` others have the same content, all of them are skipped.
    """
    grouped = cosines.reshape(len(cosines), -1, n_groups)  # consecutive images are in different groups
    nearest = grouped.max(1)
    last = n_groups - n
    limits = np.minimum(np.maximum((nearest >= SAME_COSINE).sum(1), limit), last)
    groups = np.empty((len(cosines), n), np.int64)
    for skipped in np.unique(limits):
        own = limits == skipped
        order = np.argpartition(-nearest[own], (skipped, min(skipped + n, n_groups) - 1), axis=1)
        groups[own] = order[:, skipped : skipped + n]
    inside = np.take_along_axis(grouped, groups[:, None], 2).argmax(1)
    distance = _distance(np.take_along_axis(nearest, groups[:, :1], 1)[:, 0])
    return inside * n_groups + groups, distance


def _distance(cosines: Float32Array) -> Float32Array:
    """Compute the distance of unit vectors from their cosine."""
    return np.asarray(np.sqrt(np.maximum(2 - 2 * cosines, 0)), dtype=np.float32)


def _fingerprints(
    thumbnails: UInt8Array, top: float, left: float, share: float, *, is_dark: bool = False
) -> Float32Array:
    """Average a window of thumbnails (N, S, S) to fingerprints (N, s, s); corner and side are fractions."""
    transform = darker_half if is_dark else np.float32
    to_y, to_x = (_average(start, share, thumbnails.shape[-1]) for start in (top, left))
    blocks = (thumbnails[i : i + BLOCK_ROWS] for i in range(0, len(thumbnails), BLOCK_ROWS))
    return np.concatenate([to_y @ transform(block) @ to_x.T for block in blocks])


def _average(start: float, share: float, side_px: int) -> Float32Array:
    """Compute weights (s, S) that average a window of S pixels in s equal steps."""
    edges = (start + share * np.arange(FINGERPRINT_PX + 1) / FINGERPRINT_PX) * side_px
    pixels = np.arange(side_px)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.maximum(covered, 0) / np.diff(edges)[:, None], dtype=np.float32)


def _rows(fingerprints: Float32Array) -> Float32Array:
    """Convert fingerprints (N, s, s) to unit rows (N, s²) without line means."""
    return unit_rows(remove_line_means(fingerprints).reshape(len(fingerprints), -1))


def _project(features: Float32Array) -> Float32Array:
    """Standardise features (N, D) and project them on few directions, as unit rows, block by block."""
    mean, std = features.mean(0), np.maximum(features.std(0), 1e-6)
    directions = np.eye(len(mean), dtype=np.float32)
    if len(mean) > DIRECTIONS:
        rng = np.random.default_rng(0)
        directions = rng.standard_normal((len(mean), DIRECTIONS), dtype=np.float32)
    blocks = (features[i : i + BLOCK_ROWS] for i in range(0, len(features), BLOCK_ROWS))
    return unit_rows(np.concatenate([((block - mean) / std) @ directions for block in blocks]))
