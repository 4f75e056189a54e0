"""Tests of the range of values in images with more than 8 bits."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import pixelplay
from conftest import draw_of_class
from pixelplay.data.bit_range import find_bit_range
from pixelplay.data.decode import MAX_VALUE, decode_image, largest_value
from pixelplay.data.sources import open_dataset
from pixelplay.errors import ImageError

GREY = np.asarray(draw_of_class("bars", 1).convert("L")).copy()
GREY[0, 0], GREY[0, 1] = 0, 255
# name → values as stored, and what white is there
DEEP: dict[str, tuple[NDArray[Any], float]] = {
    "8 bits in 16": (GREY.astype(np.uint16), 255),
    "12 bits in 16": (((GREY.astype(np.uint32) * 4095 + 127) // 255).astype(np.uint16), 4095),
    "16 bits": (GREY.astype(np.uint16) * 257, 65535),
    "8 bits in 32": (GREY.astype(np.int32), 255),
    "0 to 1 as float": ((GREY / 255).astype(np.float32), 1),
    "0 to 255 as float": (GREY.astype(np.float32), 255),
}


def encode_deep(values: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    return file.getvalue()


def tiff(values: NDArray[Any], photometric: int) -> bytes:
    """Write an uncompressed little-endian TIFF."""
    height, width = values.shape
    data = values.astype(f"<u{values.itemsize}").tobytes()
    tags = [(256, width), (257, height), (258, 8 * values.itemsize), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(data))]
    out = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    return out + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)


def write(root: Path, values: NDArray[Any], n: int = 3) -> Path:
    for name in "ab":
        (root / name).mkdir(parents=True)
        for i in range(n):
            (root / name / f"{i}.tif").write_bytes(encode_deep(values))
    return root


@pytest.mark.parametrize("kind", DEEP)
def test_deep_images_are_decoded_like_their_8_bit_twin(kind: str) -> None:
    values, white = DEEP[kind]
    found = decode_image(encode_deep(values), path="x", max_value=white)
    assert np.abs(found[:, :, 0].astype(int) - GREY).max() <= 1
    assert largest_value(encode_deep(values), path="x") == pytest.approx(white)


@pytest.mark.parametrize("kind", DEEP)
def test_bit_range_of_a_dataset_follows_from_its_largest_value(kind: str, tmp_path: Path) -> None:
    values, white = DEEP[kind]
    found = find_bit_range(open_dataset(str(write(tmp_path / "x", values))), None)
    assert found.max_value == white
    assert bool(found.note) == (white != MAX_VALUE)
    if found.note:
        assert "6 of 6 images have more than 8 bits" in found.note


def test_one_image_that_uses_the_whole_range_keeps_it(tmp_path: Path) -> None:
    root = write(tmp_path / "x", DEEP["12 bits in 16"][0])
    (root / "a/9.tif").write_bytes(encode_deep(DEEP["16 bits"][0]))
    assert find_bit_range(open_dataset(str(root)), None).max_value == MAX_VALUE


def test_bit_range_by_hand_wins(tmp_path: Path) -> None:
    root = write(tmp_path / "x", DEEP["8 bits in 16"][0])
    assert find_bit_range(open_dataset(str(root)), 12).max_value == 4095


def test_images_of_8_bits_have_no_bit_range(tmp_path: Path) -> None:
    root = write(tmp_path / "x", GREY)
    found = find_bit_range(open_dataset(str(root)), None)
    assert (found.max_value, found.note) == (MAX_VALUE, "")
    assert largest_value(encode_deep(GREY), path="x") is None


@pytest.mark.parametrize("photometric", [0, 1])
def test_tiff_where_zero_is_white_is_decoded_like_its_twin(photometric: int) -> None:
    stored = GREY if photometric else 255 - GREY
    eight = decode_image(tiff(stored, photometric), path="x")
    sixteen = decode_image(tiff(stored.astype(np.uint16) * 257, photometric), path="x")
    np.testing.assert_array_equal(eight[:, :, 0], GREY)
    np.testing.assert_array_equal(sixteen[:, :, 0], GREY)


def test_float_images_without_a_range_are_unsupported() -> None:
    with pytest.raises(ImageError, match="32-bit"):
        decode_image(encode_deep(DEEP["0 to 1 as float"][0]), path="x")


def test_values_that_are_not_finite_are_unsupported() -> None:
    values = DEEP["0 to 1 as float"][0].copy()
    values[3, 3] = np.nan
    with pytest.raises(ImageError, match="32-bit"):
        decode_image(encode_deep(values), path="x", max_value=1)
    assert largest_value(encode_deep(values), path="x") == 1


def test_bit_range_is_stored_and_used_in_prediction(
    tiny_probe: pixelplay.TrainConfig, tmp_path: Path
) -> None:
    for name in ("bars", "dots"):
        for bits in ("8", "12"):
            (tmp_path / bits / name).mkdir(parents=True)
        for seed in range(12):
            grey = np.asarray(draw_of_class(name, seed).convert("L"))
            Image.fromarray(grey).save(tmp_path / "8" / name / f"{seed}.png")
            Image.fromarray(grey.astype(np.uint16) * 16).save(tmp_path / "12" / name / f"{seed}.png")
    reports = {
        bits: pixelplay.train(tmp_path / bits, tmp_path / f"run{bits}", tiny_probe) for bits in ("8", "12")
    }
    assert any("read as 0 to 4,095" in note for note in reports["12"].notes)
    assert not any("more than 8 bits" in note for note in reports["8"].notes)
    found = [pixelplay.Predictor(tmp_path / f"run{bits}").predict(tmp_path / bits) for bits in ("8", "12")]
    # 255 * 16 is 4080, a little below white
    np.testing.assert_allclose(found[0].probs, found[1].probs, atol=0.1)
    assert found[0].prediction == found[1].prediction
    array = np.asarray(Image.open(tmp_path / "12/bars/0.png"))
    np.testing.assert_array_equal(
        pixelplay.Predictor(tmp_path / "run12").predict(array.astype(np.uint16)).probs[0], found[1].probs[0]
    )
