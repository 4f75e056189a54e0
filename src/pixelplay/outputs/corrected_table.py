"""Export the training data with corrected labels as one table, so that corrections are needed only once."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pixelplay.array_types import IntArray
from pixelplay.atomic import atomic_write
from pixelplay.config import SPLITS, DataConfig, StrPath
from pixelplay.data.dataset import NO_LABEL, NO_SPLIT, ImageDataset
from pixelplay.data.file_access import FolderStorage
from pixelplay.data.labelled_tables import dataset_from_table
from pixelplay.data.relabel import read_corrected_labels
from pixelplay.data.sources import open_dataset
from pixelplay.data.tables import Table, csv_writer, escape_label, escape_path
from pixelplay.errors import BundleError, DataError
from pixelplay.outputs.predictions_table import check_new_file
from pixelplay.run_log import RunLog
from pixelplay.text import counted, name_some, printable

Columns = dict[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class CorrectedTable:
    """Summarise what `export_corrected` wrote.

    Attributes:
        path: the table.
        n: rows, one per image.
        n_changed: labels that differ from those in the data.
        n_excluded: images left out because their corrected label is empty.
        n_test: corrections of predefined test images, which are not applied.
    """

    path: str
    n: int
    n_changed: int
    n_excluded: int
    n_test: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def summary(self) -> str:
        """Describe the table in a sentence."""
        changes = f"{counted(self.n_changed, 'label')} changed, {counted(self.n_excluded, 'image')} left out"
        kept = f"; {counted(self.n_test, 'correction')} of test images not applied" if self.n_test else ""
        return f"{counted(self.n, 'image')} → {printable(self.path)} ({changes}{kept})"


def export_corrected(
    run: StrPath,
    out: StrPath,
    relabel: StrPath | None = None,
    data: StrPath | None = None,
    *,
    force: bool = False,
    log: RunLog | None = None,
) -> CorrectedTable:
    """Write a table of all images of a run with corrected labels, to train on instead of `--relabel`.

    Training on the table uses the same images, labels, predefined splits and groups as training on the
    run's data with the corrections. Unlabelled images and those that a correction excludes are left out.
    Images of a predefined test split keep their labels, as metrics do.

    Args:
        run: folder of a run; the corrections it was trained with are part of the table.
        out: table to write, .csv or .parquet. Its paths are relative to its folder if all images are below
            that, otherwise absolute.
        relabel: table of corrected labels; they replace those of the run.
        data: the images, if they have moved.
        force: replace an existing table.

    Raises:
        BundleError: `run` is not a run, or its records are damaged.
        ConfigError: the table cannot be written.
        DataError: the images or corrections cannot be used, there are no corrections, or training on the
            table would not read the same labels.
    """
    target = os.fspath(out)
    check_new_file(target, force=force)
    dataset, earlier = _open_data_of(os.fspath(run), None if data is None else os.fspath(data))
    for note in dataset.notes:
        (log or RunLog()).note(note)
    if not isinstance(dataset.storage, FolderStorage):
        raise DataError(
            f"a table cannot name images in the archive {dataset.source}; unpack it and use --data"
        )
    dataset = dataset.select(dataset.labels >= 0)
    labels = _apply_earlier(earlier, dataset)
    if relabel is not None:
        corrections = read_corrected_labels(os.fspath(relabel), dataset)
        labels = np.where(corrections.reviewed, corrections.labels, labels)
    elif not earlier:
        raise DataError(f"{run} was trained without corrections; pass a table of them with --relabel")
    is_test = dataset.in_split("test")
    n_test = int((is_test & (labels != dataset.labels)).sum())
    labels = np.where(is_test, dataset.labels, labels)
    kept = labels != NO_LABEL
    n_changed = int((kept & (labels != dataset.labels)).sum())
    corrected = replace(dataset, labels=labels).select(kept)
    _write_table(_make_columns(corrected, os.path.dirname(os.path.abspath(target))), corrected, target)
    n_excluded = int((~kept).sum())
    return CorrectedTable(
        path=target, n=len(corrected), n_changed=n_changed, n_excluded=n_excluded, n_test=n_test
    )


def _open_data_of(run: str, source: str | None) -> tuple[ImageDataset, list[dict[str, Any]]]:
    """List the images of a run, and return the corrections it was trained with."""
    try:
        with open(os.path.join(run, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        with open(os.path.join(run, "metrics.json"), encoding="utf-8") as file:
            corrections = list(json.load(file)["data"]["corrections"])
        reading, recorded = (
            DataConfig(**{**config["reading"], "images_dir": config["images_dir"]}),
            config["source"],
        )
    except FileNotFoundError as error:
        name = os.path.basename(str(error.filename))
        raise BundleError(
            f"{run} has no {name}; pass the output folder of pixelplay train or crossval"
        ) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BundleError(
            f"the records of {run} are missing or damaged ({type(error).__name__}: {error}); train again"
        ) from None
    if source is not None:
        reading = replace(reading, images_dir=None)
    elif not os.path.exists(recorded):
        raise DataError(f"the images of {run} are no longer in {recorded}; use --data to say where they are")
    return open_dataset(source or recorded, reading), corrections


def _apply_earlier(corrections: Sequence[dict[str, Any]], dataset: ImageDataset) -> IntArray:
    """Return the labels (N,) as the run was trained on them, -1 for an excluded image."""
    row_of = {path: i for i, path in enumerate(dataset.paths)}
    index = {name: k for k, name in enumerate(dataset.classes)} | {None: NO_LABEL}
    labels = dataset.labels.copy()
    if gone := [c["path"] for c in corrections if c["path"] not in row_of or c["corrected"] not in index]:
        raise DataError(
            f"{dataset.source} lacks {name_some(gone)} or the class it was corrected to; "
            "use --data to say where the images of the run are"
        )
    for each in corrections:
        labels[row_of[each["path"]]] = index[each["corrected"]]
    return labels


def _make_columns(dataset: ImageDataset, folder: str) -> Columns:
    """Return path and label, and split and group where the data has them."""
    paths = _absolute_paths(dataset)
    below = os.path.join(folder, "")
    if all(path.startswith(below) for path in paths):
        paths = [path.removeprefix(below).replace(os.sep, "/") for path in paths]
    columns = {"path": paths, "label": [dataset.classes[k] for k in dataset.labels]}
    if (dataset.splits != NO_SPLIT).any():
        columns["split"] = ["" if i == NO_SPLIT else SPLITS[i] for i in dataset.splits]
    if dataset.groups is not None:
        columns["group"] = [f"group {k}" for k in dataset.groups]
    return columns


def _write_table(columns: Columns, dataset: ImageDataset, target: str) -> None:
    """Write a table atomically, once it is certain that training on it reads the same data."""
    is_csv = target.lower().endswith(".csv")
    escapes = {"path": escape_path, "label": escape_label} if is_csv else {}
    cells = {name: [escapes.get(name, str)(cell) for cell in column] for name, column in columns.items()}
    _check_reads_back(Table(name=target, columns=cells), dataset)
    with atomic_write(target, suffix=".partial") as partial:
        if is_csv:
            with open(partial, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                writer = csv_writer(file)
                writer.writerow(cells)
                writer.writerows(zip(*cells.values(), strict=True))
        else:
            _write_parquet(cells, partial)


def _write_parquet(cells: Columns, path: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.table(cells)
    except UnicodeEncodeError as error:
        raise DataError(f"{error.object!r} is not UTF-8, which Parquet requires; use .csv") from None
    pq.write_table(table, path)


def _check_reads_back(table: Table, dataset: ImageDataset) -> None:
    """Raise DataError unless training on a table uses the same images, labels, splits and groups."""
    folder = os.path.dirname(os.path.abspath(table.name))
    read = dataset_from_table(table, FolderStorage(folder), DataConfig())
    labels, read_labels = (
        [each.classes[k] if k >= 0 else None for k in each.labels] for each in (dataset, read)
    )
    for i, label in enumerate(labels):
        if label != read_labels[i]:
            raise DataError(
                f"class {label!r} would be read from {table.name} as {read_labels[i]!r}; rename the class"
                + (", or write .parquet" if escape_label(str(label)) != label else "")
            )
    if wrong := [
        path for path, other in zip(*map(_absolute_paths, (dataset, read)), strict=True) if path != other
    ]:
        raise DataError(f"{table.name} cannot name {name_some(wrong)}; rename the file")
    assert (read.splits == dataset.splits).all()


def _absolute_paths(dataset: ImageDataset) -> list[str]:
    assert isinstance(dataset.storage, FolderStorage)
    return [os.path.abspath(os.path.join(dataset.storage.root, path)) for path in dataset.paths]
