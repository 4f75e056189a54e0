"""First bytes → the name of a file format; who reads it; and the formats that PixelPlay does not read.

A file is what its content says; its extension plays no part.
"""

import io
from collections.abc import Callable

from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
# The readers' classes and not Image.open: no other code of Pillow is reached, its errors keep their message,
# and its limit on pixels, a global of the process and lower than ours, does not apply. HEIC is an extra.
READERS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "JPEG": JpegImageFile,  # the first picture of an MPO
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "TIFF": TiffImageFile,
    "AVIF": AvifImageFile,
}
_MAGIC: dict[str, tuple[bytes, ...]] = {  # how a file of each format begins
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
_BRANDS: tuple[tuple[bytes, str], ...] = (  # ISO base media files: the first brand that fits, in this order
    (b"crx ", "camera raw"),
    (b"avif", "AVIF"),
    (b"avis", "AVIF"),
    *((brand, "HEIC") for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")),
)
_BMP_HEADERS = {bytes((size, 0, 0, 0)) for size in (12, 40, 52, 56, 64, 108, 124)}


def name_format(data: bytes) -> str:
    """Name the format that the content declares.

    Returns:
        "JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF", "AVIF" or "HEIC"; the name of another format; or "" where
        the content is not known. Many camera raw files are TIFF by their first bytes.
    """
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        return next((name for brand, name in _BRANDS if brand in brands), "video" if len(data) >= 16 else "")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[:2] == b"BM" and data[14:18] in _BMP_HEADERS:
        return "BMP"
    if data[128:132] == b"DICM":
        return "DICOM"
    kind = next((name for name, magic in _MAGIC.items() if data.startswith(magic)), "")
    return kind or _name_markup(data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower())


def _name_markup(text: bytes) -> str:
    if text.startswith(b"<") and b"<svg" in text:
        return "SVG"
    return "HTML" if text.startswith((b"<!doctype html", b"<html")) else ""
