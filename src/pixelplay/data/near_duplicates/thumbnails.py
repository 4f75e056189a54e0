"""Thumbnails of whole images, for the near-duplicate search."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixelplay.array_types import Float32Array, UInt8Array

THUMBNAIL_PX = 64
FINGERPRINT_PX = 16  # side of the fingerprints that candidates are searched by
THUMBNAIL_VERSION = 1  # part of cache keys: increase it when the same pixels give another thumbnail


def make_thumbnail(pixels: UInt8Array, side_px: int = THUMBNAIL_PX) -> UInt8Array:
    """Squash an image (H, W, 3) uint8 to a grey square (S, S) uint8."""
    return np.asarray(make_color_thumbnail(pixels, side_px).convert("L"))


def make_color_thumbnail(pixels: UInt8Array, side_px: int) -> Image.Image:
    """Squash an image (H, W, 3) uint8 to a square."""
    image = Image.fromarray(pixels)
    return image.resize((side_px, side_px), Image.Resampling.BILINEAR, reducing_gap=3.0)


def darker_half(images: UInt8Array | Float32Array) -> Float32Array:
    """Clip images (N, S, S) at their median.

    The dark half is left, which a brightened duplicate keeps even if its highlights are clipped.
    """
    n, height, width = images.shape
    middle = np.median(images.reshape(n, height * width), axis=1)
    return np.asarray(np.minimum(images, middle[:, None, None]), dtype=np.float32)


def shrink(thumbnails: UInt8Array | Float32Array, side_px: int) -> Float32Array:
    """Average blocks of thumbnails (N, S, S) to (N, s, s); s divides S."""
    return np.asarray(blocks(thumbnails, side_px).mean((2, 4), dtype=np.float32))


def blocks(images: NDArray[Any], n_blocks: int) -> NDArray[Any]:
    """Divide images (N, S, S) into n × n blocks of s × s pixels: (N, n, s, n, s)."""
    step = images.shape[-1] // n_blocks
    return images.reshape(len(images), n_blocks, step, n_blocks, step)
