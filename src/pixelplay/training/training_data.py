"""TrainingData: usable images with features, labels and split; everything a classifier is trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pixelplay.array_types import BoolArray, Float32Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.audit import Duplicates, find_duplicates
from pixelplay.data.dataset import NO_LABEL, ImageDataset
from pixelplay.data.relabel import CorrectedLabels, uncorrected_labels
from pixelplay.data.splits import Split, check_trainable, check_two_classes, make_split
from pixelplay.errors import ImageError
from pixelplay.model.features import ImageFeatures


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """N labelled, readable images, split into train, val and test."""

    all_images: ImageDataset  # unreadable ones included
    errors: Mapping[int, ImageError]  # position in `all_images` → why it cannot be read
    dataset: ImageDataset  # the N readable images
    features: Float32Array  # (N, D) float32
    feature_groups: Mapping[str, slice] | None  # name → columns of the features; None: one group
    digests: tuple[bytes, ...]  # (N,) content hash of each file
    duplicates: Duplicates
    split: Split
    classes: tuple[str, ...]  # first the K that are trained, then those that only other splits contain
    n_known: int  # K
    original_labels: IntArray  # (N,) positions in `classes`, before corrections: for metrics
    corrected_labels: IntArray  # (N,) after the user's corrections; -1 where an image is to be excluded
    reviewed: BoolArray  # (N,) images that the user's corrections name, changed or confirmed
    labels: IntArray  # (N,) for training: corrected in train and val, original in test
    fit_rows: IntArray  # positions that the final model is fitted on: train and val, ascending
    excluded: IntArray  # positions in train and val that a correction excludes
    excluded_from_val: IntArray  # those of them that were in val
    dropped: IntArray  # positions in train and val whose labels look wrong

    @property
    def known_classes(self) -> tuple[str, ...]:
        """(K,) names of the classes that are trained."""
        return self.classes[: self.n_known]

    @property
    def fit_counts(self) -> IntArray:
        """(K,) images per class in `fit_rows`."""
        return self.counts_of(self.fit_rows)

    def counts_of(self, rows: IntArray) -> IntArray:
        """Count the images per class, (K,), at some positions in train or val."""
        return np.bincount(self.labels[rows], minlength=self.n_known).astype(np.int64)

    def paths_of(self, rows: Sequence[int] | IntArray) -> tuple[str, ...]:
        """Paths of the images at some positions."""
        return tuple(self.dataset.paths[i] for i in rows)

    def train_without_val_duplicates(self) -> IntArray:
        """Positions of the training images that duplicate no validation image.

        A predefined split may have such duplicates; memorised images would distort validation metrics.
        """
        is_val = np.zeros(len(self.dataset), dtype=np.bool_)
        is_val[self.split.val] = True
        sets = [members for members in self.duplicates.exact_and_near if is_val[list(members)].any()]
        return np.setdiff1d(self.split.train, [i for members in sets for i in members])


def count_groups(labels: IntArray, groups: IntArray, n_classes: int) -> IntArray:
    """Count the groups of each class, (K,), from labels (N,) and groups (N,)."""
    pairs = np.unique(np.stack([labels, groups], axis=1), axis=0)
    return np.bincount(pairs[:, 0], minlength=n_classes)


def build_training_data(
    dataset: ImageDataset,
    features: ImageFeatures,
    config: TrainConfig,
    corrections: CorrectedLabels | None = None,
    near_duplicates: Sequence[tuple[int, int]] = (),
    feature_groups: Mapping[str, slice] | None = None,
) -> TrainingData:
    """Leave out unreadable images and split the rest.

    The split is made by the original labels, not the corrected ones.

    Args:
        near_duplicates: pairs of positions in `dataset`.
        feature_groups: name → columns of the features.

    Raises:
        DataError: too few images are left to train on or to measure on.
    """
    is_readable = ~np.isin(np.arange(len(dataset)), list(features.errors))
    check_trainable(dataset, is_readable)
    usable = dataset.select(is_readable)
    digests = tuple(digest for digest, ok in zip(features.digests, is_readable, strict=True) if ok)
    position = np.cumsum(is_readable) - 1  # of each image among the readable ones
    pairs = [(int(position[i]), int(position[j])) for i, j in near_duplicates]
    duplicates = find_duplicates(usable, digests, pairs)
    split = make_split(usable, duplicates, config)
    corrections = corrections or uncorrected_labels(dataset)
    corrected = corrections.labels[is_readable]
    fit_rows = np.union1d(split.train, split.val)
    excluded = fit_rows[corrected[fit_rows] == NO_LABEL]
    train, val, fit_rows = (np.setdiff1d(a, excluded) for a in (split.train, split.val, fit_rows))
    labels = usable.labels.copy()
    labels[fit_rows] = corrected[fit_rows]
    counts = np.bincount(labels[fit_rows], minlength=len(usable.classes))
    check_two_classes(usable, counts)
    known, unknown = np.flatnonzero(counts > 0), np.flatnonzero(counts == 0)
    order = np.concatenate([known, unknown])
    rank = np.append(np.argsort(order), NO_LABEL)  # of each class in the new order; -1 stays -1
    return TrainingData(
        all_images=dataset,
        errors=features.errors,
        dataset=usable,
        features=features.values[is_readable],
        feature_groups=feature_groups,
        digests=digests,
        duplicates=duplicates,
        split=replace(split, train=train, val=val),
        classes=tuple(usable.classes[k] for k in order),
        n_known=len(known),
        original_labels=rank[usable.labels],
        corrected_labels=rank[corrected],
        reviewed=corrections.reviewed[is_readable],
        labels=rank[labels],
        fit_rows=fit_rows,
        excluded=excluded,
        excluded_from_val=np.intersect1d(excluded, split.val),
        dropped=np.empty(0, dtype=np.int64),
    )
