"""Photographs → the folds of a cross-validation, or why there cannot be so many."""

from collections.abc import Sequence

import numpy as np

from pixelplay.arrays import IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.dataset import ImageIndex
from pixelplay.data.splits import assign_folds, check_some_held_out
from pixelplay.errors import DataError
from pixelplay.text import counted
from pixelplay.training.material import Material


def check_enough(index: ImageIndex, n_folds: int) -> None:
    """Raise where names show that classes have too few photographs for every fold.

    Args:
        index: N labelled photographs that take part.

    Raises:
        DataError: a class has fewer than folds: it and the largest possible number of folds are named; or two
            folds leave nothing to choose on.
    """
    groups = np.arange(len(index)) if index.groups is None else index.groups
    _check_each_class(index.labels, groups, index.classes, n_folds)


def _check_each_class(labels: IntArray, groups: IntArray, classes: Sequence[str], n_folds: int) -> None:
    """The same by labels (N,) and groups (N,); a class of one is in no fold and needs none."""
    pairs = np.unique(np.stack([labels, groups], axis=1), axis=0)
    n_groups = np.bincount(pairs[:, 0], minlength=len(classes))  # (K,)
    short = np.flatnonzero((n_groups > 1) & (n_groups < n_folds))
    if not len(short):
        if n_folds == 2 and n_groups.max() == 2:  # one is held out, and of one nothing can choose
            raise DataError(
                "no class has more than 2 photographs or groups, but n_folds=2 needs a class of 3: without "
                "a fold, strength and temperature are chosen on others; add some"
            )
        return
    k = int(short[n_groups[short].argmin()])
    n = int((labels == k).sum())
    together = "" if n == n_groups[k] else f" in {n_groups[k]} groups that stay together"
    raise DataError(
        f"class {classes[k]!r} has {n} photographs{together} but n_folds={n_folds} needs {n_folds}; "
        f"add some or use --n-folds {n_groups[k]}"
    )


def deal_photographs(material: Material, config: TrainConfig) -> IntArray:
    """Fold (N,) of each photograph that takes part; -1 for the only one of its class.

    Raises:
        DataError: a class has fewer photographs or groups than folds, or groups leave a fold without
            one of the classes to learn from.
    """
    rows, n_folds = material.learn, config.n_folds
    labels, groups = material.labels[rows], material.parts.groups[rows]
    _check_each_class(labels, groups, material.known_classes, n_folds)
    folds = assign_folds(labels, groups, n_folds, config.seed)
    check_some_held_out(folds, material.index.source)
    if empty := [fold for fold in range(n_folds) if not (folds == fold).any()]:
        raise DataError(
            f"groups leave {counted(len(empty), 'fold')} of {n_folds} without a photograph to hold out; "
            f"use --n-folds {max(2, n_folds - len(empty))} or smaller groups"
        )
    for fold in range(n_folds):
        left = np.bincount(labels[folds != fold], minlength=material.n_known)
        if (left == 0).any():
            name = material.classes[int((left == 0).argmax())]
            raise DataError(
                f"groups put every photograph of class {name!r} into one fold of {n_folds}, so that "
                "nothing is left to learn it from; use fewer folds or smaller groups"
            )
    return folds
