"""Evaluation preprocessing: fit decoded pixels into the network's input."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from pixelplay.array_types import UInt8Array
from pixelplay.data.decode import MAX_VALUE, decode_image

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Box = tuple[float, float, float, float]  # left, top, right, bottom, px
PixelBox = tuple[int, int, int, int]
Size = tuple[int, int]  # height, width, px
Fit = Literal["squash", "pad", "crop"]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Preprocessing of the network input; the keys are timm's, except `fit`."""

    input_size: Size
    mean: tuple[float, ...]  # per channel, in [0, 1]
    std: tuple[float, ...]  # per channel, in [0, 1]
    interpolation: str = "bicubic"  # a key of FILTERS, antialiased
    # the whole image, changing its aspect ratio; the whole image with borders of the mean colour; or the
    # largest central part of the input's aspect ratio
    fit: Fit = "squash"
    max_value: float = MAX_VALUE  # value of white in images with more than 8 bits


def decode_for(data: bytes, preprocessing: Preprocessing, *, path: str) -> UInt8Array:
    """Decode an image (H, W, 3) for a network; errors as `decode_image`."""
    longest = max(preprocessing.input_size)
    return decode_image(data, path=path, target_px=longest, max_value=preprocessing.max_value)


def eval_transform(pixels: UInt8Array, preprocessing: Preprocessing) -> UInt8Array:
    """Fit decoded pixels (H, W, 3) into the network's input (S_h, S_w, 3), both uint8."""
    source, (left, top, right, bottom) = fit_boxes(pixels.shape[:2], preprocessing)
    resampling = FILTERS[preprocessing.interpolation]
    part = np.asarray(Image.fromarray(pixels).resize((right - left, bottom - top), resampling, box=source))
    if part.shape[:2] == preprocessing.input_size:
        return part
    border = np.array([round(255 * value) for value in preprocessing.mean], np.uint8)
    padded = np.tile(border, (*preprocessing.input_size, 1))  # (S_h, S_w, 3)
    padded[top:bottom, left:right] = part
    return padded


def fit_boxes(size: tuple[int, ...], preprocessing: Preprocessing) -> tuple[Box, PixelBox]:
    """Return the part of an image (height, width) that the network sees, and where it lies in the input."""
    (height, width), (input_height, input_width) = size, preprocessing.input_size
    source: Box = 0, 0, width, height
    target: PixelBox = 0, 0, input_width, input_height
    scales = input_height / height, input_width / width
    if preprocessing.fit == "crop":
        left = (width - input_width / max(scales)) / 2
        top = (height - input_height / max(scales)) / 2
        source = max(0.0, left), max(0.0, top), min(width, width - left), min(height, height - top)
    elif preprocessing.fit == "pad":
        part_height, part_width = (max(1, round(side * min(scales))) for side in (height, width))
        x, y = (input_width - part_width) // 2, (input_height - part_height) // 2
        target = x, y, x + part_width, y + part_height
    return source, target


def describe_size(size: Size) -> str:
    """Return 224 for a square, 224x384 for a height of 224 and a width of 384 px."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"
