"""What copies.py promises: a scan that looks closely finds altered copies in a folder."""

from pathlib import Path

import pytest

import pixelplay
from images import altered, encode, scene
from pixelplay.data.audit import Duplicates
from pixelplay.data.dataset import ImageDataset
from pixelplay.run_log import RunLog


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight scenes in two classes; of one all kinds of copies, in the other class and in the test part."""
    root = tmp_path_factory.mktemp("copies")
    for name in ("train/a", "train/b", "test/a"):
        (root / name).mkdir(parents=True)
    for i in range(8):
        (root / f"train/{'ab'[i % 2]}/{i}.png").write_bytes(encode(scene(i), "PNG"))
    for kind, data in altered(scene(0)).items():
        (root / f"train/b/{kind}.jpg").write_bytes(data)
    (root / "test/a/cut.jpg").write_bytes(altered(scene(2))["cut"])
    (root / "test/a/broken.jpg").write_bytes(b"broken")
    return root


def scan(folder: Path) -> tuple[ImageDataset, Duplicates]:
    dataset, audit = pixelplay.scan(folder, near_duplicates=True, log=RunLog(quiet=True))
    assert [dataset.paths[i] for i in audit.errors] == ["test/a/broken.jpg"]
    return dataset, audit.duplicates


def test_every_altered_copy_is_found_with_its_conflict_or_leak(folder: Path) -> None:
    dataset, duplicates = scan(folder)
    sets = [{dataset.paths[i] for i in members} for members in duplicates.near]
    with_copies = {f"train/b/{kind}.jpg" for kind in altered(scene(0))} | {"train/a/0.png"}
    together = set().union(*(members for members in sets if members & with_copies))
    assert together == with_copies
    assert {"train/a/2.png", "test/a/cut.jpg"} in sets
    assert len(duplicates.sets) == len(duplicates.large) == 0
    assert any("train/a/0.png" in {dataset.paths[i] for i in members} for members in duplicates.conflicts)
    leaks = [{dataset.paths[i] for i in members} for members in duplicates.leaks]
    assert leaks == [{"train/a/2.png", "test/a/cut.jpg"}]


def test_a_second_scan_finds_the_same_from_the_cache(folder: Path) -> None:
    assert scan(folder)[1] == scan(folder)[1]


def test_damaged_files_are_no_copies_of_each_other(tmp_path: Path) -> None:
    for name, i in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "good.png").write_bytes(encode(scene(i), "PNG"))
        (tmp_path / name / "broken.jpg").write_bytes(b"")
    _, audit = pixelplay.scan(tmp_path, near_duplicates=True, log=RunLog(quiet=True))
    assert len(audit.errors) == 2
    assert len(audit.duplicates.sets) == len(audit.duplicates.conflicts) == 0
