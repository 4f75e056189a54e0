"""Given parts and duplicates → what is learned from and what is measured on."""

from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import BoolArray, IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.audit import Duplicates
from pixelplay.data.index import ImageIndex
from pixelplay.data.split import Split, hold_out, merge_groups
from pixelplay.errors import DataError
from pixelplay.text import counted, name_some


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A split, and what it took to keep it honest.

    Attributes:
        split: disjoint positions into the index.
        groups: (N,) int64, equal for images that must stay together.
        removed: training images left out because the given test part holds a copy.
        copied: test images that had such a copy.
        notes: what was assumed, one sentence each.
    """

    split: Split
    groups: IntArray
    removed: IntArray
    copied: IntArray
    notes: list[str]


def make_parts(index: ImageIndex, duplicates: Duplicates, config: TrainConfig) -> Parts:
    """Honour given parts; hold out a test part where the data has none.

    Copies never straddle a split made here. A given split is kept, and training copies of its test
    images are removed from training.

    Args:
        index: N labelled, readable images.

    Raises:
        DataError: nothing can be held out, or nothing is left to learn from.
    """
    groups = join_groups(index, duplicates)
    notes: list[str] = []
    test, val = index.in_part("test"), index.in_part("val")
    if not test.any():
        free = ~np.isin(groups, groups[val])  # what the given val part has copies of stays out of test
        test = np.zeros(len(index), dtype=np.bool_)
        test[free] = hold_out(index.labels[free], groups[free], config.test_frac, config.seed)
        _check_held_out(index, test, config)
    notes += _note_unused(index, config)
    notes += _note_straddling(index, test, val if config.tune != "probe" else None)
    if config.tune != "probe" and not val.any():
        free = ~np.isin(groups, groups[test])
        val[free] = hold_out(index.labels[free], groups[free], config.val_frac, config.seed)
    # images that a given split leaves without a part learn
    train = ~test & ~val
    removed = _copies_of(duplicates, test, train | val)
    copied = _copies_of(duplicates, train | val, test)
    if len(removed):
        n_removed = counted(len(removed), "training photograph")
        names = name_some([index.paths[i] for i in removed])
        notes.append(f"{n_removed} not learned from, as copies of test photographs: {names}")
    notes += _note_lost(index, ~test, removed)
    keep = np.ones(len(index), dtype=np.bool_)
    keep[removed] = False
    split = Split(
        train=np.flatnonzero(train & keep), val=np.flatnonzero(val & keep), test=np.flatnonzero(test)
    )
    return Parts(split=split, groups=groups, removed=removed, copied=copied, notes=notes)


def join_groups(index: ImageIndex, duplicates: Duplicates) -> IntArray:
    """Number (N,) what must stay together: the user's groups, joined by copies."""
    given: list[list[int]] = []
    if index.groups is not None:
        order = np.argsort(index.groups, kind="stable")
        borders = np.flatnonzero(np.diff(index.groups[order])) + 1
        given = [[int(i) for i in rows] for rows in np.split(order, borders) if len(rows) > 1]
    return merge_groups(len(index), duplicates.copies, given)


def check_learnable(index: ImageIndex, is_readable: BoolArray) -> None:
    """Raise where labelled photographs cannot make a classifier.

    Args:
        is_readable: (N,) bool; all true before anything was opened.

    Raises:
        DataError: fewer than two classes to learn from; a class, or a given test part, none of whose
            photographs can be read.
    """
    test = index.in_part("test")
    counts, readable = index.class_counts(~test), index.class_counts(is_readable & ~test)
    remedy = "(pixelplay scan lists the reasons)"
    for k in np.flatnonzero((counts > 0) & (readable == 0)):
        raise DataError(
            f"class {index.classes[k]!r} has {counted(int(counts[k]), 'photograph')} to learn from, and none "
            f"can be read; replace them or remove the class {remedy}"
        )
    if test.any() and not (test & is_readable).any():
        raise DataError(
            f"the given test part has {counted(int(test.sum()), 'photograph')}, and none can be read; "
            f"replace or remove them {remedy}"
        )
    check_two_classes(index, readable)


def check_two_classes(index: ImageIndex, learning: IntArray) -> None:
    """Raise DataError unless at least two classes have something to learn from, (K,) counts."""
    n_classes = int((learning > 0).sum())
    if n_classes < 2:
        named = f", {index.classes[int(learning.argmax())]!r}," if n_classes else ""
        raise DataError(
            f"{index.source} has {n_classes} class{'' if n_classes else 'es'}{named} to learn from; "
            "at least 2 are needed: add another, or give the folder that holds the class folders"
        )


def _check_held_out(index: ImageIndex, test: BoolArray, config: TrainConfig) -> None:
    if config.test_frac > 0 and not test.any():
        raise DataError(
            f"no test images: no class of {index.source} has 2 photographs (or groups) to hold one out; "
            "add photographs, or use --test-frac 0"
        )


def _note_lost(index: ImageIndex, learning: BoolArray, removed: IntArray) -> list[str]:
    """Say which classes lose all they had to learn from with the removed copies.

    Raises:
        DataError: fewer than two classes remain.
    """
    kept = learning.copy()
    kept[removed] = False
    before, after = index.class_counts(learning), index.class_counts(kept)
    lost = [index.classes[k] for k in np.flatnonzero((before > 0) & (after == 0))]
    if not lost:
        return []
    try:
        check_two_classes(index, after)
    except DataError as error:
        raise DataError(f"without the {len(removed)} copies of test photographs {error}") from None
    return [f"all training photographs of {name_some(lost)} are copies of test photographs: not learned"]


def _copies_of(duplicates: Duplicates, those: BoolArray, among: BoolArray) -> IntArray:
    """Positions in `among` that are copies of something in `those`."""
    found = [
        i for members in duplicates.copies if any(those[j] for j in members) for i in members if among[i]
    ]
    return np.array(sorted(set(found)), dtype=np.int64)


def _note_unused(index: ImageIndex, config: TrainConfig) -> list[str]:
    """Say which shares were asked for of parts that the data gives."""
    usual, notes = TrainConfig(), []
    if index.in_part("test").any() and config.test_frac not in (0, usual.test_frac):
        notes.append(f"--test-frac {config.test_frac} does not count: the data has a test part")
    if index.in_part("val").any() and config.tune != "probe" and config.val_frac != usual.val_frac:
        notes.append(f"--val-frac {config.val_frac} does not count: the data has a validation part")
    return notes


def _note_straddling(index: ImageIndex, test: BoolArray, val: BoolArray | None) -> list[str]:
    """Say where given parts cut through the user's groups; None: no validation part is to choose."""
    if index.groups is None:
        return []
    cuts = [("test", test, ~test, "its figures are optimistic")]
    if val is not None:
        cuts.append(("val", val, ~val & ~test, "what it chooses, and how sure answers are, is optimistic"))
    notes = []
    for part, inside, outside, why in cuts:
        torn = np.intersect1d(index.groups[inside], index.groups[outside])
        if len(torn):
            first = index.paths[np.flatnonzero(index.groups == torn[0])[0]]
            notes.append(
                f"{counted(len(torn), 'group')} on both sides of the given {part} part, for example that of "
                f"{first}: {why}"
            )
    return notes
