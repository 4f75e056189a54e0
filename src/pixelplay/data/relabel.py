"""Read corrected labels from a table of path and label (`--relabel`)."""

from dataclasses import dataclass

import numpy as np

from pixelplay.array_types import BoolArray, IntArray
from pixelplay.data.dataset import NO_LABEL, ImageDataset
from pixelplay.data.tables import read_table, require_column, unescape_label, unescape_path
from pixelplay.errors import DataError
from pixelplay.text import name_some, suggest


@dataclass(frozen=True, kw_only=True, eq=False)
class CorrectedLabels:
    """Labels of a dataset after review."""

    labels: IntArray  # (N,) class indices; -1 excludes the image
    reviewed: BoolArray  # (N,) true where the table lists the image, with a changed or confirmed label


def uncorrected_labels(dataset: ImageDataset) -> CorrectedLabels:
    """Return the labels of the dataset, none of them reviewed."""
    return CorrectedLabels(labels=dataset.labels, reviewed=np.zeros(len(dataset), bool))


def read_corrected_labels(file: str, dataset: ImageDataset) -> CorrectedLabels:
    """Read a table of corrected labels, such as a run's label_issues.csv.

    An empty label excludes the image. Images that the table does not list keep their label.

    Raises:
        DataError: it cannot be read, names an unknown image or class, or gives an image two labels.
    """
    table = read_table(file, allow_empty=True)  # a run may have no label issues
    paths = [unescape_path(cell) for cell in table.columns[require_column(table, "path", None)]]
    names = [unescape_label(cell) for cell in table.columns[require_column(table, "label", None)]]
    row_of = {path: i for i, path in enumerate(dataset.paths)}
    if unknown := [path for path in paths if path not in row_of]:
        missing = f"{name_some(unknown)}, which is no labelled image of {dataset.source}"
        raise DataError(f"{file} lists {missing}; write paths as in the data")
    class_index = {name: k for k, name in enumerate(dataset.classes)} | {"": NO_LABEL}
    if new := sorted(set(names) - class_index.keys()):
        raise DataError(
            f"{file} has the class {new[0]!r}, but {dataset.source} has no image of it"
            f"{suggest(new[0], dataset.classes)}; leave the label empty to exclude an image"
        )
    label_of: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        if (first := label_of.setdefault(path, name)) != name:
            raise DataError(f"{file} gives {path} two labels, {first!r} and {name!r}; remove one of them")
    labels, reviewed = dataset.labels.copy(), np.zeros(len(dataset), bool)
    for path, name in label_of.items():
        labels[row_of[path]] = class_index[name]
        reviewed[row_of[path]] = True
    return CorrectedLabels(labels=labels, reviewed=reviewed)
