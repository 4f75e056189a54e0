"""Tests of pixelplay.data.near_duplicates.alignment."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from images import scene
from pixelplay.data.near_duplicates.alignment import (
    agreement,
    align_coarsely,
    color_correlation,
    correlate,
    refine,
    remove_line_means,
)
from pixelplay.data.near_duplicates.thumbnails import make_color_thumbnail, make_thumbnail, shrink

SIDE = 192
# left, top, right, bottom: whole image, two corners, all sides, one side
CUTS = (
    (0, 0, 1, 1),
    (0.1, 0, 1, 0.9),
    (0, 0.2, 0.8, 1),
    (0.05, 0.05, 0.95, 0.95),
    (0.15, 0, 1, 1),
    (0, 0, 1, 0.85),
)


def grey(image: Image.Image, side: int = SIDE) -> NDArray[np.float32]:
    return make_thumbnail(np.asarray(image), side).astype(np.float32)


def colours(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(make_color_thumbnail(np.asarray(image), 64), np.float32).transpose(2, 0, 1)


def cut(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Crop by fractions of the sides; the sizes give whole pixels."""
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round(right * width), round(bottom * height))
    )


def place(first: Image.Image, second: Image.Image) -> NDArray[np.float32]:
    """Align at increasing resolution."""
    pairs = [np.stack([grey(image, 64)]) for image in (first, second)]
    alignments, _ = align_coarsely(shrink(pairs[0], 16), shrink(pairs[1], 16))
    for side in (32, 64):
        alignments = refine(shrink(pairs[0], side), shrink(pairs[1], side), alignments)
    return refine(grey(first)[None], grey(second)[None], alignments)[0]


@pytest.mark.parametrize("box", CUTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_crop_is_aligned_to_a_pixel(box: tuple[float, float, float, float], seed: int) -> None:
    left, top, right, bottom = box
    image = scene(seed, (400, 300))
    found = place(image, cut(image, left, top, right, bottom))
    height, width = bottom - top, right - left
    # u of the whole image lies at (u - start) / side in the crop
    np.testing.assert_allclose(found, [1 / height, -top / height, 1 / width, -left / width], atol=1 / SIDE)
    back = place(cut(image, left, top, right, bottom), image)
    np.testing.assert_allclose(back, [height, top, width, left], atol=1 / SIDE)


def test_brightness_and_contrast_do_not_change_the_alignment() -> None:
    image = scene(3)
    darker = image.point(lambda value: round(0.6 * value + 20))
    np.testing.assert_allclose(place(image, darker), [1, 0, 1, 0], atol=0.2 / SIDE)


def test_agreement_separates_duplicates_from_other_images() -> None:
    upright = np.array([1, 0, 1, 0], np.float32)
    images = [grey(scene(seed)) for seed in range(6)]
    for i, first in enumerate(images):
        for j, second in enumerate(images):
            value = agreement(first, second, upright)
            assert value > 0.99 if i == j else abs(value) < 0.3, (i, j)


def test_negative_image_does_not_agree() -> None:
    image = grey(scene(0))
    upright = np.array([1, 0, 1, 0], np.float32)
    assert agreement(image, 255 - image, upright) < -0.99
    assert np.isnan(refine(image[None], 255 - image[None], upright[None])).all()


def test_flat_images_do_not_agree() -> None:
    upright = np.array([1, 0, 1, 0], np.float32)
    rng = np.random.default_rng(0)
    flat, same = (200 + rng.normal(0, 0.5, (SIDE, SIDE)).astype(np.float32) for _ in range(2))
    assert agreement(flat, same, upright) == 0
    assert agreement(flat, flat, upright) == 0
    correlation, _ = correlate(np.zeros((1, 8, 8), np.float32), np.ones((1, 8, 8), np.float32))
    assert correlation[0] == 0


def test_line_means_are_removed() -> None:
    rows, columns = np.random.default_rng(0).normal(0, 50, (2, 32)).astype(np.float32)
    np.testing.assert_allclose(remove_line_means(rows[:, None] + columns), 0, atol=1e-4)


def test_color_correlation_drops_with_other_colours() -> None:
    upright = np.array([1, 0, 1, 0], np.float32)
    image = scene(0)
    bands = image.split()
    tinted = Image.merge("RGB", [bands[0], *(band.point(lambda v: round(0.3 * v)) for band in bands[1:])])
    assert color_correlation(colours(image), colours(image.point(lambda v: round(0.7 * v))), upright) > 0.99
    assert color_correlation(colours(image), colours(tinted), upright) < 0.8
    assert color_correlation(colours(image), colours(scene(1)), upright) < 0.6


def test_images_with_little_overlap_are_not_aligned() -> None:
    image = grey(scene(0))
    starts = np.array([[1, 0.7, 1, 0], [3, 0, 3, 0], [1, 0.01, 1, 0]], np.float32)
    images = np.stack([image] * 3)
    found = refine(images, images, starts)
    assert np.isnan(found[:2]).all()
    np.testing.assert_allclose(found[2], [1, 0, 1, 0], atol=1e-3)
