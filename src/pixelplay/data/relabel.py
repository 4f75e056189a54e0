"""A table of path and label → other labels to learn from."""

from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import BoolArray, IntArray
from pixelplay.data.dataset import NO_LABEL, ImageIndex
from pixelplay.data.tables import need_column, plain_label, plain_path, read_table
from pixelplay.errors import DataError
from pixelplay.text import name_some, suggest


@dataclass(frozen=True, kw_only=True, eq=False)
class Corrections:
    """What the labels of an index should be.

    Attributes:
        labels: (N,) as corrected; -1 leaves a photograph out.
        is_reviewed: (N,) somebody has looked at it, and changed or confirmed its label.
    """

    labels: IntArray
    is_reviewed: BoolArray


def no_corrections(index: ImageIndex) -> Corrections:
    """Labels as the data gives them, none of them looked at."""
    return Corrections(labels=index.labels, is_reviewed=np.zeros(len(index), bool))


def read_corrections(file: str, index: ImageIndex) -> Corrections:
    """Read a table of path and label; an empty label leaves the photograph out.

    Photographs that the table does not name keep the label that the data gives. A run's suspects.csv is
    such a table.

    Raises:
        DataError: it cannot be read, or names a photograph or class that the data does not have.
    """
    wanted = _read_wanted(file, index)
    labels, is_reviewed = index.labels.copy(), np.zeros(len(index), bool)
    labels[list(wanted)] = list(wanted.values())
    is_reviewed[list(wanted)] = True
    return Corrections(labels=labels, is_reviewed=is_reviewed)


def _read_wanted(file: str, index: ImageIndex) -> dict[int, int]:
    """Position → label, as a table says; -1 where its cell is empty."""
    table = read_table(file, may_be_empty=True)  # a run may have no suspects
    paths = [plain_path(cell) for cell in table.columns[need_column(table, "path", None)]]
    names = [plain_label(cell) for cell in table.columns[need_column(table, "label", None)]]
    position = {path: i for i, path in enumerate(index.paths)}
    if unknown := [path for path in paths if path not in position]:
        raise DataError(
            f"{file} names {name_some(unknown)}, of which {index.source} has no labelled photograph; "
            "give paths as the data has them"
        )
    classes = {name: k for k, name in enumerate(index.classes)}
    if strange := sorted({name for name in names if name and name not in classes}):
        raise DataError(
            f"{file} names the class {strange[0]!r}, of which {index.source} has no photograph"
            f"{suggest(strange[0], index.classes)}; leave the label empty to leave a photograph out"
        )
    wanted: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        if wanted.setdefault(path, name) != name:
            raise DataError(
                f"{file} gives {path} two labels, {wanted[path]!r} and {name!r}; leave one of them"
            )
    return {position[path]: classes[name] if name else NO_LABEL for path, name in wanted.items()}
