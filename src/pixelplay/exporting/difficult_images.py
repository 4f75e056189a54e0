"""Draw small image files of kinds on which exported models often differ from the original."""

import io

import numpy as np
from PIL import Image

from pixelplay.array_types import UInt8Array

N_NOISE = 4
_EXIF_ORIENTATION = 274


def draw_difficult_images() -> dict[str, bytes]:
    """Encode the same images at every call: description → file."""
    rng = np.random.default_rng(0)
    waves = _draw_waves(180, 240)
    rotated = Image.Exif()
    rotated[_EXIF_ORIENTATION] = 6
    alpha = np.dstack([waves, waves[:, :, 0]])
    images: dict[str, Image.Image] = {
        "1 x 1 px": Image.new("RGB", (1, 1), (200, 30, 60)),
        "1 x 900 px": Image.fromarray(_draw_waves(900, 1)),
        "900 x 1 px": Image.fromarray(_draw_waves(1, 900)),
        "grey": Image.fromarray(waves[:, :, 0]),
        "16-bit grey": Image.fromarray(waves[:, :, 0].astype(np.uint16) * 257),
        "transparent": Image.fromarray(alpha),
        "black": Image.new("RGB", (240, 180)),
        "white": Image.new("RGB", (240, 180), "white"),
    }
    images |= {
        f"noise {i}": Image.fromarray(rng.integers(0, 256, (224, 224, 3), np.uint8)) for i in range(N_NOISE)
    }
    files = {name: _encode(image, "PNG") for name, image in images.items()}
    photo = Image.fromarray(waves)
    files["CMYK"] = _encode(photo.convert("CMYK"), "JPEG")
    files["rotated by EXIF"] = _encode(photo, "JPEG", exif=rotated)
    return files


def _draw_waves(height: int, width: int) -> UInt8Array:
    """Draw smooth waves, different in each channel: (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 17 + channel) * np.cos(y / (11 + channel)) for channel in range(3)]
    return np.asarray((127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8))


def _encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
