"""Tests of pixelplay.data.near_duplicates.thumbnails."""

import numpy as np
import pytest

from images import scene
from pixelplay.data.near_duplicates.thumbnails import (
    THUMBNAIL_PX,
    darker_half,
    make_color_thumbnail,
    make_thumbnail,
    shrink,
)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (64, 64), (900, 40)])
def test_thumbnail_is_a_grey_square_of_the_whole_image(size: tuple[int, int]) -> None:
    pixels = np.asarray(scene(0, (64, 64)).resize(size))
    thumbnail = make_thumbnail(pixels)
    assert (thumbnail.shape, thumbnail.dtype) == ((THUMBNAIL_PX, THUMBNAIL_PX), np.uint8)
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    assert thumbnail.mean() == pytest.approx(luma.mean(), abs=3)


def test_color_thumbnail_separates_channels() -> None:
    pixels = np.zeros((40, 60, 3), np.uint8) + np.array([250, 100, 5], np.uint8)
    thumbnail = make_color_thumbnail(pixels, 16)
    np.testing.assert_array_equal(thumbnail, np.broadcast_to([250, 100, 5], (16, 16, 3)))


def test_darker_half_is_unchanged() -> None:
    thumbnails = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    half = darker_half(thumbnails)
    middle = np.median(thumbnails, axis=(1, 2))[:, None, None]
    np.testing.assert_array_equal(half, np.where(thumbnails < middle, thumbnails, middle))
    assert darker_half(thumbnails[:0]).shape == (0, 8, 8)


def test_shrink_averages_blocks() -> None:
    thumbnails = np.arange(2 * 64 * 64).reshape(2, 64, 64).astype(np.uint8)
    small = shrink(thumbnails, 16)
    assert small.shape == (2, 16, 16)
    np.testing.assert_allclose(small[1, 2, 3], thumbnails[1, 8:12, 12:16].mean())
