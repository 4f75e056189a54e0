"""Stratified, grouped and seeded hold-out and k-fold splits."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pixelplay.array_types import BoolArray, Float64Array, IntArray
from pixelplay.config import SplitName, TrainConfig
from pixelplay.data.audit import Duplicates
from pixelplay.data.dataset import ImageDataset, merge_groups
from pixelplay.errors import DataError
from pixelplay.text import counted, name_some

NEVER_HELD_OUT = -1


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training, validation and test images, by ascending and disjoint positions in the dataset."""

    train: IntArray
    val: IntArray
    test: IntArray
    groups: IntArray  # (N,) int64, equal for images that must stay in one split
    removed: IntArray  # training and validation images that duplicate predefined test images
    duplicated: IntArray  # the test images that they duplicate
    notes: tuple[str, ...]  # one sentence per assumption or warning

    def items(self) -> Iterator[tuple[SplitName, IntArray]]:
        """Yield name and positions of each split."""
        yield from (("train", self.train), ("val", self.val), ("test", self.test))


def hold_out(labels: IntArray, groups: IntArray, frac: float, seed: int) -> BoolArray:
    """Hold out a fraction of the images, stratified by class, without dividing groups.

    A class with a single image or group is never held out. A class with two or more groups has at least one
    on either side if every group has one class, and nearly always otherwise.

    Args:
        labels: (N,) int64 in [0, K).
        groups: (N,) int64, equal for images that stay together.
        frac: fraction of each class, in [0, 1).

    Returns:
        (N,) bool mask of the held-out images.
    """
    if frac == 0:
        return np.zeros(len(labels), dtype=np.bool_)
    return np.asarray(_assign(labels, groups, np.array([1 - frac, frac]), seed) == 1)


def assign_folds(labels: IntArray, groups: IntArray, n_folds: int, seed: int) -> IntArray:
    """Assign each image the fold that holds it out, stratified by class, without dividing groups.

    Returns:
        (N,) int64 in [0, n_folds); NEVER_HELD_OUT for classes with a single image or group, and for all
        images that share a group with them: these are always trained on. If groups have several classes,
        a small class can still lie in one fold.
    """
    return _assign(labels, groups, np.full(n_folds, 1 / n_folds), seed)


def check_any_held_out(folds: IntArray, source: str) -> None:
    """Raise DataError if no image of the folds (N,) is held out."""
    if not (folds != NEVER_HELD_OUT).any():
        raise DataError(f"every class of {source} has a single training image or group; at least one needs 2")


def _assign(labels: IntArray, groups: IntArray, shares: Float64Array, seed: int) -> IntArray:
    """Assign images to splits so that each class meets its shares as closely as groups allow.

    Groups of several images come first, the largest first, each in the split where it fits the shares best;
    single images then fill every class up to its exact quota.

    Args:
        shares: (S,) of each split, summing to 1.

    Returns:
        (N,) int64 split of each image; NEVER_HELD_OUT for groups with a class that has no other group.
    """
    rng = np.random.default_rng(seed)
    n_classes, n_splits = int(labels.max(initial=-1)) + 1, len(shares)
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    pairs = np.unique(np.stack([labels, group_of], axis=1), axis=0)
    n_groups = np.bincount(pairs[:, 0], minlength=n_classes)  # (K,)
    is_fixed = np.zeros(len(sizes), dtype=np.bool_)
    is_fixed[group_of[n_groups[labels] < 2]] = True
    free = ~is_fixed[group_of]  # (N,)
    remaining = _quotas(np.bincount(labels[free], minlength=n_classes), shares, rng)  # (K, S)
    filled = np.zeros(n_splits, dtype=np.int64)
    assigned = np.full(len(labels), NEVER_HELD_OUT, dtype=np.int64)
    members = _members(group_of, np.flatnonzero((sizes > 1) & ~is_fixed))
    single = (sizes[group_of] == 1) & free
    has_single = bool(single.any())
    by_size = sorted(members, key=lambda rows: (-len(rows), rng.random()))
    for n_done, group in enumerate(by_size):
        # The squared distance from the quotas falls most where the group's classes have most room left.
        # Ties go to the emptiest split, and the last groups to splits that are still empty.
        n_empty = np.count_nonzero(filled == 0)
        is_excluded = (filled > 0) & (not has_single and len(by_size) - n_done <= n_empty)
        group_labels = labels[group]
        split = int(
            np.lexsort((rng.random(n_splits), filled, -remaining[group_labels].sum(0), is_excluded))[0]
        )
        assigned[group] = split
        for k in group_labels.tolist():  # groups are small: faster than numpy
            remaining[k, split] -= 1
        filled[split] += len(group)
    for k in np.unique(labels[single]):
        rows = rng.permutation(np.flatnonzero(single & (labels == k)))
        left = np.maximum(remaining[k], 0)
        while left.sum() > len(rows):  # groups have overfilled another split
            left[left.argmax()] -= 1
        assigned[rows] = np.repeat(np.arange(n_splits), left)
    _spread(assigned, labels, group_of, n_splits)
    return assigned


def _quotas(counts: IntArray, shares: Float64Array, rng: np.random.Generator) -> IntArray:
    """Compute integers (K, S) that sum to the class counts and are within one of the exact shares.

    The remainders of a class go to the splits that earlier classes left short, so that splits stay balanced.
    With two splits, both get at least one image of every class.
    """
    quota = np.zeros((len(counts), len(shares)), dtype=np.int64)
    deficit = np.zeros(len(shares))
    for k in np.argsort(counts, kind="stable"):
        exact = counts[k] * shares
        quota[k] = np.floor(exact + 1e-9)  # 0.7 * 10 must not lose one to rounding
        left = int(counts[k] - quota[k].sum())
        first = np.lexsort((rng.random(len(shares)), -(deficit + exact - quota[k])))[:left]
        quota[k, first] += 1
        if len(shares) == 2 and counts[k] >= 2 and quota[k].min() == 0:
            quota[k] += np.where(quota[k] == 0, 1, -1)
        deficit += exact - quota[k]
    return quota


def _spread(assigned: IntArray, labels: IntArray, group_of: IntArray, n_splits: int) -> None:
    """Move a group of each class that lies in one split only, if no other class loses a split by it."""
    n_classes = int(labels.max(initial=-1)) + 1
    free = assigned != NEVER_HELD_OUT
    cells = labels[free] * n_splits + assigned[free]
    table = np.bincount(cells, minlength=n_classes * n_splits).reshape(n_classes, n_splits)
    for k in np.flatnonzero((table > 0).sum(1) == 1):
        if (table[k] > 0).sum() > 1:  # a group moved for another class has already helped this one
            continue
        start = int(table[k].argmax())
        target = min(set(range(n_splits)) - {start}, key=lambda split: (table[:, split].sum(), split))
        groups, sizes = np.unique(group_of[free & (labels == k)], return_counts=True)
        for group in groups[sizes.argsort(kind="stable")]:
            rows = group_of == group
            counts = np.bincount(labels[rows], minlength=n_classes)
            moved = table.copy()
            moved[:, [start, target]] += np.stack([-counts, counts], axis=1)
            # moving all images of the class would only change the split
            if moved[k, start] > 0 and ((moved > 0).sum(1) >= (table > 0).sum(1)).all():
                assigned[rows], table = target, moved
                break


def _members(group_of: IntArray, wanted: IntArray) -> list[IntArray]:
    """List the positions of each wanted group."""
    order = np.argsort(group_of, kind="stable")
    starts = np.searchsorted(group_of[order], wanted, side="left")
    ends = np.searchsorted(group_of[order], wanted, side="right")
    return [order[start:end] for start, end in zip(starts, ends, strict=True)]


def make_split(dataset: ImageDataset, duplicates: Duplicates, config: TrainConfig) -> Split:
    """Keep predefined splits; otherwise hold out a test split and, for fine-tuning, a validation split.

    Duplicates never lie on both sides of a split made here. With a predefined test split, its duplicates are
    removed from training and validation.

    Args:
        dataset: N labelled, readable images.

    Raises:
        DataError: nothing can be held out, or fewer than two classes are left to train on.
    """
    groups = join_groups(dataset, duplicates)
    test, val = dataset.in_split("test"), dataset.in_split("val")
    has_finetuning = config.finetune != "none"
    default, notes = TrainConfig(), []
    if test.any() and config.test_frac not in (0, default.test_frac):
        notes.append(f"--test-frac {config.test_frac} is ignored with a predefined test split")
    if has_finetuning and val.any() and config.val_frac != default.val_frac:
        notes.append(f"--val-frac {config.val_frac} is ignored with a predefined validation split")
    if not test.any():
        free = ~np.isin(groups, groups[val])  # groups and duplicates of predefined validation images stay out
        test = np.zeros(len(dataset), dtype=np.bool_)
        test[free] = hold_out(dataset.labels[free], groups[free], config.test_frac, config.seed)
        if config.test_frac > 0 and not test.any():
            problem = f"no class of {dataset.source} has the 2 images or groups that a test split needs"
            n_images, n_groups = int(free.sum()), len(np.unique(groups[free]))
            if duplicates.exact_and_near and n_groups < n_images:
                problem += (
                    f" (duplicates count as one image; its {n_images:,} images form {n_groups:,} groups)"
                )
            raise DataError(f"{problem}; add images or use --test-frac 0")
    notes += _note_divided_groups(dataset, test, val if has_finetuning else None)
    if has_finetuning and not val.any():
        free = ~np.isin(groups, groups[test])
        if frac := config.validation_frac(int((free & ~test).sum())):
            val[free] = hold_out(dataset.labels[free], groups[free], frac, config.seed)
    train = ~test & ~val  # including images without a predefined split
    removed = _duplicates_of(duplicates, test, train | val)
    duplicated = _duplicates_of(duplicates, train | val, test)
    notes += _note_removed(dataset, ~test, removed)
    is_kept = ~np.isin(np.arange(len(dataset)), removed)
    return Split(
        train=np.flatnonzero(train & is_kept),
        val=np.flatnonzero(val & is_kept),
        test=np.flatnonzero(test),
        groups=groups,
        removed=removed,
        duplicated=duplicated,
        notes=tuple(notes),
    )


def join_groups(dataset: ImageDataset, duplicates: Duplicates) -> IntArray:
    """Number (N,) the sets of images that must stay together: the user's groups joined by duplicates."""
    user_groups: list[list[int]] = []
    if dataset.groups is not None:
        _, group_of, sizes = np.unique(dataset.groups, return_inverse=True, return_counts=True)
        user_groups = [rows.tolist() for rows in _members(group_of, np.flatnonzero(sizes > 1))]
    return merge_groups(len(dataset), duplicates.exact_and_near, user_groups)


def check_trainable(dataset: ImageDataset, is_readable: BoolArray) -> None:
    """Check that a classifier can be trained on labelled images, of which those of a mask (N,) are readable.

    Raises:
        DataError: fewer than two classes to train on, or no readable image of a class or of a predefined
            test split.
    """
    test = dataset.in_split("test")
    counts, readable = dataset.class_counts(~test), dataset.class_counts(is_readable & ~test)
    remedy = "none can be read; replace or remove them (pixelplay scan lists the reasons)"
    for k in np.flatnonzero((counts > 0) & (readable == 0)):
        n = counted(int(counts[k]), "training image")
        raise DataError(f"class {dataset.classes[k]!r} has {n} and {remedy}")
    if test.any() and not (test & is_readable).any():
        raise DataError(f"the predefined test split has {counted(int(test.sum()), 'image')} and {remedy}")
    check_two_classes(dataset, readable)


def check_two_classes(dataset: ImageDataset, train_counts: IntArray) -> None:
    """Raise DataError unless at least two of the training counts (K,) are positive."""
    n_classes = int((train_counts > 0).sum())
    if n_classes < 2:
        named = f" ({dataset.classes[int(train_counts.argmax())]!r})" if n_classes else ""
        raise DataError(
            f"{dataset.source} has {n_classes} class{'' if n_classes else 'es'} with training images{named} "
            "but at least 2 are needed; add another, or pass the folder that contains the class folders"
        )


def _note_removed(dataset: ImageDataset, is_training: BoolArray, removed: IntArray) -> list[str]:
    """Describe the removed duplicates of test images, and the classes that have no other images.

    Raises DataError if fewer than two classes remain of the images outside the test split (N,).
    """
    if not len(removed):
        return []
    names = name_some([dataset.paths[i] for i in removed])
    notes = [f"{counted(len(removed), 'training image')} removed as duplicates of test images: {names}"]
    before = dataset.class_counts(is_training)
    after = before - dataset.class_counts(np.isin(np.arange(len(dataset)), removed))
    if lost := [dataset.classes[k] for k in np.flatnonzero((before > 0) & (after == 0))]:
        try:
            check_two_classes(dataset, after)
        except DataError as error:
            raise DataError(f"without the {len(removed)} duplicates of test images {error}") from None
        notes.append(f"all training images of {name_some(lost)} are duplicates of test images")
    return notes


def _duplicates_of(duplicates: Duplicates, images: BoolArray, among: BoolArray) -> IntArray:
    """Find the positions in `among` that duplicate one of `images`."""
    sets = [members for members in duplicates.exact_and_near if any(images[j] for j in members)]
    return np.array(sorted({i for members in sets for i in members if among[i]}), dtype=np.int64)


def _note_divided_groups(dataset: ImageDataset, test: BoolArray, val: BoolArray | None) -> list[str]:
    """List the groups that predefined splits divide; `val` is None if no validation split is used."""
    if dataset.groups is None:
        return []
    cuts = [("test", test, ~test, "its metrics are")]
    if val is not None:
        cuts.append(("val", val, ~val & ~test, "the model chosen on it and its confidence are"))
    notes = []
    for split, inside, outside, what in cuts:
        divided = np.intersect1d(dataset.groups[inside], dataset.groups[outside])
        if len(divided):
            first = dataset.paths[np.flatnonzero(dataset.groups == divided[0])[0]]
            groups = f"{counted(len(divided), 'group')}, for example that of {first}"
            notes.append(f"the predefined {split} split divides {groups}; {what} optimistic")
    return notes
