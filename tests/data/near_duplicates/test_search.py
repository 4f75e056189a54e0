"""Tests of pixelplay.data.near_duplicates.search."""

import io
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from images import altered, encode, scene
from pixelplay.data.decode import decode_image
from pixelplay.data.near_duplicates.search import NearDuplicatePair, connected_sets, search_near_duplicates
from pixelplay.data.near_duplicates.thumbnails import make_thumbnail
from pixelplay.errors import ImageError
from pixelplay.run_log import RunLog

PixelArray = NDArray[np.uint8]


def decoded(data: bytes) -> PixelArray:
    return decode_image(data, path="photo")


def search(
    images: Sequence[PixelArray], features: NDArray[np.float32] | None = None, *, mirrored: bool = True
) -> list[NearDuplicatePair]:
    thumbnails = np.stack([make_thumbnail(image) for image in images])
    return search_near_duplicates(
        thumbnails,
        lambda i: images[i],
        features,
        mirrored=mirrored,
        num_workers=1,
        log=RunLog(quiet=True),
    )


def wafer(seed: int) -> PixelArray:
    """Draw a solar cell: the same frame and bus bars, but its own grain."""
    rng = np.random.default_rng(seed)
    grain = np.asarray(scene(seed, (240, 240)).convert("L")).astype(float) / 6
    cell = 90 + grain + rng.normal(0, 2, grain.shape)
    cell[[*range(58, 64), *range(118, 124), *range(178, 184)]] = 20
    cell[:6] = cell[-6:] = 10
    cell[:, :6] = cell[:, -6:] = 10
    return np.repeat(cell.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("kind", list(altered(scene(0))))
def test_near_duplicates_are_found_and_nothing_else(kind: str) -> None:
    originals = [np.asarray(scene(seed)) for seed in range(8)]
    duplicates = [decoded(altered(scene(seed))[kind]) for seed in range(4)]
    # features are close for near-duplicates, as those of a network
    rng = np.random.default_rng(0)
    features = rng.standard_normal((12, 64), dtype=np.float32)
    features[8:] = features[:4] + 0.2 * rng.standard_normal((4, 64), dtype=np.float32)
    found = search([*originals, *duplicates], features)
    assert [pair.members for pair in found] == [(0, 8), (1, 9), (2, 10), (3, 11)]
    assert all(pair.is_mirrored == (kind == "mirrored") for pair in found)


def test_mirror_images_can_be_excluded_from_near_duplicates() -> None:
    originals = [np.asarray(scene(seed)) for seed in range(8)]
    mirrored = decoded(altered(scene(0))["mirrored"])
    re_encoded = decoded(altered(scene(1))["re-encoded"])
    images = [*originals, mirrored, re_encoded]
    assert [pair.members for pair in search(images)] == [(0, 8), (1, 9)]
    assert [pair.members for pair in search(images, mirrored=False)] == [(1, 9)]


def under_one_sky(seed: int) -> PixelArray:
    """Draw the same bright sky, but its own dark ground."""
    ground, sky = (np.asarray(scene(s, (240, 240)).convert("L")).astype(float) for s in (seed, 999))
    grey = np.concatenate([165 + sky[:144] / 3, 60 + ground[144:] / 3])
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("gain", [1.2, 1.5, 1.7])
def test_near_duplicate_with_clipped_highlights_is_found(gain: float) -> None:
    originals = [under_one_sky(seed) for seed in range(40)]
    duplicates = [np.clip(image * gain, 0, 255).astype(np.uint8) for image in originals[:8]]
    assert gain < 1.5 or np.mean(np.array(duplicates) == 255) > 0.5
    found = search([*originals, *duplicates])
    assert [pair.members for pair in found] == [(i, 40 + i) for i in range(8)]


@pytest.mark.parametrize("kind", ["re-encoded", "brightened"])
def test_near_duplicate_of_a_small_object_on_white_is_found(kind: str) -> None:
    images = []
    for seed in range(40):
        at = np.random.default_rng(seed).integers(10, 160, 2).tolist()
        image = Image.new("RGB", (240, 240), "white")
        image.paste(scene(seed, (70, 70)), (at[0], at[1]))
        images.append(image)
    duplicates = [decoded(altered(image)[kind]) for image in images[:4]]
    found = search([*map(np.asarray, images), *duplicates])
    assert [pair.members for pair in found] == [(i, 40 + i) for i in range(4)]


def test_same_pixels_in_another_format_are_near_duplicates() -> None:
    image = scene(0)
    images = [decoded(encode(image, "PNG")), np.asarray(scene(1)), decoded(encode(image, "BMP"))]
    (pair,) = search(images)
    assert (pair.members, pair.is_mirrored) == ((0, 2), False)
    assert pair.agreement > 0.999


def test_similar_images_are_not_near_duplicates() -> None:
    cells = [wafer(seed) for seed in range(30)]
    assert search(cells) == []
    # a near-duplicate among them is still found
    buffer = io.BytesIO()
    Image.fromarray(cells[7]).save(buffer, "JPEG", quality=60)
    assert [pair.members for pair in search([*cells, decoded(buffer.getvalue())])] == [(7, 30)]


def test_more_near_duplicates_than_kept_in_one_split_are_found() -> None:
    images = [np.asarray(scene(seed, (120, 96))) for seed in range(60)]
    buffers = [io.BytesIO() for _ in range(15)]
    for quality, buffer in zip(range(60, 90, 2), buffers, strict=True):
        scene(5, (120, 96)).save(buffer, "JPEG", quality=quality)
    found = search([*images, *(decoded(buffer.getvalue()) for buffer in buffers)])
    duplicates = {5, *range(60, 75)}
    assert {i for pair in found for i in pair.members} == duplicates


def test_search_for_near_duplicates_ends_where_similar_images_are_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def frame(seed: int) -> NDArray[np.float64]:
        return np.asarray(scene(seed, (64, 64)), float)

    # pairs that share most of their content, and one near-duplicate
    images = [(0.7 * frame(i // 2) + 0.3 * frame(1000 + i)).astype(np.uint8) for i in range(600)]
    buffer = io.BytesIO()
    Image.fromarray(images[7]).save(buffer, "JPEG", quality=80)
    images.append(decoded(buffer.getvalue()))
    thumbnails = np.stack([make_thumbnail(image) for image in images])
    found = search_near_duplicates(thumbnails, images.__getitem__, num_workers=1, log=RunLog())
    assert [pair.members for pair in found] == [(7, 600)]
    note = re.search(r"near-duplicates: .* ([\d,]+) less similar pairs", capsys.readouterr().err)
    assert note
    assert int(note[1]) > 50


def test_plain_images_are_not_near_duplicates() -> None:
    plain = [np.full((60, 80, 3), level, np.uint8) for level in (0, 120, 121, 255)]
    assert search(plain) == []


def test_one_or_no_image_has_no_near_duplicates() -> None:
    assert search([np.asarray(scene(0))]) == []
    assert (
        search_near_duplicates(
            np.empty((0, 64, 64), np.uint8), lambda i: np.empty(0, np.uint8), log=RunLog(quiet=True)
        )
        == []
    )


def test_image_that_became_unreadable_is_skipped() -> None:
    images = [np.asarray(scene(0)), decoded(altered(scene(0))["re-encoded"])]
    thumbnails = np.stack([make_thumbnail(image) for image in images])

    def read(i: int) -> PixelArray:
        raise ImageError("photo", "missing", "no such file")

    assert search_near_duplicates(thumbnails, read, log=RunLog(quiet=True)) == []


def test_near_duplicates_do_not_depend_on_the_image_order() -> None:
    images = [np.asarray(scene(seed)) for seed in range(6)]
    images += [decoded(altered(scene(seed))["resized"]) for seed in range(3)]
    order = np.random.default_rng(0).permutation(len(images))
    place = np.argsort(order)
    plain = {pair.members for pair in search(images)}
    shuffled = {pair.members for pair in search([images[i] for i in order])}
    assert {tuple(sorted((int(place[i]), int(place[j])))) for i, j in plain} == shuffled
    assert len(plain) == 3


# Sets


def test_connected_sets_divide_chains() -> None:
    assert connected_sets([(0, 1), (1, 2), (2, 3)]) == [(1, 0, 2), (2, 3)]


def test_connected_sets_join_mutual_duplicates() -> None:
    assert connected_sets([(0, 1), (0, 2), (1, 2), (5, 9)]) == [(0, 1, 2), (5, 9)]
    assert connected_sets([]) == []


pairs_of = st.sets(
    st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda p: p[0] < p[1]), max_size=30
)


@given(pairs_of)
def test_every_pair_is_in_a_set_of_duplicates_of_its_first_member(pairs: set[tuple[int, int]]) -> None:
    sets = connected_sets(sorted(pairs))
    held = {frozenset((a, b)) for members in sets for a in members for b in members if a != b}
    assert {frozenset(pair) for pair in pairs} <= held
    for first, *others in sets:
        assert len(others) == len(set(others)) >= 1
        assert all(tuple(sorted((first, other))) in pairs for other in others)
