"""Tests of dropping training images with label issues."""

import re
from dataclasses import replace

import numpy as np
import pytest

from contexts import context_of
from pixelplay.config import SplitName, TrainConfig
from pixelplay.data.dataset import make_dataset
from pixelplay.data.file_access import FolderStorage
from pixelplay.model.features import ImageFeatures
from pixelplay.run_log import RunLog
from pixelplay.training.label_cleaning import remove_label_issues
from pixelplay.training.prepare import log_problems
from pixelplay.training.training_data import TrainingData, build_training_data

N = 90  # images of three classes in turn
WRONG = (0, 10, 20, 31, 44)  # labelled as the next class
CONFIG = TrainConfig(finetune="none", test_frac=0.2)


def data_with_wrong_labels(
    wrong: tuple[int, ...], config: TrainConfig, splits: list[SplitName | None] | None = None
) -> TrainingData:
    """Return images whose features show the true class; `wrong` positions have another label."""
    true = np.arange(N) % 3
    labels = true.copy()
    labels[list(wrong)] = (true[list(wrong)] + 1) % 3
    names = [f"{i}" for i in range(N)]
    dataset = make_dataset(
        "made", FolderStorage("nowhere"), names, [f"class {k}" for k in labels], splits or [None] * N
    )
    features = 6 * np.eye(3)[true] + np.random.default_rng(0).normal(0, 1, (N, 3))
    images = ImageFeatures(
        values=features.astype(np.float32), digests=[name.encode() for name in names], errors={}
    )
    return build_training_data(dataset, images, config)


def drop(data: TrainingData, config: TrainConfig) -> tuple[TrainingData, list[str]]:
    log = RunLog(quiet=True)
    return remove_label_issues(data, context_of(config, log)), log.notes


def test_label_issues_are_dropped_and_noted() -> None:
    data = data_with_wrong_labels(WRONG, CONFIG)
    kept, notes = drop(data, CONFIG)
    wrong_in_train = np.intersect1d(WRONG, data.fit_rows)
    assert len(wrong_in_train) >= 3
    np.testing.assert_array_equal(kept.dropped, wrong_in_train)
    np.testing.assert_array_equal(kept.fit_rows, np.setdiff1d(data.fit_rows, wrong_in_train))
    np.testing.assert_array_equal(kept.fit_rows, kept.split.train)
    (note,) = notes
    assert re.search(rf"\b{len(wrong_in_train)}\b.*\b{len(data.fit_rows)}\b", note)
    assert ", ".join(map(str, wrong_in_train[:3])) in note


def test_reviewed_labels_are_not_dropped() -> None:
    data = data_with_wrong_labels(WRONG, CONFIG)
    wrong_in_train = np.intersect1d(WRONG, data.fit_rows)
    reviewed = np.isin(np.arange(N), wrong_in_train[:2])
    kept, _ = drop(replace(data, reviewed=reviewed), CONFIG)
    np.testing.assert_array_equal(kept.dropped, wrong_in_train[2:])
    assert np.isin(wrong_in_train[:2], kept.fit_rows).all()


def test_correct_labels_are_not_dropped() -> None:
    data = data_with_wrong_labels((), CONFIG)
    kept, notes = drop(data, CONFIG)
    assert (len(kept.dropped), notes) == (0, [])
    np.testing.assert_array_equal(kept.fit_rows, data.fit_rows)


@pytest.mark.parametrize("finetune", ["partial", "auto"])
def test_label_issues_in_val_and_test_still_select_and_measure(finetune: str) -> None:
    config = TrainConfig(finetune=finetune, test_frac=0.2)  # type: ignore[arg-type]
    splits: list[SplitName | None] = ["train"] * 50 + ["val"] * 20 + ["test"] * 20
    wrong = (1, 2, 55, 60, 75, 80)
    data = data_with_wrong_labels(wrong, config, splits)
    kept, _ = drop(data, config)
    np.testing.assert_array_equal(kept.dropped, [1, 2, 55, 60])
    np.testing.assert_array_equal(kept.fit_rows, np.setdiff1d(data.fit_rows, [1, 2, 55, 60]))
    for name in ("val", "test"):
        np.testing.assert_array_equal(getattr(kept.split, name), getattr(data.split, name))
    np.testing.assert_array_equal(kept.original_labels, data.original_labels)
    np.testing.assert_array_equal(kept.labels, data.labels)


def test_linear_probe_drops_label_issues_in_val_too() -> None:
    splits: list[SplitName | None] = ["train"] * 50 + ["val"] * 20 + ["test"] * 20
    kept, _ = drop(data_with_wrong_labels((1, 2, 55, 60, 75, 80), CONFIG, splits), CONFIG)
    np.testing.assert_array_equal(kept.dropped, [1, 2, 55, 60])


def test_train_split_keeps_half_of_each_class_when_dropping_label_issues() -> None:
    config = TrainConfig(finetune="partial")
    splits: list[SplitName | None] = ["val"] * N
    mislabelled = range(0, 15, 3)  # all training images of one class
    splits[0:60:3], splits[2:47:3] = ["train"] * 20, ["train"] * 15
    kept, _ = drop(data_with_wrong_labels(tuple(mislabelled), config, splits), config)
    assert len(np.intersect1d(kept.dropped, mislabelled)) == 2
    assert (kept.counts_of(kept.split.train) > 0).all()


def test_dropping_label_issues_keeps_half_of_each_class() -> None:
    # nearly all images of one class look like another, so the class is hard rather than mislabelled
    wrong = tuple(i for i in range(0, N, 3) if i > 12)
    config = TrainConfig(finetune="none", test_frac=0)
    data = data_with_wrong_labels(wrong, config)
    kept, _ = drop(data, config)
    assert (kept.fit_counts >= data.fit_counts / 2).all()
    assert kept.n_known == 3


def data_in_groups(labels: str, groups: str, config: TrainConfig) -> TrainingData:
    """Return one image per letter of `labels`; images with equal letters in `groups` form a group."""
    names = [f"{i}" for i in range(len(labels))]
    no_splits: list[SplitName | None] = [None] * len(names)
    dataset = make_dataset("made", FolderStorage("nowhere"), names, list(labels), no_splits, list(groups))
    images = ImageFeatures(
        values=np.zeros((len(names), 2), np.float32), digests=[name.encode() for name in names], errors={}
    )
    return build_training_data(dataset, images, config)


def test_class_moved_to_test_by_groups_is_noted() -> None:
    log = RunLog(quiet=True)
    data = data_in_groups("bcbaacaaccaa", "acdbcbdccacb", CONFIG)
    assert data.known_classes == ("a", "c")
    log_problems(data, CONFIG, log)
    assert any("1 of 3 classes" in note and note.endswith(": b") for note in log.notes)


def test_class_in_one_group_is_noted_as_never_held_out() -> None:
    log = RunLog(quiet=True)
    data = data_in_groups("a" * 10 + "b" * 4, "0123456789xxxx", CONFIG)
    log_problems(data, CONFIG, log)
    assert any("1 of 2 classes" in note and note.endswith(": b") for note in log.notes)
