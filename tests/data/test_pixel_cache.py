"""Tests of pixelplay.data.pixel_cache."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from images import draw, encode
from pixelplay.data.audit import digest_bytes
from pixelplay.data.dataset import ImageDataset, make_dataset
from pixelplay.data.decode import decode_image
from pixelplay.data.file_access import FolderStorage
from pixelplay.data.pixel_cache import MARGIN, MAX_FRACTION, PixelCache
from pixelplay.data.transforms import Fit, Preprocessing, eval_transform
from pixelplay.errors import ImageError

PREPROCESSING = Preprocessing(input_size=(64, 64), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
SIDE, N, MANY = 80, 6, 10**9
SET_BYTES = N * 3 * SIDE**2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write images larger and smaller than the square, of several shapes and formats."""
    folder = tmp_path / "photos"
    folder.mkdir()
    sizes = [(200, 150), (64, 48), (90, 300), (80, 80), (500, 400), (33, 21)]
    for i, size in enumerate(sizes):
        ending, format = (("jpg", "JPEG"), ("png", "PNG"))[i % 2]
        (folder / f"{i}.{ending}").write_bytes(encode(draw(i, size), format))
    return folder


def dataset_of(folder: Path) -> ImageDataset:
    paths = sorted(path.name for path in folder.iterdir())
    return make_dataset(str(folder), FolderStorage(str(folder)), paths, [None] * N, [None] * N)


def open_cache(
    folder: Path, cache: Path | str, max_bytes: int = MANY, preprocessing: Preprocessing = PREPROCESSING
) -> PixelCache:
    dataset = dataset_of(folder)
    digests = tuple(digest_bytes((folder / path).read_bytes()) for path in dataset.paths)
    return PixelCache(dataset, digests, preprocessing, cache_dir=str(cache), max_bytes=max_bytes)


def fill(cache: PixelCache) -> list[NDArray[np.uint8]]:
    """Read and cache all images, as an epoch does."""
    found = []
    for i in range(N):
        found.append(cache[i])
        cache.keep(i, found[-1])
    cache.flush()
    return found


def test_cached_squares_are_a_quarter_larger_than_the_input(folder: Path) -> None:
    assert MARGIN == 1.25
    cache = open_cache(folder, "", 0)
    assert cache.preprocessing.input_size == (SIDE, SIDE)
    for i in range(N):
        assert cache[i].shape == (SIDE, SIDE, 3)
        assert cache[i].dtype == np.uint8


@pytest.mark.parametrize("fit", get_args(Fit))
def test_cached_images_are_fitted_as_for_prediction(fit: Fit, folder: Path) -> None:
    cache = open_cache(folder, "", 0, replace(PREPROCESSING, fit=fit))
    larger = replace(PREPROCESSING, input_size=(SIDE, SIDE), fit=fit)
    for i, path in enumerate(dataset_of(folder).paths):
        pixels = decode_image((folder / path).read_bytes(), path=path, target_px=SIDE)
        np.testing.assert_array_equal(cache[i], eval_transform(pixels, larger))


def test_pixels_are_the_same_with_and_without_cache(folder: Path, tmp_path: Path) -> None:
    plain = [open_cache(folder, "", 0)[i] for i in range(N)]
    cache = open_cache(folder, tmp_path / "cache")
    for found in (fill(cache), fill(cache), fill(open_cache(folder, tmp_path / "cache"))):
        for pixels, expected in zip(found, plain, strict=True):
            np.testing.assert_array_equal(pixels, expected)


def test_cached_images_are_not_read_again(folder: Path, tmp_path: Path) -> None:
    expected = fill(open_cache(folder, tmp_path / "cache"))
    cache = open_cache(folder, tmp_path / "cache")
    shutil.rmtree(folder)
    for i in range(N):
        np.testing.assert_array_equal(cache[i], expected[i])


def test_uncached_images_are_read_again(folder: Path, tmp_path: Path) -> None:
    cache = open_cache(folder, tmp_path / "cache")
    for i in range(N):
        cache[i]
    cache.flush()
    assert not (tmp_path / "cache").exists()
    shutil.rmtree(folder)
    with pytest.raises(ImageError, match="no such file"):
        cache[0]


@pytest.mark.parametrize(
    ("max_bytes", "is_kept"), [(2 * SET_BYTES, True), (2 * SET_BYTES - 1, False), (0, False)]
)
def test_images_above_half_of_the_cache_are_not_cached(
    max_bytes: int, is_kept: bool, folder: Path, tmp_path: Path
) -> None:
    assert MAX_FRACTION == 0.5
    cache = open_cache(folder, tmp_path / "cache", max_bytes)
    fill(cache)
    assert (tmp_path / "cache").exists() == is_kept
    shutil.rmtree(folder)
    if is_kept:
        fill(cache)
    else:
        with pytest.raises(ImageError, match="no such file"):
            cache[0]


@pytest.mark.parametrize("change", [{"input_size": (96, 64)}, {"interpolation": "bilinear"}, {"fit": "pad"}])
def test_other_size_filter_or_fit_has_its_own_pixels(
    change: dict[str, object], folder: Path, tmp_path: Path
) -> None:
    fill(open_cache(folder, tmp_path / "cache"))
    other = replace(PREPROCESSING, **change)
    expected = [open_cache(folder, "", 0, other)[i] for i in range(N)]
    found = fill(open_cache(folder, tmp_path / "cache", MANY, other))
    for pixels, plain in zip(found, expected, strict=True):
        np.testing.assert_array_equal(pixels, plain)


def test_other_mean_shares_the_cached_pixels(folder: Path, tmp_path: Path) -> None:
    fill(open_cache(folder, tmp_path / "cache"))
    other = open_cache(folder, tmp_path / "cache", MANY, replace(PREPROCESSING, mean=(0.0, 0.0, 0.0)))
    shutil.rmtree(folder)
    fill(other)


def test_changed_image_is_read_again(folder: Path, tmp_path: Path) -> None:
    fill(open_cache(folder, tmp_path / "cache"))
    path = folder / "1.png"
    path.write_bytes(encode(draw(99), "PNG"))
    expected = open_cache(folder, "", 0)[1]
    np.testing.assert_array_equal(open_cache(folder, tmp_path / "cache")[1], expected)


def test_pixel_cache_is_thread_safe(folder: Path, tmp_path: Path) -> None:
    expected = fill(open_cache(folder, tmp_path / "cache"))
    for cache in (open_cache(folder, tmp_path / "cache"), open_cache(folder, "", 0)):
        requested = np.random.default_rng(0).integers(0, N, 60)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(cache.__getitem__, requested))
        for i, pixels in zip(requested, found, strict=True):
            np.testing.assert_array_equal(pixels, expected[i])


def test_modifying_returned_pixels_does_not_change_the_cache(folder: Path, tmp_path: Path) -> None:
    expected = [pixels.copy() for pixels in fill(open_cache(folder, tmp_path / "cache"))]
    cache = open_cache(folder, tmp_path / "cache")
    cache[0][:] = 0
    np.testing.assert_array_equal(cache[0], expected[0])


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize("max_bytes", [0, SET_BYTES, MANY])
def test_nothing_is_written_to_the_image_folder(max_bytes: int, folder: Path, tmp_path: Path) -> None:
    before = everything_in(folder)
    fill(open_cache(folder, tmp_path / "cache", max_bytes))
    fill(open_cache(folder, tmp_path / "cache", max_bytes))
    assert everything_in(folder) == before


def test_pixel_cache_that_cannot_be_written_is_no_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    expected = [open_cache(folder, "", 0)[i] for i in range(N)]
    cache = open_cache(folder, tmp_path / "cache")
    for found in (fill(cache), fill(cache)):
        for pixels, plain in zip(found, expected, strict=True):
            np.testing.assert_array_equal(pixels, plain)
    assert (tmp_path / "cache").read_bytes() == b"a file"


def test_image_changed_during_the_run_raises(folder: Path, tmp_path: Path) -> None:
    cache = open_cache(folder, tmp_path / "cache")
    (folder / "0.jpg").write_bytes(encode(draw(99), "JPEG"))
    with pytest.raises(ImageError, match=r"0\.jpg: it has changed since it was first read; start again"):
        cache[0]


def test_images_too_large_for_the_cache_are_a_failure(folder: Path, tmp_path: Path) -> None:
    limit = round(SET_BYTES / MAX_FRACTION)
    assert open_cache(folder, tmp_path / "cache", limit).failure == ""
    assert open_cache(folder, tmp_path / "cache", limit - 1).failure == (
        "they need 0.1 MB but can use 0.1 MB; raise --cache-gb"
    )
    assert open_cache(folder, tmp_path / "cache", 0).failure == ""  # caching is off
    cache = open_cache(folder, folder / "0.jpg")  # no folder
    fill(cache)
    assert "Not a directory" in cache.failure
