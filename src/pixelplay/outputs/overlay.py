"""Image + heat → a picture that shows where the heat is."""

import numpy as np
from PIL import Image, ImageEnhance

from pixelplay.arrays import Float32Array, UInt8Array

# Dark to light in even steps, blue to yellow: order shows in lightness, also on a grey print, and no step
# asks to tell red from green. RGB.
ANCHORS = (
    (28, 16, 98),
    (98, 22, 138),
    (168, 38, 126),
    (222, 76, 88),
    (248, 132, 52),
    (252, 190, 64),
    (255, 240, 150),
)
GREYED = 0.7  # of the image's colour is taken away, lest it be taken for heat
MAX_OPACITY = 0.8  # of the hottest place: what it lies on must still be known


def color(values: Float32Array) -> Float32Array:
    """Colours (…, 3) in [0, 255] of values in [0, 1]."""
    places = np.linspace(0, 1, len(ANCHORS))
    channels = [np.interp(values, places, channel) for channel in np.transpose(ANCHORS)]
    return np.stack(channels, axis=-1).astype(np.float32)


def overlay(pixels: UInt8Array, heat: Float32Array, *, max_px: int) -> UInt8Array:
    """Lay heat over a paler image, the more opaque the hotter.

    Args:
        pixels: (H, W, 3), upright.
        heat: (h, w) >= 0 over the whole image.
        max_px: the long side of the picture; smaller images are not enlarged.

    Returns:
        (H', W', 3) in the image's proportions.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, max_px / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    ground = np.asarray(ImageEnhance.Color(small).enhance(1 - GREYED))
    grown = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    values = np.asarray(grown) / max(float(heat.max()), np.finfo(np.float32).tiny)
    values = values.clip(0, 1)  # (H', W'); bicubic may overshoot
    opacity = MAX_OPACITY * values[..., None]
    mixed = (1 - opacity) * ground + opacity * color(values)
    return np.asarray(mixed.round().astype(np.uint8))
