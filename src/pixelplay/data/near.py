"""Thumbs and features → pairs of photographs that show the same pixels, and the sets they form.

Candidates come cheaply and too many: of each photograph those most like it by fingerprint, mirrored too, and
by features. What is a copy is decided by laying one picture on the other. A pair is a pair by itself: two
copies of a third need not be copies of each other, and what only looks alike never chains.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelplay.data.align import agreement, detail, likeness, outlines_agree, place_coarsely, refine
from pixelplay.data.loader import map_ahead
from pixelplay.data.thumbs import PRINT_PX, THUMB_PX, Thumbs, make_colour_thumb, make_thumb, shrink
from pixelplay.errors import ImageError

N_BY_PRINT, N_BY_FEATURES = 2, 4  # candidates of each photograph
DIRECTIONS = 256  # that features are projected on: it disturbs near neighbours little
BLOCK = 1024  # rows compared with all others at once, and pairs laid on each other at once
COARSE, FINER = 0.75, 0.7  # correlation of details from which a candidate is looked at more closely
AGREES = 0.75  # agreement of the pictures
ALIKE = 0.75  # correlation of the colours
CLOSE_PX = 192  # side at which the decision is made

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class CopyPair:
    """Two photographs that show the same pixels.

    Attributes:
        first, second: positions, ascending.
        agreement: 0 to 1, of their details where one lies on the other.
        is_mirrored: whether one is the mirror image.
        is_same_pixels: whether they are equal to the last bit once decoded.
    """

    first: int
    second: int
    agreement: float
    is_mirrored: bool
    is_same_pixels: bool

    @property
    def members(self) -> tuple[int, int]:
        """Both positions."""
        return self.first, self.second


def find_copies(
    thumbs: Thumbs,
    read: Callable[[int], NDArray[np.uint8]],
    features: FloatArray | None = None,
    *,
    num_workers: int | None = None,
    on_progress: Callable[[int], object] = lambda n: None,
) -> list[CopyPair]:
    """Find photographs that were re-encoded, resized, cut, mirrored, brightened or watermarked.

    Args:
        thumbs: (N, S, S) uint8, of photographs whose files differ.
        read: gives the pixels (H, W, 3) of a photograph; it runs in threads.
        features: (N, D) finite; without them cut copies are rarely among the candidates.
        on_progress: called with 1 for each candidate that was looked at closely.

    Returns:
        Pairs in ascending order.
    """
    if len(thumbs) < 2:
        return []
    candidates = [propose_by_print(thumbs)]
    if features is not None:
        candidates.append(propose_by_features(features))
    pairs = np.unique(np.concatenate(candidates), axis=0)  # (P, 2)
    rough = [
        (int(i), int(j), is_mirrored, placement)
        for is_mirrored in (False, True)
        for i, j, placement in _place(thumbs, pairs, is_mirrored)
    ]

    def look(k: int) -> CopyPair | None:
        try:
            return _confirm(thumbs, read, *rough[k])
        except ImageError:  # it could be read a moment ago
            return None

    found: dict[tuple[int, int], CopyPair] = {}
    for pair in map_ahead(look, len(rough), num_workers=num_workers):
        on_progress(1)
        if pair is not None:
            found[pair.members] = max(found.get(pair.members, pair), pair, key=lambda p: p.agreement)
    return [found[key] for key in sorted(found)]


def propose_by_print(thumbs: Thumbs) -> IntArray:
    """Pairs (P, 2) of photographs most like each other, or the other's mirror image, by fingerprint."""
    details = detail(shrink(thumbs, PRINT_PX))  # (N, s, s)
    straight, mirrored = (unit_rows(x.reshape(len(x), -1)) for x in (details, details[:, :, ::-1]))
    proposed = [nearest_pairs(straight, other, N_BY_PRINT) for other in (straight, mirrored)]
    return np.concatenate(proposed)


def propose_by_features(features: FloatArray) -> IntArray:
    """Pairs (P, 2) of photographs whose features (N, D) are nearest by angle."""
    scaled = features - features.mean(0)
    scaled /= np.maximum(scaled.std(0), 1e-6)
    if scaled.shape[1] > DIRECTIONS:
        rng = np.random.default_rng(0)
        scaled = scaled @ rng.standard_normal((scaled.shape[1], DIRECTIONS), dtype=np.float32)
    rows = unit_rows(scaled)
    return nearest_pairs(rows, rows, N_BY_FEATURES)


def unit_rows(rows: FloatArray) -> FloatArray:
    """Divide rows (N, D) by their length; what has none stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-9), dtype=np.float32)


def nearest_pairs(rows: FloatArray, others: FloatArray, k: int) -> IntArray:
    """Pair each of N unit rows (N, D) with the k others (N, D) of largest cosine, itself aside.

    Returns:
        (P, 2) positions, the smaller first, each pair once.
    """
    found = []
    for start in range(0, len(rows), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(rows)))
        cosines = rows[block] @ others.T  # (b, N)
        within = np.arange(len(block))
        cosines[within, block] = -np.inf
        for _ in range(min(k, len(rows) - 1)):  # few passes are quicker than sorting
            nearest = cosines.argmax(1)
            found.append(np.stack([block, nearest], axis=1))
            cosines[within, nearest] = -np.inf
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _place(thumbs: Thumbs, pairs: IntArray, is_mirrored: bool) -> list[tuple[int, int, NDArray[np.float32]]]:
    """Lay candidates on each other, and keep those whose details look alike: both, and the placement."""
    prints = shrink(thumbs, PRINT_PX)
    others = prints[:, :, ::-1] if is_mirrored else prints
    kept = []
    for start in range(0, len(pairs), BLOCK):
        i, j = pairs[start : start + BLOCK].T
        placements, correlation = place_coarsely(prints[i], others[j])
        alike = correlation >= COARSE
        kept += list(zip(i[alike], j[alike], placements[alike], strict=True))
    return kept


def _confirm(
    thumbs: Thumbs,
    read: Callable[[int], NDArray[np.uint8]],
    i: int,
    j: int,
    is_mirrored: bool,
    placement: NDArray[np.float32],
) -> CopyPair | None:
    """Decide by thumbs, then by pictures, whether a candidate is a copy."""
    pair = thumbs[[i, j]]
    for side_px in (THUMB_PX // 2, THUMB_PX):
        small = _turned(shrink(pair, side_px), is_mirrored)
        if (refined := refine(small[0], small[1], placement)) is None:
            return None
        placement = refined
        if outlines_agree(*small, placement) < FINER:
            return None
    pixels = read(i), read(j)
    close = _turned(np.stack([make_thumb(picture, CLOSE_PX) for picture in pixels]), is_mirrored)
    colours = _turned(np.stack([make_colour_thumb(picture, THUMB_PX) for picture in pixels]), is_mirrored)
    if (refined := refine(close[0], close[1], placement)) is None:
        return None
    if likeness(colours[0], colours[1], refined) < ALIKE:
        return None
    if (value := agreement(close[0], close[1], refined)) < AGREES:
        return None
    return CopyPair(
        first=i,
        second=j,
        agreement=value,
        is_mirrored=is_mirrored,
        is_same_pixels=not is_mirrored and np.array_equal(*pixels),
    )


def _turned(pair: NDArray[Any], is_mirrored: bool) -> tuple[FloatArray, FloatArray]:
    """Both pictures (…, h, w) of a pair (2, …, h, w), the second mirrored back."""
    first, second = pair.astype(np.float32)
    return first, second[..., ::-1] if is_mirrored else second


def form_sets(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Gather pairs into sets whose members are all copies of their first one.

    The photograph with most copies comes first. What is left of a chain forms sets of its own, so that every
    pair is in some set, and a photograph may be in several.
    """
    copies: dict[int, set[int]] = {}
    for i, j in pairs:
        copies.setdefault(i, set()).add(j)
        copies.setdefault(j, set()).add(i)
    left = {frozenset(pair) for pair in pairs}
    sets = []
    for centre in sorted(copies, key=lambda i: (-len(copies[i]), i)):
        members = sorted(j for j in copies[centre] if frozenset((centre, j)) in left)
        if not members:
            continue
        whole = (centre, *members)
        sets.append(whole)
        left -= {frozenset((a, b)) for a in whole for b in copies[a] if b in whole}
    return sets
