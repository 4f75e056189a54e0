"""Thumbs and features → pairs of photographs that may be copies, cheaply, and whom each looks like anyway.

A copy stands out: it is nearer than others are. Where things are made alike every photograph has near
neighbours, and being one means nothing; so a candidate is measured against the nearest of those that cannot
all be copies: sets as large as that are never kept together.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from pixelplay.data.align import detail
from pixelplay.data.thumbs import PRINT_PX, Thumbs

MAX_COPIES, MAX_COPIES_FRAC = 10, 0.01  # of the photographs: sets above both are shown, not kept together
N_BY_PRINT, N_BY_FEATURES, N_BY_CUT = 2, 4, 1  # candidates of each photograph
CUT_SHARE = 0.9  # of a side, that a cut at a corner leaves
# Of the distance to a look-alike: copies of solar cells and of TrashNet are nearer, by one of both.
STANDS_OUT, FEATURES_STAND_OUT = 0.8, 0.7
N_LOOK_ALIKES = 4
N_GROUPS = 2048  # that others are gathered in, to find the nearest few quickly
DIRECTIONS = 256  # that features are projected on: it disturbs near neighbours little
BLOCK = 1024  # rows compared with all others at once

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Pairs worth a closer look, and what each photograph is like without being a copy.

    Attributes:
        pairs: (P, 2) positions, the smaller first.
        is_mirrored: (P,) whether one is to be laid on the other's mirror image; each pair and way once.
        look_alikes: (N, R) positions, nearest first but for those that may be copies; R is 0 where there are
            too few photographs to tell.
    """

    pairs: IntArray
    is_mirrored: NDArray[np.bool_]
    look_alikes: IntArray


def max_copies(n: int) -> int:
    """How many copies of a photograph among n are at most kept together."""
    return int(max(MAX_COPIES, MAX_COPIES_FRAC * n))


def propose(thumbs: Thumbs, features: FloatArray | None) -> Candidates:
    """Find, for each photograph, those that stand out from all that look like it.

    By fingerprint, straight and mirrored; by the fingerprint of what a cut at one corner leaves; by features.

    Args:
        thumbs: (N, S, S) uint8.
        features: (N, D) finite; without them copies cut otherwise than at a corner are rarely found.
    """
    whole = _prints(thumbs, 0, 0, 1)  # (N, s, s)
    straight, mirrored = _rows(whole), _rows(whole[:, :, ::-1])
    pairs, look_alikes = nearest_pairs(straight, straight, N_BY_PRINT)
    found = [(pairs, False), (nearest_pairs(straight, mirrored, N_BY_PRINT)[0], True)]
    for top, left in product((0.0, 1 - CUT_SHARE), repeat=2):
        corner = _rows(_prints(thumbs, top, left, CUT_SHARE))
        found.append((nearest_pairs(corner, straight, N_BY_CUT)[0], False))
    if features is not None:
        rows = _project(features)
        found.append((nearest_pairs(rows, rows, N_BY_FEATURES, FEATURES_STAND_OUT)[0], False))
    every = np.concatenate([np.column_stack([pairs, np.full(len(pairs), way)]) for pairs, way in found])
    every = np.unique(every, axis=0)
    return Candidates(pairs=every[:, :2], is_mirrored=every[:, 2] == 1, look_alikes=look_alikes)


def nearest_pairs(
    rows: FloatArray, others: FloatArray, k: int, stands_out: float = STANDS_OUT
) -> tuple[IntArray, IntArray]:
    """Pair each of N unit rows (N, D) with those of its k nearest others (N, D) that stand out.

    To stand out is to be nearer than that share of the distance to a look-alike, which is taken from the
    nearest of each of N_GROUPS groups of others: with more photographs it is slightly too long. The i-th row
    has no business with the i-th other.

    Returns:
        Pairs (P, 2), the smaller position first, each once; and the look-alikes (N, R) of each row.
    """
    n, limit = len(rows), max_copies(len(rows))
    n_look_alikes = min(N_LOOK_ALIKES, max(0, n - 1 - limit))
    n_groups = -(-n // -(-n // N_GROUPS))
    found, alike = [], np.empty((n, n_look_alikes), np.int64)
    for start in range(0, n, BLOCK):
        block = np.arange(start, min(start + BLOCK, n))
        within = np.arange(len(block))
        cosines = rows[block] @ others.T  # (b, N)
        cosines[within, block] = -np.inf
        usual = np.full(len(block), np.inf, np.float32)
        if n_look_alikes:
            alike[block], usual = _look_alikes(cosines, limit, n_look_alikes, n_groups)
        for _ in range(min(k, n - 1)):  # few passes are quicker than sorting
            nearest = cosines.argmax(1)
            is_near = _distance(cosines[within, nearest]) < stands_out * usual
            found.append(np.stack([block, nearest], axis=1)[is_near])
            cosines[within, nearest] = -np.inf
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0), alike


def unit_rows(rows: FloatArray) -> FloatArray:
    """Divide rows (N, D) by their length; what has none stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-9), dtype=np.float32)


def _look_alikes(cosines: FloatArray, limit: int, n: int, n_groups: int) -> tuple[IntArray, FloatArray]:
    """Positions (b, n) of those after the `limit` nearest by cosine (b, N), and how far the first is."""
    padding = -len(cosines[0]) % n_groups
    padded = np.pad(cosines, ((0, 0), (0, padding)), constant_values=-np.inf)
    grouped = padded.reshape(len(cosines), -1, n_groups)  # neighbours in order are in different groups
    nearest = grouped.max(1)
    limit = min(limit, n_groups - 1 - n)
    groups = np.argpartition(-nearest, (limit, limit + n - 1), axis=1)[:, limit : limit + n]
    inside = np.take_along_axis(grouped, groups[:, None], 2).argmax(1)
    distance = _distance(np.take_along_axis(nearest, groups[:, :1], 1)[:, 0])
    return inside * n_groups + groups, distance


def _distance(cosines: FloatArray) -> FloatArray:
    """Distance of unit vectors."""
    return np.asarray(np.sqrt(np.maximum(2 - 2 * cosines, 0)), dtype=np.float32)


def _prints(thumbs: Thumbs, top: float, left: float, share: float) -> FloatArray:
    """Average a window of thumbs (N, S, S), its corner and side in fractions, to fingerprints (N, s, s)."""
    to_y, to_x = (_average(start, share, thumbs.shape[-1]) for start in (top, left))
    prints = [to_y @ thumbs[i : i + BLOCK].astype(np.float32) @ to_x.T for i in range(0, len(thumbs), BLOCK)]
    return np.concatenate(prints)


def _average(start: float, share: float, side_px: int) -> FloatArray:
    """Weights (s, S) that average a window of S pixels in s equal steps."""
    edges = (start + share * np.arange(PRINT_PX + 1) / PRINT_PX) * side_px
    pixels = np.arange(side_px)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.maximum(covered, 0) / np.diff(edges)[:, None], dtype=np.float32)


def _rows(prints: FloatArray) -> FloatArray:
    """The details of fingerprints (N, s, s) as unit rows (N, s²)."""
    return unit_rows(detail(prints).reshape(len(prints), -1))


def _project(features: FloatArray) -> FloatArray:
    """Scale features (N, D) alike and bring them to few directions, as unit rows."""
    scaled = features - features.mean(0)
    scaled /= np.maximum(scaled.std(0), 1e-6)
    if scaled.shape[1] > DIRECTIONS:
        rng = np.random.default_rng(0)
        scaled = scaled @ rng.standard_normal((scaled.shape[1], DIRECTIONS), dtype=np.float32)
    return unit_rows(scaled)
