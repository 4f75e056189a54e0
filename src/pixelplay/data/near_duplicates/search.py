"""Thumbs and features → pairs of images that show the same pixels, and the sets they form.

Candidates come cheaply. What is a copy is decided by laying one picture on the other: it must agree in its
details, and better than look-alikes do. A pair is a pair by itself: two copies of a third need not be copies
of each other, and what only looks alike never chains.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelplay.arrays import BoolArray, Float32Array, IntArray, UInt8Array
from pixelplay.data.near_duplicates.alignment import (
    agreement,
    inverse,
    likeness,
    outlines_agree,
    place_coarsely,
    refine,
)
from pixelplay.data.near_duplicates.candidates import Candidates, propose
from pixelplay.data.near_duplicates.thumbnails import (
    PRINT_PX,
    THUMBNAIL_PX,
    darker_half,
    make_color_thumbnail,
    make_thumbnail,
    shrink,
)
from pixelplay.data.near_duplicates.verification import (
    differences,
    share_of_usual,
    tile_differences,
    usual_differences,
)
from pixelplay.errors import ImageError
from pixelplay.run_log import RunLog
from pixelplay.thread_pool import prefetch_map

COARSE, FINER = 0.75, 0.7  # correlation of details from which a candidate is looked at more closely
AGREES = 0.7  # agreement of the pictures
ALIKE = 0.75  # correlation of the colours
AT_ONCE = 256  # pairs
CLOSE_PX = 192  # side at which the decision is made
UNUSUAL, ROUGHLY_UNUSUAL = 0.2, 0.4  # of what look-alikes differ by, at full sight and by thumbs


@dataclass(frozen=True, kw_only=True)
class NearDuplicatePair:
    """Two images that show the same pixels.

    Attributes:
        first, second: positions, ascending.
        agreement: 0 to 1, of their details where one lies on the other.
        is_mirrored: whether one is the mirror image.
    """

    first: int
    second: int
    agreement: float
    is_mirrored: bool

    @property
    def members(self) -> tuple[int, int]:
        """Both positions."""
        return self.first, self.second


def search_near_duplicates(
    thumbnails: UInt8Array,
    read: Callable[[int], UInt8Array],
    features: Float32Array | None = None,
    *,
    has_mirrored: bool = True,
    num_workers: int | None = None,
    log: RunLog,
) -> list[NearDuplicatePair]:
    """Find images that were re-encoded, resized, cut, mirrored, brightened or watermarked.

    Args:
        thumbs: (N, S, S) uint8, of images whose files differ.
        read: gives the pixels (H, W, 3) of an image; it runs in threads.
        features: (N, D) finite; without them cut copies are rarely among the candidates.
        has_mirrored: mirror images are looked for too.

    Returns:
        Pairs in ascending order.
    """
    if len(thumbnails) < 2:
        return []
    candidates = propose(thumbnails, features, log)
    if not has_mirrored:
        candidates = candidates.select(~candidates.is_mirrored)
    placed = _place(thumbnails, candidates, log)
    usual = None
    if candidates.look_alikes.shape[1]:
        usual = usual_differences(thumbnails, candidates.look_alikes, np.unique(placed.members))
        placed = _which_stand_out(thumbnails, placed, usual)

    def look(k: int) -> tuple[_Seen, _Seen] | None:
        try:
            first, second = (_see(read(int(i))) for i in placed.members[k])
        except ImageError:  # it could be read a moment ago
            return None
        return first, second

    found: dict[tuple[int, int], NearDuplicatePair] = {}
    n = len(placed.members)
    with log.progress("comparing", n, "pairs that look alike") as bar:
        for k, seen in enumerate(prefetch_map(look, range(n), num_workers=num_workers)):
            bar.update()
            pair = None if seen is None else _confirm(placed.select([k]), *seen, usual)
            if pair is not None:
                found[pair.members] = max(found.get(pair.members, pair), pair, key=lambda p: p.agreement)
    return [found[key] for key in sorted(found)]


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """Pairs of images, and how the first of each lies on the second or on its mirror image.

    Attributes:
        members: (P, 2) positions.
        is_mirrored: (P,).
        placements: (P, 4).
    """

    members: IntArray
    is_mirrored: BoolArray
    placements: Float32Array

    def select(self, rows: NDArray[Any] | Sequence[int]) -> "_Placed":
        """Keep some of the pairs."""
        return _Placed(
            members=self.members[rows],
            is_mirrored=self.is_mirrored[rows],
            placements=self.placements[rows],
        )


def _place(thumbnails: UInt8Array, candidates: Candidates, log: RunLog) -> _Placed:
    """Lay candidates on each other, finer and finer, and keep those whose details go on agreeing."""
    n = len(candidates.pairs)
    placements, is_kept = np.zeros((n, 4), np.float32), np.zeros(n, bool)
    for what, is_dark in (("aligning", False), ("aligning dark parts", True)):
        # what a blown-out copy has lost leads the whole of it astray, from afar
        rows = np.flatnonzero(candidates.is_dark & ~is_kept) if is_dark else np.arange(n)
        if not len(rows):
            continue
        blocks = [rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE)]
        for block in log.follow(what, blocks, len(rows), "pairs"):
            i, j = candidates.pairs[block].T
            first, second = _turned(thumbnails[i], thumbnails[j], candidates.is_mirrored[block])
            if is_dark:
                first, second = darker_half(first), darker_half(second)
            placements[block], is_kept[block] = _place_block(first, second)
    every = _Placed(members=candidates.pairs, is_mirrored=candidates.is_mirrored, placements=placements)
    return every.select(is_kept)


def _place_block(first: Float32Array, second: Float32Array) -> tuple[Float32Array, BoolArray]:
    """Lay pictures (P, S, S) on others (P, S, S): placements (P, 4), and which go on agreeing (P,)."""
    found, correlation = place_coarsely(shrink(first, PRINT_PX), shrink(second, PRINT_PX))
    kept = np.flatnonzero(correlation >= COARSE)
    for side_px in (THUMBNAIL_PX // 2, THUMBNAIL_PX):
        a, b = shrink(first[kept], side_px), shrink(second[kept], side_px)
        found[kept] = refine(a, b, found[kept])
        agree = [
            bool(np.isfinite(placement).all()) and outlines_agree(x, y, placement) >= FINER
            for x, y, placement in zip(a, b, found[kept], strict=True)
        ]
        kept = kept[np.array(agree, bool)]
    is_kept = np.zeros(len(first), bool)
    is_kept[kept] = True
    return found, is_kept


def _which_stand_out(thumbnails: UInt8Array, placed: _Placed, usual: Float32Array) -> _Placed:
    """Keep the pairs that may be copies, as far as thumbs (N, S, S) tell."""
    shares = []
    for start in range(0, len(placed.members), AT_ONCE):
        block = placed.select(np.arange(start, min(start + AT_ONCE, len(placed.members))))
        i, j = block.members.T
        shares.append(
            _shares_of_usual(_turned(thumbnails[i], thumbnails[j], block.is_mirrored), block, usual)
        )
    return placed.select(np.concatenate([np.empty(0), *shares]) <= ROUGHLY_UNUSUAL)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """An image seen closely: grey (n, n) and colours (3, S, S), uint8."""

    grey: UInt8Array
    colours: UInt8Array


def _see(pixels: UInt8Array) -> _Seen:
    return _Seen(
        grey=make_thumbnail(pixels, CLOSE_PX),
        colours=make_color_thumbnail(pixels, THUMBNAIL_PX),
    )


def _confirm(
    placed: _Placed, first: _Seen, second: _Seen, usual: Float32Array | None
) -> NearDuplicatePair | None:
    """Decide whether one candidate is a copy."""
    is_mirrored = bool(placed.is_mirrored[0])
    close = _turned(first.grey, second.grey, is_mirrored)
    pictures = close[0][None], close[1][None]
    exact = refine(*pictures, placed.placements)
    if not np.isfinite(exact).all():
        return None
    if likeness(*_turned(first.colours, second.colours, is_mirrored), exact[0]) < ALIKE:
        return None
    if (value := agreement(*close, exact[0])) < AGREES:
        return None
    if usual is not None:
        shares = _shares_of_usual(pictures, replace(placed, placements=exact), usual)
        if shares[0] > UNUSUAL:
            return None
    i, j = placed.members[0]
    return NearDuplicatePair(first=int(i), second=int(j), agreement=value, is_mirrored=is_mirrored)


def _shares_of_usual(
    pictures: tuple[Float32Array, Float32Array], placed: _Placed, usual: Float32Array
) -> Float32Array:
    """How much pictures (P, n, n) differ, of what either of a pair does from its look-alikes: the larger."""
    first, second = pictures
    i, j = placed.members.T
    there = tile_differences(differences(first, second, placed.placements))
    back = tile_differences(differences(second, first, inverse(placed.placements)))
    turned = np.where(placed.is_mirrored[:, None, None], usual[j][..., ::-1], usual[j])
    return np.maximum(share_of_usual(there, usual[i]), share_of_usual(back, turned))


def _turned(
    first: NDArray[Any], second: NDArray[Any], is_mirrored: bool | BoolArray
) -> tuple[Float32Array, Float32Array]:
    """Both pictures (…, h, w) of a pair, or of pairs (P, h, w), the second mirrored back."""
    first, second = first.astype(np.float32), second.astype(np.float32)
    turned = np.where(np.asarray(is_mirrored)[..., None, None], second[..., ::-1], second)
    return first, turned


def connected_sets(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Gather pairs into sets whose members are all copies of their first one.

    The image with most copies comes first. What is left of a chain forms sets of its own, so that every
    pair is in some set, and an image may be in several.
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
