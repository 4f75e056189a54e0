"""Draw, encode, alter and damage images for tests; nothing is read from disk."""

import io
import struct
import zlib
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pixelplay.errors import ImageStatus

FORMATS: dict[str, dict[str, object]] = {  # format: options of encode() for a small typical file
    "JPEG": {"quality": 90},
    "PNG": {},
    "WebP": {"quality": 90},
    "BMP": {},
    "GIF": {},
    "TIFF": {"compression": "tiff_lzw"},
    "AVIF": {"quality": 80, "speed": 10},
}
if find_spec("pillow_heif"):  # an extra
    FORMATS["HEIC"] = {"quality": 80}


def draw(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Draw an image with a smooth background and some bright blocks.

    Args:
        seed: determines every pixel.
        size: width and height in pixels.
    """
    rng = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(float)
    waves = rng.uniform(0.5, 3, (3, 2)) * 2 * np.pi
    ground = [np.sin(a * x / width + b * y / height) for a, b in waves]
    pixels = (120 + 100 * np.stack(ground, axis=-1)).astype(np.uint8)  # (H, W, 3)
    for _ in range(4):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        across, down = 1 + width // 6, 1 + height // 6
        pixels[top : top + down, left : left + across] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    """Encode an image in one of FORMATS or any other format that Pillow writes.

    HEIC without pillow_heif skips the test.
    """
    if format == "HEIC":
        return _encode_heic(image, **options)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _encode_heic(image: Image.Image, **options: object) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, **options)
    return buffer.getvalue()


def icc_profile(space: str, gamma: float, primaries: NDArray[np.float64] | None = None) -> bytes:
    """Build a small ICC profile.

    Args:
        space: "RGB " or "GRAY".
        gamma: of every channel.
        primaries: (3, 3) columns red, green, blue in XYZ under D50; for "RGB " only.
    """

    def xyz(values: object) -> bytes:
        return b"XYZ \0\0\0\0" + np.round(np.asarray(values) * 65536).astype(">i4").tobytes()

    white = (0.9642, 1.0, 0.8249)
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    tags = {b"wtpt": xyz(white)}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for name, column in zip((b"r", b"g", b"b"), primaries.T, strict=True):
            tags |= {name + b"XYZ": xyz(column), name + b"TRC": curve}
    start = 132 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value
    head = struct.pack(">I4xI", start + len(body), 0x02400000)
    head += b"mntr" + space.encode() + b"XYZ " + bytes(12) + b"acsp" + bytes(28) + xyz(white)[8:]
    return head.ljust(128, b"\0") + table + body


def chunk(kind: bytes, body: bytes) -> bytes:
    """Build a PNG chunk with a valid checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def noisy_png() -> bytes:
    """Build a PNG that Pillow warns about: an animation control chunk without frames."""
    whole = encode(draw(1), "PNG")
    return whole[:33] + chunk(b"acTL", bytes(8)) + whole[33:]


def bomb_png(width: int = 60_000, height: int = 60_000) -> bytes:
    """Build a PNG of a few bytes that declares a huge image."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def grey_ended_jpeg() -> bytes:
    """Truncate a JPEG and append an end marker: decoders fill the rest with grey."""
    whole = encode(draw(3, (128, 128)), "JPEG")
    return whole[: len(whole) // 2] + b"\xff\xd9"


def damaged_files() -> dict[str, tuple[bytes, ImageStatus]]:
    """Build every kind of damaged or foreign file: name → bytes and expected status."""
    jpeg, png, gif = (encode(draw(1), format) for format in ("JPEG", "PNG", "GIF"))
    random = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8).tobytes()
    float_tiff = encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    wide_tiff = encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF")
    raw_tiff = encode(draw(1), "TIFF", tiffinfo={50706: b"\1\4\0\0"})
    return {
        "empty.jpg": (b"", "unreadable"),
        "empty.gif": (b"", "unreadable"),
        "text.jpg": (b"Dear Sir or Madam, the image is attached.\n" * 9, "unreadable"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "unreadable"),
        "random.jpg": (random, "unreadable"),
        "zeros.jpg": (bytes(4096), "unreadable"),
        "archive.jpg": (b"PK\3\4" + random, "unreadable"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "unreadable"),
        "header_only.jpg": (jpeg[:20], "unreadable"),
        "grey_end.jpg": (grey_ended_jpeg(), "unreadable"),
        "random_behind_magic.jpg": (jpeg[:3] + random, "unreadable"),
        "cut.png": (png[: len(png) // 2], "unreadable"),
        "magic_only.png": (png[:8], "unreadable"),
        "broken_crc.png": (png[:17] + b"\xff" + png[18:], "unreadable"),
        "no_pixels.png": (png[:33] + chunk(b"IEND", b""), "unreadable"),
        "cut.gif": (gif[: len(gif) // 2], "unreadable"),
        "cut.bmp": (encode(draw(1), "BMP")[:3000], "unreadable"),
        "cut.webp": (encode(draw(1), "WebP")[:200], "unreadable"),
        "cut.tif": (encode(draw(1), "TIFF")[:3000], "unreadable"),
        "cut.avif": (encode(draw(1), "AVIF", speed=10)[:300], "unreadable"),
        "bomb.png": (bomb_png(), "too_large"),
        "bomb.gif": (gif[:6] + b"\xff\xff\xff\xff" + gif[10:], "too_large"),
        "photoshop.jpg": (b"8BPS\0\1" + bytes(64), "unsupported"),
        "document.jpg": (b"%PDF-1.7\n" + random, "unsupported"),
        "drawing.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported"),
        "postscript.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported"),
        "icon.ico": (b"\0\0\1\0\1\0" + bytes(64), "unsupported"),
        "jpeg2000.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64), "unsupported"),
        "jpeg_xl.jxl": (b"\xff\x0a" + bytes(64), "unsupported"),
        "netpbm.ppm": (encode(draw(1), "PPM"), "unsupported"),
        "video.mp4": (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(64), "unsupported"),
        "canon.cr3": (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(64), "unsupported"),
        "adobe.dng": (raw_tiff, "unsupported"),
        "float.tif": (float_tiff, "unsupported"),
        "wide.tif": (wide_tiff, "unsupported"),
    }


def mangled_files(whole: bytes, count: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """Damage a file in `count` ways: flip bits, truncate and overwrite the header, in turn.

    Returns:
        (kind of damage, bytes); the kind is "flipped", "cut" or "header".
    """
    rng = np.random.default_rng(seed)
    ways: tuple[tuple[str, Callable[[bytes, np.random.Generator], bytes]], ...] = (
        ("flipped", _flip_bits),
        ("cut", lambda data, rng: data[: int(rng.integers(0, len(data)))]),
        ("header", _overwrite_header),
    )
    return [(ways[i % 3][0], ways[i % 3][1](whole, rng)) for i in range(count)]


def _flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    values: NDArray[np.uint8] = np.frombuffer(data, np.uint8).copy()
    places = rng.integers(0, len(data), int(rng.integers(1, 20)))
    values[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
    return values.tobytes()


def _overwrite_header(data: bytes, rng: np.random.Generator) -> bytes:
    start, length = int(rng.integers(0, 64)), int(rng.integers(1, 16))
    noise = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
    return data[:start] + noise + data[start + length :]


def scene(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """Draw an image with detail at every scale, like a photo.

    Args:
        seed: determines every pixel.
        size: width and height in pixels.
    """
    rng = np.random.default_rng(seed)
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    spectrum = 1 / np.maximum(frequency, 1 / max(size)) ** 1.2
    noise = np.fft.fft2(rng.standard_normal((4, height, width)))  # one for each colour, one for all
    fields = np.fft.ifft2(noise * spectrum).real  # (4, H, W)
    fields /= fields.std(axis=(1, 2), keepdims=True)
    pixels = 120 + 40 * (fields[3] + 0.4 * fields[:3])  # (3, H, W)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def altered(image: Image.Image) -> dict[str, bytes]:
    """Encode near-duplicates of an image as they occur in collected data: kind → file."""
    width, height = image.size
    small = image.resize((round(0.6 * width), round(0.6 * height)), Image.Resampling.BICUBIC)
    marked = image.copy()
    marked.paste((255, 255, 255), (width // 8, height // 2, width // 2, height // 2 + height // 12))
    brighter = image.point(lambda value: min(255, round(1.3 * value)))
    return {
        "re-encoded": encode(image, "JPEG", quality=50),
        "resized": encode(small, "JPEG", quality=90),
        "cut": encode(image.crop((width // 10, 0, width, height - height // 10)), "JPEG", quality=90),
        "mirrored": encode(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "JPEG", quality=90),
        "watermarked": encode(marked, "JPEG", quality=90),
        "brightened": encode(brighter, "JPEG", quality=90),
    }
