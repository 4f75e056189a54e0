"""Class folders and split folders become labels and splits, and nothing is skipped silently."""

import os
from pathlib import Path

import pytest

from dataset_files import (
    ALL,
    BOTH,
    Maker,
    assert_notes,
    assert_refused,
    assert_words,
    make_folder,
    make_wrapped_zip,
    make_zip,
    pack,
    rows,
)
from pixelplay.data.sources import list_images, open_dataset


@ALL
def test_class_folders_give_classes_in_natural_order_at_any_depth(make: Maker, tmp_path: Path) -> None:
    source = make(tmp_path, ["10/a.jpg", "2/deep/er/b.jpg", "2/a10.jpg", "2/a9.jpg", "Ant/x", "ant 3/x"])
    dataset = open_dataset(source)
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
def test_split_folders_are_found_in_any_spelling(make: Maker, val: str, tmp_path: Path) -> None:
    source = make(tmp_path, ["Train/cat/1", "Train/dog/1", f"{val}/cat/1", "TEST/cat/x/1", "TEST/dog/1"])
    dataset = open_dataset(source)
    assert sorted(rows(dataset)) == sorted(
        [
            ("Train/cat/1", "cat", "train"),
            ("Train/dog/1", "dog", "train"),
            (f"{val}/cat/1", "cat", "val"),
            ("TEST/cat/x/1", "cat", "test"),
            ("TEST/dog/1", "dog", "test"),
        ]
    )


def test_training_and_testing_are_split_folders(tmp_path: Path) -> None:
    dataset = open_dataset(make_folder(tmp_path, ["Training/a/1.jpg", "Training/b/2.jpg", "Testing/a/3.jpg"]))
    found = [(label, split) for _, label, split in rows(dataset)]
    assert found == [("a", "test"), ("a", "train"), ("b", "train")]


@ALL
@pytest.mark.parametrize("inside", ["1.jpg", "steam/1.jpg"])
def test_train_among_other_vehicles_is_a_class(make: Maker, inside: str, tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path, ["bus/1.jpg", "car/1.jpg", f"train/{inside}", "ship/1.jpg"]))
    assert dataset.classes == ("bus", "car", "ship", "train")
    assert (dataset.splits == -1).all()
    assert_words(dataset.notes[0], "classes", "train")


@ALL
def test_train_with_as_many_subfolders_as_other_classes_is_a_class(make: Maker, tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path, ["bus/1", "car/1", "train/diesel/1", "train/steam/1"]))
    assert dataset.classes == ("bus", "car", "train")


@ALL
@pytest.mark.parametrize("flat", ["test/1.jpg", "test/images/1.jpg"])
def test_test_split_without_known_classes_is_unlabelled(make: Maker, flat: str, tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path, ["train/cat/1", "train/dog/1", flat]))
    assert rows(dataset)[0] == (flat, None, "test")
    assert dataset.classes == ("cat", "dog")
    assert_words(dataset.notes[0], "test", "unlabelled", "not scored", "1 image")


@ALL
def test_labelled_test_split_may_have_classes_without_training_images(make: Maker, tmp_path: Path) -> None:
    dataset = open_dataset(
        make(tmp_path, ["train/cat/1", "train/dog/1", "test/cat/1", "test/emu/1", "test/x"])
    )
    assert rows(dataset)[:3] == [
        ("test/cat/1", "cat", "test"),
        ("test/emu/1", "emu", "test"),
        ("test/x", None, "test"),
    ]


@ALL
@pytest.mark.parametrize("split", ["test", "val"])
def test_held_out_folder_next_to_class_folders_is_a_split(make: Maker, split: str, tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path, ["cat/1", "dog/1", f"{split}/cat/1", f"{split}/dog/1"]))
    assert rows(dataset) == [
        ("cat/1", "cat", None),
        ("dog/1", "dog", None),
        (f"{split}/cat/1", "cat", split),
        (f"{split}/dog/1", "dog", split),
    ]
    assert_words(dataset.notes[0], "splits", split)


@ALL
def test_flat_test_folder_next_to_class_folders_is_a_split(make: Maker, tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path, ["cat/1", "dog/1", "test/1"]))
    assert rows(dataset) == [("cat/1", "cat", None), ("dog/1", "dog", None), ("test/1", None, "test")]


@ALL
def test_test_versus_control_are_two_classes(make: Maker, tmp_path: Path) -> None:
    assert open_dataset(make(tmp_path, ["control/1", "test/1"])).classes == ("control", "test")


@ALL
def test_single_test_folder_is_labelled_by_its_subfolders(make: Maker, tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path, ["test/cat/1", "test/dog/1"]))
    assert rows(dataset) == [("test/cat/1", "cat", "test"), ("test/dog/1", "dog", "test")]


@ALL
def test_files_next_to_split_folders_are_skipped_and_counted(make: Maker, tmp_path: Path) -> None:
    names = ["train/cat/1", "train/dog/1", "test/cat/1", "masks/1", "masks/2", "train/stray", "top.jpg"]
    dataset = open_dataset(make(tmp_path, names))
    assert [path for path, _, _ in rows(dataset)] == ["test/cat/1", "train/cat/1", "train/dog/1"]
    assert dataset.skipped == {
        "in masks, outside the class folders": 2,
        "in train, outside the class folders": 1,
        "outside the class folders": 1,
    }


@BOTH
def test_subfolders_with_the_same_name_are_not_merged(make: Maker, tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path, ["a/cat/1", "a/dog/1", "b/cat/1"]))
    assert rows(dataset) == [("a/cat/1", "a", None), ("a/dog/1", "a", None), ("b/cat/1", "b", None)]
    assert_notes(dataset, ("the first folder", "cat"))


@BOTH
def test_class_folders_that_differ_in_a_space_are_separate_and_named(make: Maker, tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path, ["cat/1", "cat /1", "Cat/1", "dog/1"]))
    assert sorted(rows(dataset)) == [
        ("Cat/1", "Cat", None),
        ("cat /1", "cat ", None),
        ("cat/1", "cat", None),
        ("dog/1", "dog", None),
    ]
    assert_notes(dataset, ("'Cat'", "'cat'", "'cat '", "separate"))


@BOTH
def test_classes_that_differ_in_accent_encoding_are_named(make: Maker, tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path, ["Cafe\u0301/1", "Caf\u00e9/1", "dog/1"]))
    assert len(dataset.classes) == 3
    assert_notes(dataset, ("'Cafe\u0301'", "'Caf\u00e9'", "separate"))


@pytest.mark.parametrize("is_zipped", [False, True])
def test_class_folders_without_an_image_are_named(is_zipped: bool, tmp_path: Path) -> None:
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
    assert_notes(open_dataset(source), ("3 folders without an image: val, train/emu, train/fox",))
    assert_notes(list_images(source))


def test_empty_folders_next_to_class_folders_are_named(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    for folder in ("emu/deep", "cat/deep", "lost+found"):
        os.makedirs(f"{source}/{folder}")
    os.symlink(source, f"{source}/loop")
    assert_notes(open_dataset(source), ("2 folders without an image: emu, lost+found",))


def test_a_note_names_three_empty_folders_and_counts_the_rest(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    for i in range(5):
        os.makedirs(f"{source}/e{i}")
    assert_notes(open_dataset(source), ("5 folders", "e0, e1, e2 and 2 more"))


# Errors


@BOTH
def test_empty_source_is_refused_with_the_expected_layout(make: Maker, tmp_path: Path) -> None:
    source = make(tmp_path, [])
    assert_refused(source, f"{source} has no images; expected {source}/<class>/photo.jpg")


def test_folder_of_other_files_is_refused_with_what_was_skipped(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["a/notes.txt", "a/.x"])
    assert_refused(source, "no images", "1 .txt files", "1 hidden")


@BOTH
def test_images_without_class_folders_are_refused_with_what_to_do(make: Maker, tmp_path: Path) -> None:
    source = make(tmp_path, ["1.jpg", "2.jpg"])
    expected = (f"{source}/<class>/photo.jpg", f"{source}/train/<class>/photo.jpg", "path and label")
    assert_refused(source, f"{source} has images but no class folders", *expected, "parent folder")


def test_folder_one_level_too_high_is_refused_with_the_folder_to_pass(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["photos/2024/cat/1", "photos/2024/dog/1"])
    assert_refused(source, source, "'photos/2024'", f"pass {source}/photos/2024 instead")


def test_folder_without_classes_points_to_its_tables(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["train/1.jpg", "test/2.jpg", "train.csv", "sample_submission.csv"])
    assert_refused(source, f"to use {source}/train.csv, pass the table")


def test_a_stray_image_does_not_hide_the_wrapper_folder(tmp_path: Path) -> None:
    names = ["photos/cat/1", "photos/cat/2", "photos/dog/1", "photos/cover.jpg", "top.jpg"]
    assert_refused(make_folder(tmp_path, names), f"pass {tmp_path / 'data/photos'} instead")
    dataset = open_dataset(make_zip(tmp_path, names))
    assert dataset.paths == ("photos/cat/1", "photos/cat/2", "photos/dog/1")
    assert dataset.skipped == {"outside the class folders": 1, "outside photos/": 1}


def test_wrapper_folder_of_an_archive_is_noted(tmp_path: Path) -> None:
    dataset = open_dataset(make_wrapped_zip(tmp_path, ["cat/1", "dog/1"]))
    assert_notes(dataset, ("photos/2024/",))
    assert dataset.paths == ("photos/2024/cat/1", "photos/2024/dog/1")
