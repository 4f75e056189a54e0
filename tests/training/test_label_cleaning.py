"""What suspected.py promises: wrong labels are not learned from; what chooses or measures keeps its own."""

from dataclasses import replace

import numpy as np
import pytest

from pixelplay.config import Part, TrainConfig
from pixelplay.data.dataset import make_index
from pixelplay.data.storage import FolderStore
from pixelplay.model.features import PhotographFeatures
from pixelplay.run_log import Journal
from pixelplay.training.label_cleaning import without_suspects
from pixelplay.training.prepare import say_what_was_found
from pixelplay.training.training_data import Material, sort_out

N = 90  # photographs of three classes in turn
WRONG = (0, 10, 20, 31, 44)  # given the next class's label
CONFIG = TrainConfig(tune="probe", test_frac=0.2)


def material_of(
    wrong: tuple[int, ...], config: TrainConfig, parts: list[Part | None] | None = None
) -> Material:
    """Photographs whose features show the true class, some with another label."""
    true = np.arange(N) % 3
    labels = true.copy()
    labels[list(wrong)] = (true[list(wrong)] + 1) % 3
    names = [f"{i}" for i in range(N)]
    index = make_index(
        "made", FolderStore("nowhere"), names, [f"class {k}" for k in labels], parts or [None] * N
    )
    features = 6 * np.eye(3)[true] + np.random.default_rng(0).normal(0, 1, (N, 3))
    photographs = PhotographFeatures(
        values=features.astype(np.float32), digests=[name.encode() for name in names], errors={}
    )
    return sort_out(index, photographs, config)


def drop(material: Material, config: TrainConfig) -> tuple[Material, list[str]]:
    journal = Journal(quiet=True)
    return without_suspects(material, config, journal), journal.notes


def test_wrong_labels_are_dropped_and_said() -> None:
    material = material_of(WRONG, CONFIG)
    kept, notes = drop(material, CONFIG)
    wrong_learned = np.intersect1d(WRONG, material.learn)
    assert len(wrong_learned) >= 3
    np.testing.assert_array_equal(kept.dropped, wrong_learned)
    np.testing.assert_array_equal(kept.learn, np.setdiff1d(material.learn, wrong_learned))
    np.testing.assert_array_equal(kept.learn, kept.parts.split.train)
    (note,) = notes
    assert note.startswith(f"{len(wrong_learned)} of {len(material.learn)} photographs not learned from")
    assert note.endswith("as their labels look wrong: " + ", ".join(map(str, wrong_learned)))


def test_what_somebody_has_looked_at_is_not_dropped() -> None:
    material = material_of(WRONG, CONFIG)
    wrong_learned = np.intersect1d(WRONG, material.learn)
    reviewed = np.isin(np.arange(N), wrong_learned[:2])
    kept, _ = drop(replace(material, reviewed=reviewed), CONFIG)
    np.testing.assert_array_equal(kept.dropped, wrong_learned[2:])
    assert np.isin(wrong_learned[:2], kept.learn).all()


def test_nothing_is_dropped_where_nothing_looks_wrong() -> None:
    material = material_of((), CONFIG)
    kept, notes = drop(material, CONFIG)
    assert (len(kept.dropped), notes) == (0, [])
    np.testing.assert_array_equal(kept.learn, material.learn)


@pytest.mark.parametrize("tune", ["partial", "auto"])
def test_what_chooses_and_what_measures_keeps_its_labels(tune: str) -> None:
    config = TrainConfig(tune=tune, test_frac=0.2)  # type: ignore[arg-type]
    parts: list[Part | None] = ["train"] * 50 + ["val"] * 20 + ["test"] * 20
    wrong = (1, 2, 55, 60, 75, 80)
    material = material_of(wrong, config, parts)
    kept, _ = drop(material, config)
    np.testing.assert_array_equal(kept.dropped, [1, 2, 55, 60])
    np.testing.assert_array_equal(kept.learn, np.setdiff1d(material.learn, [1, 2, 55, 60]))
    for part in ("val", "test"):
        np.testing.assert_array_equal(getattr(kept.parts.split, part), getattr(material.parts.split, part))
    np.testing.assert_array_equal(kept.given, material.given)
    np.testing.assert_array_equal(kept.labels, material.labels)


def test_a_probe_learns_from_val_too_so_it_drops_there_as_well() -> None:
    parts: list[Part | None] = ["train"] * 50 + ["val"] * 20 + ["test"] * 20
    kept, _ = drop(material_of((1, 2, 55, 60, 75, 80), CONFIG, parts), CONFIG)
    np.testing.assert_array_equal(kept.dropped, [1, 2, 55, 60])


def test_training_keeps_half_of_each_class_however_many_val_has() -> None:
    config = TrainConfig(tune="partial")
    parts: list[Part | None] = ["val"] * N
    mislabelled = range(0, 15, 3)  # all that train has of one class
    parts[0:60:3], parts[2:47:3] = ["train"] * 20, ["train"] * 15
    kept, _ = drop(material_of(tuple(mislabelled), config, parts), config)
    assert len(np.intersect1d(kept.dropped, mislabelled)) == 2
    assert (kept.counts_of(kept.parts.split.train) > 0).all()


def test_a_class_keeps_at_least_half_of_its_photographs() -> None:
    # nearly all of one class look like another: then it is the class that is hard
    wrong = tuple(i for i in range(0, N, 3) if i > 12)
    config = TrainConfig(tune="probe", test_frac=0)
    material = material_of(wrong, config)
    kept, _ = drop(material, config)
    assert (kept.learn_counts >= material.learn_counts / 2).all()
    assert kept.n_known == 3


def material_in_groups(labels: str, groups: str, config: TrainConfig) -> Material:
    """One photograph for each letter of labels; equal letters of groups stay together."""
    names = [f"{i}" for i in range(len(labels))]
    nothing: list[Part | None] = [None] * len(names)
    index = make_index("made", FolderStore("nowhere"), names, list(labels), nothing, list(groups))
    photographs = PhotographFeatures(
        values=np.zeros((len(names), 2), np.float32), digests=[name.encode() for name in names], errors={}
    )
    return sort_out(index, photographs, config)


def test_a_class_that_groups_carry_into_the_test_part_whole_is_said() -> None:
    journal = Journal(quiet=True)
    material = material_in_groups("bcbaacaaccaa", "acdbcbdccacb", CONFIG)
    assert material.known_classes == ("a", "c")
    say_what_was_found(material, CONFIG, journal)
    assert "nothing is left to learn from, so these are never answered: b" in journal.notes


def test_a_class_in_one_group_is_said_to_be_never_held_out() -> None:
    journal = Journal(quiet=True)
    material = material_in_groups("a" * 10 + "b" * 4, "0123456789xxxx", CONFIG)
    say_what_was_found(material, CONFIG, journal)
    assert "a single group to learn from, so never held out of training: b" in journal.notes
