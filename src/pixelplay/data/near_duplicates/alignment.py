"""Two small grey pictures → how one lies on the other, and whether both show the same pixels.

A placement (4,) is scale and shift along y, then along x: the point u of the first picture, in fractions of
its side, lies at scale·u + shift in the second. Copies that were cut, resized or squashed differ by such a
placement; a mirrored one is mirrored back by the caller.
"""

from functools import cache
from itertools import product

import numpy as np

from pixelplay.arrays import BoolArray, Float32Array

# Shares of a side that a cut may leave, for the search to start from; those in between are found from the
# nearest, those far below are not looked for.
CUTS = (0.9, 0.78)
CUT_STEP = 0.11  # of the side between two places of a cut: refining finds its way from half of that
MIN_OVERLAP = 0.5  # of either side
MAX_STEP = 0.05  # of the side, by which one step may move a placement
FLAT = 0.3  # grey levels: a picture or tile that varies less shows nothing
TILE_FRAC = 16  # tiles along a side
TILE_FLAT = 1.0  # grey levels: JPEG's own noise stays below
MIN_TILES = 12  # with so many that show something


def detail(pictures: Float32Array) -> Float32Array:
    """Take the means of rows and columns out of pictures (…, h, w).

    What is constant along an axis, such as frames, horizons or the bus bars of a solar cell, is alike in
    images of different things.
    """
    centred = pictures - pictures.mean(-1, keepdims=True)
    return np.asarray(centred - centred.mean(-2, keepdims=True), dtype=np.float32)


def correlate(first: Float32Array, second: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Correlate the details of pictures (…, h, w).

    Returns:
        Correlation (…,), 0 where one of them is flat, and the smaller standard deviation (…,), grey levels.
    """
    a, b = detail(first), detail(second)
    spread_a, spread_b = (np.sqrt(np.square(x).mean((-2, -1))) for x in (a, b))
    product_ = (a * b).mean((-2, -1))
    spread = np.minimum(spread_a, spread_b)
    correlation = np.where(spread >= FLAT, product_ / np.maximum(spread_a * spread_b, 1e-9), 0)
    return correlation.astype(np.float32), spread


def place_coarsely(first: Float32Array, second: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Find how pictures (P, n, n) lie on others, among the cuts that copies are likely to have.

    Returns:
        The best placement of each pair (P, 4), and the correlation of their details there (P,).
    """
    n = first.shape[-1]
    best = np.full(len(first), -1, np.float32)
    placements = np.zeros((len(first), 4), np.float32)
    samplers = _start_samplers(n)
    for (y_start, to_y, ys), (x_start, to_x, xs) in product(samplers, repeat=2):
        if x_start is samplers[0][0]:  # one pass along y serves all along x
            rows = to_y @ second  # (P, h, n)
        found, _ = correlate(first[:, ys, xs], np.asarray(rows @ to_x.T, dtype=np.float32))
        is_better = found > best
        best[is_better] = found[is_better]
        placements[is_better] = (*y_start, *x_start)
    return placements, best


def refine(
    first: Float32Array, second: Float32Array, placements: Float32Array, n_steps: int = 8
) -> Float32Array:
    """Move placements (P, 4) to where pictures (P, n, n) agree best, whatever their brightness and contrast.

    Gauss-Newton on the squared difference, gain and offset being fitted in each step.

    Returns:
        The placements; NaN where it leads away from any.

    Source: Lucas and Kanade, "An iterative image registration technique", IJCAI 1981.
    """
    n = first.shape[-1]
    along = (np.arange(n, dtype=np.float32) + 0.5) / n
    slope_y, slope_x = (gradient * n for gradient in np.gradient(second, axis=(-2, -1)))
    wanted = first.reshape(len(first), n * n, 1)
    found, is_lost = placements.copy(), np.zeros(len(first), bool)
    for _ in range(n_steps):
        to_y, inside_y = _samplers(found[:, 0], found[:, 1], n)
        to_x, inside_x = _samplers(found[:, 2], found[:, 3], n)
        across = to_x.swapaxes(1, 2)
        seen, by, bx = (to_y @ picture @ across for picture in (second, slope_y, slope_x))  # (P, n, n) each
        overlap = (inside_y[:, :, None] & inside_x[:, None]).astype(np.float32)
        columns = np.stack([by * along[:, None], by, bx * along, bx, seen, np.ones_like(seen)], axis=1)
        columns = (columns * overlap[:, None]).reshape(len(first), 6, n * n)
        square = columns @ columns.swapaxes(1, 2)  # (P, 6, 6)
        diagonal = np.arange(6)
        # flat pictures fix nothing
        square[:, diagonal, diagonal] = square[:, diagonal, diagonal] * (1 + 1e-4) + 1e-6
        fitted = np.linalg.solve(square, columns @ wanted)[..., 0]
        is_lost |= ~(fitted[:, 4] > 0)  # it would be its own negative
        step = np.clip(fitted[:, :4] / np.where(is_lost, 1, fitted[:, 4])[:, None], -MAX_STEP, MAX_STEP)
        found = np.where(is_lost[:, None], found, found + step)
        is_lost |= ~_overlap(found)
        if (np.abs(step).max(1) * n < 0.02)[~is_lost].all():
            break
    return np.where(is_lost[:, None], np.nan, found).astype(np.float32)


def agreement(first: Float32Array, second: Float32Array, placement: Float32Array) -> float:
    """Measure whether two pictures (n, n) show the same pixels where one lies on the other.

    The overlap is cut into tiles. Images of like things agree in their outlines; copies agree in the
    detail of nearly every tile, but for those that a watermark or a blown highlight has covered.

    Returns:
        The median correlation over the tiles that show something in both, at most 1; 0 where too few do.
    """
    size = len(first) // TILE_FRAC
    tiles = [_tiles(picture, size) for picture in _lay(first, second, placement)]
    if not len(tiles[0]):
        return 0.0
    correlation, spread = correlate(*tiles)
    shows = spread >= TILE_FLAT
    return float(np.median(correlation[shows])) if shows.sum() >= MIN_TILES else 0.0


def outlines_agree(first: Float32Array, second: Float32Array, placement: Float32Array) -> float:
    """Correlation of the details of two pictures (n, n) over all that they share."""
    return float(correlate(*_lay(first, second, placement))[0])


def likeness(first: Float32Array, second: Float32Array, placement: Float32Array) -> float:
    """Correlate colour pictures (3, n, n) where one lies on the other, all colours and places at once.

    Brightness and contrast may differ, by the same for all; other colours or another light may not.
    """
    pairs = [_lay(a, b, placement) for a, b in zip(first, second, strict=True)]
    seen = np.stack([[picture.ravel() for picture in pair] for pair in pairs], axis=1).reshape(2, -1)
    seen = seen - seen.mean(1, keepdims=True)
    lengths = np.linalg.norm(seen, axis=1)
    return float(seen[0] @ seen[1] / max(lengths.prod(), 1e-9))


def lay(
    first: Float32Array, second: Float32Array, placements: Float32Array
) -> tuple[Float32Array, BoolArray]:
    """Bring second pictures (P, n, n) to where they lie on the first; and where they do (P, n, n)."""
    n = first.shape[-1]
    to_y, inside_y = _samplers(placements[:, 0], placements[:, 1], n)
    to_x, inside_x = _samplers(placements[:, 2], placements[:, 3], n)
    laid = np.asarray(to_y @ second @ to_x.swapaxes(1, 2), dtype=np.float32)
    return laid, inside_y[:, :, None] & inside_x[:, None]


def inverse(placements: Float32Array) -> Float32Array:
    """How first pictures lie on second ones, for placements (P, 4) of these on those."""
    scales, shifts = placements[:, [0, 2]], placements[:, [1, 3]]
    found = np.stack([1 / scales, -shifts / scales], axis=2)
    return np.asarray(found.reshape(-1, 4), dtype=np.float32)


def _lay(
    first: Float32Array, second: Float32Array, placement: Float32Array
) -> tuple[Float32Array, Float32Array]:
    """Cut both pictures (n, n) to where they overlap, pixel upon pixel."""
    to_y, ys = _sampler(placement[0], placement[1], len(first))
    to_x, xs = _sampler(placement[2], placement[3], len(first))
    return first[ys, xs], np.asarray(to_y @ second @ to_x.T, dtype=np.float32)


def _tiles(picture: Float32Array, size: int) -> Float32Array:
    """Cut a picture into whole tiles (T, size, size)."""
    down, across = picture.shape[0] // size, picture.shape[1] // size
    whole = picture[: down * size, : across * size]
    return whole.reshape(down, size, across, size).swapaxes(1, 2).reshape(-1, size, size)


def _overlap(placements: Float32Array) -> BoolArray:
    """Whether enough of both pictures lies on the other, for placements (P, 4)."""
    enough = np.ones(len(placements), bool)
    for scale, shift in (placements[:, :2].T, placements[:, 2:].T):
        is_near = (scale > MIN_OVERLAP) & (scale < 1 / MIN_OVERLAP)
        scale = np.where(is_near, scale, 1)
        low, high = np.maximum(0, -shift / scale), np.minimum(1, (1 - shift) / scale)  # of the first
        enough &= is_near & (high - low >= MIN_OVERLAP) & ((high - low) * scale >= MIN_OVERLAP)
    return enough


def _samplers(scales: Float32Array, shifts: Float32Array, n: int) -> tuple[Float32Array, BoolArray]:
    """Weights (P, n, n) that read second pictures along an axis, and which places (P, n) lie on them."""
    centres = (np.arange(n, dtype=np.float32) + 0.5) / n
    at = scales[:, None] * centres + shifts[:, None]  # (P, n)
    inside = (at >= 0) & (at <= 1)
    # a hat as wide as a step: what is made smaller is averaged
    width = np.maximum(scales, 1)[:, None, None] / n
    weights = np.maximum(0, 1 - np.abs(at[..., None] - centres) / width)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-6)
    return weights.astype(np.float32), inside


def _sampler(scale: float, shift: float, n: int) -> tuple[Float32Array, slice]:
    """Weights (m, n) that read the second picture at the m places that lie on it, and which these are."""
    weights, inside = _samplers(np.array([scale], np.float32), np.array([shift], np.float32), n)
    places = np.flatnonzero(inside[0])
    if not len(places):
        return np.empty((0, n), np.float32), slice(0, 0)
    within = slice(int(places[0]), int(places[-1]) + 1)
    return weights[0, within], within


@cache
def _start_samplers(n: int) -> list[tuple[tuple[float, float], Float32Array, slice]]:
    """Along one axis: scale and shift of each start of the search, its weights and where they apply."""
    starts = [(1.0, 0.0)]
    for share in CUTS:
        for offset in np.linspace(0, 1 - share, round((1 - share) / CUT_STEP) + 1):
            # the first is cut from the second, or the second from the first
            starts += [(share, float(offset)), (1 / share, float(-offset / share))]
    return [(start, *_sampler(*start, n)) for start in starts]
