"""Image → a small grey picture of the whole of it, by which its copies are known."""

import numpy as np
from PIL import Image

from pixelplay.arrays import Float32Array, UInt8Array

THUMBNAIL_PX = 64
PRINT_PX = 16  # side of the fingerprint that candidates are searched by
THUMBNAIL_VERSION = 1  # part of cache keys: raise it whenever the same pixels come to yield another thumb


def make_thumbnail(pixels: UInt8Array, side_px: int = THUMBNAIL_PX) -> UInt8Array:
    """Squash an image (H, W, 3) uint8 to a grey square (S, S) uint8."""
    return np.asarray(_squash(pixels, side_px).convert("L"))


def make_color_thumbnail(pixels: UInt8Array, side_px: int) -> UInt8Array:
    """Squash an image (H, W, 3) uint8 to a square (3, S, S) uint8."""
    return np.asarray(_squash(pixels, side_px)).transpose(2, 0, 1)


def _squash(pixels: UInt8Array, side_px: int) -> Image.Image:
    image = Image.fromarray(pixels)
    return image.resize((side_px, side_px), Image.Resampling.BILINEAR, reducing_gap=3.0)


def darker_half(pictures: UInt8Array | Float32Array) -> Float32Array:
    """Bring what is brighter than half of a picture (N, S, S) down to its median.

    What is left to see is dark, and a brightened copy keeps it, whatever its highlights have lost.
    """
    n, height, width = pictures.shape
    middle = np.median(pictures.reshape(n, height * width), axis=1)
    return np.asarray(np.minimum(pictures, middle[:, None, None]), dtype=np.float32)


def shrink(thumbnails: UInt8Array | Float32Array, side_px: int) -> Float32Array:
    """Average thumbs (N, S, S) to (N, s, s); s divides S."""
    n, side, _ = thumbnails.shape
    step = side // side_px
    blocks = thumbnails.reshape(n, side_px, step, side_px, step)
    return np.asarray(blocks.mean((2, 4), dtype=np.float32))
