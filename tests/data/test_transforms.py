"""Tests of pixelplay.data.transforms."""

import numpy as np
import pytest
from numpy.typing import NDArray

from images import draw
from pixelplay.data.transforms import Preprocessing, eval_transform


def settings(size: int, **values: object) -> Preprocessing:
    return Preprocessing(input_size=size, mean=(0.5,) * 3, std=(0.5,) * 3, **values)  # type: ignore[arg-type]


def stripes(width: int, height: int) -> NDArray[np.uint8]:
    """Draw an image whose red increases to the right and whose green increases downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return pixels


def test_square_of_the_input_size_is_unchanged() -> None:
    pixels = np.asarray(draw(1, (40, 40)))
    for mode in ("squash", "center"):
        np.testing.assert_array_equal(eval_transform(pixels, settings(40, crop_mode=mode)), pixels)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_squash_shows_the_whole_image(interpolation: str) -> None:
    view = eval_transform(stripes(120, 60), settings(30, interpolation=interpolation))
    assert (view.shape, view.dtype) == ((30, 30, 3), np.uint8)
    exact = (np.arange(30) + 0.5) / 30 * 255
    assert np.abs(view[:, :, 0] - exact).max() <= 6
    assert np.abs(view[:, :, 1] - exact[:, None]).max() <= 6


def test_center_shows_the_central_square() -> None:
    view = eval_transform(stripes(120, 60), settings(30, crop_mode="center"))
    exact = (np.arange(30) + 0.5) / 30
    assert np.abs(view[:, :, 0] - (0.25 + exact / 2) * 255).max() <= 6
    assert np.abs(view[:, :, 1] - exact[:, None] * 255).max() <= 6


def test_crop_pct_is_the_fraction_of_the_short_side() -> None:
    view = eval_transform(stripes(120, 60), settings(30, crop_mode="center", crop_pct=0.5))
    exact = (np.arange(30) + 0.5) / 30
    assert np.abs(view[:, :, 1] - (0.25 + exact[:, None] / 2) * 255).max() <= 6


def test_single_pixel_fills_the_square() -> None:
    pixels = np.full((1, 1, 3), 77, np.uint8)
    for mode in ("squash", "center"):
        np.testing.assert_array_equal(
            eval_transform(pixels, settings(8, crop_mode=mode)), np.full((8, 8, 3), 77)
        )
