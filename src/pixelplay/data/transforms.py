"""Pixels → the square that a network sees."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pixelplay.arrays import UInt8Array

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


CORNER_FRAC = 0.85  # of each side, what a view in a corner shows


Box = tuple[float, float, float, float]  # left, top, right, bottom in px


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a photograph becomes network input; the keys are timm's.

    Attributes:
        input_size: side of the square input, px.
        mean: of each channel, in [0, 1], subtracted.
        std: of each channel, in [0, 1], divided by.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos", antialiased.
        crop_mode: "squash" shows the network the whole photograph, "center" its central square.
        crop_pct: fraction of the short side that "center" keeps.
    """

    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_mode: str = "squash"
    crop_pct: float = 1.0


def eval_view(pixels: UInt8Array, preprocessing: Preprocessing) -> UInt8Array:
    """Resize decoded pixels (H, W, 3) to the network's square (S, S, 3), both uint8."""
    image = Image.fromarray(pixels)
    return _resize(image, seen_box(image.size, preprocessing), preprocessing)


def corner_views(pixels: UInt8Array, preprocessing: Preprocessing) -> UInt8Array:
    """The same view and one in each of its corners: decoded pixels (H, W, 3) to (5, S, S, 3), all uint8."""
    image = Image.fromarray(pixels)
    left, top, right, bottom = whole = seen_box(image.size, preprocessing)
    width, height = CORNER_FRAC * (right - left), CORNER_FRAC * (bottom - top)
    boxes = [whole] + [
        (x, y, x + width, y + height) for x in (left, right - width) for y in (top, bottom - height)
    ]
    return np.stack([_resize(image, box, preprocessing) for box in boxes])


def seen_box(size: tuple[int, int], preprocessing: Preprocessing) -> Box:
    """What the network sees of a photograph of some (width, height)."""
    width, height = size
    if preprocessing.crop_mode != "center":
        return 0, 0, width, height
    side = min(width, height) * preprocessing.crop_pct
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _resize(image: Image.Image, box: Box, preprocessing: Preprocessing) -> UInt8Array:
    size = (preprocessing.input_size, preprocessing.input_size)
    return np.asarray(image.resize(size, FILTERS[preprocessing.interpolation], box=box))
