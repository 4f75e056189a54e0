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
Box = tuple[float, float, float, float]  # left, top, right, bottom in px


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes network input; the keys are timm's.

    Attributes:
        input_size: side of the square input, px.
        mean: of each channel, in [0, 1], subtracted.
        std: of each channel, in [0, 1], divided by.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos", antialiased.
        crop_mode: "squash" shows the network the whole image, "center" its central square.
        crop_pct: fraction of the short side that "center" keeps.
    """

    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_mode: str = "squash"
    crop_pct: float = 1.0


def eval_transform(pixels: UInt8Array, preprocessing: Preprocessing) -> UInt8Array:
    """Resize decoded pixels (H, W, 3) to the network's square (S, S, 3), both uint8."""
    image = Image.fromarray(pixels)
    return _resize(image, crop_box(image.size, preprocessing), preprocessing)


def crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> Box:
    """What the network sees of an image of some (width, height)."""
    width, height = size
    if preprocessing.crop_mode != "center":
        return 0, 0, width, height
    side = min(width, height) * preprocessing.crop_pct
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _resize(image: Image.Image, box: Box, preprocessing: Preprocessing) -> UInt8Array:
    size = (preprocessing.input_size, preprocessing.input_size)
    return np.asarray(image.resize(size, FILTERS[preprocessing.interpolation], box=box))
