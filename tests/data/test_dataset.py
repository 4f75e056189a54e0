"""Columns of names become class indices, splits and groups, and a selection keeps their meaning."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_files import ALL, BOTH, Maker, assert_notes, assert_refused, make_folder
from pixelplay.config import DataConfig
from pixelplay.data.dataset import ImageDataset, make_dataset, natural_key
from pixelplay.data.file_access import FolderStorage
from pixelplay.data.sources import open_dataset


def example() -> ImageDataset:
    return make_dataset(
        "photos",
        FolderStorage("photos"),
        ["a/1", "b/1", "10/1", "2/1", "x"],
        ["a", "b", "10", "2", None],
        ["train", "val", "test", None, "test"],
        ["g", "", "g", "", "h"],
    )


def test_class_names_are_numbered_in_natural_order() -> None:
    dataset = example()
    assert len(dataset) == 5
    assert dataset.classes == ("2", "10", "a", "b")
    np.testing.assert_array_equal(dataset.labels, [2, 3, 1, 0, -1])
    np.testing.assert_array_equal(dataset.splits, [0, 1, 2, -1, 2])
    assert dataset.groups is not None
    np.testing.assert_array_equal(dataset.groups, [0, 1, 0, 2, 3])
    np.testing.assert_array_equal(dataset.in_split("test"), [False, False, True, False, True])
    np.testing.assert_array_equal(dataset.class_counts(), [1, 1, 1, 1])


def test_select_keeps_classes_and_groups() -> None:
    selected = example().select(np.array([True, False, True, False, True]))
    assert selected.paths == ("a/1", "10/1", "x")
    assert selected.classes == ("2", "10", "a", "b")
    np.testing.assert_array_equal(selected.labels, [2, 1, -1])
    np.testing.assert_array_equal(selected.splits, [0, 2, 2])
    assert selected.groups is not None
    np.testing.assert_array_equal(selected.groups, [0, 0, 3])
    np.testing.assert_array_equal(selected.class_counts(), [0, 1, 1, 0])


def test_class_counts_ignore_unlabelled_images() -> None:
    dataset = example()
    np.testing.assert_array_equal(dataset.class_counts(dataset.in_split("test")), [0, 1, 0, 0])


def test_a_dataset_may_be_empty() -> None:
    dataset = make_dataset("none", FolderStorage("none"), [], [], [])
    assert (len(dataset), dataset.classes, dataset.groups) == (0, (), None)
    assert dataset.class_counts().shape == (0,)


# Natural order


@given(st.lists(st.text(alphabet="aB1023 é", max_size=6)))
def test_natural_order_is_total(names: list[str]) -> None:
    assert sorted(names, key=natural_key) == sorted(reversed(names), key=natural_key)


def test_natural_order_puts_2_before_10_and_accepts_very_long_numbers() -> None:
    names = ["10", "2", "01", "1", "b2", "B10", "9" * 5000, ""]
    assert sorted(names, key=natural_key) == ["", "01", "1", "2", "10", "9" * 5000, "b2", "B10"]


# Groups


@ALL
def test_group_by_folder_uses_the_folder_below_the_class_folder(make: Maker, tmp_path: Path) -> None:
    names = ["cat/1", "cat/b1/1", "cat/b1/2", "cat/b2/1", "dog/b1/1", "dog/2"]
    groups = open_dataset(make(tmp_path, names), DataConfig(group_by_folder=True)).groups
    assert groups is not None
    np.testing.assert_array_equal(groups, [0, 1, 1, 2, 3, 4])


def test_group_by_folder_uses_the_folder_below_the_class_folder_of_a_split(tmp_path: Path) -> None:
    names = ["train/cat/1", "train/cat/2", "train/cat/b/1", "train/cat/b/2", "train/dog/1", "val/dog/b/1"]
    dataset = open_dataset(make_folder(tmp_path, names), DataConfig(group_by_folder=True))
    assert dataset.groups is not None
    np.testing.assert_array_equal(dataset.groups, [0, 1, 2, 2, 3, 4])
    assert_notes(dataset, ("3 images", "own group"))


@BOTH
@pytest.mark.parametrize("pattern", [r"cam\d+", r"(cam\d+)_\d"])
def test_group_regex_uses_its_first_parenthesis_or_the_whole_match(
    make: Maker, pattern: str, tmp_path: Path
) -> None:
    names = ["cat/cam1_1", "cat/cam2_1", "dog/cam1_2", "dog/other"]
    groups = open_dataset(make(tmp_path, names), DataConfig(group_regex=pattern)).groups
    assert groups is not None
    np.testing.assert_array_equal(groups, [0, 1, 0, 2])


def test_group_options_that_match_nothing_are_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    assert_refused(source, "--group-regex 'cam'", "2 paths", "cat/1", config=DataConfig(group_regex="cam"))
    assert_refused(source, "--group-by-folder", "2 paths", "cat/1", config=DataConfig(group_by_folder=True))
