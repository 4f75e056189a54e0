"""Measure whether two images differ by less than similar, but different, images do.

Solar cells of one production line agree in nearly everything without being duplicates. Near-duplicates differ
by less than a fifth of what such images differ by.
"""

from dataclasses import dataclass

import numpy as np

from pixelplay.array_types import BoolArray, Float32Array, IntArray, UInt8Array
from pixelplay.data.near_duplicates.alignment import N_TILES, refine, warp
from pixelplay.data.near_duplicates.thumbnails import THUMBNAIL_PX, blocks, shrink

IDENTITY = np.array([1, 0, 1, 0], np.float32)
DARK, BRIGHT = 5, 245  # grey levels: a change of brightness may have clipped values outside
MIN_KNOWN_TILES = 16  # to compare images by
N_FITS, OUTLIER = 3, 3.0  # fits of brightness; pixels with more than OUTLIER median differences are left out
FIT_STEP = 2  # every second pixel along both sides fits the brightness


def differences(first: Float32Array, second: Float32Array, alignments: Float32Array) -> Float32Array:
    """Subtract aligned images (P, n, n) after fitting brightness and contrast.

    Returns:
        (P, n, n) grey levels; NaN outside the overlap and, if that leaves enough tiles, where either image
        may be clipped.
    """
    warped, known = warp(first, second, alignments)
    clear = known & (first > DARK) & (first < BRIGHT) & (warped > DARK) & (warped < BRIGHT)
    is_clear = (_known_tiles(clear).sum((1, 2)) >= MIN_KNOWN_TILES)[:, None, None]
    known = np.where(is_clear, clear, known)
    is_fit = clear.sum((1, 2), keepdims=True) >= (first.shape[-1] // N_TILES) ** 2  # a tile's worth
    is_fitted = np.where(is_fit, clear, known)  # clipped pixels would distort the contrast
    sampled = np.s_[:, ::FIT_STEP, ::FIT_STEP]
    gain, offset = _fit_brightness(first[sampled], warped[sampled], is_fitted[sampled])
    return np.where(known, first - gain * warped - offset, np.nan).astype(np.float32)


def _fit_brightness(
    first: Float32Array, second: Float32Array, is_fitted: BoolArray
) -> tuple[Float32Array, Float32Array]:
    """Fit first = gain * second + offset over some pixels (P, n, n); gain and offset are (P, 1, 1)."""
    is_used, axes = is_fitted, (1, 2)
    for _ in range(N_FITS):  # robust regression: watermarks drop out as outliers
        n_used = np.maximum(is_used.sum(axes, keepdims=True), 1)
        mean_first, mean_second = (
            np.where(is_used, x, 0).sum(axes, keepdims=True) / n_used for x in (first, second)
        )
        centred = np.where(is_used, second - mean_second, 0)
        spread = np.square(centred).sum(axes, keepdims=True)
        contrast = (centred * first).sum(axes, keepdims=True) / np.maximum(spread, 1e-6)
        gain = np.where(spread > n_used, contrast, 1)  # flat images do not determine the contrast
        offset = mean_first - gain * mean_second
        size = np.where(is_fitted, np.abs(first - gain * second - offset), np.inf)
        is_used = is_fitted & (size <= OUTLIER * _median(size.reshape(len(size), -1))[:, None, None])
    return gain, offset


def _known_tiles(known: BoolArray) -> BoolArray:
    """Find tiles (P, t, t) of which at least half the thumbnail pixels are known in full from (P, n, n)."""
    is_whole = np.asarray(blocks(known, THUMBNAIL_PX).all((2, 4)))
    return np.asarray(blocks(is_whole, N_TILES).mean((2, 4)) >= 0.5)


def tile_differences(left: Float32Array) -> Float32Array:
    """Compute the root mean square of differences (P, n, n) per tile (P, t, t); NaN if under half is known.

    Differences are averaged to thumbnail pixels first, which removes JPEG noise.
    """
    is_known = _known_tiles(np.isfinite(left))
    tiles = blocks(blocks(left, THUMBNAIL_PX).mean((2, 4)), N_TILES)
    tiles = tiles.swapaxes(2, 3).reshape(*is_known.shape, -1)  # (P, t, t, pixels)
    known = np.isfinite(tiles)
    square = np.where(known, np.square(tiles), 0).sum(-1) / np.maximum(known.sum(-1), 1)
    return np.where(is_known, np.sqrt(square), np.nan).astype(np.float32)


@dataclass(frozen=True)
class TypicalDifferences:
    """By how much images differ from similar ones that are no duplicates, in each tile."""

    images: IntArray  # (R,) positions in the dataset, ascending
    values: Float32Array  # (R, t, t) grey levels

    @classmethod
    def measure(cls, thumbnails: UInt8Array, neighbors: IntArray, pairs: IntArray) -> "TypicalDifferences":
        """Compute the median difference of the images in pairs (P, 2) from their neighbors.

        Args:
            thumbnails: (N, S, S).
            neighbors: (N, R) positions of similar images.
        """
        images, n_each = np.unique(pairs), neighbors.shape[1]
        first = np.repeat(thumbnails[images], n_each, axis=0)
        second = thumbnails[neighbors[images].ravel()]
        upright = np.repeat(IDENTITY[None], len(first), axis=0)
        a, b = (shrink(x, THUMBNAIL_PX // 2) for x in (first, second))
        alignments = refine(a, b, upright, n_steps=2)
        alignments = np.where(np.isfinite(alignments), alignments, upright)
        found = differences(first.astype(np.float32), second.astype(np.float32), alignments)
        tiles = tile_differences(found).reshape(len(images), n_each, N_TILES, N_TILES)
        return cls(images, _median(np.moveaxis(tiles, 1, -1)))

    def of(self, images: IntArray) -> Float32Array:
        """Return the differences (n, t, t) of some of the images (n,)."""
        return self.values[np.searchsorted(self.images, images)]


def relative_difference(found: Float32Array, typical: Float32Array) -> Float32Array:
    """Divide found by typical differences (P, t, t) in the half of tiles where neighbors differ most.

    Returns:
        (P,) medians >= 0; 1 is typical of different images; infinite if too few tiles are known.
    """
    shape = len(found), N_TILES * N_TILES
    found, typical = found.reshape(shape), typical.reshape(shape)
    known = np.isfinite(found) & np.isfinite(typical)
    is_used = known & (typical >= _median(np.where(known, typical, np.inf))[:, None])
    ratio = _median(np.where(is_used, found / np.maximum(typical, 1e-6), np.inf))
    return np.where(known.sum(1) < MIN_KNOWN_TILES, np.inf, ratio).astype(np.float32)


def _median(values: Float32Array) -> Float32Array:
    """Compute the lower median of the finite values along the last axis; not finite if there are none."""
    ordered = np.sort(values, axis=-1)  # finite values first
    middle = np.maximum(np.isfinite(values).sum(-1) - 1, 0) // 2
    return np.asarray(np.take_along_axis(ordered, middle[..., None], -1)[..., 0])
