"""A table of path and label → other labels to learn from."""

from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import BoolArray, IntArray
from pixelplay.data.dataset import NO_LABEL, ImageDataset
from pixelplay.data.tables import need_column, plain_label, plain_path, read_table
from pixelplay.errors import DataError
from pixelplay.text import name_some, suggest


@dataclass(frozen=True, kw_only=True, eq=False)
class CorrectedLabels:
    """What the labels of an index should be.

    Attributes:
        labels: (N,) as corrected; -1 leaves an image out.
        is_reviewed: (N,) somebody has looked at it, and changed or confirmed its label.
    """

    labels: IntArray
    is_reviewed: BoolArray


def uncorrected_labels(dataset: ImageDataset) -> CorrectedLabels:
    """Labels as the data gives them, none of them looked at."""
    return CorrectedLabels(labels=dataset.labels, is_reviewed=np.zeros(len(dataset), bool))


def read_corrected_labels(file: str, dataset: ImageDataset) -> CorrectedLabels:
    """Read a table of path and label; an empty label leaves the image out.

    Images that the table does not name keep the label that the data gives. A run's label_issues.csv is
    such a table.

    Raises:
        DataError: it cannot be read, or names an image or class that the data does not have.
    """
    wanted = _read_wanted(file, dataset)
    labels, is_reviewed = dataset.labels.copy(), np.zeros(len(dataset), bool)
    labels[list(wanted)] = list(wanted.values())
    is_reviewed[list(wanted)] = True
    return CorrectedLabels(labels=labels, is_reviewed=is_reviewed)


def _read_wanted(file: str, dataset: ImageDataset) -> dict[int, int]:
    """Position → label, as a table says; -1 where its cell is empty."""
    table = read_table(file, may_be_empty=True)  # a run may have no suspects
    paths = [plain_path(cell) for cell in table.columns[need_column(table, "path", None)]]
    names = [plain_label(cell) for cell in table.columns[need_column(table, "label", None)]]
    position = {path: i for i, path in enumerate(dataset.paths)}
    if unknown := [path for path in paths if path not in position]:
        raise DataError(
            f"{file} names {name_some(unknown)}, of which {dataset.source} has no labelled image; "
            "give paths as the data has them"
        )
    classes = {name: k for k, name in enumerate(dataset.classes)}
    if strange := sorted({name for name in names if name and name not in classes}):
        raise DataError(
            f"{file} names the class {strange[0]!r}, of which {dataset.source} has no image"
            f"{suggest(strange[0], dataset.classes)}; leave the label empty to leave an image out"
        )
    wanted: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        if wanted.setdefault(path, name) != name:
            raise DataError(
                f"{file} gives {path} two labels, {wanted[path]!r} and {name!r}; leave one of them"
            )
    return {position[path]: classes[name] if name else NO_LABEL for path, name in wanted.items()}
