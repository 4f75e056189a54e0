"""Tests of pixelplay.data.near_duplicates.verification."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from images import scene
from pixelplay.data.near_duplicates.thumbnails import make_thumbnail
from pixelplay.data.near_duplicates.verification import (
    IDENTITY,
    TypicalDifferences,
    differences,
    relative_difference,
    tile_differences,
)


def grey(image: Image.Image, side: int = 64) -> NDArray[np.float32]:
    return make_thumbnail(np.asarray(image), side).astype(np.float32)[None]


def watermarked(image: Image.Image) -> Image.Image:
    copy = image.copy()
    ImageDraw.Draw(copy).rectangle((40, 90, 200, 130), fill="white")
    return copy


ALTERATIONS = {
    "darker": lambda image: image.point(lambda v: round(0.6 * v + 20)),
    "clipped": lambda image: image.point(lambda v: min(255, round(1.5 * v))),
    "watermarked": watermarked,
}


@pytest.mark.parametrize("kind", list(ALTERATIONS))
def test_differences_ignore_brightness_and_watermarks(kind: str) -> None:
    image = scene(0)
    left = differences(grey(image), grey(ALTERATIONS[kind](image)), IDENTITY[None])
    assert np.isfinite(left).mean() > 0.3
    assert np.nanmedian(np.abs(left)) < 2
    assert np.nanmedian(np.abs(differences(grey(image), grey(scene(1)), IDENTITY[None]))) > 10


def test_differences_outside_the_overlap_are_nan() -> None:
    image = grey(scene(0))
    left = differences(image, image, np.array([[1, 0.25, 1, 0]], np.float32))
    assert np.isnan(left[0, 48:]).all()
    assert np.isfinite(left[0, :47]).mean() > 0.9
    tiles = tile_differences(left)
    assert tiles.shape == (1, 16, 16)
    assert np.isnan(tiles[0, 12:]).all()


def test_tile_differences_are_root_mean_squares() -> None:
    left = np.random.default_rng(0).normal(0, 3, (2, 64, 64)).astype(np.float32)
    expected = np.sqrt(np.square(left.reshape(2, 16, 4, 16, 4)).mean((2, 4)))
    np.testing.assert_allclose(tile_differences(left), expected, rtol=1e-5)


def test_typical_difference_is_the_median_over_neighbors() -> None:
    base = 60 + grey(scene(0))[0].astype(float) / 2
    rng = np.random.default_rng(0)
    noise = (0.0, 4.0, 4.0, 4.0, 60.0)  # the first is nearly a duplicate, the last very different
    thumbnails = (
        np.stack([base + rng.normal(0, sd, base.shape) for sd in noise]).clip(0, 255).astype(np.uint8)
    )
    typical = TypicalDifferences.measure(thumbnails, np.array([[1, 2, 3, 4]] * 5), np.array([[0, 2]]))
    assert typical.images.tolist() == [0, 2]
    assert np.median(typical.of(np.array([0]))) == pytest.approx(4, rel=0.15)


def test_relative_difference_is_small_for_duplicates_only() -> None:
    typical = np.ones((3, 16, 16), np.float32)
    typical[:, :9] = 10  # here neighbors differ most
    found = np.stack([0.1 * typical[0], typical[1], np.full((16, 16), np.nan, np.float32)])
    found[0, 9:] = 50  # not measured where neighbors hardly differ
    np.testing.assert_allclose(relative_difference(found, typical)[:2], [0.1, 1.0], rtol=1e-5)
    assert relative_difference(found, typical)[2] == np.inf


@pytest.mark.parametrize(
    ("grey_rows", "is_clear"),
    [(slice(0, 10), True), (slice(0, 4), True), (slice(0, 1), False), (slice(0, 64, 6), False)],
)
def test_clipped_pixels_are_left_out_if_enough_tiles_remain(grey_rows: slice, is_clear: bool) -> None:
    image = np.full((1, 64, 64), 255, np.float32)
    image[:, grey_rows] = np.random.default_rng(0).uniform(50, 180, image[:, grey_rows].shape)
    left = differences(image, np.minimum(1.3 * image, 255), IDENTITY[None])
    is_grey = image < 255
    np.testing.assert_array_equal(np.isfinite(left), is_grey if is_clear else np.ones_like(is_grey))
    assert np.abs(left[is_grey]).max() < 0.1


@pytest.mark.parametrize("spots", [[240], [240, 244, 238], [90] * 9, [128] * 64])
def test_identical_white_pages_do_not_differ(spots: list[int]) -> None:
    image = np.full((1, 64, 64), 255, np.float32)
    side = round(len(spots) ** 0.5) or 1
    for n, value in enumerate(spots):
        image[0, 20 + n // side, 30 + n % side] = value
    assert np.abs(differences(image, image, IDENTITY[None])).max() < 0.1
