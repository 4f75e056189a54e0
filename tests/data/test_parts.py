"""What parts.py promises: given parts stay, copies never straddle, and too little is said early."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pixelplay.config import DataConfig, SplitName, TrainConfig
from pixelplay.data.audit import Duplicates, find_duplicates
from pixelplay.data.dataset import ImageDataset, make_dataset
from pixelplay.data.sources import scan_source
from pixelplay.data.splits import check_learnable, join_groups, make_split
from pixelplay.data.storage import FolderStorage
from pixelplay.errors import DataError

CONFIG = TrainConfig(finetune="none")


def index_of(
    labels: str, parts: str | None = None, groups: Sequence[str] | None = None, name: str = "photos"
) -> ImageDataset:
    """One image for each letter of labels; parts by their first letter, "-" for none."""
    named: dict[str, SplitName | None] = {"t": "train", "v": "val", "s": "test", "-": None}
    return make_dataset(
        name,
        FolderStorage(name),
        [f"{label}{i}" for i, label in enumerate(labels)],
        list(labels),
        [named[letter] for letter in parts or "-" * len(labels)],
        groups,
    )


def copies(dataset: ImageDataset, *sets: tuple[int, ...]) -> Duplicates:
    """Duplicates of an index in which only the given positions are alike."""
    digests = [f"only {i}".encode() for i in range(len(dataset))]
    for number, members in enumerate(sets):
        for i in members:
            digests[i] = f"shared {number}".encode()
    return find_duplicates(dataset, digests)


def message(dataset: ImageDataset, duplicates: Duplicates | None = None, config: TrainConfig = CONFIG) -> str:
    with pytest.raises(DataError) as caught:
        make_split(dataset, duplicates or copies(dataset), config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_given_parts_are_kept_and_partless_photographs_learn() -> None:
    dataset = index_of("aabbaabb", "tvs-tvs-")
    split = make_split(dataset, copies(dataset), CONFIG).split
    np.testing.assert_array_equal(split.train, [0, 3, 4, 7])
    np.testing.assert_array_equal(split.val, [1, 5])
    np.testing.assert_array_equal(split.test, [2, 6])


def test_without_a_test_part_one_is_held_out_of_every_class() -> None:
    dataset = index_of("a" * 50 + "b" * 10 + "c" * 2 + "d")
    parts = make_split(dataset, copies(dataset), CONFIG)
    np.testing.assert_array_equal(np.bincount(dataset.labels[parts.split.test], minlength=4), [10, 2, 1, 0])
    together = np.concatenate([parts.split.train, parts.split.val, parts.split.test])
    np.testing.assert_array_equal(np.sort(together), np.arange(len(dataset)))
    assert len(parts.removed) == len(parts.copied) == 0
    assert parts.notes == []


def test_a_given_val_part_stays_and_none_of_its_kin_are_held_out() -> None:
    groups = ["p"] * 5 + ["q"] * 5 + ["r"] * 5 + ["s"] * 5
    dataset = index_of("aaaaabbbbb" * 2, "vv---" + "-" * 15, groups)
    split = make_split(dataset, copies(dataset, (0, 12)), CONFIG).split
    np.testing.assert_array_equal(split.val, [0, 1])
    # p joins r by a copy, so the test part can only come from q and s
    assert set(split.test) <= {5, 6, 7, 8, 9, 15, 16, 17, 18, 19}
    assert len(split.test) > 0


def test_training_copies_of_test_photographs_are_removed_and_listed() -> None:
    dataset = index_of("aabbaabb", "ttttvsss")
    parts = make_split(dataset, copies(dataset, (0, 5), (1, 2), (4, 6), (3, 7)), CONFIG)
    np.testing.assert_array_equal(parts.removed, [0, 3, 4])
    np.testing.assert_array_equal(parts.copied, [5, 6, 7])
    np.testing.assert_array_equal(parts.split.train, [1, 2])
    np.testing.assert_array_equal(parts.split.val, [])
    np.testing.assert_array_equal(parts.split.test, [5, 6, 7])
    assert parts.notes == [
        "3 training images not learned from, as copies of test images: a0, b3, a4",
    ]


def near(dataset: ImageDataset, *pairs: tuple[int, int]) -> Duplicates:
    """No two files equal, but these pairs altered copies of each other."""
    return find_duplicates(dataset, [f"only {i}".encode() for i in range(len(dataset))], pairs)


def test_altered_copies_of_test_photographs_are_removed_too() -> None:
    dataset = index_of("aabbaabb", "ttttvsss")
    # the second set hangs together over an image of the test part
    parts = make_split(dataset, near(dataset, (0, 5), (1, 6), (2, 6)), CONFIG)
    np.testing.assert_array_equal(parts.removed, [0, 1, 2])
    np.testing.assert_array_equal(parts.copied, [5, 6])


@given(st.integers(0, 50))
def test_altered_copies_never_straddle_a_split(seed: int) -> None:
    dataset = index_of("ab" * 30)
    rng = np.random.default_rng(seed)
    pairs = [(int(i), int(i + 30)) for i in rng.choice(30, 6, replace=False)]
    parts = make_split(dataset, near(dataset, *pairs), TrainConfig(finetune="partial", seed=seed))
    side = np.zeros(60, dtype=np.int64)
    side[parts.split.val], side[parts.split.test] = 1, 2
    assert all(side[i] == side[j] for i, j in pairs)


def test_copies_inside_one_part_are_no_leak() -> None:
    dataset = index_of("aabb" * 2, "ttttssss")
    parts = make_split(dataset, copies(dataset, (0, 1), (4, 5)), CONFIG)
    assert len(parts.removed) == len(parts.copied) == 0


def test_copies_with_conflicting_labels_share_a_side() -> None:
    dataset = index_of("ab" * 20)
    duplicates = copies(dataset, *((i, i + 1) for i in range(0, 40, 2)))
    assert len(duplicates.conflicts) == 20
    parts = make_split(dataset, duplicates, CONFIG)
    is_test = np.isin(np.arange(40), parts.split.test)
    np.testing.assert_array_equal(is_test[::2], is_test[1::2])
    assert len(parts.split.test) == 8


@given(st.integers(3, 9), st.integers(0, 10))
def test_groups_and_copies_join_transitively_and_stay_on_one_side(shift: int, seed: int) -> None:
    groups = [f"g{i // 3}" for i in range(60)]
    dataset = index_of("aabbcc" * 10, groups=groups)
    links = [(i, (i + 10 + shift) % 60) for i in range(0, 18, 6)]
    parts = make_split(dataset, copies(dataset, *links), TrainConfig(finetune="none", seed=seed))
    is_test = np.isin(np.arange(60), parts.split.test)
    for first, second in links:
        kin = [i for i in range(60) if i // 3 in (first // 3, second // 3)]
        assert len(set(parts.groups[kin])) == 1
    for group in np.unique(parts.groups):
        assert len(set(is_test[parts.groups == group])) == 1
    assert is_test.any()


def test_join_groups_numbers_the_connected_sets() -> None:
    dataset = index_of("aaabbb", groups=["x", "x", "", "y", "", "y"])
    groups = join_groups(dataset, copies(dataset, (1, 3), (2, 4)))
    same: NDArray[np.bool_] = groups[:, None] == groups
    expected = np.equal.outer([0, 0, 1, 0, 1, 0], [0, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(same, expected)


def test_groups_torn_by_a_given_split_are_said() -> None:
    dataset = index_of("aabbaabb", "ttttssss", ["p", "q", "r", "", "q", "r", "x", "y"])
    parts = make_split(dataset, copies(dataset), CONFIG)
    assert parts.notes == [
        "2 groups on both sides of the given test part, for example that of a1: its figures are optimistic"
    ]
    np.testing.assert_array_equal(parts.split.train, [0, 1, 2, 3])


def test_a_class_that_only_copies_taught_is_said() -> None:
    dataset = index_of("abbcc" + "abc", "ttttt" + "sss")
    parts = make_split(dataset, copies(dataset, (0, 5)), CONFIG)
    assert parts.notes[1] == "all training images of a are copies of test images: not learned"


def test_a_training_part_that_repeats_the_test_part_is_refused() -> None:
    dataset = index_of("abab", "ttss")
    assert message(dataset, copies(dataset, (0, 2), (1, 3))) == (
        "without the 2 copies of test images photos has 0 classes to learn from; "
        "at least 2 are needed: add another, or give the folder that holds the class folders"
    )


def test_nothing_to_hold_out_says_so() -> None:
    dataset = index_of("abc")
    assert message(dataset) == (
        "no test images: no class of photos has 2 images (or groups) to hold one out; "
        "add images, or use --test-frac 0"
    )
    one_group_each = index_of("aaabbb", groups=list("xxxyyy"))
    assert message(one_group_each).startswith("no test images: ")
    split = make_split(dataset, copies(dataset), TrainConfig(finetune="none", test_frac=0)).split
    np.testing.assert_array_equal(split.train, [0, 1, 2])
    assert len(split.test) == 0


def test_the_seed_decides_the_test_part() -> None:
    dataset = index_of("ab" * 100)
    first, again, other = (
        make_split(dataset, copies(dataset), TrainConfig(finetune="none", seed=s)).split.test
        for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)


# Enough to learn from


def unlearnable(dataset: ImageDataset, unreadable: Sequence[int] = ()) -> str:
    is_readable = ~np.isin(np.arange(len(dataset)), unreadable)
    with pytest.raises(DataError) as caught:
        check_learnable(dataset, is_readable)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_class_is_named_with_the_remedy() -> None:
    remedy = "at least 2 are needed: add another, or give the folder that holds the class folders"
    assert unlearnable(index_of("aaa")) == f"photos has 1 class, 'a', to learn from; {remedy}"
    assert unlearnable(index_of("aab", "tts")) == f"photos has 1 class, 'a', to learn from; {remedy}"
    assert unlearnable(index_of("ab", "ss")) == f"photos has 0 classes to learn from; {remedy}"
    assert unlearnable(index_of("")) == f"photos has 0 classes to learn from; {remedy}"


def test_a_class_none_of_whose_photographs_can_be_read_is_named() -> None:
    assert unlearnable(index_of("aabbb"), [2, 3, 4]) == (
        "class 'b' has 3 images to learn from, and none can be read; "
        "replace them or remove the class (pixelplay scan lists the reasons)"
    )
    # a readable image in the test part teaches nothing
    assert unlearnable(index_of("aabba", "ttsts"), [3]).startswith("class 'b' has 1 image to learn from")


def test_a_given_test_part_that_cannot_be_read_is_not_replaced_in_silence() -> None:
    assert unlearnable(index_of("aabbab", "ttttss"), [4, 5]) == (
        "the given test part has 2 images, and none can be read; "
        "replace or remove them (pixelplay scan lists the reasons)"
    )


def test_a_few_unreadable_photographs_are_no_error() -> None:
    dataset = index_of("aabbabc", "ttttsss")
    check_learnable(dataset, ~np.isin(np.arange(7), [0, 2, 4, 6]))


def test_a_classifier_of_a_real_folder_never_sees_a_test_group(tmp_path: Path) -> None:
    for animal in ("cat", "dog"):
        for burst in range(6):
            for shot in range(3):
                path = tmp_path / animal / f"burst{burst}" / f"{shot}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(path.as_posix().encode())
    dataset = scan_source(str(tmp_path), DataConfig(group_by_folder=True))
    split = make_split(dataset, copies(dataset), CONFIG).split
    train, test = ({dataset.paths[i].rpartition("/")[0] for i in side} for side in (split.train, split.test))
    assert not train & test
    assert {folder.split("/")[0] for folder in test} == {"cat", "dog"}


def test_groups_that_a_given_val_part_tears_are_said_where_it_chooses() -> None:
    dataset = index_of("aaabbb" * 2, "tvstvs" * 2, [f"camera {i // 2}" for i in range(12)])
    notes = make_split(dataset, copies(dataset), TrainConfig(finetune="partial")).notes
    assert [note for note in notes if "both sides of the given val part" in note]
    assert not [n for n in make_split(dataset, copies(dataset), CONFIG).notes if "given val part" in n]


def test_shares_of_parts_that_the_data_gives_do_not_count_and_that_is_said() -> None:
    dataset = index_of("aaabbb" * 2, "tvstvs" * 2)
    config = TrainConfig(finetune="partial", test_frac=0.3, val_frac=0.4)
    assert make_split(dataset, copies(dataset), config).notes[:2] == [
        "--test-frac 0.3 does not count: the data has a test part",
        "--val-frac 0.4 does not count: the data has a validation part",
    ]
    assert make_split(dataset, copies(dataset), TrainConfig(finetune="partial")).notes == []
