"""Tests of pixelplay.data.decode."""

import io
import logging
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

from images import (
    FORMATS,
    bomb_png,
    chunk,
    damaged_files,
    draw,
    encode,
    icc_profile,
    mangled_files,
    noisy_png,
)
from pixelplay.data import decode
from pixelplay.data.decode import (
    MAX_PIXELS,
    ImageInfo,
    check_array,
    decode_image,
    probe_image,
    silence_pillow,
    to_rgb,
)
from pixelplay.errors import ImageError, ImageStatus

Pixels = NDArray[np.uint8]

ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
DAMAGED = damaged_files()
FAILURES: set[ImageStatus] = {"unreadable", "too_large", "unsupported"}


def array(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"))


def over_white(color: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[..., None] / 255
    return np.round(color * share + 255 * (1 - share)).astype(np.uint8)


def assert_close(left: Pixels, right: Pixels, levels: int) -> None:
    assert left.shape == right.shape
    assert np.abs(left.astype(int) - right).max() <= levels


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation as its standard describes it: where row 0 and column 0 of the file lie."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)  # rows of the file are columns of the image
    top_down = orientation in (1, 2, 5, 6)
    left_right = orientation in (1, 4, 5, 8)
    return pixels[:: 1 if top_down else -1, :: 1 if left_right else -1]


def outcome(function: Callable[..., object], data: bytes) -> str:
    try:
        function(data, path="a")
    except ImageError as error:
        return f"{error.status}: {error.reason}"
    return "ok"


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags.tobytes()


# --- formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_decode_exactly(format: str) -> None:
    image = draw(1)
    pixels = decode_image(encode(image, format), path="a.jpg")
    np.testing.assert_array_equal(pixels, array(image))
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


@pytest.mark.parametrize("format", FORMATS)
def test_format_is_detected_from_the_content(format: str) -> None:
    data = encode(draw(1), format, **FORMATS[format])
    pixels = decode_image(data, path="image.txt")
    assert np.abs(pixels.astype(int) - array(draw(1))).mean() < 12
    assert probe_image(data, path="image.txt") == ImageInfo(format, 64, 48, "P" if format == "GIF" else "RGB")


def test_jpeg_decodes_as_in_pillow() -> None:
    data = encode(draw(2, (333, 222)), "JPEG")
    np.testing.assert_array_equal(decode_image(data, path="a"), np.asarray(Image.open(io.BytesIO(data))))


def test_images_larger_than_a_strip_are_copied_completely() -> None:
    image = draw(2, (700, 501))
    np.testing.assert_array_equal(to_rgb(image, path="a"), array(image))


def test_mpo_decodes_to_its_first_image() -> None:
    data = encode(draw(1), "MPO", save_all=True, append_images=[draw(2)], quality=95)
    assert probe_image(data, path="a").format == "JPEG"
    np.testing.assert_array_equal(
        decode_image(data, path="a"), decode_image(encode(draw(1), "JPEG", quality=95), path="a")
    )


@pytest.mark.parametrize("format", ["GIF", "WebP", "PNG", "TIFF"])
def test_only_the_first_frame_is_decoded(format: str) -> None:
    options = {"lossless": True} if format == "WebP" else {}
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "lime")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode_image(data, path="a"), array(frames[0]))


def test_heic_without_its_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for function in (decode_image, probe_image):
        with pytest.raises(ImageError, match=r"pip install 'pixelplay\[heif\]'") as caught:
            function(data, path="a.jpg")
        assert caught.value.status == "unsupported"


# --- modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "levels"), [("RGBX", 0), ("CMYK", 1), ("YCbCr", 3), ("HSV", 6), ("LAB", 20)]
)
def test_every_mode_keeps_its_colours(mode: str, levels: int) -> None:
    # Pillow keeps HSV and LAB in 8 bits: saturated blues lose most.
    pixels = to_rgb(draw(3).convert(mode), path="a")
    assert_close(pixels, array(draw(3)), levels)
    assert np.abs(pixels.astype(int) - array(draw(3))).mean() < 1.5


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_images_become_rgb(mode: str) -> None:
    image = draw(3).quantize(64) if mode == "P" else draw(3).convert(mode)
    levels = np.asarray(image.convert("RGB")) if mode == "P" else np.asarray(image.convert("L"))
    expected = levels if mode == "P" else np.stack([levels] * 3, axis=-1)
    np.testing.assert_array_equal(to_rgb(image, path="a"), expected)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparency_is_composited_over_white(mode: str) -> None:
    color = draw(3).quantize(32).convert("RGB") if mode == "PA" else draw(3)
    color = color.convert("L").convert("RGB") if mode in ("LA", "La") else color
    alpha = Image.linear_gradient("L").resize(color.size)
    if mode == "PA":
        image = color.quantize(32).convert("PA")
        image.putalpha(alpha)
    elif mode in ("LA", "La"):
        image = Image.merge("LA", (color.convert("L"), alpha)).convert(mode)
    else:
        image = Image.merge("RGBA", (*color.split(), alpha)).convert(mode)
    # Premultiplied colour is coarse where it is nearly transparent; over white that is one level or two.
    assert_close(to_rgb(image, path=mode), over_white(array(color), np.asarray(alpha)), 2)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_transparent_png_colour_becomes_white(mode: str) -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white" if mode == "1" else "red", (4, 0, 8, 8))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    transparent = image.getpixel((0, 0))
    expected = array(image).copy()
    expected[:, :4] = 255
    np.testing.assert_array_equal(
        decode_image(encode(image, "PNG", transparency=transparent), path="a"), expected
    )


def test_palette_transparency_is_composited_over_white() -> None:
    image = draw(3).quantize(16)
    alphas = bytes(range(0, 256, 16))
    expected = over_white(array(image), np.frombuffer(alphas, np.uint8)[np.asarray(image)])
    assert_close(decode_image(encode(image, "PNG", transparency=alphas), path="a"), expected, 1)


def test_transparent_gif_is_composited_over_white() -> None:
    image = draw(3).quantize(16)
    expected = array(image).copy()
    expected[np.asarray(image) == 3] = 255
    data = encode(image, "GIF", transparency=3, optimize=False)
    np.testing.assert_array_equal(decode_image(data, path="a"), expected)


@pytest.mark.parametrize(
    ("format", "mode"),
    [("TIFF", "CMYK"), ("TIFF", "LAB"), ("TIFF", "YCbCr"), ("JPEG", "CMYK")],
)
def test_other_colour_spaces_become_rgb(format: str, mode: str) -> None:
    data = encode(draw(3).convert(mode), format)
    assert probe_image(data, path="a").mode == mode
    assert_close(decode_image(data, path="a"), array(Image.open(io.BytesIO(data))), 0)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_divided_by_257(format: str) -> None:
    values = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    expected = np.round(values / 257).astype(np.uint8)
    pixels = decode_image(encode(Image.fromarray(values), format), path="a")
    np.testing.assert_array_equal(pixels, np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "i4"])
def test_16_bit_grey_in_memory_is_divided_by_257(dtype: str) -> None:
    values = np.array([[0, 128, 129, 257, 65535]])
    pixels = to_rgb(Image.fromarray(values.astype(dtype)), path="a")
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 1, 1, 255])


@pytest.mark.parametrize(
    "image", [Image.new("F", (4, 4)), Image.new("I", (4, 4), 65536), Image.new("I", (4, 4), -1)]
)
def test_32_bit_pixels_are_unsupported(image: Image.Image) -> None:
    with pytest.raises(ImageError, match="32-bit") as caught:
        to_rgb(image, path="a")
    assert caught.value.status == "unsupported"


# --- orientation and colour profiles -----------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WebP", "TIFF"])
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    image = draw(4)
    options = {"lossless": True} if format == "WebP" else {}
    data = encode(image, format, exif=exif(orientation), **options)
    expected = turned(array(image), orientation)
    np.testing.assert_array_equal(decode_image(data, path="a"), expected)
    info = probe_image(data, path="a")
    assert (info.height, info.width) == expected.shape[:2]


@pytest.mark.parametrize("format", ["JPEG", "AVIF", "HEIC"])
def test_exif_orientation_of_lossy_formats_is_applied(format: str) -> None:
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 16, 32))  # orientation 6: the left of the file is the top of the image
    data = encode(image, format, exif=exif(6))
    pixels = decode_image(data, path="a")
    assert pixels.shape == (64, 32, 3)
    assert pixels[:14].max() < 60
    assert pixels[18:].min() > 195
    info = probe_image(data, path="a")
    assert (info.width, info.height) == (32, 64)


def test_exif_orientation_after_png_pixels_is_applied() -> None:
    whole = encode(draw(4), "PNG")
    data = whole[:-12] + chunk(b"eXIf", exif(8)[6:]) + whole[-12:]
    np.testing.assert_array_equal(decode_image(data, path="a"), turned(array(draw(4)), 8))
    assert probe_image(data, path="a").height == 64


@pytest.mark.parametrize(
    "broken", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\x01" * 50, exif(9)]
)
def test_broken_exif_is_ignored(broken: bytes) -> None:
    data = encode(draw(4), "PNG", exif=broken)
    np.testing.assert_array_equal(decode_image(data, path="a"), array(draw(4)))


def test_icc_profile_is_converted_to_srgb() -> None:
    image = draw(5)
    profile = icc_profile("RGB ", 563 / 256, ADOBE_RGB)
    linear = (array(image) / 255) ** (563 / 256) @ (np.linalg.inv(SRGB) @ ADOBE_RGB).T
    linear = linear.clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    expected = np.round(255 * srgb).astype(np.uint8)
    pixels = decode_image(encode(image, "PNG", icc_profile=profile), path="a")
    assert_close(pixels, expected, 3)
    assert np.abs(pixels.astype(int) - array(image)).max() > 10


def test_wide_gamut_icc_profile_makes_green_more_saturated() -> None:
    image = Image.new("RGB", (2, 2), (90, 160, 90))
    data = encode(image, "PNG", icc_profile=icc_profile("RGB ", 563 / 256, ADOBE_RGB))
    red, green, _ = decode_image(data, path="a")[0, 0]
    assert red < 70
    assert abs(int(green) - 160) <= 3


def test_grey_icc_profile_is_applied_to_grey_pixels() -> None:
    levels = np.arange(256, dtype=np.uint8)[None]
    data = encode(Image.fromarray(levels), "PNG", icc_profile=icc_profile("GRAY", 1.0))
    pixels = decode_image(data, path="a")
    assert abs(int(pixels[0, 55, 0]) - 128) <= 2  # linear 0.2157 is sRGB 128
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_srgb_icc_profile_changes_no_pixel() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encode(draw(5), "PNG", icc_profile=profile)
    np.testing.assert_array_equal(decode_image(data, path="a"), array(draw(5)))


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"not a profile"),
        ("RGB", icc_profile("GRAY", 1.0)),
        ("L", icc_profile("RGB ", 1.0, ADOBE_RGB)),
        ("RGB", icc_profile("RGB ", 1.0, ADOBE_RGB)[:150]),
    ],
)
def test_broken_or_mismatched_icc_profile_is_ignored(mode: str, profile: bytes) -> None:
    image = draw(5).convert(mode)
    np.testing.assert_array_equal(
        decode_image(encode(image, "PNG", icc_profile=profile), path="a"), array(image)
    )


def test_icc_profile_is_applied_to_transparent_images() -> None:
    profile = icc_profile("RGB ", 1.0, SRGB)
    image = Image.new("RGBA", (2, 2), (55, 55, 55, 255))
    image.putpixel((0, 0), (55, 55, 55, 0))
    pixels = decode_image(encode(image, "PNG", icc_profile=profile), path="a")
    np.testing.assert_array_equal(pixels[0, 0], 255)
    assert_close(pixels[1, 1], np.full(3, 128, np.uint8), 2)


# --- size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1600, 1200), (1199, 1601), (450, 2000), (300, 300)])
@pytest.mark.parametrize("target_px", [64, 75, 224])
def test_scaled_jpeg_keeps_twice_the_target_size(size: tuple[int, int], target_px: int) -> None:
    data = encode(draw(6, size), "JPEG")
    height, width, _ = decode_image(data, path="a", target_px=target_px).shape
    assert min(height, width) >= min(2 * target_px, *size)
    assert abs(width / height - size[0] / size[1]) < 0.02
    assert min(height, width) <= max(4 * target_px, min(size) / 8 + 1)


def test_scaled_jpeg_shows_the_same_image() -> None:
    data = encode(draw(6, (1600, 1200)), "JPEG")
    whole = Image.fromarray(decode_image(data, path="a")).reduce(8)
    scaled = decode_image(data, path="a", target_px=75)
    assert scaled.shape == (150, 200, 3)
    assert_close(scaled, np.asarray(whole), 12)


def test_other_formats_are_never_scaled() -> None:
    assert decode_image(encode(draw(6, (400, 300)), "PNG"), path="a", target_px=10).shape == (300, 400, 3)
    assert decode_image(encode(draw(6, (400, 300)), "HEIC"), path="a", target_px=10).shape == (300, 400, 3)


def test_files_above_the_byte_limit_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_BYTES", 99)
    with pytest.raises(ImageError, match="the limit is 99 bytes") as caught:
        decode_image(encode(draw(1), "PNG"), path="a")
    assert caught.value.status == "too_large"


def test_pixel_limit_allows_200_megapixels() -> None:
    assert probe_image(bomb_png(16_320, 12_240), path="a").width == 16_320
    with pytest.raises(ImageError, match="the limit is 250") as caught:
        probe_image(bomb_png(MAX_PIXELS // 1000 + 1, 1000), path="a")
    assert caught.value.status == "too_large"


# --- arrays ----------------------------------------------------------------------------------------------


def test_arrays_of_every_supported_shape_become_rgb() -> None:
    rgb = array(draw(7))
    grey = rgb[:, :, 0]
    alpha = rgb[:, :, 1]
    assert check_array(rgb, path="a") is rgb
    np.testing.assert_array_equal(check_array(grey, path="a"), np.stack([grey] * 3, axis=-1))
    np.testing.assert_array_equal(check_array(grey[:, :, None], path="a"), np.stack([grey] * 3, axis=-1))
    np.testing.assert_array_equal(check_array(rgb.astype(np.uint16) * 257, path="a"), rgb)
    np.testing.assert_array_equal(check_array(rgb[::-1, ::2], path="a"), rgb[::-1, ::2])
    with_alpha = np.dstack([rgb, alpha])
    assert_close(check_array(with_alpha, path="a"), over_white(rgb, alpha), 1)
    assert check_array(rgb[::-1], path="a").flags.c_contiguous


@pytest.mark.parametrize(
    ("values", "status", "words"),
    [
        (np.zeros((2, 2, 2), np.uint8), "unsupported", r"\(2, 2, 2\)"),
        (np.zeros(4, np.uint8), "unsupported", r"\(4,\)"),
        (np.zeros((1, 3, 8, 8), np.uint8), "unsupported", r"\(1, 3, 8, 8\)"),
        (np.zeros((2, 2, 3), np.float32), "unsupported", "float32"),
        (np.zeros((2, 2, 3), np.int64), "unsupported", "int64"),
        (np.zeros((0, 2, 3), np.uint8), "unreadable", "no pixels"),
        (np.broadcast_to(np.uint8(0), (60_000, 60_000)), "too_large", "3,600 megapixels"),
    ],
)
def test_unsupported_arrays_are_rejected(values: NDArray[np.uint8], status: ImageStatus, words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        check_array(values, path="row 7")
    assert caught.value.status == status
    assert str(caught.value).startswith("row 7: ")


# --- damage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_have_the_right_status(name: str) -> None:
    data, status = DAMAGED[name]
    with silence_pillow(), pytest.raises(ImageError) as caught:
        decode_image(data, path=name)
    assert caught.value.status == status
    assert caught.value.path == name
    assert "0x" not in caught.value.reason


@pytest.mark.parametrize("name", DAMAGED)
def test_probe_and_decode_report_the_same_error(name: str) -> None:
    data, _ = DAMAGED[name]
    with silence_pillow():
        assert outcome(probe_image, data) in {"ok", outcome(decode_image, data)}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.jpg", "empty file"),
        ("text.jpg", "not an image"),
        ("page.jpg", "not an image but an HTML page; download it again"),
        ("zeros.jpg", "not an image (zero bytes only)"),
        ("cut.jpg", "truncated JPEG file"),
        ("cut.png", "truncated PNG file"),
        ("magic_only.png", "truncated PNG file"),
        ("bomb.png", "60000 × 60000 is 3,600 megapixels; the limit is 250"),
        ("document.jpg", "PDF is not supported; convert it to JPEG or PNG"),
        ("adobe.dng", "camera raw is not supported; convert it to JPEG or PNG"),
        ("float.tif", "32-bit float TIFF is not supported; convert it to JPEG or PNG"),
    ],
)
def test_error_reasons_name_the_problem_and_the_remedy(name: str, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(DAMAGED[name][0], path=name)
    assert caught.value.reason == reason


@pytest.mark.parametrize("format", FORMATS)
def test_mangled_files_never_crash_hang_or_decode_wrongly(format: str) -> None:
    whole = encode(draw(8, (160, 120)), format, **FORMATS[format])
    pixels = decode_image(whole, path="a")
    for kind, data in mangled_files(whole, 100, seed=8):
        started = time.monotonic()
        try:
            with silence_pillow():
                decoded = decode_image(data, path="mangled")
        except ImageError as error:
            assert error.status in FAILURES  # noqa: PT017
        else:
            assert decoded.dtype == np.uint8
            assert decoded.ndim == 3
            assert decoded.shape[2] == 3
            if kind == "cut":  # only bytes after the pixels may be missing
                np.testing.assert_array_equal(decoded, pixels)
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True, "subsampling": 0}])
def test_truncated_jpeg_never_decodes_to_grey(options: dict[str, object]) -> None:
    whole = encode(draw(9), "JPEG", **options)
    pixels = decode_image(whole, path="a")
    for length in range(0, len(whole), 7):
        try:
            np.testing.assert_array_equal(decode_image(whole[:length], path="a"), pixels)
        except ImageError as error:
            assert error.status == "unreadable"  # noqa: PT017


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_truncated_jpeg_with_an_end_marker_is_detected(share: float) -> None:
    whole = encode(draw(9, (256, 256)), "JPEG")
    for target_px in (None, 32):
        with pytest.raises(ImageError, match="truncated JPEG file"):
            decode_image(whole[: int(share * len(whole))] + b"\xff\xd9", path="a", target_px=target_px)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (33, 17), (200, 100)])
def test_complete_jpeg_that_ends_in_grey_is_accepted(mode: str, size: tuple[int, int]) -> None:
    for options in ({}, {"optimize": True}, {"progressive": True}, {"restart_marker_blocks": 1}):
        grey = Image.new("RGB", size, (128, 128, 128))
        grey.paste(draw(1, (max(1, size[0] // 2), size[1])))
        if size == (1, 1):
            grey = Image.new("RGB", size, (128, 128, 128))
        data = encode(grey.convert(mode), "JPEG", **options)
        assert decode_image(data, path="a").shape == (size[1], size[0], 3)


@given(st.sampled_from([b"", *(encode(draw(1, (9, 9)), f)[:40] for f in FORMATS)]), st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_random_bytes_never_crash(head: bytes, tail: bytes) -> None:
    with silence_pillow():
        for function in (probe_image, decode_image):
            try:
                function(head + tail, path="a")
            except ImageError as error:
                assert error.status in FAILURES  # noqa: PT017


# --- threads and warnings --------------------------------------------------------------------------------


def test_decode_is_thread_safe() -> None:
    image = draw(10, (300, 200))
    files = [
        encode(image, "JPEG", exif=exif(6), icc_profile=icc_profile("RGB ", 1.8, ADOBE_RGB)),
        encode(image.quantize(32), "PNG", transparency=3),
        *(encode(image, format, **FORMATS[format]) for format in ("WebP", "AVIF", "HEIC", "TIFF")),
    ]
    alone = [decode_image(data, path="a") for data in files]
    decode._srgb_transform.cache_clear()
    with silence_pillow(), ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: decode_image(files[i % len(files)], path="a"), range(48)))
    for i, pixels in enumerate(together):
        np.testing.assert_array_equal(pixels, alone[i % len(files)])


def test_silence_pillow_hides_warnings() -> None:
    with pytest.warns(UserWarning, match="APNG"):
        expected = decode_image(noisy_png(), path="a")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with silence_pillow(), ThreadPoolExecutor(2) as pool:
            decoded = list(pool.map(lambda _: decode_image(noisy_png(), path="a"), range(4)))
    assert caught == []
    for pixels in decoded:
        np.testing.assert_array_equal(pixels, expected)


def test_silence_pillow_hides_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("PIL.TiffImagePlugin")
    with silence_pillow():
        logger.error("inside")
    logger.error("outside")
    assert caplog.messages == ["outside"]


def test_silence_pillow_keeps_other_warnings() -> None:
    with silence_pillow(), pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", UserWarning, stacklevel=1)


def test_transparent_image_of_many_strips_has_no_seam() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (900, 300, 4), dtype=np.uint8)  # three strips and a piece
    data = encode(Image.fromarray(pixels), "PNG")
    color, alpha = pixels[..., :3].astype(float), pixels[..., 3:] / 255
    np.testing.assert_allclose(decode_image(data, path="x.png"), color * alpha + 255 * (1 - alpha), atol=1)


def test_overlapping_silence_pillow_blocks_restore_warnings_and_logger() -> None:
    filters, level = list(warnings.filters), logging.getLogger("PIL").level
    first, second = silence_pillow(), silence_pillow()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logging.getLogger("PIL").level > logging.CRITICAL
    second.__exit__(None, None, None)
    assert (list(warnings.filters), logging.getLogger("PIL").level) == (filters, level)
