"""Small grey pictures → whether they differ by less than pictures that merely look alike do.

Cells of one production line, lids of one brand: all of a picture may agree with another one's and still be
usual. A copy differs from its original by less than a fifth of what look-alikes differ by.
"""

import numpy as np

from pixelplay.arrays import BoolArray, Float32Array, IntArray, UInt8Array
from pixelplay.data.near_duplicates.alignment import TILE_FRAC, lay, refine
from pixelplay.data.near_duplicates.thumbnails import THUMBNAIL_PX, shrink

UPRIGHT = np.array([1, 0, 1, 0], np.float32)
DARK, BRIGHT = 5, 245  # grey levels: what is outside may have been cut off by a change of brightness
ENOUGH_TILES = 16  # of all, to judge a picture by
N_FITS, OUTLIER = 3, 3.0  # fits of brightness, each without what differs by so many median differences
AT_ONCE = 256  # pictures


def differences(first: Float32Array, second: Float32Array, placements: Float32Array) -> Float32Array:
    """Lay pictures (P, n, n) on others, brightness and contrast fitted, and subtract.

    Returns:
        (P, n, n) grey levels; NaN outside of the overlap and, where that leaves enough tiles to judge by,
        where either is too dark or bright to tell.
    """
    laid, known = lay(first, second, placements)
    clear = known & (first > DARK) & (first < BRIGHT) & (laid > DARK) & (laid < BRIGHT)
    is_clear = (_known_tiles(clear).sum((1, 2)) >= ENOUGH_TILES)[:, None, None]
    known = np.where(is_clear, clear, known)
    is_fit = clear.sum((1, 2), keepdims=True) >= (first.shape[-1] // TILE_FRAC) ** 2  # a tile's worth
    fitted = used = np.where(is_fit, clear, known)  # white tells no contrast
    left = first - laid
    for _ in range(N_FITS):  # a watermark does not count
        n_used = np.maximum(used.sum((1, 2), keepdims=True), 1)
        mean_laid, mean_first = (
            np.where(used, x, 0).sum((1, 2), keepdims=True) / n_used for x in (laid, first)
        )
        centred = np.where(used, laid - mean_laid, 0)
        spread = np.square(centred).sum((1, 2), keepdims=True)
        gradient = (centred * first).sum((1, 2), keepdims=True) / np.maximum(spread, 1e-6)
        gain = np.where(spread > n_used, gradient, 1)  # what is flat tells none either
        left = first - mean_first - gain * (laid - mean_laid)
        size = np.where(fitted, np.abs(left), np.inf)
        used = fitted & (size <= OUTLIER * _median(size.reshape(len(size), -1))[:, None, None])
    return np.where(known, left, np.nan).astype(np.float32)


def _known_tiles(known: BoolArray) -> BoolArray:
    """Tiles (P, t, t) known by half: a pixel of a thumb is known where all its pixels (P, n, n) are."""
    n, side = len(known), THUMBNAIL_PX // TILE_FRAC
    step = known.shape[-1] // THUMBNAIL_PX
    whole = known.reshape(n, THUMBNAIL_PX, step, THUMBNAIL_PX, step).all((2, 4))
    share = whole.reshape(n, TILE_FRAC, side, TILE_FRAC, side).mean((2, 4))
    return np.asarray(share >= 0.5)


def tile_differences(left: Float32Array) -> Float32Array:
    """Root mean square of differences (P, n, n) in tiles (P, t, t); NaN where less than half of one is known.

    Taken at the sharpness of thumbs: a JPEG's noise is averaged out.
    """
    n, side = len(left), THUMBNAIL_PX // TILE_FRAC
    step = left.shape[-1] // THUMBNAIL_PX
    is_known = _known_tiles(np.isfinite(left))
    left = left.reshape(n, THUMBNAIL_PX, step, THUMBNAIL_PX, step).mean((2, 4))
    tiles = (
        left.reshape(n, TILE_FRAC, side, TILE_FRAC, side).swapaxes(2, 3).reshape(n, TILE_FRAC, TILE_FRAC, -1)
    )
    known = np.isfinite(tiles)
    square = np.where(known, np.square(tiles), 0).sum(-1) / np.maximum(known.sum(-1), 1)
    return np.where(is_known, np.sqrt(square), np.nan).astype(np.float32)


def usual_differences(thumbnails: UInt8Array, look_alikes: IntArray, rows: IntArray) -> Float32Array:
    """What thumbs (N, S, S) differ by from their look-alikes (N, R), the median in each tile.

    Returns:
        (N, t, t) grey levels, NaN but for the rows asked for.
    """
    n_each = look_alikes.shape[1]
    usual = np.full((len(thumbnails), TILE_FRAC, TILE_FRAC), np.nan, np.float32)
    for start in range(0, len(rows), AT_ONCE // n_each):
        block = rows[start : start + AT_ONCE // n_each]
        first = np.repeat(thumbnails[block], n_each, axis=0)
        second = thumbnails[look_alikes[block].ravel()]
        upright = np.repeat(UPRIGHT[None], len(first), axis=0)
        placements = refine(
            shrink(first, THUMBNAIL_PX // 2), shrink(second, THUMBNAIL_PX // 2), upright, n_steps=4
        )
        placements = np.where(np.isfinite(placements), placements, upright)
        found = differences(first.astype(np.float32), second.astype(np.float32), placements)
        tiles = tile_differences(found).reshape(len(block), n_each, TILE_FRAC, TILE_FRAC)
        usual[block] = _median(np.moveaxis(tiles, 1, -1))
    return usual


def share_of_usual(found: Float32Array, usual: Float32Array) -> Float32Array:
    """Median of found over usual differences (P, t, t), in the half of tiles where look-alikes differ most.

    Returns:
        (P,) 0 or more; 1 is as usual; infinite where too little is known.
    """
    shape = len(found), TILE_FRAC * TILE_FRAC
    found, usual = found.reshape(shape), usual.reshape(shape)
    known = np.isfinite(found) & np.isfinite(usual)
    tells = known & (usual >= _median(np.where(known, usual, np.inf))[:, None])
    share = _median(np.where(tells, found / np.maximum(usual, 1e-6), np.inf))
    return np.where(known.sum(1) < ENOUGH_TILES, np.inf, share).astype(np.float32)


def _median(values: Float32Array) -> Float32Array:
    """The lower median along the last axis of what is finite; not finite where nothing is."""
    ordered = np.sort(values, axis=-1)  # what is not finite last
    middle = np.maximum(np.isfinite(values).sum(-1) - 1, 0) // 2
    return np.asarray(np.take_along_axis(ordered, middle[..., None], -1)[..., 0])
