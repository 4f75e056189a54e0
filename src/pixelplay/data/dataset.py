"""ImageDataset: paths, labels, groups and predefined splits of images, before any image is opened."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pixelplay.array_types import BoolArray, IntArray
from pixelplay.config import SPLITS, DataConfig, SplitName
from pixelplay.data.file_access import ImageStorage
from pixelplay.errors import DataError
from pixelplay.text import counted

NO_SPLIT = -1
NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """N images in a fixed order, with their labels, groups and predefined splits.

    Attributes:
        source: the folder, table or archive, as the user named it.
        paths: (N,) in natural order; from a table, in row order.
        labels: (N,) int64 in [0, K), -1 for an unlabelled image.
        classes: (K,) names in natural order; a class may have no image.
        splits: (N,) int8 index into SPLITS, -1 where the data defines no split.
        groups: (N,) int64, equal for images that must stay in one split; None if unknown.
        expected: class → number of test images (None if unknown), from a classes file or sample submission.
        skipped: reason → number of files skipped because of their names.
        notes: assumptions made while listing the images, one sentence each.
    """

    source: str
    storage: ImageStorage
    paths: tuple[str, ...]
    labels: IntArray
    classes: tuple[str, ...]
    splits: NDArray[np.int8]
    groups: IntArray | None = None
    expected: Mapping[str, int | None] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, mask: BoolArray) -> "ImageDataset":
        """Keep the images where a (N,) mask is true; `classes` does not change."""
        kept = np.flatnonzero(mask)
        return replace(
            self,
            paths=tuple(self.paths[i] for i in kept),
            labels=self.labels[kept],
            splits=self.splits[kept],
            groups=None if self.groups is None else self.groups[kept],
        )

    def in_split(self, split: SplitName) -> BoolArray:
        """Return the (N,) mask of the images that the data assigns to a split."""
        return np.asarray(self.splits == SPLITS.index(split))

    def class_counts(self, mask: BoolArray | None = None) -> IntArray:
        """Count the labelled images of each class, (K,), optionally only where a (N,) mask is true."""
        labels = self.labels if mask is None else self.labels[mask]
        return np.bincount(labels[labels >= 0], minlength=len(self.classes)).astype(np.int64)


def make_dataset(
    source: str,
    storage: ImageStorage,
    paths: Sequence[str],
    labels: Sequence[str | None] | None = None,
    splits: Sequence[SplitName | None] | None = None,
    group_names: Sequence[str] | None = None,
    *,
    skipped: Mapping[str, int] | None = None,
    notes: Iterable[str] = (),
) -> ImageDataset:
    """Build a dataset from columns of names; classes are numbered in natural order.

    Args:
        labels: (N,) class names, None for an unlabelled image; None: all are unlabelled.
        splits: (N,) None where the data defines no split; None: it defines none.
        group_names: (N,) an image with an empty name is its own group.
    """
    labels, splits = labels or [None] * len(paths), splits or [None] * len(paths)
    classes = tuple(sorted({label for label in labels if label is not None}, key=natural_key))
    class_index = {name: k for k, name in enumerate(classes)}
    return ImageDataset(
        source=source,
        storage=storage,
        paths=tuple(paths),
        labels=np.array([NO_LABEL if x is None else class_index[x] for x in labels], dtype=np.int64),
        classes=classes,
        splits=np.array([NO_SPLIT if x is None else SPLITS.index(x) for x in splits], dtype=np.int8),
        groups=None if group_names is None else _number_groups(group_names),
        skipped=dict(skipped or {}),
        notes=(*notes, *_note_similar_classes(classes), *_note_ungrouped(group_names or ())),
    )


def find_group_names(
    paths: Sequence[str], subfolders: Sequence[str], config: DataConfig
) -> Sequence[str] | None:
    """Name the group of each path with --group-regex or --group-by-folder; None if neither is set.

    Args:
        paths: (N,) of the images.
        subfolders: (N,) folder below the class folder, "" if there is none.

    Raises:
        DataError: no image belongs to a group.
    """
    if config.group_regex is not None:
        pattern = re.compile(config.group_regex)
        found = map(pattern.search, paths)
        names: Sequence[str] = [(match and match[min(pattern.groups, 1)]) or "" for match in found]
        problem = f"--group-regex '{config.group_regex}' matches none of {len(paths)} paths"
    elif config.group_by_folder:
        names = subfolders
        problem = f"--group-by-folder finds no folder below a class folder in {len(paths)} paths"
    else:
        return None
    if paths and not any(names):
        raise DataError(f"{problem}, for example {paths[0]}; change or remove the option")
    return names


def _number_groups(names: Sequence[str]) -> IntArray:
    keys = [name or i for i, name in enumerate(names)]  # an int key never equals a name
    numbers = {key: k for k, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def merge_groups(n: int, *links: Sequence[Sequence[int]]) -> IntArray:
    """Number the connected components, (n,), of n images; `links` are lists of sets that belong together."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = [(members[0], member) for sets in links for members in sets for member in members[1:]]
    first, other = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs), dtype=np.bool_), (first, other)), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def normalize_unicode(name: str) -> str:
    """Compose accents (NFC), so that a name stored decomposed, as macOS does, compares equal."""
    return unicodedata.normalize("NFC", name)


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Return a sort key that puts `2` before `10`; case only breaks ties."""
    pieces: list[str | tuple[int, str]] = list(re.split(r"(\d+)", name.casefold()))
    for i in range(1, len(pieces), 2):
        digits = str(pieces[i]).lstrip("0")
        pieces[i] = (len(digits), digits)  # int() is limited to 4,300 digits
    return pieces, name


def _note_similar_classes(classes: Sequence[str]) -> list[str]:
    similar: dict[str, list[str]] = {}
    for name in classes:
        similar.setdefault(normalize_unicode(" ".join(name.split()).casefold()), []).append(name)
    return [
        f"classes {' and '.join(map(repr, names))} differ only in case, spaces or the encoding of accents; "
        "they are kept as separate classes"
        for names in similar.values()
        if len(names) > 1
    ]


def _note_ungrouped(names: Sequence[str]) -> list[str]:
    n = sum(not name for name in names)
    return [f"{counted(n, 'image')} without a group; each is treated as its own group"] if n else []
