"""What is known about images before any is opened: paths, labels, parts, groups."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pixelplay.arrays import BoolArray, IntArray
from pixelplay.config import SPLITS, DataConfig, SplitName
from pixelplay.data.storage import ImageStorage
from pixelplay.errors import DataError
from pixelplay.text import counted

NO_SPLIT = -1
NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """N images in a fixed order, with all that their names say.

    Attributes:
        source: the folder, table or archive, as the user named it.
        store: gives the bytes of each path.
        paths: (N,) what the store reads, in natural order (a table: its own order).
        labels: (N,) int64 in [0, K), -1 unlabelled.
        classes: (K,) names in natural order; a class may have no image.
        parts: (N,) int8 position in PARTS, -1 where the data names none.
        groups: (N,) int64, equal for images that must stay together; None where nothing is known.
        expected: class → number of test images, None where unknown; what the test side expects.
        skipped: why → how many files were passed over by name.
        notes: what was assumed while reading, one sentence each.
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

    def select(self, where: BoolArray) -> "ImageDataset":
        """Keep the rows where a (N,) mask is true; classes stay as they are."""
        kept = np.flatnonzero(where)
        return replace(
            self,
            paths=tuple(self.paths[i] for i in kept),
            labels=self.labels[kept],
            splits=self.splits[kept],
            groups=None if self.groups is None else self.groups[kept],
        )

    def in_split(self, split: SplitName) -> BoolArray:
        """Mask (N,) of the images that the data itself puts in a part."""
        return np.asarray(self.splits == SPLITS.index(split))

    def class_counts(self, where: BoolArray | None = None) -> IntArray:
        """Labelled images of each class, (K,), among those where a mask is true."""
        labels = self.labels if where is None else self.labels[where]
        return np.bincount(labels[labels >= 0], minlength=len(self.classes)).astype(np.int64)


def make_dataset(
    source: str,
    storage: ImageStorage,
    paths: Sequence[str],
    labels: Sequence[str | None],
    splits: Sequence[SplitName | None],
    group_names: Sequence[str] | None = None,
    *,
    skipped: Mapping[str, int] | None = None,
    notes: Iterable[str] = (),
) -> ImageDataset:
    """Number the classes in natural order and build an index from columns of names.

    Args:
        labels: (N,) class names, None where an image has none.
        group_names: (N,) an empty name is a group of its own.
    """
    classes = tuple(sorted({label for label in labels if label is not None}, key=natural_key))
    position = {name: i for i, name in enumerate(classes)}
    return ImageDataset(
        source=source,
        storage=storage,
        paths=tuple(paths),
        labels=np.array([NO_LABEL if x is None else position[x] for x in labels], dtype=np.int64),
        classes=classes,
        splits=np.array([NO_SPLIT if x is None else SPLITS.index(x) for x in splits], dtype=np.int8),
        groups=None if group_names is None else _number_groups(group_names),
        skipped=dict(skipped or {}),
        notes=(*notes, *_note_alike(classes), *_note_ungrouped(group_names)),
    )


def group_names(paths: Sequence[str], subfolders: Sequence[str], config: DataConfig) -> list[str] | None:
    """Name the group of each path by the settings on paths; None where they ask for none.

    Args:
        paths: (N,) where the images lie.
        subfolders: (N,) the folder below the class folder, "" where there is none.

    Raises:
        DataError: the settings group no image at all.
    """
    if config.group_regex is not None:
        pattern = re.compile(config.group_regex)
        names = [_first_group(pattern.search(path)) for path in paths]
        way = f"--group-regex '{config.group_regex}' matches none"
    elif config.group_by_folder:
        names = list(subfolders)
        way = "--group-by-folder finds no folder below the class folder of any"
    else:
        return None
    if paths and not any(names):
        raise DataError(f"{way} of {len(paths)} paths, for example {paths[0]}; mend it or leave it out")
    return names


def normalize_unicode(name: str) -> str:
    """The one of a name's spellings in Unicode that most systems use; a Mac writes accents apart."""
    return unicodedata.normalize("NFC", name)


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Sort key that puts `2` before `10` and ignores case before it decides by it."""
    pieces: list[str | tuple[int, str]] = list(re.split(r"(\d+)", name.casefold()))
    for i in range(1, len(pieces), 2):
        digits = str(pieces[i]).lstrip("0")
        # by length, then digits: no integer to build, however long the number
        pieces[i] = (len(digits), digits)
    return pieces, name


def _note_alike(classes: Sequence[str]) -> list[str]:
    """Say which classes differ by nothing but case and spaces."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(normalize_unicode(" ".join(name.split()).casefold()), []).append(name)
    return [
        f"classes {' and '.join(map(repr, names))} differ only in case, spaces or the way accents are stored "
        "and stay apart"
        for names in alike.values()
        if len(names) > 1
    ]


def _note_ungrouped(names: Sequence[str] | None) -> list[str]:
    n = 0 if names is None else sum(not name for name in names)
    return [f"{counted(n, 'image')} in no group: each stands alone"] if n else []


def _number_groups(names: Sequence[str]) -> IntArray:
    numbers: dict[str | int, int] = {}
    keys = (name or i for i, name in enumerate(names))  # a nameless one is a group of its own
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _first_group(match: "re.Match[str] | None") -> str:
    if match is None:
        return ""
    return (match.group(1) if match.re.groups else match.group(0)) or ""


def merge_groups(n: int, *links: Sequence[Sequence[int]]) -> IntArray:
    """Number the connected sets of n images, given lists of sets that belong together."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = [(members[0], member) for sets in links for members in sets for member in members[1:]]
    first, other = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs), dtype=np.bool_), (first, other)), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)
