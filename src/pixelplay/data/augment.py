"""Pixels → one of the many squares that a network may learn from."""

import math

import numpy as np
from PIL import Image

from pixelplay.arrays import UInt8Array
from pixelplay.config import AugmentConfig
from pixelplay.data.transforms import FILTERS, Preprocessing

SETTING_USED_BY = {  # setting → the variations whose strength it is
    "crop_scale": ("crop",),
    "rotation_deg": ("rotation",),
    "erasing_prob": ("erasing",),
    "mixup_alpha": ("mixup",),
    "cutmix_alpha": ("cutmix",),
    "mix_prob": ("mixup", "cutmix"),
    "mix_off_frac": ("mixup", "cutmix"),
}
_CROP_ASPECT = 4 / 3  # a crop is at most so much wider or higher than the image's own shape
_ERASING_AREA = (0.02, 0.33)
_ERASING_ASPECT = 3.3


def augment_view(
    pixels: UInt8Array,
    config: AugmentConfig,
    preprocessing: Preprocessing,
    rng: np.random.Generator,
    *,
    hflip: bool,
    size_px: int | None = None,
) -> UInt8Array:
    """Draw one varied view of an image.

    Cropped and squashed to the square, then mirrored, rotated, recoloured or distorted, and erased in part,
    as far as `config.augment` names these; mixup and cutmix need a batch and are not done here. With nothing
    named it is the whole image, squashed.

    Args:
        pixels: (H, W, 3) uint8, decoded; not written to.
        config: which variations, and how strong.
        preprocessing: the filter, the colour beside a distorted picture, and the size where none is given.
        rng: the only source of chance, so that the same state gives the same bytes on any thread.
        hflip: mirror every second view; otherwise none is mirrored.
        size_px: side S of the square.

    Returns:
        (S, S, 3) uint8, perhaps read-only.
    """
    size = size_px or preprocessing.input_size
    image = _resize(pixels, config, FILTERS[preprocessing.interpolation], size, rng)
    if hflip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if "rotation" in config.augment:
        image = _rotate(image, rng.uniform(-config.rotation_deg, config.rotation_deg))
    if "erasing" in config.augment and rng.random() < config.erasing_prob:
        return _erase(image, rng)
    return np.asarray(image)


def _resize(
    pixels: UInt8Array,
    config: AugmentConfig,
    resample: Image.Resampling,
    size: int,
    rng: np.random.Generator,
) -> Image.Image:
    """Squash the image, or with "crop" a part of it that is not much slimmer, in one go."""
    image = Image.fromarray(pixels)
    box: tuple[float, float, float, float] | None = None
    if "crop" in config.augment:
        left, top, right, bottom = _draw_box((config.crop_scale, 1.0), _CROP_ASPECT, rng)
        box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    return image.resize((size, size), resample, box=box)


def _draw_box(
    area: tuple[float, float], aspect: float, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draw a box inside the unit square: left, top, right, bottom.

    Area uniform in the range given, width / height log-uniform in [1 / aspect, aspect], place uniform. Where
    such a box would stick out, its shape gives way and its area stays.

    Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015, arXiv:1409.4842, section 6.
    """
    share = rng.uniform(*area)
    ratio = math.exp(rng.uniform(-math.log(aspect), math.log(aspect)))
    width = min(max(math.sqrt(share * ratio), share), 1.0)
    height = share / width
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    # the sums may round to just over 1, which Pillow refuses
    return left, top, min(left + width, 1.0), min(top + height, 1.0)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Turn a square about its middle; what turns into the corners is the picture reflected at its edges."""
    size = image.width
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # half the square that holds the turned one, less half its own side, and a pixel to interpolate from
    pad = math.ceil((abs(cos) + abs(sin) - 1) * size / 2) + 1
    padded = np.pad(np.asarray(image), ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
    middle, half = size / 2 + pad, size / 2
    # x' = cos·(x − half) + sin·(y − half) + middle, and y' at right angles: from the view back to the picture
    matrix = (cos, sin, middle - half * (cos + sin), -sin, cos, middle - half * (cos - sin))
    return Image.fromarray(padded).transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )


def _erase(image: Image.Image, rng: np.random.Generator) -> UInt8Array:
    """Replace a rectangle by noise.

    The logarithm of its aspect is uniform, as in timm, so that flat and upright are equally frequent.

    Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, arXiv:1708.04896, algorithm 1.
    """
    view = np.array(image)  # a copy: what Pillow shows is read-only
    left, top, right, bottom = (
        round(edge * image.width) for edge in _draw_box(_ERASING_AREA, _ERASING_ASPECT, rng)
    )
    hole = view[top:bottom, left:right]
    hole[:] = rng.integers(0, 256, hole.shape, np.uint8)
    return view
