"""What source.py promises: folders, tables and archives become labels, parts and nothing silent."""

import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixelplay.config import SPLITS, DataConfig
from pixelplay.data.dataset import ImageDataset, natural_key
from pixelplay.data.sources import list_images, scan_source
from pixelplay.errors import ConfigError, DataError, ImageError

Maker = Callable[[Path, Iterable[str]], str]


def make_folder(root: Path, names: Iterable[str]) -> str:
    """Write small files, each with its name as content; returns the folder."""
    folder = root / "data"
    folder.mkdir(exist_ok=True)
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(os.fsencode(name))
    return str(folder)


def make_zip(root: Path, names: Iterable[str]) -> str:
    """Write the same into an archive; returns its path."""
    return pack(root, {name: name.encode() for name in names})


def pack(root: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> str:
    path = root / "data.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return str(path)


def make_wrapped_zip(root: Path, names: Iterable[str]) -> str:
    return make_zip(root, [f"photos/2024/{name}" for name in names])


BOTH = pytest.mark.parametrize("make", [make_folder, make_zip])
ALL = pytest.mark.parametrize("make", [make_folder, make_zip, make_wrapped_zip])


def rows(dataset: ImageDataset) -> list[tuple[str, str | None, str | None]]:
    """(path, class, part) of each image, in order, without a wrapper."""
    return [
        (
            path.removeprefix("photos/2024/"),
            dataset.classes[label] if label >= 0 else None,
            SPLITS[part] if part >= 0 else None,
        )
        for path, label, part in zip(dataset.paths, dataset.labels, dataset.splits, strict=True)
    ]


def message(source: str, config: DataConfig | None = None, classes: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        scan_source(source, config, classes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Layouts


@ALL
def test_class_folders_give_classes_in_natural_order_however_deep_the_photographs_lie(
    make: Maker, tmp_path: Path
) -> None:
    source = make(tmp_path, ["10/a.jpg", "2/deep/er/b.jpg", "2/a10.jpg", "2/a9.jpg", "Ant/x", "ant 3/x"])
    dataset = scan_source(source)
    assert dataset.classes == ("2", "10", "Ant", "ant 3")
    assert rows(dataset) == [
        ("2/a9.jpg", "2", None),
        ("2/a10.jpg", "2", None),
        ("2/deep/er/b.jpg", "2", None),
        ("10/a.jpg", "10", None),
        ("ant 3/x", "ant 3", None),
        ("Ant/x", "Ant", None),
    ]
    assert dataset.storage.read(dataset.paths[0]).endswith(b"2/a9.jpg")


@ALL
@pytest.mark.parametrize("val", ["val", "valid", "Validation", "VAL"])
def test_part_folders_in_any_spelling_are_kept(make: Maker, val: str, tmp_path: Path) -> None:
    source = make(tmp_path, ["Train/cat/1", "Train/dog/1", f"{val}/cat/1", "TEST/cat/x/1", "TEST/dog/1"])
    dataset = scan_source(source)
    assert sorted(rows(dataset)) == sorted(
        [
            ("Train/cat/1", "cat", "train"),
            ("Train/dog/1", "dog", "train"),
            (f"{val}/cat/1", "cat", "val"),
            ("TEST/cat/x/1", "cat", "test"),
            ("TEST/dog/1", "dog", "test"),
        ]
    )


@ALL
@pytest.mark.parametrize("inside", ["1.jpg", "steam/1.jpg"])
def test_a_class_called_train_among_vehicles_is_a_class(make: Maker, inside: str, tmp_path: Path) -> None:
    dataset = scan_source(make(tmp_path, ["bus/1.jpg", "car/1.jpg", f"train/{inside}", "ship/1.jpg"]))
    assert dataset.classes == ("bus", "car", "ship", "train")
    assert (dataset.splits == -1).all()
    assert "train is read as a class, like the folders beside it" in dataset.notes


@ALL
def test_a_class_called_train_keeps_its_place_with_as_many_subfolders_as_neighbours(
    make: Maker, tmp_path: Path
) -> None:
    dataset = scan_source(make(tmp_path, ["bus/1", "car/1", "train/diesel/1", "train/steam/1"]))
    assert dataset.classes == ("bus", "car", "train")


@ALL
@pytest.mark.parametrize("flat", ["test/1.jpg", "test/images/1.jpg"])
def test_a_test_folder_without_known_classes_is_unlabelled_and_that_is_said(
    make: Maker, flat: str, tmp_path: Path
) -> None:
    dataset = scan_source(make(tmp_path, ["train/cat/1", "train/dog/1", flat]))
    assert rows(dataset)[0] == (flat, None, "test")
    assert dataset.classes == ("cat", "dog")
    assert any("it holds 1 unlabelled image, not scored" in note for note in dataset.notes)


@ALL
def test_a_labelled_test_folder_may_hold_classes_that_training_lacks(make: Maker, tmp_path: Path) -> None:
    dataset = scan_source(
        make(tmp_path, ["train/cat/1", "train/dog/1", "test/cat/1", "test/emu/1", "test/x"])
    )
    assert rows(dataset)[:3] == [
        ("test/cat/1", "cat", "test"),
        ("test/emu/1", "emu", "test"),
        ("test/x", None, "test"),
    ]


@ALL
@pytest.mark.parametrize("part", ["test", "val"])
def test_a_held_out_folder_beside_class_folders_is_a_part(make: Maker, part: str, tmp_path: Path) -> None:
    dataset = scan_source(make(tmp_path, ["cat/1", "dog/1", f"{part}/cat/1", f"{part}/dog/1"]))
    assert rows(dataset) == [
        ("cat/1", "cat", None),
        ("dog/1", "dog", None),
        (f"{part}/cat/1", "cat", part),
        (f"{part}/dog/1", "dog", part),
    ]
    assert f"{part} is a part of the data, the folders beside it are classes" in dataset.notes


@ALL
def test_a_flat_test_folder_beside_class_folders_is_no_class(make: Maker, tmp_path: Path) -> None:
    dataset = scan_source(make(tmp_path, ["cat/1", "dog/1", "test/1"]))
    assert rows(dataset) == [("cat/1", "cat", None), ("dog/1", "dog", None), ("test/1", None, "test")]


@ALL
def test_test_versus_control_are_two_classes(make: Maker, tmp_path: Path) -> None:
    assert scan_source(make(tmp_path, ["control/1", "test/1"])).classes == ("control", "test")


@ALL
def test_a_test_folder_alone_is_labelled_by_its_subfolders(make: Maker, tmp_path: Path) -> None:
    dataset = scan_source(make(tmp_path, ["test/cat/1", "test/dog/1"]))
    assert rows(dataset) == [("test/cat/1", "cat", "test"), ("test/dog/1", "dog", "test")]


@ALL
def test_folders_beside_the_parts_are_counted_and_left_out(make: Maker, tmp_path: Path) -> None:
    names = ["train/cat/1", "train/dog/1", "test/cat/1", "masks/1", "masks/2", "train/stray", "top.jpg"]
    dataset = scan_source(make(tmp_path, names))
    assert [path for path, _, _ in rows(dataset)] == ["test/cat/1", "train/cat/1", "train/dog/1"]
    assert dataset.skipped == {
        "in masks, outside the class folders": 2,
        "in train, outside the class folders": 1,
        "outside the class folders": 1,
    }


@BOTH
def test_subfolders_named_alike_in_two_classes_never_merge(make: Maker, tmp_path: Path) -> None:
    dataset = scan_source(make(tmp_path, ["a/cat/1", "a/dog/1", "b/cat/1"]))
    assert rows(dataset) == [("a/cat/1", "a", None), ("a/dog/1", "a", None), ("b/cat/1", "b", None)]
    assert dataset.notes == (
        "subfolders named alike in several classes stay apart, the first folder is the class: cat",
    )


@BOTH
def test_class_folders_that_differ_in_a_space_stay_apart_and_are_named(make: Maker, tmp_path: Path) -> None:
    dataset = scan_source(make(tmp_path, ["cat/1", "cat /1", "Cat/1", "dog/1"]))
    assert sorted(rows(dataset)) == [
        ("Cat/1", "Cat", None),
        ("cat /1", "cat ", None),
        ("cat/1", "cat", None),
        ("dog/1", "dog", None),
    ]
    assert dataset.notes == (
        "classes 'Cat' and 'cat' and 'cat ' differ only in case, spaces or the way accents are stored "
        "and stay apart",
    )


@BOTH
def test_classes_whose_accents_are_stored_otherwise_are_named(make: Maker, tmp_path: Path) -> None:
    dataset = scan_source(make(tmp_path, ["Cafe\u0301/1", "Caf\u00e9/1", "dog/1"]))
    assert len(dataset.classes) == 3
    (note,) = dataset.notes
    assert note.endswith(" differ only in case, spaces or the way accents are stored and stay apart")


def test_a_table_finds_names_whose_accents_are_stored_otherwise(tmp_path: Path) -> None:
    make_folder(tmp_path, ["in/Cafe\u0301.jpg", "in/dog.jpg"])
    (tmp_path / "data/t.csv").write_text("path,label\nCaf\u00e9,cup\ndog,dog\n")
    assert scan_source(str(tmp_path / "data/t.csv")).paths == ("in/Cafe\u0301.jpg", "in/dog.jpg")


@pytest.mark.parametrize("is_zipped", [False, True])
def test_class_folders_without_a_photograph_are_named(is_zipped: bool, tmp_path: Path) -> None:
    names = ["train/cat/1", "train/dog/1", "train/emu/deep/film.mp4", "test/cat/1"]
    folders = ["train/fox", "train/cat/none", "train/.git", "val", "val/cat"]
    if is_zipped:
        source = pack(
            tmp_path, {**{name: b"x" for name in names}, **{f"{folder}/": b"" for folder in folders}}
        )
    else:
        source = make_folder(tmp_path, names)
        for folder in folders:
            os.makedirs(f"{source}/{folder}", exist_ok=True)
    assert "3 folders without an image: val, train/emu, train/fox" in scan_source(source).notes
    assert not any("without an image" in note for note in list_images(source).notes)


def test_empty_folders_beside_class_folders_are_named(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    for folder in ("emu/deep", "cat/deep", "lost+found"):
        os.makedirs(f"{source}/{folder}")
    os.symlink(source, f"{source}/loop")
    assert scan_source(source).notes == ("2 folders without an image: emu, lost+found",)


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
    dataset = scan_source(make(tmp_path, ["cat/1.jpg", "dog/1.jpg", "__MACOSX/cat/._1.jpg", *junk]))
    assert list(dataset.paths) == [f"{prefix}cat/1.jpg", f"{prefix}dog/1.jpg"]
    assert dataset.skipped == {"hidden": 3, "system files": 2, "__MACOSX": 1, ".txt files": 1}


def test_extensions_are_only_hints(tmp_path: Path) -> None:
    dataset = scan_source(make_folder(tmp_path, ["a/1", "a/2.bin", "a/3.JPG", "b/4.jpg.bak"]))
    assert dataset.paths == ("a/1", "a/2.bin", "a/3.JPG", "b/4.jpg.bak")


@given(st.lists(st.text(alphabet="aB1023 é", max_size=6)))
def test_natural_order_is_total_and_does_not_depend_on_the_first_order(names: list[str]) -> None:
    assert sorted(names, key=natural_key) == sorted(reversed(names), key=natural_key)


def test_natural_order_puts_2_before_10_and_survives_endless_numbers() -> None:
    names = ["10", "2", "01", "1", "b2", "B10", "9" * 5000, ""]
    assert sorted(names, key=natural_key) == ["", "01", "1", "2", "10", "9" * 5000, "b2", "B10"]


# What cannot be used


@BOTH
def test_an_empty_source_says_what_was_expected(make: Maker, tmp_path: Path) -> None:
    source = make(tmp_path, [])
    assert message(source) == f"{source} has no images; expected {source}/<class>/photo.jpg or a table"


def test_a_folder_of_other_files_says_what_was_passed_over(tmp_path: Path) -> None:
    said = message(make_folder(tmp_path, ["a/notes.txt", "a/.x"]))
    assert "has no images (passed over by name, 1 .txt files, 1 hidden)" in said


@BOTH
def test_photographs_without_class_folders_get_the_remedy(make: Maker, tmp_path: Path) -> None:
    source = make(tmp_path, ["1.jpg", "2.jpg"])
    assert message(source) == (
        f"{source} has images but no class folders; expected {source}/<class>/photo.jpg, "
        f"{source}/train/<class>/photo.jpg or a table with path and label; "
        "if this is one class, give the folder above"
    )


def test_one_level_too_high_names_the_folder_to_give(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["photos/2024/cat/1", "photos/2024/dog/1"])
    assert message(source) == (
        f"{source} has one class folder, 'photos/2024', whose subfolders look like classes; "
        f"give {source}/photos/2024 instead"
    )


def test_kaggle_folders_without_classes_point_to_the_tables(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["train/1.jpg", "test/2.jpg", "train.csv", "sample_submission.csv"])
    assert message(source).endswith(f"; {source}/train.csv lies there: give a table instead of the folder")


def test_a_source_that_is_not_there_or_of_no_known_kind_is_named(tmp_path: Path) -> None:
    assert message("nowhere") == ("nowhere does not exist; give a folder, a table or a zip archive of images")
    other = tmp_path / "a.jpg"
    other.write_bytes(b"x")
    assert message(str(other)) == f"{other} is no folder, table (.csv, .tsv, .parquet) or zip archive"


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    source = make_zip(tmp_path, ["cat/1", "dog/1"])
    whole = Path(source).read_bytes()
    for damaged, why in (
        (whole.replace(b"PK\x01\x02", b"PK\0\0"), "Bad magic number for central directory"),
        (whole[:-30], "File is not a zip file"),
    ):
        Path(source).write_bytes(damaged)
        assert message(source) == (
            f"{source} cannot be read as a zip archive: {why}; pack or download it again"
        )


def test_a_stray_photograph_does_not_hide_the_wrapper(tmp_path: Path) -> None:
    names = ["photos/cat/1", "photos/cat/2", "photos/dog/1", "photos/cover.jpg", "top.jpg"]
    assert message(make_folder(tmp_path, names)).endswith(
        "give " + str(tmp_path / "data" / "photos") + " instead"
    )
    dataset = scan_source(make_zip(tmp_path, names))
    assert dataset.paths == ("photos/cat/1", "photos/cat/2", "photos/dog/1")
    assert dataset.skipped == {"outside the class folders": 1, "outside photos/": 1}


# Links and odd names


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    root = Path(make_folder(tmp_path, ["cat/1", "dog/1"]))
    (root / "emu").symlink_to(root / "cat")
    (root / "cat/up").symlink_to(root)
    (root / "dog/self").symlink_to(root / "dog/self")
    (root / "dog/gone").symlink_to(root / "nowhere")
    dataset = scan_source(str(root))
    assert dataset.paths == ("cat/1", "dog/1", "dog/gone", "dog/self", "emu/1")
    for path in ("dog/gone", "dog/self"):
        with pytest.raises(ImageError):
            dataset.storage.read(path)


def test_a_link_from_a_class_to_its_root_does_not_repeat_the_root(tmp_path: Path) -> None:
    root = Path(make_folder(tmp_path, ["cat/1"]))
    (root / "cat/again").symlink_to(root / "cat")
    (root / "dog").mkdir()
    (root / "dog/2").write_bytes(b"2")
    assert scan_source(str(root)).paths == ("cat/1", "dog/2")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_valid_utf8_are_read(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9/\xff.jpg"), "dog/1.jpg"]
    dataset = scan_source(make_folder(tmp_path, names))
    assert list(dataset.paths) == names
    assert dataset.storage.read(names[0]) == b"caf\xe9/\xff.jpg"


# Archives


def test_a_wrapped_archive_says_that_it_was_unwrapped(tmp_path: Path) -> None:
    dataset = scan_source(make_wrapped_zip(tmp_path, ["cat/1", "dog/1"]))
    assert dataset.notes == ("the images of the archive lie in photos/2024/: classes are the folders inside",)
    assert dataset.paths == ("photos/2024/cat/1", "photos/2024/dog/1")


def test_members_that_point_outside_the_archive_are_passed_over_and_counted(tmp_path: Path) -> None:
    bad = ["../cat/1", "/cat/2", "cat/../../3", "C:/cat/4", "\\cat\\5"]
    dataset = scan_source(make_zip(tmp_path, ["cat/1", "dog/1", *bad]))
    assert dataset.paths == ("cat/1", "dog/1")
    assert dataset.skipped == {"unsafe names in the archive": 5}
    for path in bad[:3]:
        assert path not in dataset.paths


def test_backslashes_of_a_windows_archive_are_folders(tmp_path: Path) -> None:
    dataset = scan_source(make_zip(tmp_path, ["cat\\1", "dog\\deep\\1"]))
    assert rows(dataset) == [("cat/1", "cat", None), ("dog/deep/1", "dog", None)]
    assert dataset.storage.read("dog/deep/1") == b"dog\\deep\\1"


@pytest.mark.parametrize("raw", [b"K\xc3\xa4fer/1", b"K\x84fer/1"], ids=["as a Mac does", "as DOS did"])
def test_names_of_an_archive_that_does_not_say_how_they_are_written(raw: bytes, tmp_path: Path) -> None:
    plain = b"x" * len(raw)  # has no flag, and is then written over
    source = Path(pack(tmp_path, {plain.decode(): b"beetle", "dog/1": b"good"}))
    source.write_bytes(source.read_bytes().replace(plain, raw))
    dataset = scan_source(str(source))
    assert dataset.classes == ("dog", "Käfer")
    assert dataset.storage.read("Käfer/1") == b"beetle"


def test_an_archive_that_tar_has_made_is_read(tmp_path: Path) -> None:
    dataset = scan_source(make_zip(tmp_path, ["./", "./cat/", "./cat/1", "././dog/1"]))
    assert rows(dataset) == [("cat/1", "cat", None), ("dog/1", "dog", None)]
    assert dataset.storage.read("cat/1") == b"./cat/1"
    assert list_images(dataset.source).paths == ("cat/1", "dog/1")


def declare(path: str, name: str, *, size: int | None = None, flags: int | None = None) -> None:
    """Overwrite what both headers of a zip member say about its unpacked size or its flags."""
    data = bytearray(Path(path).read_bytes())
    with zipfile.ZipFile(path) as archive:
        local = archive.getinfo(name).header_offset
    central = 0
    while True:
        central = data.index(b"PK\x01\x02", central + 1)
        if data[central + 46 :].startswith(name.encode()):
            break
    if size is not None:
        struct.pack_into("<I", data, local + 22, size)
        struct.pack_into("<I", data, central + 24, size)
    if flags is not None:
        struct.pack_into("<H", data, local + 6, flags)
        struct.pack_into("<H", data, central + 8, flags)
    Path(path).write_bytes(data)


def read_error(source: str, path: str) -> ImageError:
    dataset = scan_source(source)
    with pytest.raises(ImageError) as caught:
        dataset.storage.read(path)
    assert dataset.storage.read("dog/1") == b"good"  # the others are still there
    return caught.value


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = bytes(65 << 20)
    source = pack(tmp_path, {"cat/1": bomb, "dog/1": b"good"}, zipfile.ZIP_DEFLATED)
    error = read_error(source, "cat/1")
    assert error.status == "too_large"
    assert error.reason.startswith("unpacks to 68,157,440 bytes, 1,0")
    assert error.reason.endswith(" times its packed size; limits: 1,073,741,824 bytes, 200 times")


@pytest.mark.parametrize("declared", [10, 2000, 5000])
def test_a_member_whose_declared_size_lies_is_unreadable(declared: int, tmp_path: Path) -> None:
    content = {"cat/1": bytes(range(250)) * 16, "dog/1": b"good"}
    source = pack(tmp_path, content, zipfile.ZIP_DEFLATED)
    declare(source, "cat/1", size=declared)
    error = read_error(source, "cat/1")
    assert error.status == "unreadable"
    assert error.reason.startswith("damaged zip member: ")


def test_a_method_that_ignores_declared_sizes_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("cat/1", bytes(10_000_000), zipfile.ZIP_BZIP2)
        archive.writestr("dog/1", b"good")
    source = str(tmp_path / "data.zip")
    declare(source, "cat/1", size=100)
    error = read_error(source, "cat/1")
    assert (error.status, error.reason) == (
        "unsupported",
        "packed by zip method 12; pack the archive with deflate",
    )


def test_an_encrypted_member_says_so(tmp_path: Path) -> None:
    source = pack(tmp_path, {"cat/1": b"secret", "dog/1": b"good"})
    declare(source, "cat/1", flags=1)
    error = read_error(source, "cat/1")
    assert (error.status, error.reason) == ("unsupported", "encrypted zip member; unpack the archive")


def test_a_damaged_member_is_unreadable_and_the_others_are_not(tmp_path: Path) -> None:
    source = pack(tmp_path, {"cat/1": b"abcdefgh" * 50, "dog/1": b"good"})
    data = Path(source).read_bytes()
    Path(source).write_bytes(data.replace(b"abcdefgh", b"abcdXfgh", 1))
    error = read_error(source, "cat/1")
    assert error.status == "unreadable"
    assert error.reason == "damaged zip member: Bad CRC-32 for file 'cat/1'"


@pytest.mark.parametrize("folder", ["", "kaggle/"])
def test_a_table_in_an_archive_labels_its_photographs(folder: str, tmp_path: Path) -> None:
    table = b"id,label\n1,dog\n2,cat\n"
    sample = b"id,label\n3,cat\n"
    source = pack(
        tmp_path,
        {
            f"{folder}images/1.jpg": b"1",
            f"{folder}images/2.jpg": b"2",
            f"{folder}sample_submission.csv": sample,
            f"{folder}train.csv": table,
            f"{folder}test.csv": b"id\n3\n",
        },
    )
    dataset = scan_source(source)
    assert rows(dataset) == [(f"{folder}images/1.jpg", "dog", None), (f"{folder}images/2.jpg", "cat", None)]
    assert dataset.expected == {"cat": None}


def test_paths_in_an_archived_table_start_where_it_lies(tmp_path: Path) -> None:
    table = b"path,label\nx.jpg,k\ny.jpg,m\n"
    members = {"in/x.jpg": b"1", "in/deep/x.jpg": b"2", "in/y.jpg": b"3", "in/t.csv": table}
    assert scan_source(pack(tmp_path, members)).paths == ("in/x.jpg", "in/y.jpg")


def test_images_dir_is_a_folder_of_the_archive(tmp_path: Path) -> None:
    members = {"train/1.jpg": b"1", "test/1.jpg": b"2", "t.csv": b"id,label\n1,k\n"}
    source = pack(tmp_path, members)
    assert message(source).startswith(f"{source}/t.csv names '1', which could be test/1.jpg, train/1.jpg; ")
    assert scan_source(source, DataConfig(images_dir="train/")).paths == ("train/1.jpg",)


def test_several_tables_in_an_archive_are_named(tmp_path: Path) -> None:
    table = b"id,label\n1,dog\n"
    source = pack(tmp_path, {"images/1.jpg": b"1", "a.csv": table, "b.csv": table})
    assert message(source) == (
        f"{source} holds several tables with labels: a.csv, b.csv; unpack it and give one of them"
    )


def test_a_broken_table_in_an_archive_does_not_hide_the_other(tmp_path: Path) -> None:
    tables = {"a.csv": b"id,label\n1,dog\n2,cat\n", "notes.csv": b"", "z.csv": b"a,b\n1\n"}
    dataset = scan_source(pack(tmp_path, {"images/1.jpg": b"1", "images/2.jpg": b"2", **tables}))
    assert dataset.paths == ("images/1.jpg", "images/2.jpg")
    assert [note for note in dataset.notes if note.startswith("a table is not used: ")] == [
        f"a table is not used: {tmp_path}/data.zip/{reason}"
        for reason in (
            "notes.csv has no rows; a table needs a header and at least one row",
            "z.csv, line 2 has 1 cells where the header has 2; mend the line",
        )
    ]


def test_broken_tables_and_no_other_say_what_to_mend(tmp_path: Path) -> None:
    tables = {"test.csv": b"id\n1\n", "train.csv": b"id,label\n1\n"}
    source = pack(tmp_path, {"1.jpg": b"1", **tables})
    assert message(source) == f"{source}/train.csv, line 2 has 1 cells where the header has 2; mend the line"


def test_a_table_in_an_archive_that_lacks_labels_says_so(tmp_path: Path) -> None:
    source = pack(tmp_path, {"1.jpg": b"1", "a.csv": b"id,n\n1,2\n"})
    assert message(source) == (
        f"{source}/a.csv has no column that looks like a label among id, n; name it with --label-column"
    )


# Expected classes


@pytest.mark.parametrize("place", ["data", "."])
def test_a_sample_submission_in_or_beside_the_data_names_expected_classes(place: str, tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    path = tmp_path / place / "Sample_Submission.csv"
    path.write_text("id,cat,dog,emu\n1,0.1,0.2,0.7\n")
    dataset = scan_source(source)
    assert dataset.expected == {"cat": None, "dog": None, "emu": None}
    assert dataset.notes == (f"expected classes are read from {path}",)


def test_a_sample_submission_of_another_task_or_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    sample = Path(source) / "sample_submission.csv"
    sample.write_text("id,price\n1,0.5\n")
    assert scan_source(source).expected == {}
    sample.write_text("id,label\n1\n")
    dataset = scan_source(source)
    assert dataset.expected == {}
    assert dataset.notes[0].startswith(f"a sample submission is not used: {sample}, line 2 has 1 cells")


def test_of_a_wide_sample_submission_only_the_header_is_read(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    (tmp_path / "data/sample_submission.csv").write_text("id,cat,dog\n1,0.5,0.5\n2,a line that is cut\n")
    assert scan_source(source).expected == {"cat": None, "dog": None}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("c.txt", "cat\n\n dog \nemu\ncat\n", {"cat": None, "dog": None, "emu": None}),
        ("c.csv", "class\ncat\ndog\n", {"cat": None, "dog": None}),
        ("c.csv", "cat\ndog\n", {"cat": None, "dog": None}),
        ("c.csv", "class,count\ncat,3\ndog, 40\n", {"cat": 3, "dog": 40}),
        ("c.csv", "class,comment,count\ncat,x,3\ndog,y,40\n", {"cat": 3, "dog": 40}),
        ("c.tsv", "Class\tN\ncat\t3\n", {"cat": 3}),
        ("c.csv", "id,label\n1,cat\n2,cat\n3,emu\n", {"cat": None, "emu": None}),
        ("c.csv", "id,cat,n\n1,0.5,0.5\n", {"cat": None, "n": None}),
    ],
)
def test_a_classes_file_is_a_list_counts_or_a_sample_submission(
    name: str, content: str, expected: dict[str, int | None], tmp_path: Path
) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    path = tmp_path / name
    path.write_text(content)
    assert scan_source(source, classes=str(path)).expected == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("class,count\ncat,many\n", "has the count 'many' for class 'cat'; expected a whole number"),
        ("class,count\ncat,1\ncat,2\n", "counts class 'cat' twice; list each class once"),
        ("cat,3\ndog,4\n", "has no header; make `class,count` its first line"),
        ("class\n", "has no rows; a table needs a header and at least one row"),
        ("id,label\n1,\n", "names no class; expected one a line, or a table"),
    ],
)
def test_a_classes_file_that_cannot_be_used_says_why(content: str, said: str, tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    path = tmp_path / "classes.csv"
    path.write_text(content)
    assert message(source, classes=str(path)) == f"{path} {said}"


def test_a_classes_file_that_is_missing_empty_or_no_text_is_named(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    path = tmp_path / "classes.txt"
    assert message(source, classes=str(path)) == f"{path} cannot be read: No such file or directory"
    path.write_text("\n")
    assert message(source, classes=str(path)) == f"{path} names no class; expected one a line, or a table"
    path.write_bytes(b"\xff\xfe\0")
    assert message(source, classes=str(path)) == f"{path} is no text; expected one class a line, or a table"


# Groups


@ALL
def test_group_by_folder_takes_the_folder_below_the_class_folder(make: Maker, tmp_path: Path) -> None:
    names = ["cat/1", "cat/b1/1", "cat/b1/2", "cat/b2/1", "dog/b1/1", "dog/2"]
    groups = scan_source(make(tmp_path, names), DataConfig(group_by_folder=True)).groups
    assert groups is not None
    np.testing.assert_array_equal(groups, [0, 1, 1, 2, 3, 4])


def test_group_by_folder_looks_below_the_class_folder_of_a_part(tmp_path: Path) -> None:
    names = ["train/cat/1", "train/cat/2", "train/cat/b/1", "train/cat/b/2", "train/dog/1", "val/dog/b/1"]
    dataset = scan_source(make_folder(tmp_path, names), DataConfig(group_by_folder=True))
    assert dataset.groups is not None
    np.testing.assert_array_equal(dataset.groups, [0, 1, 2, 2, 3, 4])
    assert dataset.notes == ("3 images in no group: each stands alone",)


@BOTH
@pytest.mark.parametrize("pattern", [r"cam\d+", r"(cam\d+)_\d"])
def test_group_regex_names_groups_by_bracket_or_whole_match(
    make: Maker, pattern: str, tmp_path: Path
) -> None:
    names = ["cat/cam1_1", "cat/cam2_1", "dog/cam1_2", "dog/other"]
    groups = scan_source(make(tmp_path, names), DataConfig(group_regex=pattern)).groups
    assert groups is not None
    np.testing.assert_array_equal(groups, [0, 1, 0, 2])


def test_settings_that_group_nothing_are_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    assert message(source, DataConfig(group_regex="cam")) == (
        "--group-regex 'cam' matches none of 2 paths, for example cat/1; mend it or leave it out"
    )
    assert message(source, DataConfig(group_by_folder=True)) == (
        "--group-by-folder finds no folder below the class folder of any of 2 paths, for example cat/1; "
        "mend it or leave it out"
    )


# Images without labels


@BOTH
def test_listing_names_every_photograph_whatever_the_layout(make: Maker, tmp_path: Path) -> None:
    dataset = list_images(make(tmp_path, ["10.jpg", "2.jpg", "a/b/c.jpg", "a/.x", "t.txt"]))
    assert dataset.paths == ("2.jpg", "10.jpg", "a/b/c.jpg")
    assert (dataset.labels == -1).all()
    assert dataset.skipped == {"hidden": 1, ".txt files": 1}


def test_listing_a_missing_file_keeps_its_row() -> None:
    dataset = list_images("nowhere/1.jpg")
    assert dataset.paths == ("nowhere/1.jpg",)
    with pytest.raises(ImageError, match="no such file") as caught:
        dataset.storage.read(dataset.paths[0])
    assert caught.value.status == "missing"


def test_listing_a_table_keeps_order_repeats_and_missing_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ["b/1.jpg", "b/2.jpg"])
    table = Path(folder) / "ids.csv"
    table.write_text("id\n2\n9\n2\n1\n")
    assert list_images(str(table)).paths == ("b/2.jpg", "9", "b/2.jpg", "b/1.jpg")


def test_the_data_stage_does_not_load_torch() -> None:
    code = "import sys, pixelplay.data.audit, pixelplay.data.parts, pixelplay.data.source; "
    asked = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}print([m for m in ('torch', 'sklearn', 'pyarrow') if m in sys.modules])",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "setting", ["path_column", "label_column", "split_column", "group_column", "images_dir"]
)
def test_a_setting_about_tables_is_refused_for_a_folder(setting: str, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match=f"--{setting.replace('_', '-')} is about tables"):
        scan_source(str(tmp_path), DataConfig(**{setting: "patient"}))


def test_training_and_testing_are_parts(tmp_path: Path) -> None:
    dataset = scan_source(make_folder(tmp_path, ["Training/a/1.jpg", "Training/b/2.jpg", "Testing/a/3.jpg"]))
    told = [(label, part) for _, label, part in rows(dataset)]
    assert told == [("a", "test"), ("a", "train"), ("b", "train")]


def test_a_photograph_with_an_archive_behind_it_is_a_photograph(tmp_path: Path) -> None:
    archive = Path(make_zip(tmp_path, ["a.jpg", "b.jpg"])).read_bytes()
    both = tmp_path / "photo.jpg"
    both.write_bytes(b"\xff\xd8\xff\xe0" + bytes(2000) + archive)
    assert list_images(str(both)).paths == (str(both),)


def test_a_sample_submission_with_one_label_names_no_expectation(tmp_path: Path) -> None:
    folder = Path(make_folder(tmp_path, ["a/1.jpg", "b/2.jpg"]))
    sample = folder / "sample_submission.csv"
    sample.write_text("id,label\n1,a\n2,a\n")
    assert scan_source(str(folder)).expected == {}
    sample.write_text("id,label\n1,a\n2,c\n")
    assert set(scan_source(str(folder)).expected) == {"a", "c"}
