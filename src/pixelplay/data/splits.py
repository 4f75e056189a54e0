"""Hold-out and k-fold: stratified, groups whole, seeded."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import BoolArray, Float64Array, IntArray
from pixelplay.config import SplitName, TrainConfig
from pixelplay.data.audit import Duplicates
from pixelplay.data.dataset import ImageDataset, merge_groups
from pixelplay.errors import DataError
from pixelplay.text import counted, name_some

NEVER_HELD_OUT = -1


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which images train, choose and measure, and what it took to keep that honest.

    Attributes:
        train: positions in the dataset, ascending; disjoint from the other two, like them.
        val: likewise.
        test: likewise.
        groups: (N,) int64, equal for images that must stay together.
        removed: training images left out because the given test split holds a duplicate.
        duplicated: test images that had such a duplicate.
        notes: what was assumed, one sentence each.
    """

    train: IntArray
    val: IntArray
    test: IntArray
    groups: IntArray
    removed: IntArray
    duplicated: IntArray
    notes: tuple[str, ...]

    def items(self) -> Iterator[tuple[SplitName, IntArray]]:
        """Name and positions of the three splits."""
        yield from (("train", self.train), ("val", self.val), ("test", self.test))


def hold_out(labels: IntArray, groups: IntArray, frac: float, seed: int) -> BoolArray:
    """Choose a held-out part, stratified by class, groups whole.

    A class with one image, or with one group only, is never held out. Where every group carries
    one class, a class with two or more groups keeps at least one on either side; where groups
    carry several, nearly always.

    Args:
        labels: (N,) int64 in [0, K).
        groups: (N,) int64, equal for images that stay together.
        frac: of the images of each class, in [0, 1).

    Returns:
        (N,) bool mask of the held-out images.
    """
    if frac == 0:
        return np.zeros(len(labels), dtype=np.bool_)
    return np.asarray(_assign(labels, groups, np.array([1 - frac, frac]), seed) == 1)


def assign_folds(labels: IntArray, groups: IntArray, n_folds: int, seed: int) -> IntArray:
    """Give each image the fold in which it is held out, stratified by class, groups whole.

    Returns:
        (N,) int64 in [0, n_folds); -1 for the images of a class that is a single image or group,
        and for all that share a group with one: they are always trained on. Where groups carry several
        classes, a small class may still lie in one fold whole.
    """
    return _assign(labels, groups, np.full(n_folds, 1 / n_folds), seed)


def check_some_held_out(folds: IntArray, source: str) -> None:
    """Raise where no image can be held out.

    Raises:
        DataError: every class is a single image or group.
    """
    if not (folds != NEVER_HELD_OUT).any():
        raise DataError(
            f"every class of {source} has a single image or group to learn from; "
            "at least one class needs 2, so that temperature and strength can be chosen on held-out ones"
        )


def _is_lone(labels: IntArray, groups: IntArray) -> BoolArray:
    """Mask (N,) of the images whose class has fewer than two groups."""
    pairs = np.unique(np.stack([labels, groups], axis=1), axis=0)
    n_groups = np.bincount(pairs[:, 0], minlength=int(labels.max(initial=-1)) + 1)
    return np.asarray(n_groups[labels] < 2)


def _assign(labels: IntArray, groups: IntArray, shares: Float64Array, seed: int) -> IntArray:
    """Deal images to sides so that each class meets its shares as nearly as groups allow.

    Groups of several images are dealt first, the largest first, each to the side that it brings
    nearest to the shares; single images then fill every class up to its exact quota.

    Returns:
        (N,) int64 side of each image; NEVER_HELD_OUT for groups with a class that has no other.
    """
    rng = np.random.default_rng(seed)
    n_classes, n_sides = int(labels.max(initial=-1)) + 1, len(shares)
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    is_fixed = np.zeros(len(sizes), dtype=np.bool_)
    is_fixed[group_of[_is_lone(labels, group_of)]] = True
    free = ~is_fixed[group_of]  # (N,)
    room = _quotas(np.bincount(labels[free], minlength=n_classes), shares, rng)  # (K, sides)
    dealt = np.zeros(n_sides, dtype=np.int64)
    sides = np.full(len(labels), NEVER_HELD_OUT, dtype=np.int64)
    members = _members(group_of, np.flatnonzero((sizes > 1) & ~is_fixed))
    single = (sizes[group_of] == 1) & free
    has_single = bool(single.any())
    by_size = sorted(members, key=lambda rows: (-len(rows), rng.random()))
    for n_left, group in zip(range(len(by_size), 0, -1), by_size, strict=True):
        # squared distance from the quotas falls most where the classes of the group have most room;
        # of sides that suit equally well the emptiest; and the last groups go to sides still empty
        must_be_empty = not has_single and n_left <= np.count_nonzero(dealt == 0)
        is_barred = (dealt > 0) & must_be_empty
        need = labels[group]
        side = int(np.lexsort((rng.random(n_sides), dealt, -room[need].sum(0), is_barred))[0])
        sides[group] = side
        for k in need.tolist():  # of a few images: faster than numpy
            room[k, side] -= 1
        dealt[side] += len(group)
    for k in np.unique(labels[single]):
        rows = rng.permutation(np.flatnonzero(single & (labels == k)))
        sides[rows] = _fill(room[k], len(rows))
    _spread(sides, labels, group_of, n_sides)
    return sides


def _quotas(counts: IntArray, shares: Float64Array, rng: np.random.Generator) -> IntArray:
    """Whole numbers (K, sides) that add up to the counts and are within one of the exact shares.

    The remainders of one class go to the sides that earlier classes left short, so that the
    sides stay of equal size. With two sides both get at least one image of every class.
    """
    quota = np.zeros((len(counts), len(shares)), dtype=np.int64)
    owed = np.zeros(len(shares))
    for k in np.argsort(counts, kind="stable"):
        exact = counts[k] * shares
        quota[k] = np.floor(exact + 1e-9)  # 0.7 * 10 must not lose one to rounding
        left = int(counts[k] - quota[k].sum())
        first = np.lexsort((rng.random(len(shares)), -(owed + exact - quota[k])))[:left]
        quota[k, first] += 1
        if len(shares) == 2 and counts[k] >= 2 and quota[k].min() == 0:
            quota[k] += np.where(quota[k] == 0, 1, -1)
        owed += exact - quota[k]
    return quota


def _fill(room: IntArray, n: int) -> IntArray:
    """Deal n images to sides by the room left, which is n or more."""
    room = np.maximum(room, 0)
    while room.sum() > n:  # groups have overfilled another side
        room[room.argmax()] -= 1
    return np.repeat(np.arange(len(room)), room)


def _spread(sides: IntArray, labels: IntArray, group_of: IntArray, n_sides: int) -> None:
    """Give each class that lies on one side only a second one, where no other class loses by it."""
    n_classes = int(labels.max(initial=-1)) + 1
    free = sides != NEVER_HELD_OUT
    places = labels[free] * n_sides + sides[free]
    dealt = np.bincount(places, minlength=n_classes * n_sides).reshape(n_classes, n_sides)
    for k in np.flatnonzero((dealt > 0).sum(1) == 1):
        if (dealt[k] > 0).sum() > 1:  # a group that moved for another class has helped this one too
            continue
        start = int(dealt[k].argmax())
        target = min(
            (side for side in range(n_sides) if side != start), key=lambda side: dealt[:, side].sum()
        )
        groups, sizes = np.unique(group_of[free & (labels == k)], return_counts=True)
        for group in groups[sizes.argsort(kind="stable")]:
            rows = group_of == group
            need = np.bincount(labels[rows], minlength=n_classes)
            moved = dealt.copy()
            moved[:, start] -= need
            moved[:, target] += need
            # a group that is all its class has here would only change the side
            if moved[k, start] > 0 and ((moved > 0).sum(1) >= (dealt > 0).sum(1)).all():
                sides[rows], dealt = target, moved
                break


def _members(group_of: IntArray, wanted: IntArray) -> list[IntArray]:
    order = np.argsort(group_of, kind="stable")
    starts = np.searchsorted(group_of[order], wanted, side="left")
    ends = np.searchsorted(group_of[order], wanted, side="right")
    return [order[start:end] for start, end in zip(starts, ends, strict=True)]


def make_split(dataset: ImageDataset, duplicates: Duplicates, config: TrainConfig) -> Split:
    """Honour given parts; hold out a test part where the data has none.

    Copies never straddle a split made here. A given split is kept, and training copies of its test
    images are removed from training.

    Args:
        index: N labelled, readable images.

    Raises:
        DataError: nothing can be held out, or nothing is left to learn from.
    """
    groups = join_groups(dataset, duplicates)
    notes: list[str] = []
    test, val = dataset.in_split("test"), dataset.in_split("val")
    if not test.any():
        free = ~np.isin(groups, groups[val])  # what the given val part has copies of stays out of test
        test = np.zeros(len(dataset), dtype=np.bool_)
        test[free] = hold_out(dataset.labels[free], groups[free], config.test_frac, config.seed)
        _check_held_out(dataset, test, config)
    notes += _note_unused(dataset, config)
    notes += _note_straddling(dataset, test, val if config.finetune != "none" else None)
    if config.finetune != "none" and not val.any():
        free = ~np.isin(groups, groups[test])
        val[free] = hold_out(dataset.labels[free], groups[free], config.val_frac, config.seed)
    # images that a given split leaves without a part learn
    train = ~test & ~val
    removed = _copies_of(duplicates, test, train | val)
    copied = _copies_of(duplicates, train | val, test)
    if len(removed):
        n_removed = counted(len(removed), "training image")
        names = name_some([dataset.paths[i] for i in removed])
        notes.append(f"{n_removed} not learned from, as copies of test images: {names}")
    notes += _note_lost(dataset, ~test, removed)
    keep = np.ones(len(dataset), dtype=np.bool_)
    keep[removed] = False
    return Split(
        train=np.flatnonzero(train & keep),
        val=np.flatnonzero(val & keep),
        test=np.flatnonzero(test),
        groups=groups,
        removed=removed,
        duplicated=copied,
        notes=tuple(notes),
    )


def join_groups(dataset: ImageDataset, duplicates: Duplicates) -> IntArray:
    """Number (N,) what must stay together: the user's groups, joined by copies."""
    given: list[list[int]] = []
    if dataset.groups is not None:
        order = np.argsort(dataset.groups, kind="stable")
        borders = np.flatnonzero(np.diff(dataset.groups[order])) + 1
        given = [[int(i) for i in rows] for rows in np.split(order, borders) if len(rows) > 1]
    return merge_groups(len(dataset), duplicates.copies, given)


def check_learnable(dataset: ImageDataset, is_readable: BoolArray) -> None:
    """Raise where labelled images cannot make a classifier.

    Args:
        is_readable: (N,) bool; all true before anything was opened.

    Raises:
        DataError: fewer than two classes to learn from; a class, or a given test part, none of whose
            images can be read.
    """
    test = dataset.in_split("test")
    counts, readable = dataset.class_counts(~test), dataset.class_counts(is_readable & ~test)
    remedy = "(pixelplay scan lists the reasons)"
    for k in np.flatnonzero((counts > 0) & (readable == 0)):
        raise DataError(
            f"class {dataset.classes[k]!r} has {counted(int(counts[k]), 'image')} to learn from, and none "
            f"can be read; replace them or remove the class {remedy}"
        )
    if test.any() and not (test & is_readable).any():
        raise DataError(
            f"the given test part has {counted(int(test.sum()), 'image')}, and none can be read; "
            f"replace or remove them {remedy}"
        )
    check_two_classes(dataset, readable)


def check_two_classes(dataset: ImageDataset, learning: IntArray) -> None:
    """Raise DataError unless at least two classes have something to learn from, (K,) counts."""
    n_classes = int((learning > 0).sum())
    if n_classes < 2:
        named = f", {dataset.classes[int(learning.argmax())]!r}," if n_classes else ""
        raise DataError(
            f"{dataset.source} has {n_classes} class{'' if n_classes else 'es'}{named} to learn from; "
            "at least 2 are needed: add another, or give the folder that holds the class folders"
        )


def _check_held_out(dataset: ImageDataset, test: BoolArray, config: TrainConfig) -> None:
    if config.test_frac > 0 and not test.any():
        raise DataError(
            f"no test images: no class of {dataset.source} has 2 images (or groups) to hold one out; "
            "add images, or use --test-frac 0"
        )


def _note_lost(dataset: ImageDataset, learning: BoolArray, removed: IntArray) -> list[str]:
    """Say which classes lose all they had to learn from with the removed copies.

    Raises:
        DataError: fewer than two classes remain.
    """
    kept = learning.copy()
    kept[removed] = False
    before, after = dataset.class_counts(learning), dataset.class_counts(kept)
    lost = [dataset.classes[k] for k in np.flatnonzero((before > 0) & (after == 0))]
    if not lost:
        return []
    try:
        check_two_classes(dataset, after)
    except DataError as error:
        raise DataError(f"without the {len(removed)} copies of test images {error}") from None
    return [f"all training images of {name_some(lost)} are copies of test images: not learned"]


def _copies_of(duplicates: Duplicates, those: BoolArray, among: BoolArray) -> IntArray:
    """Positions in `among` that are copies of something in `those`."""
    found = [
        i for members in duplicates.copies if any(those[j] for j in members) for i in members if among[i]
    ]
    return np.array(sorted(set(found)), dtype=np.int64)


def _note_unused(dataset: ImageDataset, config: TrainConfig) -> list[str]:
    """Say which shares were asked for of parts that the data gives."""
    usual, notes = TrainConfig(), []
    if dataset.in_split("test").any() and config.test_frac not in (0, usual.test_frac):
        notes.append(f"--test-frac {config.test_frac} does not count: the data has a test part")
    if dataset.in_split("val").any() and config.finetune != "none" and config.val_frac != usual.val_frac:
        notes.append(f"--val-frac {config.val_frac} does not count: the data has a validation part")
    return notes


def _note_straddling(dataset: ImageDataset, test: BoolArray, val: BoolArray | None) -> list[str]:
    """Say where given parts cut through the user's groups; None: no validation part is to choose."""
    if dataset.groups is None:
        return []
    cuts = [("test", test, ~test, "its figures are optimistic")]
    if val is not None:
        cuts.append(("val", val, ~val & ~test, "what it chooses, and how sure answers are, is optimistic"))
    notes = []
    for split, inside, outside, why in cuts:
        torn = np.intersect1d(dataset.groups[inside], dataset.groups[outside])
        if len(torn):
            first = dataset.paths[np.flatnonzero(dataset.groups == torn[0])[0]]
            notes.append(
                f"{counted(len(torn), 'group')} on both sides of the given {split} part, for example that of "
                f"{first}: {why}"
            )
    return notes
