"""Align two small grey images, and measure whether both show the same pixels.

An alignment (4,) is scale and shift along y, then along x: the point u of the first image, in fractions of
its side, lies at scale·u + shift in the second. Cropping, resizing and squashing cause such a transform;
mirrored images are flipped back by the caller.
"""

from functools import cache
from itertools import product

import numpy as np

from pixelplay.array_types import BoolArray, Float32Array

# Side of a crop in fractions of the image: starting points of the search. Sizes in between are reached from
# the nearest one; much smaller crops are not searched for.
CROP_SIDES = (0.9, 0.78)
CROP_STEP = 0.11  # between two crop positions, in fractions of a side: `refine` converges from half of it
MIN_OVERLAP = 0.5  # in fractions of either side
SAMPLES = 32  # pixels along a side that an alignment is refined by, evenly spaced
ALL = slice(None)
MAX_STEP = 0.05  # largest change of an alignment in one step
MIN_STD = 0.3  # grey levels: an image or tile that varies less has no content
N_TILES = 16  # along a side
MIN_TILE_STD = 1.0  # grey levels: above JPEG noise
MIN_TILES = 12  # with content


def remove_line_means(images: Float32Array) -> Float32Array:
    """Subtract the means of rows and columns from images (…, h, w): frames or horizons are often alike."""
    centred = images - images.mean(-1, keepdims=True)
    return np.asarray(centred - centred.mean(-2, keepdims=True), dtype=np.float32)


def correlate(first: Float32Array, second: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Correlate images (…, h, w) after removing row and column means.

    Returns:
        Correlation (…,), 0 if either image is flat, and the smaller standard deviation (…,) in grey levels.
    """
    a, b = remove_line_means(first), remove_line_means(second)
    spread_a, spread_b = (np.sqrt(np.square(x).mean((-2, -1))) for x in (a, b))
    product_ = (a * b).mean((-2, -1))
    spread = np.minimum(spread_a, spread_b)
    correlation = np.where(spread >= MIN_STD, product_ / np.maximum(spread_a * spread_b, 1e-9), 0)
    return correlation.astype(np.float32), spread


def align_coarsely(first: Float32Array, second: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Align images (P, n, n) with others by trying common crops.

    Returns:
        The best alignment of each pair (P, 4), and its correlation (P,).
    """
    n = first.shape[-1]
    best = np.full(len(first), -1, np.float32)
    alignments = np.zeros((len(first), 4), np.float32)
    samplers = _start_samplers(n)
    for (y_start, to_y, ys), (x_start, to_x, xs) in product(samplers, repeat=2):
        if x_start is samplers[0][0]:  # one pass along y serves all along x
            rows = to_y @ second  # (P, h, n)
        found, _ = correlate(first[:, ys, xs], np.asarray(rows @ to_x.T, dtype=np.float32))
        is_better = found > best
        best[is_better] = found[is_better]
        alignments[is_better] = (*y_start, *x_start)
    return alignments, best


def refine(
    first: Float32Array, second: Float32Array, alignments: Float32Array, n_steps: int = 8
) -> Float32Array:
    """Improve alignments (P, 4) of images (P, n, n), whatever their brightness and contrast.

    Gauss-Newton on the squared difference; gain and offset are fitted in each step.

    Returns:
        The alignments; NaN if the iteration diverges.

    Source: Lucas and Kanade, "An iterative image registration technique", IJCAI 1981.
    """
    n = first.shape[-1]
    pixels = slice(None, None, max(1, n // SAMPLES))
    along = ((np.arange(n, dtype=np.float32) + 0.5) / n)[pixels]  # (s,)
    gradient_y, gradient_x = (gradient * n for gradient in np.gradient(second, axis=(-2, -1)))
    target = first[:, pixels, pixels].reshape(len(first), len(along) ** 2, 1)  # (P, s², 1)
    found, is_lost = alignments.copy(), np.zeros(len(first), bool)
    for _ in range(n_steps):
        to_y, across, overlap = _resamplers(found, n, pixels)
        # second image and its gradients, resampled onto the first: (P, s, s) each
        warped, by, bx = (to_y @ image @ across for image in (second, gradient_y, gradient_x))
        # derivatives by the two scales and shifts, then gain and offset
        columns = np.stack([by * along[:, None], by, bx * along, bx, warped, np.ones_like(warped)], axis=1)
        columns = (columns * overlap[:, None].astype(np.float32)).reshape(len(first), 6, len(along) ** 2)
        square = columns @ columns.swapaxes(1, 2)  # (P, 6, 6) normal equations
        diagonal = np.arange(6)
        # damped, because flat images leave the equations singular
        square[:, diagonal, diagonal] = square[:, diagonal, diagonal] * (1 + 1e-4) + 1e-6
        fitted = np.linalg.solve(square, columns @ target)[..., 0]
        is_lost |= ~(fitted[:, 4] > 0)  # a negative gain would match an image with its negative
        step = np.clip(fitted[:, :4] / np.where(is_lost, 1, fitted[:, 4])[:, None], -MAX_STEP, MAX_STEP)
        found = np.where(is_lost[:, None], found, found + step)
        is_lost |= ~_overlap(found)
        if (np.abs(step).max(1) * n < 0.02)[~is_lost].all():
            break
    return np.where(is_lost[:, None], np.nan, found).astype(np.float32)


def agreement(first: Float32Array, second: Float32Array, alignment: Float32Array) -> float:
    """Measure whether two aligned images (n, n) show the same pixels.

    Images of similar things agree in their outlines; duplicates agree in the detail of nearly every tile,
    except where a watermark or a clipped highlight hides it.

    Returns:
        Median correlation, at most 1, over the tiles with content in both images; 0 if there are too few.
    """
    size = len(first) // N_TILES
    tiles = [_tiles(image, size) for image in _crop_to_overlap(first, second, alignment)]
    if not len(tiles[0]):
        return 0.0
    correlation, spread = correlate(*tiles)
    has_content = spread >= MIN_TILE_STD
    return float(np.median(correlation[has_content])) if has_content.sum() >= MIN_TILES else 0.0


def overlap_correlation(first: Float32Array, second: Float32Array, alignments: Float32Array) -> Float32Array:
    """Correlate aligned images (P, n, n) over their overlap, after removing line means: (P,)."""
    warped, overlap = warp(first, second, alignments)
    mask = overlap.astype(np.float32)
    a, b = _remove_masked_line_means(first, mask), _remove_masked_line_means(warped, mask)
    squares_a, squares_b = (np.square(x).sum((1, 2)) for x in (a, b))
    variance = np.minimum(squares_a, squares_b) / np.maximum(mask.sum((1, 2)), 1)
    correlation = (a * b).sum((1, 2)) / np.maximum(np.sqrt(squares_a * squares_b), 1e-9)
    return np.where(variance >= MIN_STD**2, correlation, 0).astype(np.float32)


def _remove_masked_line_means(images: Float32Array, mask: Float32Array) -> Float32Array:
    """Subtract the means of rows and columns inside a rectangular mask from images (P, n, n); 0 outside."""
    for axis in (-1, -2):
        means = (images * mask).sum(axis, keepdims=True) / np.maximum(mask.sum(axis, keepdims=True), 1)
        images = (images - means) * mask
    return images


def color_correlation(first: Float32Array, second: Float32Array, alignment: Float32Array) -> float:
    """Correlate aligned colour images (3, n, n) over all channels at once: a change of colour lowers it."""
    pairs = [_crop_to_overlap(a, b, alignment) for a, b in zip(first, second, strict=True)]
    values = np.stack([[image.ravel() for image in pair] for pair in pairs], axis=1).reshape(2, -1)
    values = values - values.mean(1, keepdims=True)
    lengths = np.linalg.norm(values, axis=1)
    return float(values[0] @ values[1] / max(lengths.prod(), 1e-9))


def warp(
    first: Float32Array, second: Float32Array, alignments: Float32Array
) -> tuple[Float32Array, BoolArray]:
    """Resample second images (P, n, n) onto the first; also return the mask (P, n, n) of the overlap."""
    to_y, across, overlap = _resamplers(alignments, first.shape[-1])
    return np.asarray(to_y @ second @ across, dtype=np.float32), overlap


def invert(alignments: Float32Array) -> Float32Array:
    """Invert alignments (P, 4): swap first and second images."""
    scales, shifts = alignments[:, [0, 2]], alignments[:, [1, 3]]
    found = np.stack([1 / scales, -shifts / scales], axis=2)
    return np.asarray(found.reshape(-1, 4), dtype=np.float32)


def _crop_to_overlap(
    first: Float32Array, second: Float32Array, alignment: Float32Array
) -> tuple[Float32Array, Float32Array]:
    """Crop both images (n, n) to their overlap, pixel by pixel."""
    to_y, ys = _sampler(alignment[0], alignment[1], len(first))
    to_x, xs = _sampler(alignment[2], alignment[3], len(first))
    return first[ys, xs], np.asarray(to_y @ second @ to_x.T, dtype=np.float32)


def _tiles(image: Float32Array, size: int) -> Float32Array:
    """Divide an image into complete tiles (T, size, size)."""
    down, across = image.shape[0] // size, image.shape[1] // size
    whole = image[: down * size, : across * size]
    return whole.reshape(down, size, across, size).swapaxes(1, 2).reshape(-1, size, size)


def _overlap(alignments: Float32Array) -> BoolArray:
    """Check whether enough of both images overlaps, for alignments (P, 4)."""
    enough = np.ones(len(alignments), bool)
    for scale, shift in (alignments[:, :2].T, alignments[:, 2:].T):
        is_near = (scale > MIN_OVERLAP) & (scale < 1 / MIN_OVERLAP)
        scale = np.where(is_near, scale, 1)
        low, high = np.maximum(0, -shift / scale), np.minimum(1, (1 - shift) / scale)  # in the first image
        enough &= is_near & (high - low >= MIN_OVERLAP) & ((high - low) * scale >= MIN_OVERLAP)
    return enough


def _resamplers(
    alignments: Float32Array, n: int, pixels: slice = ALL
) -> tuple[Float32Array, Float32Array, BoolArray]:
    """Compute factors on the left (P, s, n) and right (P, n, s) of second images, and the mask of overlap.

    The mask (P, s, s) is of the pixels of the first images that are sampled along each axis.
    """
    to_y, inside_y = _samplers(alignments[:, 0], alignments[:, 1], n, pixels)
    to_x, inside_x = _samplers(alignments[:, 2], alignments[:, 3], n, pixels)
    return to_y, to_x.swapaxes(1, 2), inside_y[:, :, None] & inside_x[:, None]


def _samplers(
    scales: Float32Array, shifts: Float32Array, n: int, pixels: slice = ALL
) -> tuple[Float32Array, BoolArray]:
    """Compute weights (P, s, n) that resample second images along an axis, and a mask (P, s) of overlap."""
    centres = (np.arange(n, dtype=np.float32) + 0.5) / n
    at = scales[:, None] * centres[pixels] + shifts[:, None]  # (P, s)
    inside = (at >= 0) & (at <= 1)
    # triangle filter as wide as a step, so that downsampling averages
    width = np.maximum(scales, 1)[:, None, None] / n
    weights = np.maximum(0, 1 - np.abs(at[..., None] - centres) / width)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-6)
    return weights.astype(np.float32), inside


def _sampler(scale: float, shift: float, n: int) -> tuple[Float32Array, slice]:
    """Compute weights (m, n) that resample the second image at the m overlapping pixels, and their slice."""
    weights, inside = _samplers(np.array([scale], np.float32), np.array([shift], np.float32), n)
    places = np.flatnonzero(inside[0])
    if not len(places):
        return np.empty((0, n), np.float32), slice(0, 0)
    within = slice(int(places[0]), int(places[-1]) + 1)
    return weights[0, within], within


@cache
def _start_samplers(n: int) -> list[tuple[tuple[float, float], Float32Array, slice]]:
    """List scale and shift of each start of the search along one axis, with its weights and overlap."""
    starts = [(1.0, 0.0)]
    for side in CROP_SIDES:
        for offset in np.linspace(0, 1 - side, round((1 - side) / CROP_STEP) + 1):
            # the first image is a crop of the second, or the second of the first
            starts += [(side, float(offset)), (1 / side, float(-offset / side))]
    return [(start, *_sampler(*start, n)) for start in starts]
