"""Files that may be images are listed by name: hidden files, links, archives, folders without permission."""

import os
import sys
from pathlib import Path

import pytest

from dataset_files import (
    ALL,
    BOTH,
    Maker,
    assert_words,
    make_folder,
    make_wrapped_zip,
    make_zip,
    pack,
    rows,
)
from pixelplay.data.file_access import FolderStorage
from pixelplay.data.file_listing import list_image_files
from pixelplay.data.sources import list_images, open_dataset
from pixelplay.errors import DataError, ImageError


@ALL
def test_hidden_and_system_files_are_skipped_and_counted(make: Maker, tmp_path: Path) -> None:
    prefix = "photos/2024/" if make is make_wrapped_zip else ""
    junk = [
        ".DS_Store",
        "cat/Thumbs.db",
        "cat/.hidden.jpg",
        "dog/desktop.ini",
        ".git/objects/x",
        "dog/notes.txt",
    ]
    dataset = open_dataset(make(tmp_path, ["cat/1.jpg", "dog/1.jpg", "__MACOSX/cat/._1.jpg", *junk]))
    assert list(dataset.paths) == [f"{prefix}cat/1.jpg", f"{prefix}dog/1.jpg"]
    assert dataset.skipped == {"hidden": 3, "system files": 2, "__MACOSX": 1, ".txt files": 1}


def test_files_with_unknown_extensions_are_listed(tmp_path: Path) -> None:
    dataset = open_dataset(make_folder(tmp_path, ["a/1", "a/2.bin", "a/3.JPG", "b/4.jpg.bak"]))
    assert dataset.paths == ("a/1", "a/2.bin", "a/3.JPG", "b/4.jpg.bak")


def test_links_to_folders_are_followed_except_loops(tmp_path: Path) -> None:
    root = Path(make_folder(tmp_path, ["cat/1", "dog/1"]))
    (root / "emu").symlink_to(root / "cat")
    (root / "cat/up").symlink_to(root)
    (root / "dog/self").symlink_to(root / "dog/self")
    (root / "dog/gone").symlink_to(root / "nowhere")
    dataset = open_dataset(str(root))
    assert dataset.paths == ("cat/1", "dog/1", "dog/gone", "dog/self", "emu/1")
    for path in ("dog/gone", "dog/self"):
        with pytest.raises(ImageError):
            dataset.storage.read(path)


def test_a_link_from_a_class_to_itself_adds_no_images(tmp_path: Path) -> None:
    root = Path(make_folder(tmp_path, ["cat/1"]))
    (root / "cat/again").symlink_to(root / "cat")
    (root / "dog").mkdir()
    (root / "dog/2").write_bytes(b"2")
    assert open_dataset(str(root)).paths == ("cat/1", "dog/2")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf8_are_listed_and_read(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9/\xff.jpg"), "dog/1.jpg"]
    dataset = open_dataset(make_folder(tmp_path, names))
    assert list(dataset.paths) == names
    assert dataset.storage.read(names[0]) == b"caf\xe9/\xff.jpg"


# Archives


def test_members_that_point_outside_the_archive_are_skipped_and_counted(tmp_path: Path) -> None:
    bad = ["../cat/1", "/cat/2", "cat/../../3", "C:/cat/4", "\\cat\\5"]
    dataset = open_dataset(make_zip(tmp_path, ["cat/1", "dog/1", *bad]))
    assert dataset.paths == ("cat/1", "dog/1")
    assert dataset.skipped == {"unsafe names in the archive": 5}
    for path in bad[:3]:
        assert path not in dataset.paths


def test_backslashes_in_a_windows_archive_are_folders(tmp_path: Path) -> None:
    dataset = open_dataset(make_zip(tmp_path, ["cat\\1", "dog\\deep\\1"]))
    assert rows(dataset) == [("cat/1", "cat", None), ("dog/deep/1", "dog", None)]
    assert dataset.storage.read("dog/deep/1") == b"dog\\deep\\1"


@pytest.mark.parametrize("raw", [b"K\xc3\xa4fer/1", b"K\x84fer/1"], ids=["UTF-8, as on macOS", "CP437"])
def test_member_names_without_the_utf8_flag_are_decoded(raw: bytes, tmp_path: Path) -> None:
    plain = b"x" * len(raw)  # an ASCII name, so zipfile sets no flag; replaced afterwards
    source = Path(pack(tmp_path, {plain.decode(): b"beetle", "dog/1": b"good"}))
    source.write_bytes(source.read_bytes().replace(plain, raw))
    dataset = open_dataset(str(source))
    assert dataset.classes == ("dog", "Käfer")
    assert dataset.storage.read("Käfer/1") == b"beetle"


def test_leading_dots_in_an_archive_made_from_tar_are_removed(tmp_path: Path) -> None:
    dataset = open_dataset(make_zip(tmp_path, ["./", "./cat/", "./cat/1", "././dog/1"]))
    assert rows(dataset) == [("cat/1", "cat", None), ("dog/1", "dog", None)]
    assert dataset.storage.read("cat/1") == b"./cat/1"
    assert list_images(dataset.source).paths == ("cat/1", "dog/1")


# Folders without permission


def test_a_folder_without_permission_is_skipped_with_a_note(unprivileged: Path) -> None:
    (unprivileged / "x").mkdir(mode=0)
    for name in "ab":
        (unprivileged / name).mkdir()
        (unprivileged / name / "1.jpg").write_bytes(b"x")
    for dataset in (open_dataset(str(unprivileged)), list_images(str(unprivileged))):
        assert dataset.paths == ("a/1.jpg", "b/1.jpg")
        assert "skipped 1 unreadable folder: x" in dataset.notes


def test_a_root_folder_without_permission_is_an_error(unprivileged: Path) -> None:
    (unprivileged / "x").mkdir(mode=0)
    with pytest.raises(DataError) as caught:
        list_image_files(FolderStorage(str(unprivileged / "x")))
    assert_words(str(caught.value), f"{unprivileged}/x", "Permission denied")


def test_missing_files_of_a_table_are_searched_past_folders_without_permission(unprivileged: Path) -> None:
    (unprivileged / "x").mkdir(mode=0)
    (unprivileged / "deep").mkdir()
    (unprivileged / "deep/1.jpg").write_bytes(b"x")
    (unprivileged / "list.csv").write_text("path\n1.jpg\n2.jpg\n")
    dataset = list_images(str(unprivileged / "list.csv"))
    assert dataset.paths == ("deep/1.jpg", "2.jpg")
    assert dataset.notes == ("skipped 1 unreadable folder: x",)


def test_lost_and_found_without_permission_is_skipped(unprivileged: Path) -> None:
    (unprivileged / "lost+found").mkdir(mode=0)
    assert list_image_files(FolderStorage(str(unprivileged))).candidates == []


# --- folders that PixelPlay wrote ---


@BOTH
@pytest.mark.parametrize(
    "written",
    [
        ("explanations.csv", "0001.overlay.png"),
        ("config.json", "metrics.json", "split.json", "photo.png", "model/bundle.json"),
        ("bundle.json", "head.safetensors", "photo.png"),
        (".lock", "plan.json", "photo.png"),
    ],
)
def test_folders_that_pixelplay_wrote_are_skipped_and_counted(
    written: tuple[str, ...], make: Maker, tmp_path: Path
) -> None:
    names = ["cat/1.jpg", "dog/1.jpg", *(f"deep/cams/{name}" for name in written)]
    dataset = open_dataset(make(tmp_path, names))
    assert dataset.classes == ("cat", "dog")
    assert dataset.skipped == {"in folders that PixelPlay wrote": len(written)}
    assert not any("without an image" in note for note in dataset.notes)


def test_a_folder_that_pixelplay_wrote_is_listed_when_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ["explanations.csv", "0001.overlay.png"])
    assert list_images(folder).paths == ("0001.overlay.png",)


def test_a_class_folder_with_a_config_file_is_a_class(tmp_path: Path) -> None:
    dataset = open_dataset(make_folder(tmp_path, ["cat/1.jpg", "cat/config.json", "dog/1.jpg"]))
    assert dataset.classes == ("cat", "dog")
