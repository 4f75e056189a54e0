"""Tests of pixelplay.data.audit."""

import gc
import weakref
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from images import bomb_png, draw, encode
from pixelplay.data.audit import (
    ClassCoverage,
    Duplicates,
    audit_images,
    describe_set,
    digest_bytes,
    find_coverage,
    find_duplicates,
    first_occurrences,
    summarize_formats,
)
from pixelplay.data.dataset import ImageDataset, make_dataset
from pixelplay.data.decode import ImageInfo
from pixelplay.data.file_access import FolderStorage, ImageStorage
from pixelplay.data.near_duplicates.search import connected_sets
from pixelplay.data.sources import open_dataset


def measure_coverage(
    classes: Sequence[str], counts: list[int], expected: Mapping[str, int | None]
) -> ClassCoverage:
    """Find the coverage of a dataset with these classes, (K,) training images and expected classes."""
    dataset = make_dataset("", FolderStorage(""), classes, classes, [None] * len(classes))
    return find_coverage(replace(dataset, expected=expected), np.array(counts))


PHOTO = {i: encode(draw(i), "PNG") for i in range(6)}


class Bytes(bytearray):
    """Bytes that support weak references."""


class Watched:
    """Storage that records what is read from another one."""

    def __init__(self, storage: ImageStorage) -> None:
        self._storage = storage
        self.read_paths: list[str] = []
        self.data_refs: list[weakref.ref[Bytes]] = []

    def read(self, path: str) -> bytes:
        data = Bytes(self._storage.read(path))
        self.read_paths.append(path)
        self.data_refs.append(weakref.ref(data))
        return data  # type: ignore[return-value]

    def size(self, path: str) -> int:
        return self._storage.size(path)

    def display_path(self, path: str) -> str:
        return path


def write(root: Path, files: Mapping[str, bytes]) -> ImageDataset:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return open_dataset(str(root))


def named(dataset: ImageDataset, sets: tuple[tuple[int, ...], ...]) -> list[set[str]]:
    return [{dataset.paths[i] for i in members} for members in sets]


@pytest.fixture
def planted(tmp_path: Path) -> ImageDataset:
    """Write duplicates: plain, with two labels, in two splits and without a label; and two empty files."""
    return write(
        tmp_path,
        {
            "train/cat/1.png": PHOTO[0],
            "train/cat/2.png": PHOTO[0],
            "train/cat/3.png": PHOTO[1],
            "train/dog/4.png": PHOTO[1],
            "train/dog/5.png": PHOTO[2],
            "test/dog/6.png": PHOTO[2],
            "test/7.png": PHOTO[3],
            "train/dog/8.png": PHOTO[3],
            "train/cat/9.png": PHOTO[4],
            "train/cat/empty.png": b"",
            "train/dog/empty.png": b"",
        },
    )


def audit_digests(dataset: ImageDataset) -> list[bytes]:
    contents = [dataset.storage.read(path) if dataset.storage.size(path) else b"" for path in dataset.paths]
    return [digest_bytes(content) if content else b"" for content in contents]


def check_planted(dataset: ImageDataset, duplicates: Duplicates) -> None:
    plain = {"train/cat/1.png", "train/cat/2.png"}
    conflicting = {"train/cat/3.png", "train/dog/4.png"}
    leaking = {"train/dog/5.png", "test/dog/6.png"}
    unlabelled = {"test/7.png", "train/dog/8.png"}
    assert sorted(map(sorted, named(dataset, duplicates.sets))) == sorted(
        map(sorted, [plain, conflicting, leaking, unlabelled])
    )
    assert named(dataset, duplicates.conflicts) == [conflicting]
    assert sorted(map(sorted, named(dataset, duplicates.leaks))) == sorted(map(sorted, [leaking, unlabelled]))


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_planted_duplicates_conflicts_and_leaks_are_found(
    planted: ImageDataset, decode: bool, num_workers: int
) -> None:
    audit = audit_images(planted, decode=decode, num_workers=num_workers)
    check_planted(planted, audit.duplicates)
    assert {planted.paths[i]: (e.status, e.reason) for i, e in audit.errors.items()} == {
        "train/cat/empty.png": ("unreadable", "empty file"),
        "train/dog/empty.png": ("unreadable", "empty file"),
    }
    assert list(audit.errors) == sorted(audit.errors)


def test_duplicates_in_an_archive_are_found(planted: ImageDataset, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for path in planted.paths:
            archive.writestr(path, planted.storage.read(path))
    dataset = open_dataset(str(tmp_path / "d.zip"))
    for decode in (True, False):
        check_planted(dataset, audit_images(dataset, decode=decode).duplicates)


def test_files_of_equal_size_are_not_duplicates(tmp_path: Path) -> None:
    dataset = write(tmp_path, {"a/1": b"1234", "a/2": b"1235", "b/3": b"12345"})
    assert audit_images(dataset, decode=False).duplicates.sets == ()


def test_without_decoding_only_files_of_equal_size_are_read(tmp_path: Path) -> None:
    dataset = write(tmp_path, {"a/1": b"1234", "b/2": b"123", "b/3": b"abc"})
    storage = Watched(dataset.storage)
    assert audit_images(replace(dataset, storage=storage), decode=False).errors == {}
    assert sorted(storage.read_paths) == ["b/2", "b/3"]


def test_every_unreadable_image_is_reported_with_its_status(tmp_path: Path) -> None:
    dataset = write(
        tmp_path,
        {
            "a/bomb.png": bomb_png(),
            "a/cut.png": PHOTO[0][:-400],
            "a/good.png": PHOTO[1],
            "a/page.jpg": b"<!DOCTYPE html><html></html>",
            "b/gone.png": PHOTO[2],
            "b/raw.ppm": encode(draw(1), "PPM"),
        },
    )
    (tmp_path / "b/gone.png").unlink()
    audit = audit_images(dataset)
    assert {dataset.paths[i]: error.status for i, error in audit.errors.items()} == {
        "a/bomb.png": "too_large",
        "a/cut.png": "unreadable",
        "a/page.jpg": "unreadable",
        "b/gone.png": "missing",
        "b/raw.ppm": "unsupported",
    }
    assert {dataset.paths[i]: info for i, info in audit.infos.items()} == {
        "a/good.png": ImageInfo("PNG", 64, 48, "RGB")
    }
    undecoded = audit_images(dataset, decode=False)
    assert [(dataset.paths[i], error.status) for i, error in undecoded.errors.items()] == [
        ("b/gone.png", "missing")
    ]
    assert undecoded.infos == {}


def test_errors_do_not_keep_image_bytes_alive(tmp_path: Path) -> None:
    dataset = write(tmp_path, {"a/1": b"x" * 1000, "b/2": b"y" * 999})
    storage = Watched(dataset.storage)
    audit = audit_images(replace(dataset, storage=storage))
    gc.collect()
    assert len(audit.errors) == len(storage.data_refs) == 2
    assert [reference() for reference in storage.data_refs] == [None, None]


@pytest.mark.parametrize("decode", [True, False])
def test_progress_counts_every_image_once(tmp_path: Path, decode: bool) -> None:
    dataset = write(tmp_path, {f"{'ab'[i % 2]}/{i}": PHOTO[i % 3] for i in range(150)})
    counts: list[int] = []
    audit_images(dataset, decode=decode, on_progress=counts.append)
    assert sum(counts) == 150
    assert len(counts) > 2


def test_empty_dataset_can_be_audited() -> None:
    dataset = make_dataset("none", FolderStorage("nowhere"), [], [], [])
    audit = audit_images(dataset)
    assert (audit.errors, audit.duplicates.sets, audit.infos) == ({}, (), {})
    assert summarize_formats(audit) == ({}, None, None)


def test_empty_digests_are_not_duplicates(planted: ImageDataset) -> None:
    assert find_duplicates(planted, [b""] * len(planted)).sets == ()


def test_near_duplicates_include_their_exact_duplicates(planted: ImageDataset) -> None:
    position = {path: i for i, path in enumerate(planted.paths)}
    digests = audit_digests(planted)
    firsts = first_occurrences(digests)
    assert len(firsts) == 5
    first_cat, fifth = position["train/cat/1.png"], position["train/cat/9.png"]
    duplicates = find_duplicates(planted, digests, [(first_cat, fifth)])
    check_exact = find_duplicates(planted, digests)
    assert duplicates.sets == check_exact.sets
    assert named(planted, duplicates.near) == [{"train/cat/1.png", "train/cat/2.png", "train/cat/9.png"}]
    assert duplicates.exact_and_near == duplicates.sets + duplicates.near
    assert (duplicates.conflicts, duplicates.leaks) == (check_exact.conflicts, check_exact.leaks)


def test_near_duplicates_count_as_conflicts_and_leaks(planted: ImageDataset) -> None:
    position = {path: i for i, path in enumerate(planted.paths)}
    pairs = [(position["train/cat/1.png"], position["test/7.png"])]
    duplicates = find_duplicates(planted, audit_digests(planted), pairs)
    near = {"train/cat/1.png", "train/cat/2.png", "test/7.png", "train/dog/8.png"}
    assert named(planted, duplicates.near) == [near]
    assert near in named(planted, duplicates.conflicts)
    assert near in named(planted, duplicates.leaks)


@pytest.mark.parametrize(
    ("n", "n_linked", "is_large"), [(40, 10, False), (40, 11, True), (2000, 20, False), (2000, 21, True)]
)
def test_too_large_sets_are_reported_but_not_near_duplicates(n: int, n_linked: int, is_large: bool) -> None:
    dataset = make_dataset(
        "none", FolderStorage("nowhere"), [f"{i}" for i in range(n)], ["a"] * n, [None] * n
    )
    digests = [f"{i}".encode() for i in range(n)]
    chain = [(i, i + 1) for i in range(n_linked - 1)]
    duplicates = find_duplicates(dataset, digests, [*chain, (n - 2, n - 1)])
    assert (len(duplicates.large) > 0) == is_large
    assert (n - 2, n - 1) in duplicates.near
    assert len(duplicates.near) == (1 if is_large else 1 + len(connected_sets(chain)))


def test_digest_is_16_bytes_of_blake2b() -> None:
    assert digest_bytes(b"abc").hex() == "cf4ab791c62b8d2b2109c90275287816"


def test_formats_and_extreme_sizes_are_summarized(tmp_path: Path) -> None:
    dataset = write(
        tmp_path,
        {
            "a/1": encode(draw(1, (40, 30)), "PNG"),
            "a/2": encode(draw(2, (10, 99)), "JPEG"),
            "b/3": encode(draw(3, (200, 10)), "PNG"),
        },
    )
    formats, smallest, largest = summarize_formats(audit_images(dataset))
    assert (formats, smallest, largest) == ({"PNG": 2, "JPEG": 1}, (10, 99), (200, 10))


def test_sets_are_described_by_path_label_and_split(planted: ImageDataset) -> None:
    audit = audit_images(planted, decode=False)
    (unlabelled,) = (s for s in audit.duplicates.leaks if "test/7.png" in {planted.paths[i] for i in s})
    assert describe_set(planted, unlabelled) == [
        {"path": "test/7.png", "label": None, "split": "test"},
        {"path": "train/dog/8.png", "label": "dog", "split": "train"},
    ]


# Class coverage


def test_absent_classes_bound_the_accuracy() -> None:
    classes = [f"c{k}" for k in range(50)]
    counts = [100] * 40 + [0] * 10
    expected = dict.fromkeys(classes[:40], 30) | dict.fromkeys(classes[40:], 80)
    coverage = measure_coverage(classes, counts, expected)
    assert coverage.absent == tuple(classes[40:])
    assert coverage.max_accuracy == pytest.approx(0.6)
    assert (coverage.few, coverage.few_share) == ({}, 0.0)
    # unknown classes are absent like classes without images
    assert measure_coverage(classes[:40], counts[:40], expected) == coverage


def test_coverage_without_counts_names_classes_only() -> None:
    coverage = measure_coverage(["a", "b"], [1, 0], {"a": 3, "b": None, "c": 4})
    assert coverage == ClassCoverage(absent=("b", "c"), few={"a": 1}, max_accuracy=None, few_share=None)
    nothing = ClassCoverage(absent=(), few={}, max_accuracy=None, few_share=None)
    assert measure_coverage(["a"], [1], {}) == nothing
    assert measure_coverage(["a"], [10], {"a": 0}) == nothing


def test_coverage_counts_classes_with_few_images() -> None:
    coverage = measure_coverage(["a", "b", "c"], [9, 10, 1], {"a": 1, "b": 6, "c": 3})
    assert coverage == ClassCoverage(absent=(), few={"a": 9, "c": 1}, max_accuracy=1.0, few_share=0.4)


def test_coverage_with_enough_images_is_complete() -> None:
    coverage = measure_coverage(["a", "b"], [10, 20], {"a": 1, "b": 9})
    assert coverage == ClassCoverage(absent=(), few={}, max_accuracy=1.0, few_share=0.0)
