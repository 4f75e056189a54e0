"""Decode image files: formats, EXIF orientation, ICC profiles, transparency, 16 bit.

The format is detected from the content; the file extension is ignored.
"""

import io
import logging
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pixelplay.array_types import UInt8Array
from pixelplay.errors import ImageError

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif",
)  # fmt: skip
# Reader classes instead of Image.open: no other Pillow plugin is reachable, errors keep their message, and
# Pillow's process-wide pixel limit, lower than ours, does not apply. HEIC is an extra.
READERS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "JPEG": JpegImageFile,  # the first image of an MPO
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "TIFF": TiffImageFile,
    "AVIF": AvifImageFile,
}
_MAGIC: dict[str, tuple[bytes, ...]] = {  # first bytes of each format
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "Photoshop (PSD)": (b"8BPS",),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "JPEG XL": (b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a"),
    "PDF": (b"%PDF",),
    "PostScript": (b"%!PS", b"\xc5\xd0\xd3\xc6"),
    "icon (ICO)": (b"\0\0\1\0", b"\0\0\2\0"),
    "camera raw": (b"IIRO", b"IIRS", b"IIU\0", b"FUJIFILMCCD-RAW", b"FOVb", b"\0MRM"),
    "OpenEXR": (b"v/1\1",),
    "GIMP (XCF)": (b"gimp xcf",),
    "Netpbm (PPM)": tuple(b"P%d%c" % (kind, space) for kind in range(1, 7) for space in b"\n\r\t #"),
}
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# brand of an ISO base media file → format; the first match in this order decides
_BRANDS = {b"crx ": "camera raw", b"avif": "AVIF", b"avis": "AVIF", **dict.fromkeys(_HEIC_BRANDS, "HEIC")}
_BMP_HEADERS = {bytes((size, 0, 0, 0)) for size in (12, 40, 52, 56, 64, 108, 124)}
DECODE_VERSION = 2  # part of cache keys: increase it when the same bytes decode to other pixels
MAX_PIXELS = 250_000_000  # phones make 200 megapixels, bombs far more; Pillow limits TIFF and WebP to 179
MAX_VALUE = 65535.0  # of 16 bits: white, unless a dataset has another range
MAX_BYTES = 1 << 30  # of one encoded file
REMEDY = "convert it to JPEG or PNG"
_STRIP_BYTES = 1 << 18  # copied at once from Pillow's memory: fits the processor's cache
_DNG_VERSION, _NEW_SUBFILE_TYPE, _PHOTOMETRIC, _ORIENTATION = 50706, 254, 262, 274  # TIFF tags
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where a PNG can store an orientation
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ICC_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # Pillow mode: colour space of a matching profile


def name_format(data: bytes) -> str:
    """Detect the format of a file from its content.

    Returns:
        A key of READERS or "HEIC"; the name of an unsupported format; or "" if it is unknown. Many camera
        raw files start like TIFF.
    """
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        return next(
            (name for brand, name in _BRANDS.items() if brand in brands), "video" if len(data) >= 16 else ""
        )
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[:2] == b"BM" and data[14:18] in _BMP_HEADERS:
        return "BMP"
    if data[128:132] == b"DICM":
        return "DICOM"
    if data[:2] == bytes(2) and data[2:3] in b"\2\3\n\v" and data[3:8] == bytes(5):
        return "Targa (TGA)"  # an icon has the number of its images in bytes 4 and 5
    text = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    is_svg = text.startswith(b"<") and b"<svg" in text
    other = "SVG" if is_svg else "HTML" if text.startswith((b"<!doctype html", b"<html")) else ""
    return next((name for name, magic in _MAGIC.items() if data.startswith(magic)), other)


@dataclass(frozen=True)
class ImageInfo:
    """Header of an image; width and height are in pixels, after EXIF orientation."""

    format: str  # "JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF", "AVIF" or "HEIC"
    width: int
    height: int
    mode: str  # Pillow's name for the pixel layout in the file


def is_deep(mode: str) -> bool:
    """Return whether a pixel layout of Pillow has more than 8 bits per channel."""
    return mode.startswith(("I", "F"))


def largest_value(data: bytes, *, path: str) -> float | None:
    """Return the largest value of an image with more than 8 bits, else None; errors as `decode_image`."""
    kind, image = _open(data, path)
    if not is_deep(image.mode):
        return None
    with _as_image_error(path, kind):
        values = np.asarray(image)
    finite = values[np.isfinite(values)] if image.mode == "F" else values
    return float(finite.max()) if finite.size else None


def decode_image(
    data: bytes, *, path: str, target_px: int | None = None, max_value: float = MAX_VALUE
) -> UInt8Array:
    """Decode one image file to upright sRGB pixels.

    Transparent pixels are composited over white; only the first frame or page is decoded.

    Args:
        data: the whole file.
        path: names the image in errors.
        target_px: short side that the caller will resize to. A JPEG is decoded at 1/2, 1/4 or 1/8 of its
            size as long as its short side stays at least twice that. Other formats ignore it.
        max_value: value of white in images with more than 8 bits per channel.

    Returns:
        (H, W, 3) uint8, C-contiguous and writable.

    Raises:
        ImageError: unreadable, too large or unsupported.
    """
    kind, image = _open(data, path)
    with _as_image_error(path, kind):
        if kind == "JPEG" and target_px is not None:
            image.draft(None, (2 * target_px, 2 * target_px))
        image.load()
        if kind == "JPEG" and _ends_early(image, data):
            raise ImageError(path, "unreadable", "truncated JPEG file")
    return to_rgb(image, path=path, max_value=max_value)


def check_pixels(data: bytes, *, path: str, limit: float) -> None:
    """Raise ImageError if the header of an image shows an error, or more pixels than a limit."""
    _, image = _open(data, path)
    _check_pixels(image.size, path, limit)


def probe_image(data: bytes, *, path: str) -> ImageInfo:
    """Read the header of an image file; raises ImageError as `decode_image` if the header shows the error."""
    kind, image = _open(data, path)
    width, height = image.size
    # Pillow has oriented the size of a TIFF; to find the EXIF of a PNG, getexif() may decode the pixels
    if kind != "TIFF" and (kind != "PNG" or any(name in data for name in _PNG_EXIF)):
        with _as_image_error(path, kind):
            if _orientation(image) >= 5:
                width, height = height, width
    return ImageInfo(kind, width, height, image.mode)


def to_rgb(image: Image.Image, *, path: str, max_value: float = MAX_VALUE) -> UInt8Array:
    """Convert an opened image of any mode to upright sRGB pixels over white.

    Broken EXIF and ICC profiles are ignored, and so is a profile of another colour space.

    Args:
        max_value: as in `decode_image`.

    Returns:
        (H, W, 3) uint8, C-contiguous and writable.

    Raises:
        ImageError: pixels cannot be read, or are of a kind that `max_value` does not fit.
    """
    with _as_image_error(path, image.format or image.mode):
        image.load()
        _check_pixels(image.size, path)
        profile = image.info.get("icc_profile")
        is_inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0
        if (method := _TRANSPOSE.get(_orientation(image))) is not None:
            image = image.transpose(method)
        if is_deep(image.mode):
            image = _eight_bit(image, path, max_value, inverted=is_inverted)
        return _to_array(image, profile)


def check_array(array: NDArray[Any], *, path: str, max_value: float = MAX_VALUE) -> UInt8Array:
    """Convert an array of pixels to the form of a decoded image.

    Args:
        array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8 or uint16; a fourth channel is alpha,
            composited over white.
        max_value: value of white in uint16.

    Returns:
        (H, W, 3) uint8, C-contiguous; the input itself if it already has this form.

    Raises:
        ImageError: another shape or dtype, no pixels, or too many.
    """
    shape = array.shape
    if len(shape) != 2 and (len(shape) != 3 or shape[2] not in (1, 3, 4)):
        reason = f"array of shape {shape}; pass (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        raise ImageError(path, "unsupported", reason)
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise ImageError(path, "unsupported", f"array of {array.dtype}; pass uint8 (0 to 255) or uint16")
    if array.size == 0:
        raise ImageError(path, "unreadable", f"array of shape {shape} has no pixels")
    _check_pixels((shape[1], shape[0]), path)
    pixels: UInt8Array = _scale(array, max_value) if array.dtype.itemsize == 2 else array
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]  # (H, W, 1)
    if pixels.shape[2] == 4:
        return to_rgb(Image.fromarray(np.ascontiguousarray(pixels)), path=path)
    return np.ascontiguousarray(pixels) if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def _open(data: bytes, path: str) -> tuple[str, ImageFile]:
    """Detect the format and read the header, without decoding pixels."""
    if not data:
        raise ImageError(path, "unreadable", "empty file")
    if len(data) > MAX_BYTES:
        raise ImageError(path, "too_large", f"{len(data):,} bytes; the limit is {MAX_BYTES:,} bytes")
    kind = name_format(data)
    reader = _find_reader(kind, data, path)
    with _as_image_error(path, kind):
        image = reader(io.BytesIO(data))
    _check_pixels(image.size, path)
    # the first image of a raw file is marked as a thumbnail
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if _DNG_VERSION in tags or tags.get(_NEW_SUBFILE_TYPE) == 1:
        raise _unsupported(path, "camera raw")
    return kind, image


def _find_reader(kind: str, data: bytes, path: str) -> Callable[[io.BytesIO], ImageFile]:
    """Return the reader of a format, or raise ImageError; the HEIC reader is imported only when needed."""
    if kind in READERS:
        return READERS[kind]
    if kind == "HEIC":
        try:
            from pillow_heif import HeifImageFile
        except ImportError:
            reason = f"HEIC needs pip install 'pixelplay[heif]', or {REMEDY}"
            raise ImageError(path, "unsupported", reason) from None
        return cast("Callable[[io.BytesIO], ImageFile]", HeifImageFile)
    if kind == "HTML":
        raise ImageError(path, "unreadable", "not an image but an HTML page; download it again")
    if kind:
        raise _unsupported(path, kind)
    detail = "" if data.strip(b"\0") else " (zero bytes only)"
    raise ImageError(path, "unreadable", f"not an image{detail}")


def _unsupported(path: str, kind: str) -> ImageError:
    return ImageError(path, "unsupported", f"{kind} is not supported; {REMEDY}")


def _check_pixels(size: tuple[int, int], path: str, limit: float = MAX_PIXELS) -> None:
    if size[0] * size[1] > limit:
        reason = f"{size[0]} × {size[1]} is {size[0] * size[1] / 1e6:,.0f} megapixels"
        raise ImageError(path, "too_large", f"{reason}; the limit is {limit / 1e6:,.0f}")


@contextmanager
def _as_image_error(path: str, kind: str) -> Iterator[None]:
    """Turn any error that Pillow raises on these bytes into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(path, "too_large", str(error)) from error
    # On hostile bytes Pillow raises SyntaxError, struct.error, KeyError, MemoryError and more, all
    # undocumented, and one bad file among 50,000 must not end the run.
    except Exception as error:
        message = [*str(error).strip().splitlines(), type(error).__name__][0]
        if re.search("unknown pixel mode|support", message, re.IGNORECASE):
            raise _unsupported(path, f"this kind of {kind}") from error
        is_short = isinstance(error.__cause__ or error, EOFError | struct.error | IndexError)
        if is_short or re.search("truncated|end of file|insufficient", message, re.IGNORECASE):
            raise ImageError(path, "unreadable", f"truncated {kind} file") from error
        raise ImageError(path, "unreadable", f"damaged {kind} file ({message})") from error


def _ends_early(image: Image.Image, data: bytes) -> bool:
    """Check whether a baseline JPEG has an end marker but lacks pixels before it.

    libjpeg fills such a file with mid-grey without telling Pillow. If the last pixel is mid-grey, decode
    again without the end marker: a file that lacks data then fails.
    """
    last = np.asarray(image.getpixel((image.width - 1, image.height - 1)))
    if not image.info.get("progressive") and np.isin(last, (127, 128)).all():
        try:
            JpegImageFile(io.BytesIO(data[: data.rfind(b"\xff\xd9")] + bytes(16))).load()
        except OSError:
            return True
    return False


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it is missing or the EXIF is broken."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        return int(value) if value in _TRANSPOSE else 1
    except Exception:  # broad as in _as_image_error; the pixels can still be good
        return 1


def _eight_bit(image: Image.Image, path: str, max_value: float, *, inverted: bool) -> Image.Image:
    """Convert a grey image with 16 or 32 bits to mode L; `inverted` where 0 is white."""
    values = np.asarray(image)  # (H, W)
    # Without the range of a dataset, nothing tells what white is in a float image.
    fits = max_value != MAX_VALUE or (image.mode != "F" and values.min() >= 0 and values.max() <= MAX_VALUE)
    if not fits or not np.isfinite(values).all():
        kind = image.format or "image"
        raise _unsupported(path, f"32-bit float {kind}" if image.mode == "F" else f"a 32-bit {kind}")
    scaled = _scale(values, max_value)
    return Image.fromarray(255 - scaled if inverted else scaled)


def _scale(values: NDArray[Any], max_value: float) -> UInt8Array:
    """Scale 0 … max_value to 0 … 255, rounded; other values are clipped."""
    if max_value == MAX_VALUE and values.dtype.kind in "ui":  # 65535 / 257 = 255 exactly
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    scaled = values.astype(np.float64) * (255 / max_value)
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


@lru_cache(maxsize=64)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the transform from an ICC profile to sRGB; None if it changes nothing or is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _ICC_SPACES[mode]:
            return None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.ImageCmsTransform(source, srgb, mode, "RGB")
    except Exception:  # broad as in _as_image_error; the pixels can still be good
        return None
    if mode == "RGB":
        # sRGB profiles have many names but no effect on a grid of 16³ colours
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
        moved = np.asarray(transform.apply(Image.fromarray(colours)))
        if np.abs(moved.astype(int) - colours).max() <= 2:
            return None
    return transform


def _over_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image of any mode to sRGB and composite it over white."""
    alpha = None
    if image.has_transparency_data:
        is_grey = image.mode in {"1", "L", "LA", "La"}
        full = image.convert("LA" if is_grey else "RGBA")
        image, alpha = full.convert("L" if is_grey else "RGB"), full.getchannel("A")
    if image.mode not in _ICC_SPACES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = _srgb_transform(profile, image.mode) if profile else None
    if transform is not None:
        image = transform.apply(image)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def _to_array(image: Image.Image, profile: bytes | None) -> UInt8Array:
    """Copy an image into an sRGB array by strips: 3 times as fast as numpy.array, and needs less memory."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_BYTES // (3 * width))
    for top in range(0, height, rows):
        strip = _over_white(image.crop((0, top, width, min(top + rows, height))), profile)
        pixels[top : top + rows] = np.frombuffer(strip.tobytes(), np.uint8).reshape(-1, width, 3)
    return pixels


class _Silence:
    """Count of blocks that silence Pillow, and how to restore the previous state."""

    lock = threading.Lock()
    n_blocks = 0
    undo = ExitStack()


@contextmanager
def silence_pillow() -> Iterator[None]:
    """Suppress Pillow's warnings and log lines while the block decodes images.

    Warning filters are global to a process: the first block that starts changes them, the last that ends
    restores them.
    """
    with _Silence.lock:
        _Silence.n_blocks += 1
        if _Silence.n_blocks == 1:
            _Silence.undo.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\b")
            logger = logging.getLogger("PIL")
            _Silence.undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        with _Silence.lock:
            _Silence.n_blocks -= 1
            if _Silence.n_blocks == 0:
                _Silence.undo.close()
