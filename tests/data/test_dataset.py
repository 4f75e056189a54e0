"""What index.py promises: columns of names become numbers, and a selection keeps their meaning."""

import numpy as np

from pixelplay.data.dataset import ImageDataset, make_dataset
from pixelplay.data.storage import FolderStorage


def example() -> ImageDataset:
    return make_dataset(
        "photos",
        FolderStorage("photos"),
        ["a/1", "b/1", "10/1", "2/1", "x"],
        ["a", "b", "10", "2", None],
        ["train", "val", "test", None, "test"],
        ["g", "", "g", "", "h"],
    )


def test_names_become_numbers_in_natural_order() -> None:
    dataset = example()
    assert len(dataset) == 5
    assert dataset.classes == ("2", "10", "a", "b")
    np.testing.assert_array_equal(dataset.labels, [2, 3, 1, 0, -1])
    np.testing.assert_array_equal(dataset.splits, [0, 1, 2, -1, 2])
    assert dataset.groups is not None
    np.testing.assert_array_equal(dataset.groups, [0, 1, 0, 2, 3])
    np.testing.assert_array_equal(dataset.in_split("test"), [False, False, True, False, True])
    np.testing.assert_array_equal(dataset.class_counts(), [1, 1, 1, 1])


def test_a_selection_keeps_classes_and_groups() -> None:
    chosen = example().select(np.array([True, False, True, False, True]))
    assert chosen.paths == ("a/1", "10/1", "x")
    assert chosen.classes == ("2", "10", "a", "b")
    np.testing.assert_array_equal(chosen.labels, [2, 1, -1])
    np.testing.assert_array_equal(chosen.splits, [0, 2, 2])
    assert chosen.groups is not None
    np.testing.assert_array_equal(chosen.groups, [0, 0, 3])
    np.testing.assert_array_equal(chosen.class_counts(), [0, 1, 1, 0])


def test_counts_of_a_mask_leave_out_the_unlabelled() -> None:
    dataset = example()
    np.testing.assert_array_equal(dataset.class_counts(dataset.in_split("test")), [0, 1, 0, 0])


def test_an_index_may_be_empty() -> None:
    dataset = make_dataset("none", FolderStorage("none"), [], [], [])
    assert (len(dataset), dataset.classes, dataset.groups) == (0, (), None)
    assert dataset.class_counts().shape == (0,)
