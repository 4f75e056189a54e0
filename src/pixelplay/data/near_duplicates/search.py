"""Find near-duplicates: pairs of images that show the same pixels, and the sets they form.

Candidates are cheap to find. Each is then decided by aligning both images: they must agree in detail, and
better than similar, but different, images do.

On TrashNet the search finds 0.993 of planted near-duplicates at a precision of 0.93. At the same precision,
64-bit perceptual hashes and cosine similarity of the backbone's features, alone or combined, find at most
0.75; at the same recall at most 0.43 of their pairs are right (benchmarks/near_duplicates.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits

from pixelplay.array_types import BoolArray, Float32Array, IntArray, UInt8Array
from pixelplay.data.near_duplicates.alignment import (
    agreement,
    align_coarsely,
    color_correlation,
    invert,
    overlap_correlation,
    refine,
)
from pixelplay.data.near_duplicates.candidates import Candidates, find_candidates
from pixelplay.data.near_duplicates.thumbnails import (
    FINGERPRINT_PX,
    THUMBNAIL_PX,
    darker_half,
    make_color_thumbnail,
    shrink,
)
from pixelplay.data.near_duplicates.verification import (
    TypicalDifferences,
    differences,
    relative_difference,
    tile_differences,
)
from pixelplay.errors import ImageError
from pixelplay.run_log import RunLog
from pixelplay.thread_pool import prefetch_map

SEARCH_VERSION = 1  # part of cache keys: increase it when the same images give other pairs
MIN_COARSE_CORRELATION, MIN_FINE_CORRELATION = 0.75, 0.7  # of thumbnails, to stay a candidate
FINE_STEPS = 4  # at most, of the alignment at a resolution that starts from a coarser one
MIN_AGREEMENT = 0.7
MIN_COLOR_CORRELATION = 0.8  # planted duplicates of solar cells have at least 0.84, in TrashNet 0.89
CLOSE_PX = 128  # side at which candidates are decided
MAX_CLOSEUPS = 1024  # images kept at CLOSE_PX, 49 kB each
COLOR_STEP = 2  # pixels averaged along both sides to compare colours
BLOCK_PAIRS = 64  # pairs compared together
N_AHEAD = 4  # blocks compared in advance
# The most similar pairs come first. Where everything looks alike there are many pairs, but few duplicates:
# the search ends after so many blocks with a smaller share of them.
MIN_YIELD, MAX_BARREN_BLOCKS = 0.03, 3
# relative to the difference of similar images, at CLOSE_PX and by thumbnails
MAX_RELATIVE_DIFFERENCE, ROUGH_MAX_RELATIVE_DIFFERENCE = 0.2, 0.4


@dataclass(frozen=True, kw_only=True)
class NearDuplicatePair:
    """Two images that show the same pixels, by ascending position."""

    first: int
    second: int
    agreement: float  # of their aligned details, 0 to 1
    is_mirrored: bool  # one shows the mirror image of the other

    @property
    def members(self) -> tuple[int, int]:
        """Return both positions."""
        return self.first, self.second

    def to_row(self) -> tuple[float, ...]:
        """Return the attributes as numbers, for the cache."""
        return self.first, self.second, self.agreement, self.is_mirrored

    @classmethod
    def from_row(cls, row: NDArray[Any]) -> "NearDuplicatePair":
        """Make a pair from the numbers of `to_row` (4,)."""
        first, second, agreement, is_mirrored = row.tolist()
        return cls(first=int(first), second=int(second), agreement=agreement, is_mirrored=bool(is_mirrored))


def search_near_duplicates(
    thumbnails: UInt8Array,
    read: Callable[[int], UInt8Array],
    features: Float32Array | None = None,
    *,
    mirrored: bool = True,
    num_workers: int | None = None,
    log: RunLog,
) -> list[NearDuplicatePair]:
    """Find images that were re-encoded, resized, cropped, mirrored, brightened or watermarked.

    Args:
        thumbnails: (N, S, S) uint8, of files with different content.
        read: returns the pixels (H, W, 3) of an image; called in threads.
        features: (N, D) finite; without them cropped duplicates are rarely found.
        mirrored: also find mirror images.

    Returns:
        Pairs in ascending order.
    """
    if len(thumbnails) < 2:
        return []
    candidates = find_candidates(thumbnails, features, log)
    if not mirrored:
        candidates = candidates.select(~candidates.is_mirrored)
    n = len(candidates.pairs)
    blocks = np.array_split(np.argsort(candidates.ratio, kind="stable"), max(1, round(n / BLOCK_PAIRS)))
    found: dict[tuple[int, int], NearDuplicatePair] = {}
    n_compared = n_barren = 0

    @lru_cache(maxsize=MAX_CLOSEUPS)
    def close_up(i: int) -> Image.Image:
        return make_color_thumbnail(read(i), CLOSE_PX)

    def compare(rows: IntArray) -> list[NearDuplicatePair]:
        return _compare_block(thumbnails, close_up, candidates.select(rows))

    # each thread computes alone: the threads of BLAS would wait for each other
    with log.progress("comparing", n, "similar pairs") as bar, threadpool_limits(1, user_api="blas"):
        each = prefetch_map(compare, blocks, num_workers=num_workers, ahead=N_AHEAD)
        for rows, pairs in zip(blocks, each, strict=False):  # may end early
            for pair in pairs:
                found[pair.members] = max(found.get(pair.members, pair), pair, key=lambda p: p.agreement)
            n_compared += len(rows)
            bar.update(len(rows))
            n_barren = 0 if len(pairs) >= MIN_YIELD * len(rows) else n_barren + 1
            if n_barren == MAX_BARREN_BLOCKS:
                break
    if n > n_compared:
        log.note(
            f"near-duplicates: compared the {n_compared:,} most similar pairs of images; the last ones were "
            f"no duplicates, so {n - n_compared:,} less similar pairs were not compared"
        )
    return [found[key] for key in sorted(found)]


def _compare_block(
    thumbnails: UInt8Array, close_up: Callable[[int], Image.Image], candidates: Candidates
) -> list[NearDuplicatePair]:
    """Return the candidates that are near-duplicates; an image that has become unreadable has none."""
    first, second = candidates.pairs.T
    images = _unmirror(thumbnails[first], thumbnails[second], candidates.is_mirrored)
    alignments, is_kept = _align_block(*images)
    # clipped highlights mislead the coarse alignment of whole images
    dark = np.flatnonzero(candidates.is_dark & ~is_kept)
    if len(dark):
        alignments[dark], is_kept[dark] = _align_block(*(darker_half(x[dark]) for x in images))
    typical = None
    if candidates.neighbors.shape[1] and is_kept.any():
        typical = TypicalDifferences.measure(thumbnails, candidates.neighbors, candidates.pairs[is_kept])
        aligned = images[0][is_kept], images[1][is_kept]
        ratio = _relative_differences(aligned, candidates.select(is_kept), alignments[is_kept], typical)
        is_kept[is_kept] = ratio <= ROUGH_MAX_RELATIVE_DIFFERENCE
    kept, closeups = [], []
    for k in np.flatnonzero(is_kept).tolist():
        try:
            i, j = candidates.pairs[k].tolist()
            closeups.append((close_up(i), close_up(j)))
        except ImageError:
            continue
        kept.append(k)
    return _verify(candidates.select(kept), alignments[kept], closeups, typical) if kept else []


def _align_block(first: Float32Array, second: Float32Array) -> tuple[Float32Array, BoolArray]:
    """Align images (P, S, S) with others: alignments (P, 4), and a mask (P,) of those that agree."""
    found, correlation = align_coarsely(shrink(first, FINGERPRINT_PX), shrink(second, FINGERPRINT_PX))
    kept = np.flatnonzero(correlation >= MIN_COARSE_CORRELATION)
    for side_px, n_steps in ((THUMBNAIL_PX // 2, 8), (THUMBNAIL_PX, FINE_STEPS)):
        a, b = shrink(first[kept], side_px), shrink(second[kept], side_px)
        found[kept] = refine(a, b, found[kept], n_steps)
        is_found = np.isfinite(found[kept]).all(1)
        a, b, kept = a[is_found], b[is_found], kept[is_found]
        kept = kept[overlap_correlation(a, b, found[kept]) >= MIN_FINE_CORRELATION]
    is_kept = np.zeros(len(first), bool)
    is_kept[kept] = True
    return found, is_kept


def _verify(
    candidates: Candidates,
    alignments: Float32Array,
    closeups: Sequence[tuple[Image.Image, Image.Image]],
    typical: TypicalDifferences | None,
) -> list[NearDuplicatePair]:
    """Return the near-duplicates among candidates with alignments (P, 4), by their squashed images."""
    first, second = (
        np.stack([np.asarray(x.convert("L")) for x in each]) for each in zip(*closeups, strict=True)
    )
    images = _unmirror(first, second, candidates.is_mirrored)  # (P, n, n) each
    exact = refine(*images, alignments, FINE_STEPS)
    is_duplicate = np.asarray(np.isfinite(exact).all(1))
    if typical is not None:
        rows = np.flatnonzero(is_duplicate)
        kept = images[0][rows], images[1][rows]
        ratio = _relative_differences(kept, candidates.select(rows), exact[rows], typical)
        is_duplicate[rows] = ratio <= MAX_RELATIVE_DIFFERENCE
    found = []
    for k in np.flatnonzero(is_duplicate).tolist():
        is_mirrored, (i, j) = bool(candidates.is_mirrored[k]), candidates.pairs[k]
        value = agreement(images[0][k], images[1][k], exact[k])
        a, b = (np.asarray(x.reduce(COLOR_STEP)).transpose(2, 0, 1) for x in closeups[k])  # (3, m, m)
        same_color = color_correlation(*_unmirror(a, b, is_mirrored), exact[k]) >= MIN_COLOR_CORRELATION
        if value >= MIN_AGREEMENT and same_color:
            pair = NearDuplicatePair(first=int(i), second=int(j), agreement=value, is_mirrored=is_mirrored)
            found.append(pair)
    return found


def _relative_differences(
    images: tuple[Float32Array, Float32Array],
    candidates: Candidates,
    alignments: Float32Array,
    typical: TypicalDifferences,
) -> Float32Array:
    """Divide the difference of aligned images (P, n, n) by the larger of their typical ones: ratios (P,)."""
    first, second = images
    typical_first, typical_second = (typical.of(images) for images in candidates.pairs.T)
    forward = tile_differences(differences(first, second, alignments))
    backward = tile_differences(differences(second, first, invert(alignments)))
    unmirrored = np.where(candidates.is_mirrored[:, None, None], typical_second[..., ::-1], typical_second)
    return np.maximum(relative_difference(forward, typical_first), relative_difference(backward, unmirrored))


def _unmirror(
    first: NDArray[Any], second: NDArray[Any], is_mirrored: bool | BoolArray
) -> tuple[Float32Array, Float32Array]:
    """Return both images (…, h, w) of a pair, or of pairs (P, h, w), the second flipped if mirrored."""
    first, second = first.astype(np.float32), second.astype(np.float32)
    return first, np.where(np.asarray(is_mirrored)[..., None, None], second[..., ::-1], second)


def connected_sets(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Combine pairs into sets whose members are all duplicates of the first one.

    The image with the most duplicates comes first. The rest of a chain forms further sets, so that every
    pair is in some set and an image can be in several.
    """
    duplicates: dict[int, set[int]] = {}
    for i, j in pairs:
        duplicates.setdefault(i, set()).add(j)
        duplicates.setdefault(j, set()).add(i)
    left = {frozenset(pair) for pair in pairs}
    sets = []
    for centre in sorted(duplicates, key=lambda i: (-len(duplicates[i]), i)):
        members = sorted(j for j in duplicates[centre] if frozenset((centre, j)) in left)
        if members:
            sets.append((centre, *members))
            left -= {frozenset((a, b)) for a in sets[-1] for b in duplicates[a] if b in sets[-1]}
    return sets
