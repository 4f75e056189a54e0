"""What suspected.py promises: wrong labels are not learned from; what chooses or measures keeps its own."""

import re
from dataclasses import replace

import numpy as np
import pytest

from contexts import context_of
from pixelplay.config import SplitName, TrainConfig
from pixelplay.data.dataset import make_dataset
from pixelplay.data.storage import FolderStorage
from pixelplay.model.features import ImageFeatures
from pixelplay.run_log import RunLog
from pixelplay.training.label_cleaning import remove_label_issues
from pixelplay.training.prepare import log_problems
from pixelplay.training.training_data import TrainingData, build_training_data

N = 90  # images of three classes in turn
WRONG = (0, 10, 20, 31, 44)  # given the next class's label
CONFIG = TrainConfig(finetune="none", test_frac=0.2)


def material_of(
    wrong: tuple[int, ...], config: TrainConfig, parts: list[SplitName | None] | None = None
) -> TrainingData:
    """Images whose features show the true class, some with another label."""
    true = np.arange(N) % 3
    labels = true.copy()
    labels[list(wrong)] = (true[list(wrong)] + 1) % 3
    names = [f"{i}" for i in range(N)]
    dataset = make_dataset(
        "made", FolderStorage("nowhere"), names, [f"class {k}" for k in labels], parts or [None] * N
    )
    features = 6 * np.eye(3)[true] + np.random.default_rng(0).normal(0, 1, (N, 3))
    images = ImageFeatures(
        values=features.astype(np.float32), digests=[name.encode() for name in names], errors={}
    )
    return build_training_data(dataset, images, config)


def drop(data: TrainingData, config: TrainConfig) -> tuple[TrainingData, list[str]]:
    log = RunLog(quiet=True)
    return remove_label_issues(data, context_of(config, log)), log.notes


def test_wrong_labels_are_dropped_and_said() -> None:
    data = material_of(WRONG, CONFIG)
    kept, notes = drop(data, CONFIG)
    wrong_learned = np.intersect1d(WRONG, data.fit_rows)
    assert len(wrong_learned) >= 3
    np.testing.assert_array_equal(kept.dropped, wrong_learned)
    np.testing.assert_array_equal(kept.fit_rows, np.setdiff1d(data.fit_rows, wrong_learned))
    np.testing.assert_array_equal(kept.fit_rows, kept.split.train)
    (note,) = notes
    assert re.search(rf"\b{len(wrong_learned)} images of {len(data.fit_rows)}\b", note)
    assert ", ".join(map(str, wrong_learned[:3])) in note


def test_what_somebody_has_looked_at_is_not_dropped() -> None:
    data = material_of(WRONG, CONFIG)
    wrong_learned = np.intersect1d(WRONG, data.fit_rows)
    reviewed = np.isin(np.arange(N), wrong_learned[:2])
    kept, _ = drop(replace(data, reviewed=reviewed), CONFIG)
    np.testing.assert_array_equal(kept.dropped, wrong_learned[2:])
    assert np.isin(wrong_learned[:2], kept.fit_rows).all()


def test_nothing_is_dropped_where_nothing_looks_wrong() -> None:
    data = material_of((), CONFIG)
    kept, notes = drop(data, CONFIG)
    assert (len(kept.dropped), notes) == (0, [])
    np.testing.assert_array_equal(kept.fit_rows, data.fit_rows)


@pytest.mark.parametrize("finetune", ["partial", "auto"])
def test_what_chooses_and_what_measures_keeps_its_labels(finetune: str) -> None:
    config = TrainConfig(finetune=finetune, test_frac=0.2)  # type: ignore[arg-type]
    parts: list[SplitName | None] = ["train"] * 50 + ["val"] * 20 + ["test"] * 20
    wrong = (1, 2, 55, 60, 75, 80)
    data = material_of(wrong, config, parts)
    kept, _ = drop(data, config)
    np.testing.assert_array_equal(kept.dropped, [1, 2, 55, 60])
    np.testing.assert_array_equal(kept.fit_rows, np.setdiff1d(data.fit_rows, [1, 2, 55, 60]))
    for part in ("val", "test"):
        np.testing.assert_array_equal(getattr(kept.split, part), getattr(data.split, part))
    np.testing.assert_array_equal(kept.given_labels, data.given_labels)
    np.testing.assert_array_equal(kept.labels, data.labels)


def test_a_probe_learns_from_val_too_so_it_drops_there_as_well() -> None:
    parts: list[SplitName | None] = ["train"] * 50 + ["val"] * 20 + ["test"] * 20
    kept, _ = drop(material_of((1, 2, 55, 60, 75, 80), CONFIG, parts), CONFIG)
    np.testing.assert_array_equal(kept.dropped, [1, 2, 55, 60])


def test_training_keeps_half_of_each_class_however_many_val_has() -> None:
    config = TrainConfig(finetune="partial")
    parts: list[SplitName | None] = ["val"] * N
    mislabelled = range(0, 15, 3)  # all that train has of one class
    parts[0:60:3], parts[2:47:3] = ["train"] * 20, ["train"] * 15
    kept, _ = drop(material_of(tuple(mislabelled), config, parts), config)
    assert len(np.intersect1d(kept.dropped, mislabelled)) == 2
    assert (kept.counts_of(kept.split.train) > 0).all()


def test_a_class_keeps_at_least_half_of_its_photographs() -> None:
    # nearly all of one class look like another: then it is the class that is hard
    wrong = tuple(i for i in range(0, N, 3) if i > 12)
    config = TrainConfig(finetune="none", test_frac=0)
    data = material_of(wrong, config)
    kept, _ = drop(data, config)
    assert (kept.fit_counts >= data.fit_counts / 2).all()
    assert kept.n_known == 3


def material_in_groups(labels: str, groups: str, config: TrainConfig) -> TrainingData:
    """One image for each letter of labels; equal letters of groups stay together."""
    names = [f"{i}" for i in range(len(labels))]
    nothing: list[SplitName | None] = [None] * len(names)
    dataset = make_dataset("made", FolderStorage("nowhere"), names, list(labels), nothing, list(groups))
    images = ImageFeatures(
        values=np.zeros((len(names), 2), np.float32), digests=[name.encode() for name in names], errors={}
    )
    return build_training_data(dataset, images, config)


def test_a_class_that_groups_carry_into_the_test_part_whole_is_said() -> None:
    log = RunLog(quiet=True)
    data = material_in_groups("bcbaacaaccaa", "acdbcbdccacb", CONFIG)
    assert data.known_classes == ("a", "c")
    log_problems(data, CONFIG, log)
    assert any("no training image left" in note and note.endswith(": b") for note in log.notes)


def test_a_class_in_one_group_is_said_to_be_never_held_out() -> None:
    log = RunLog(quiet=True)
    data = material_in_groups("a" * 10 + "b" * 4, "0123456789xxxx", CONFIG)
    log_problems(data, CONFIG, log)
    assert any("one training group" in note and note.endswith(": b") for note in log.notes)
