"""Tests of pixelplay.data.transforms."""

from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from images import draw
from pixelplay.data.transforms import Fit, Preprocessing, Size, describe_size, eval_transform, fit_boxes


def settings(size: Size, **values: object) -> Preprocessing:
    return Preprocessing(input_size=size, mean=(0.5, 0.25, 0.0), std=(0.5,) * 3, **values)  # type: ignore[arg-type]


def stripes(width: int, height: int) -> NDArray[np.uint8]:
    """Draw an image whose red increases to the right and whose green increases downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return pixels


@pytest.mark.parametrize("size", [(40, 40), (30, 50)])
@pytest.mark.parametrize("fit", get_args(Fit))
def test_image_of_the_input_size_is_unchanged(fit: Fit, size: Size) -> None:
    pixels = np.asarray(draw(1, size[::-1]))
    np.testing.assert_array_equal(eval_transform(pixels, settings(size, fit=fit)), pixels)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_squash_shows_the_whole_image(interpolation: str) -> None:
    view = eval_transform(stripes(120, 60), settings((20, 30), interpolation=interpolation))
    assert (view.shape, view.dtype) == ((20, 30, 3), np.uint8)
    assert np.abs(view[:, :, 0] - (np.arange(30) + 0.5) / 30 * 255).max() <= 6
    assert np.abs(view[:, :, 1] - (np.arange(20)[:, None] + 0.5) / 20 * 255).max() <= 6


def test_crop_shows_the_central_part_with_the_aspect_ratio_of_the_input() -> None:
    view = eval_transform(stripes(120, 60), settings((30, 30), fit="crop"))
    exact = (np.arange(30) + 0.5) / 30
    assert np.abs(view[:, :, 0] - (0.25 + exact / 2) * 255).max() <= 6
    assert np.abs(view[:, :, 1] - exact[:, None] * 255).max() <= 6
    assert fit_boxes((60, 120), settings((30, 60), fit="crop"))[0] == (0, 0, 120, 60)


def test_pad_shows_the_whole_image_between_borders_of_the_mean_colour() -> None:
    view = eval_transform(stripes(120, 60), settings((30, 30), fit="pad"))
    assert view.shape == (30, 30, 3)
    border = np.concatenate([view[:7], view[22:]])
    np.testing.assert_array_equal(border, np.broadcast_to([128, 64, 0], border.shape))
    part = view[7:22]  # 15 of 30 rows
    assert np.abs(part[:, :, 0] - (np.arange(30) + 0.5) / 30 * 255).max() <= 6
    assert np.abs(part[:, :, 1] - (np.arange(15)[:, None] + 0.5) / 15 * 255).max() <= 10


@pytest.mark.parametrize("fit", get_args(Fit))
@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (7, 5000)])
def test_extreme_aspect_ratios_fit(fit: Fit, size: Size) -> None:
    pixels = np.full((*size, 3), 77, np.uint8)
    view = eval_transform(pixels, settings((16, 24), fit=fit))
    assert view.shape == (16, 24, 3)
    assert (view == 77).any()
    if fit != "pad":
        assert (view == 77).all()


def test_size_of_a_square_is_its_side() -> None:
    assert (describe_size((224, 224)), describe_size((224, 384))) == ("224", "224x384")
