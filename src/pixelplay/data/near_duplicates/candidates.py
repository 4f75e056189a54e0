"""Thumbs and features → pairs of images that may be copies, cheaply, and whom each looks like anyway.

A copy stands out: it is nearer than others are. Where things are made alike every image has near
neighbours, and being one means nothing; so a candidate is measured against the nearest of those that cannot
all be copies: sets as large as that are never kept together.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from pixelplay.arrays import BoolArray, Float32Array, IntArray, UInt8Array
from pixelplay.data.near_duplicates.alignment import detail
from pixelplay.data.near_duplicates.thumbnails import PRINT_PX, darker_half
from pixelplay.run_log import RunLog

MAX_COPIES, MAX_COPIES_FRAC = 10, 0.01  # of the images: sets above both are shown, not kept together
N_BY_PRINT, N_BY_FEATURES, N_BY_CUT = 2, 4, 1  # candidates of each image
CUT_SHARE = 0.9  # of a side, that a cut at a corner leaves
# Of the distance to a look-alike: copies of solar cells and of TrashNet are nearer, by one of both.
STANDS_OUT, FEATURES_STAND_OUT = 0.8, 0.7
N_LOOK_ALIKES = 4
N_GROUPS = 2048  # that others are gathered in, to find the nearest few quickly
DIRECTIONS = 256  # that features are projected on: it disturbs near neighbours little
SAME = 0.995  # cosine of fingerprints from which others are copies, however many there are
BLOCK_BYTES = 64 << 20  # of cosines held at once
AT_ONCE = 1024  # thumbs or rows of features
Nearest = tuple[IntArray, IntArray]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Pairs worth a closer look, and what each image is like without being a copy.

    Attributes:
        pairs: (P, 2) positions, the smaller first.
        is_mirrored: (P,) whether one is to be laid on the other's mirror image; each pair and way once.
        is_dark: (P,) whether their darker halves are alike, of those not mirrored.
        look_alikes: (N, R) positions, nearest first but for those that may be copies; R is 0 where there are
            too few images to tell.
    """

    pairs: IntArray
    is_mirrored: BoolArray
    is_dark: BoolArray
    look_alikes: IntArray

    def select(self, rows: BoolArray) -> "Candidates":
        """Keep the pairs where a (P,) mask is true."""
        return replace(
            self, pairs=self.pairs[rows], is_mirrored=self.is_mirrored[rows], is_dark=self.is_dark[rows]
        )


def max_duplicates(n: int) -> int:
    """How many copies of an image among n are at most kept together."""
    return int(max(MAX_COPIES, MAX_COPIES_FRAC * n))


def propose(thumbnails: UInt8Array, features: Float32Array | None, log: RunLog) -> Candidates:
    """Find, for each image, those that stand out from all that look like it.

    By fingerprint, straight and mirrored; by that of what a cut at one corner leaves; by that of the darker
    half, straight, which a blown-out copy keeps; by features.

    Args:
        thumbs: (N, S, S) uint8.
        features: (N, D) finite; without them copies cut otherwise than at a corner are rarely found.
    """
    whole = _prints(thumbnails, 0, 0, 1)  # (N, s, s)
    straight, mirrored = _rows(whole), _rows(whole[:, :, ::-1])
    dark = _rows(_prints(thumbnails, 0, 0, 1, is_dark=True))
    n_searches = 7 if features is None else 8
    with log.progress(
        "looking for copies", n_searches * len(thumbnails), "comparisons with all others"
    ) as bar:

        def search(rows: Float32Array, others: Float32Array, k: int, share: float = STANDS_OUT) -> Nearest:
            return nearest_pairs(rows, others, k, share, on_progress=bar.update)

        pairs, look_alikes = search(straight, straight, N_BY_PRINT)
        mirror_images = search(straight, mirrored, N_BY_PRINT)[0]
        dark_ones = search(dark, dark, N_BY_PRINT)[0]
        as_they_are = [pairs, dark_ones]
        for top, left in product((0.0, 1 - CUT_SHARE), repeat=2):
            corner = _rows(_prints(thumbnails, top, left, CUT_SHARE))
            as_they_are.append(search(corner, straight, N_BY_CUT)[0])
        if features is not None:
            rows = _project(features)
            as_they_are.append(search(rows, rows, N_BY_FEATURES, FEATURES_STAND_OUT)[0])
    straight_ones = np.unique(np.concatenate(as_they_are), axis=0)
    every = np.concatenate([straight_ones, mirror_images])
    is_mirrored = np.arange(len(every)) >= len(straight_ones)
    key = len(thumbnails), 1
    is_dark = np.isin(every @ key, dark_ones @ key) & ~is_mirrored
    return Candidates(pairs=every, is_mirrored=is_mirrored, is_dark=is_dark, look_alikes=look_alikes)


def nearest_pairs(
    rows: Float32Array,
    others: Float32Array,
    k: int,
    stands_out: float = STANDS_OUT,
    *,
    on_progress: Callable[[int], object] = lambda n: None,
) -> Nearest:
    """Pair each of N unit rows (N, D) with those of its k nearest others (N, D) that stand out.

    To stand out is to be nearer than that share of the distance to a look-alike, which is taken from the
    nearest of each of N_GROUPS groups of others: with more images it is slightly too long. The i-th row
    has no business with the i-th other.

    Returns:
        Pairs (P, 2), the smaller position first, each once; and the look-alikes (N, R) of each row.
    """
    n, limit = len(rows), max_duplicates(len(rows))
    n_look_alikes = min(N_LOOK_ALIKES, max(0, n - 1 - limit))
    size = -(-n // N_GROUPS)  # of a group
    n_groups = -(-n // size)
    step = max(1, min(n, BLOCK_BYTES // (4 * size * n_groups)))
    padded = np.zeros((size * n_groups, others.shape[1]), np.float32)
    padded[:n] = others
    found, alike = [], np.empty((n, n_look_alikes), np.int64)
    for start in range(0, n, step):
        block = np.arange(start, min(start + step, n))
        within = np.arange(len(block))
        cosines = rows[block] @ padded.T  # (b, N and what fills the last group)
        cosines[:, n:] = -np.inf
        cosines[within, block] = -np.inf
        usual = np.full(len(block), np.inf, np.float32)
        if n_look_alikes:
            alike[block], usual = _look_alikes(cosines, limit, n_look_alikes, n_groups)
        for _ in range(min(k, n - 1)):  # few passes are quicker than sorting
            nearest = cosines.argmax(1)
            is_near = _distance(cosines[within, nearest]) < stands_out * usual
            found.append(np.stack([block, nearest], axis=1)[is_near])
            cosines[within, nearest] = -np.inf
        on_progress(len(block))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0), alike


def unit_rows(rows: Float32Array) -> Float32Array:
    """Divide rows (N, D) by their length; what has none stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-9), dtype=np.float32)


def _look_alikes(cosines: Float32Array, limit: int, n: int, n_groups: int) -> tuple[IntArray, Float32Array]:
    """Positions (b, n) of those after the `limit` nearest by cosine (b, N), and how far the first is.

    Where more than `limit` others are the same, those after all of them.
    """
    grouped = cosines.reshape(len(cosines), -1, n_groups)  # neighbours in order are in different groups
    nearest = grouped.max(1)
    last = n_groups - n
    limits = np.minimum(np.maximum((nearest >= SAME).sum(1), limit), last)
    groups = np.empty((len(cosines), n), np.int64)
    for skipped in np.unique(limits):
        own = limits == skipped
        order = np.argpartition(-nearest[own], (skipped, min(skipped + n, n_groups) - 1), axis=1)
        groups[own] = order[:, skipped : skipped + n]
    inside = np.take_along_axis(grouped, groups[:, None], 2).argmax(1)
    distance = _distance(np.take_along_axis(nearest, groups[:, :1], 1)[:, 0])
    return inside * n_groups + groups, distance


def _distance(cosines: Float32Array) -> Float32Array:
    """Distance of unit vectors."""
    return np.asarray(np.sqrt(np.maximum(2 - 2 * cosines, 0)), dtype=np.float32)


def _prints(
    thumbnails: UInt8Array, top: float, left: float, share: float, *, is_dark: bool = False
) -> Float32Array:
    """Average a window of thumbs (N, S, S), its corner and side in fractions, to fingerprints (N, s, s)."""
    see = darker_half if is_dark else np.float32
    to_y, to_x = (_average(start, share, thumbnails.shape[-1]) for start in (top, left))
    blocks = (thumbnails[i : i + AT_ONCE] for i in range(0, len(thumbnails), AT_ONCE))
    return np.concatenate([to_y @ see(block) @ to_x.T for block in blocks])


def _average(start: float, share: float, side_px: int) -> Float32Array:
    """Weights (s, S) that average a window of S pixels in s equal steps."""
    edges = (start + share * np.arange(PRINT_PX + 1) / PRINT_PX) * side_px
    pixels = np.arange(side_px)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.maximum(covered, 0) / np.diff(edges)[:, None], dtype=np.float32)


def _rows(prints: Float32Array) -> Float32Array:
    """The details of fingerprints (N, s, s) as unit rows (N, s²)."""
    return unit_rows(detail(prints).reshape(len(prints), -1))


def _project(features: Float32Array) -> Float32Array:
    """Scale features (N, D) alike and bring them to few directions, as unit rows; a block at a time."""
    mean, std = features.mean(0), np.maximum(features.std(0), 1e-6)
    n_features = features.shape[1]
    directions = np.eye(n_features, dtype=np.float32)
    if n_features > DIRECTIONS:
        rng = np.random.default_rng(0)
        directions = rng.standard_normal((n_features, DIRECTIONS), dtype=np.float32)
    blocks = (features[i : i + AT_ONCE] for i in range(0, len(features), AT_ONCE))
    return unit_rows(np.concatenate([((block - mean) / std) @ directions for block in blocks]))
