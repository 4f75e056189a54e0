"""Training augmentation: crop, flip, rotation, erasing."""

import math

import numpy as np
from PIL import Image

from pixelplay.array_types import UInt8Array
from pixelplay.config import AugmentConfig
from pixelplay.data.transforms import FILTERS, Box, Preprocessing, Size

SETTING_USED_BY = {  # setting → the augmentations that it belongs to
    "crop_scale": ("crop",),
    "rotation_deg": ("rotation",),
    "erasing_prob": ("erasing",),
    "mixup_alpha": ("mixup",),
    "cutmix_alpha": ("cutmix",),
    "mix_prob": ("mixup", "cutmix"),
    "mix_off_frac": ("mixup", "cutmix"),
}
_CROP_ASPECT = 4 / 3  # largest change of the aspect ratio by a crop
_ERASING_AREA = (0.02, 0.33)
_ERASING_ASPECT = 3.3


def augment_view(
    pixels: UInt8Array,
    config: AugmentConfig,
    preprocessing: Preprocessing,
    rng: np.random.Generator,
    *,
    hflip: bool,
    size: Size | None = None,
) -> UInt8Array:
    """Draw one augmented view of an image.

    The image is cropped, resized, flipped, rotated and partly erased, depending on `config.augment`. Without
    augmentations it is only resized. mixup and cutmix work on batches and are applied elsewhere.

    Args:
        pixels: (H, W, 3) uint8, already fitted to the aspect ratio of the input; not modified.
        rng: only source of randomness; the same state gives the same bytes on any thread.
        hflip: flip with probability 0.5.
        size: (S_h, S_w) of the view; by default the network's input size.

    Returns:
        (S_h, S_w, 3) uint8, possibly read-only.
    """
    height, width = size or preprocessing.input_size
    image = Image.fromarray(pixels)
    box: Box | None = None
    if "crop" in config.augment:
        left, top, right, bottom = _draw_box((config.crop_scale, 1.0), _CROP_ASPECT, rng)
        box = left * image.width, top * image.height, right * image.width, bottom * image.height
    image = image.resize((width, height), FILTERS[preprocessing.interpolation], box=box)
    if hflip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if "rotation" in config.augment:
        image = _rotate(image, rng.uniform(-config.rotation_deg, config.rotation_deg))
    if "erasing" in config.augment and rng.random() < config.erasing_prob:
        return _erase(image, rng)
    return np.asarray(image)


def _draw_box(area: tuple[float, float], aspect: float, rng: np.random.Generator) -> Box:
    """Draw a box inside the unit square: left, top, right, bottom.

    The area is uniform in its range, width / height log-uniform in [1 / aspect, aspect], the position
    uniform. A box that would not fit keeps its area and changes its aspect ratio.

    Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015, arXiv:1409.4842, section 6.
    """
    share = rng.uniform(*area)
    ratio = math.exp(rng.uniform(-math.log(aspect), math.log(aspect)))
    width = min(max(math.sqrt(share * ratio), share), 1.0)
    height = share / width
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    # the sums can round to just over 1, which Pillow refuses
    return left, top, min(left + width, 1.0), min(top + height, 1.0)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Rotate an image about its centre; the corners are filled by reflection at the edges."""
    x, y = image.width / 2, image.height / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # what the rotated rectangle's bounding box exceeds the image by, plus a pixel for interpolation
    pad_x = max(0, math.ceil(abs(cos) * x + abs(sin) * y - x)) + 1
    pad_y = max(0, math.ceil(abs(sin) * x + abs(cos) * y - y)) + 1
    padded = np.pad(np.asarray(image), ((pad_y, pad_y), (pad_x, pad_x), (0, 0)), mode="symmetric")
    # from view to padded image: x' = cos·(x − x₀) + sin·(y − y₀) + x₀ + pad_x, and y' perpendicular to it
    matrix = (cos, sin, x + pad_x - cos * x - sin * y, -sin, cos, y + pad_y + sin * x - cos * y)
    return Image.fromarray(padded).transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )


def _erase(image: Image.Image, rng: np.random.Generator) -> UInt8Array:
    """Replace a rectangle by noise.

    The logarithm of its aspect ratio is uniform, as in timm, so that wide and tall are equally frequent.

    Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, arXiv:1708.04896, algorithm 1.
    """
    view = np.array(image)  # a copy: np.asarray would be read-only
    box = _draw_box(_ERASING_AREA, _ERASING_ASPECT, rng)
    left, right = (round(edge * image.width) for edge in box[::2])
    top, bottom = (round(edge * image.height) for edge in box[1::2])
    hole = view[top:bottom, left:right]
    hole[:] = rng.integers(0, 256, hole.shape, np.uint8)
    return view
