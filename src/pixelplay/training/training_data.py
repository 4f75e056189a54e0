"""What a classifier is made from: usable photographs, their features, labels and parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pixelplay.arrays import BoolArray, Float32Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.audit import Duplicates, find_duplicates
from pixelplay.data.dataset import NO_LABEL, ImageIndex
from pixelplay.data.relabel import Corrections, no_corrections
from pixelplay.data.splits import Parts, check_learnable, check_two_classes, make_parts
from pixelplay.errors import ImageError
from pixelplay.model.features import PhotographFeatures


@dataclass(frozen=True, kw_only=True)
class Material:
    """N labelled, readable photographs, sorted into parts.

    Attributes:
        scanned: all labelled photographs, those that cannot be read too.
        errors: position in `scanned` → why it cannot be read.
        index: names of the readable ones.
        features: (N, D) float32.
        digests: (N,) content of each file.
        duplicates: sets of photographs that are the same.
        parts: who is learned from, who is measured on.
        classes: names, the K that are learned first, then those that only other parts know.
        n_known: K.
        given: (N,) int64 positions in `classes`, as the data has them: what is scored on.
        corrected: (N,) likewise, as the user has corrected them; -1 where one is to be left out.
        reviewed: (N,) what the user's corrections name, changed or confirmed.
        labels: (N,) what is learned: in train and val as corrected, in test as given.
        learn: positions that are learned from in the end, train and val together, ascending.
        left_out: positions of train and val that a correction leaves out.
        left_out_of_val: those of them that were in val.
        dropped: positions of train and val that are not learned from, as their labels look wrong.
    """

    scanned: ImageIndex
    errors: Mapping[int, ImageError]
    index: ImageIndex
    features: Float32Array
    digests: tuple[bytes, ...]
    duplicates: Duplicates
    parts: Parts
    classes: tuple[str, ...]
    n_known: int
    given: IntArray
    corrected: IntArray
    reviewed: BoolArray
    labels: IntArray
    learn: IntArray
    left_out: IntArray
    left_out_of_val: IntArray
    dropped: IntArray

    @property
    def known_classes(self) -> tuple[str, ...]:
        """(K,) names of the classes that are learned."""
        return self.classes[: self.n_known]

    @property
    def learn_counts(self) -> IntArray:
        """(K,) photographs of each class that are learned from."""
        return self.counts_of(self.learn)

    def counts_of(self, positions: IntArray) -> IntArray:
        """(K,) photographs of each class among some that are learned from."""
        return np.bincount(self.labels[positions], minlength=self.n_known).astype(np.int64)


def sort_out(
    index: ImageIndex,
    photographs: PhotographFeatures,
    config: TrainConfig,
    corrections: Corrections | None = None,
    near: Sequence[tuple[int, int]] = (),
) -> Material:
    """Leave out what cannot be read, and sort the rest into parts.

    Args:
        index: all labelled photographs.
        corrections: of all of them; None: none. The parts are made by the given labels.
        near: pairs of altered copies, by their positions in the index.

    Raises:
        DataError: too little is left to learn from or to measure on.
    """
    is_readable = ~np.isin(np.arange(len(index)), list(photographs.errors))
    check_learnable(index, is_readable)
    usable = index.select(is_readable)
    digests = tuple(digest for digest, ok in zip(photographs.digests, is_readable, strict=True) if ok)
    place = np.cumsum(is_readable) - 1  # of each photograph among those that can be read
    pairs = [(int(place[i]), int(place[j])) for i, j in near]
    duplicates = find_duplicates(usable, digests, pairs)
    parts = make_parts(usable, duplicates, config)
    corrections = corrections or no_corrections(index)
    wanted = corrections.labels[is_readable]
    given_val = parts.split.val
    parts, left_out = _leave_out(parts, wanted)
    learn = np.union1d(parts.split.train, parts.split.val)
    taught = usable.labels.copy()
    taught[learn] = wanted[learn]
    counts = np.bincount(taught[learn], minlength=len(usable.classes))
    check_two_classes(usable, counts)
    known, unknown = np.flatnonzero(counts > 0), np.flatnonzero(counts == 0)
    order = np.concatenate([known, unknown])
    rank = np.append(np.argsort(order), NO_LABEL)  # of each class in the new order; -1 stays -1
    return Material(
        scanned=index,
        errors=photographs.errors,
        index=usable,
        features=photographs.values[is_readable],
        digests=digests,
        duplicates=duplicates,
        parts=parts,
        classes=tuple(usable.classes[k] for k in order),
        n_known=len(known),
        given=rank[usable.labels],
        corrected=rank[wanted],
        reviewed=corrections.is_reviewed[is_readable],
        labels=rank[taught],
        learn=learn,
        left_out=left_out,
        left_out_of_val=np.intersect1d(left_out, given_val),
        dropped=np.empty(0, dtype=np.int64),
    )


def _leave_out(parts: Parts, wanted: IntArray) -> tuple[Parts, IntArray]:
    """Take what has no label any more out of train and val; returns its positions."""
    split = parts.split
    learn = np.union1d(split.train, split.val)
    left_out = learn[wanted[learn] == NO_LABEL]
    kept = replace(split, train=np.setdiff1d(split.train, left_out), val=np.setdiff1d(split.val, left_out))
    return replace(parts, split=kept), left_out
