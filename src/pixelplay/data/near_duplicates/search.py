"""Find near-duplicates: pairs of images that show the same pixels, and the sets they form.

Candidates are cheap to find. Each is then decided by aligning both images: they must agree in detail, and
better than similar, but different, images do.

On TrashNet the search finds 0.998 of planted near-duplicates at a precision of 0.93. At the same precision,
64-bit perceptual hashes and cosine similarity of the backbone's features, alone or combined, find at most
0.75; at the same recall at most 0.43 of their pairs are right (benchmarks/near_duplicates.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixelplay.array_types import BoolArray, Float32Array, UInt8Array
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
    make_thumbnail,
    shrink,
)
from pixelplay.data.near_duplicates.verification import (
    differences,
    relative_difference,
    tile_differences,
    typical_differences,
)
from pixelplay.errors import ImageError
from pixelplay.run_log import RunLog
from pixelplay.thread_pool import prefetch_map

MIN_COARSE_CORRELATION, MIN_FINE_CORRELATION = 0.75, 0.7  # of thumbnails, to stay a candidate
MIN_AGREEMENT = 0.7
MIN_COLOR_CORRELATION = 0.75
BLOCK_PAIRS = 256  # pairs per block
CLOSE_PX = 192  # side at which candidates are decided
# relative to the difference of similar images, at CLOSE_PX and by thumbnails
MAX_RELATIVE_DIFFERENCE, ROUGH_MAX_RELATIVE_DIFFERENCE = 0.2, 0.4
Closeup = tuple[UInt8Array, UInt8Array]  # grey (n, n) and colour (3, S, S)


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
    alignments, is_aligned = _align(thumbnails, candidates, log)
    candidates, alignments = candidates.select(is_aligned), alignments[is_aligned]
    typical = None
    if candidates.neighbors.shape[1]:
        typical = typical_differences(thumbnails, candidates.neighbors, np.unique(candidates.pairs))
        is_close = _find_close_pairs(thumbnails, candidates, alignments, typical)
        candidates, alignments = candidates.select(is_close), alignments[is_close]

    def load(k: int) -> tuple[Closeup, Closeup] | None:
        try:
            pair = [read(int(i)) for i in candidates.pairs[k]]
        except ImageError:  # it has become unreadable
            return None
        first, second = ((make_thumbnail(x, CLOSE_PX), make_color_thumbnail(x, THUMBNAIL_PX)) for x in pair)
        return first, second

    found: dict[tuple[int, int], NearDuplicatePair] = {}
    n = len(alignments)
    with log.progress("comparing", n, "similar pairs") as bar:
        for k, closeups in enumerate(prefetch_map(load, range(n), num_workers=num_workers)):
            bar.update()
            if closeups is None:
                continue
            pair = _verify(candidates.select([k]), alignments[[k]], *closeups, typical)
            if pair is not None:
                found[pair.members] = max(found.get(pair.members, pair), pair, key=lambda p: p.agreement)
    return [found[key] for key in sorted(found)]


def _align(thumbnails: UInt8Array, candidates: Candidates, log: RunLog) -> tuple[Float32Array, BoolArray]:
    """Align candidates: alignments (P, 4), and a mask (P,) of those that agree at every resolution."""
    n = len(candidates.pairs)
    alignments, is_kept = np.zeros((n, 4), np.float32), np.zeros(n, bool)
    for what, is_dark in (("aligning", False), ("aligning dark regions", True)):
        # clipped highlights mislead the coarse alignment of whole images
        rows = np.flatnonzero(candidates.is_dark & ~is_kept) if is_dark else np.arange(n)
        if not len(rows):
            continue
        with log.progress(what, len(rows), "pairs") as bar:
            for block in np.array_split(rows, range(BLOCK_PAIRS, len(rows), BLOCK_PAIRS)):
                i, j = candidates.pairs[block].T
                images = _unmirror(thumbnails[i], thumbnails[j], candidates.is_mirrored[block])
                found = _align_block(*map(darker_half, images) if is_dark else images)
                alignments[block], is_kept[block] = found
                bar.update(len(block))
    return alignments, is_kept


def _align_block(first: Float32Array, second: Float32Array) -> tuple[Float32Array, BoolArray]:
    """Align images (P, S, S) with others: alignments (P, 4), and a mask (P,) of those that agree."""
    found, correlation = align_coarsely(shrink(first, FINGERPRINT_PX), shrink(second, FINGERPRINT_PX))
    kept = np.flatnonzero(correlation >= MIN_COARSE_CORRELATION)
    for side_px in (THUMBNAIL_PX // 2, THUMBNAIL_PX):
        a, b = shrink(first[kept], side_px), shrink(second[kept], side_px)
        found[kept] = refine(a, b, found[kept])
        agree = [
            np.isfinite(alignment).all() and overlap_correlation(x, y, alignment) >= MIN_FINE_CORRELATION
            for x, y, alignment in zip(a, b, found[kept], strict=True)
        ]
        kept = kept[np.array(agree, bool)]
    is_kept = np.zeros(len(first), bool)
    is_kept[kept] = True
    return found, is_kept


def _find_close_pairs(
    thumbnails: UInt8Array, candidates: Candidates, alignments: Float32Array, typical: Float32Array
) -> BoolArray:
    """Find the pairs (P,) whose thumbnails (N, S, S) differ by less than different images do."""
    is_close = np.zeros(len(alignments), bool)
    for start in range(0, len(alignments), BLOCK_PAIRS):
        rows = slice(start, start + BLOCK_PAIRS)
        block = candidates.select(rows)
        i, j = block.pairs.T
        images = _unmirror(thumbnails[i], thumbnails[j], block.is_mirrored)
        ratios = _relative_differences(images, block, alignments[rows], typical)
        is_close[rows] = ratios <= ROUGH_MAX_RELATIVE_DIFFERENCE
    return is_close


def _verify(
    candidate: Candidates,
    alignment: Float32Array,
    first: Closeup,
    second: Closeup,
    typical: Float32Array | None,
) -> NearDuplicatePair | None:
    """Return a single candidate with its alignment (1, 4) if it is a near-duplicate."""
    is_mirrored = bool(candidate.is_mirrored[0])
    close = _unmirror(first[0], second[0], is_mirrored)
    images = close[0][None], close[1][None]
    exact = refine(*images, alignment)
    if not np.isfinite(exact).all():
        return None
    if color_correlation(*_unmirror(first[1], second[1], is_mirrored), exact[0]) < MIN_COLOR_CORRELATION:
        return None
    if (value := agreement(*close, exact[0])) < MIN_AGREEMENT:
        return None
    if typical is not None and (
        _relative_differences(images, candidate, exact, typical)[0] > MAX_RELATIVE_DIFFERENCE
    ):
        return None
    i, j = candidate.pairs[0]
    return NearDuplicatePair(first=int(i), second=int(j), agreement=value, is_mirrored=is_mirrored)


def _relative_differences(
    images: tuple[Float32Array, Float32Array],
    candidates: Candidates,
    alignments: Float32Array,
    typical: Float32Array,
) -> Float32Array:
    """Divide the difference of images (P, n, n) by the typical ones of both; the larger ratio (P,)."""
    first, second = images
    i, j = candidates.pairs.T
    forward = tile_differences(differences(first, second, alignments))
    backward = tile_differences(differences(second, first, invert(alignments)))
    unmirrored = np.where(candidates.is_mirrored[:, None, None], typical[j][..., ::-1], typical[j])
    return np.maximum(relative_difference(forward, typical[i]), relative_difference(backward, unmirrored))


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
