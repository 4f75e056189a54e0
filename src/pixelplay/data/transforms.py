"""Evaluation preprocessing: resize decoded pixels to the network's input."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pixelplay.array_types import UInt8Array

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Preprocessing of the network input; the keys are timm's."""

    input_size: int  # side of the square input, px
    mean: tuple[float, ...]  # per channel, in [0, 1]
    std: tuple[float, ...]  # per channel, in [0, 1]
    interpolation: str = "bicubic"  # a key of FILTERS, antialiased
    crop_mode: str = "squash"  # uses the whole image; "center" its central square
    crop_pct: float = 1.0  # fraction of the short side that "center" keeps


def eval_transform(pixels: UInt8Array, preprocessing: Preprocessing) -> UInt8Array:
    """Resize decoded pixels (H, W, 3) to the network's square (S, S, 3), both uint8."""
    image = Image.fromarray(pixels)
    size = (preprocessing.input_size, preprocessing.input_size)
    box = crop_box(image.size, preprocessing)
    return np.asarray(image.resize(size, FILTERS[preprocessing.interpolation], box=box))


def crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> Box:
    """Return the box, in px, that is resized for the network, of an image (width, height)."""
    width, height = size
    if preprocessing.crop_mode != "center":
        return 0, 0, width, height
    side = min(width, height) * preprocessing.crop_pct
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
