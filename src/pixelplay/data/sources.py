"""Folder, table, archive or list of files → ImageDataset; reads names, never pixels."""

import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

import numpy as np

from pixelplay.config import DataConfig, StrPath, TrainConfig
from pixelplay.data.class_folders import (
    FolderLabels,
    check_has_classes,
    empty_class_folders,
    find_wrapper_folder,
    labels_from_folders,
)
from pixelplay.data.dataset import ImageDataset, find_group_names, make_dataset
from pixelplay.data.decode import IMAGE_EXTENSIONS, name_format
from pixelplay.data.file_access import FileStorage, FolderStorage, ZipStorage
from pixelplay.data.file_listing import list_image_files
from pixelplay.data.labelled_tables import dataset_from_table, index_by_ending
from pixelplay.data.sample_submission import (
    is_sample_submission,
    parse_expected_classes,
    read_expected_classes,
)
from pixelplay.data.splits import check_trainable
from pixelplay.data.tables import (
    Table,
    find_column,
    is_table,
    parent_folder,
    parse_table,
    read_table,
)
from pixelplay.errors import ConfigError, DataError
from pixelplay.run_log import RunLog
from pixelplay.text import EXAMPLES, counted, name_some

LABEL_SUBMISSION_COLUMNS = 2  # id and label; a sample submission with more names its classes in the header
TABLE_SETTINGS = ("path_column", "label_column", "split_column", "group_column", "images_dir")


def list_labelled_images(source: str, config: TrainConfig, log: RunLog) -> ImageDataset:
    """List the labelled images to train on, and run the checks that need no pixels.

    Raises:
        DataError: there are no labelled images, or not two classes to train on.
    """
    dataset = log_dataset_notes(open_dataset(source, config.reading, config.classes), log)
    is_labelled = dataset.labels >= 0
    if not is_labelled.all():
        log.note(f"skipped {(~is_labelled).sum()} of {len(dataset)} images without a label")
    dataset = dataset.select(is_labelled)
    check_trainable(dataset, np.ones(len(dataset), dtype=np.bool_))
    return dataset


def open_dataset(source: str, config: DataConfig | None = None, classes: str | None = None) -> ImageDataset:
    """List the labelled images of a folder, table or zip archive.

    Args:
        classes: file with the expected classes of the test set; by default a sample submission in or
            next to the data is used.

    Raises:
        DataError: the source does not exist, cannot be read, or has no labelled image.
    """
    config = config or DataConfig()
    if os.path.isdir(source):
        _refuse_table_settings(source, config)
        dataset = _dataset_from_class_folders(source, FolderStorage(source), config)
    elif not os.path.exists(source):
        raise DataError(f"{source} does not exist; pass a folder, table or zip archive of images")
    elif is_table(source):
        dataset = dataset_from_table(read_table(source), _table_storage(source, config), config)
    elif _is_archive(source):
        dataset = _dataset_from_class_folders(source, ZipStorage(source), config)
    else:
        raise DataError(f"{source} is not a folder, table (.csv, .tsv, .parquet) or zip archive")
    if classes is not None:
        return replace(dataset, expected=read_expected_classes(classes))
    return _add_expected_classes(dataset)


def list_all_images(
    sources: StrPath | Sequence[StrPath], config: DataConfig, log: RunLog
) -> list[ImageDataset]:
    """List the images to predict, in order and without labels.

    Consecutive single files become one dataset, so that they share batches.

    Raises:
        DataError: there are no images, or the only source does not exist and does not look like an image.
    """
    names = [os.fspath(source) for source in as_list(sources)]
    if len(names) == 1 and not names[0].lower().endswith(IMAGE_EXTENSIONS) and not os.path.lexists(names[0]):
        raise DataError(f"{names[0]} does not exist; pass folders, files, tables or zip archives")
    if names and not any(map(is_table, names)):
        _refuse_table_settings(name_some(names), config)
    listed = (list_images(name, config) for name in names)
    datasets: list[ImageDataset] = []
    for is_file, group in groupby(listed, key=lambda dataset: dataset.source == ""):
        found = list(group)
        datasets += [list_files(dataset.paths[0] for dataset in found)] if is_file else found
    if not any(map(len, datasets)):
        where = f" in {name_some(names)}" if names else ""
        raise DataError(f"no images{where}; pass image files, tables, zip archives or folders of images")
    return [log_dataset_notes(dataset, log) for dataset in datasets]


def list_images(source: str, config: DataConfig | None = None) -> ImageDataset:
    """List the images of a folder, table, zip archive or single file, without labels.

    A file that does not exist stays in the list and fails when it is read.

    Raises:
        DataError: a folder, table or archive cannot be read.
    """
    config = config or DataConfig()
    storage: FileStorage
    if os.path.isdir(source):
        storage = FolderStorage(source)
    elif is_table(source) and os.path.exists(source):
        return dataset_from_table(read_table(source), _table_storage(source, config), config, labelled=False)
    elif os.path.exists(source) and _is_archive(source):
        storage = ZipStorage(source)
    else:
        return list_files([source])
    files = list_image_files(storage)
    return replace(
        list_files(files.candidates),
        source=source,
        storage=storage,
        skipped=files.skipped,
        notes=tuple(files.notes()),
    )


def list_files(paths: Iterable[str]) -> ImageDataset:
    """Make a dataset of single files, unlabelled and in this order; `source` is ""."""
    return make_dataset("", FolderStorage(""), list(paths))


def as_list(paths: StrPath | Sequence[StrPath]) -> Sequence[StrPath]:
    """Wrap a single path in a list."""
    return [paths] if isinstance(paths, str | os.PathLike) else paths


def log_dataset_notes(dataset: ImageDataset, log: RunLog) -> ImageDataset:
    """Log the notes and skipped files of a dataset; returns the dataset."""
    for note in dataset.notes:
        log.note(note)
    if dataset.skipped:
        listed = ", ".join(f"{n} {reason}" for reason, n in dataset.skipped.items())
        log.note(f"{dataset.source}: skipped by file name: {listed}")
    return dataset


def _is_archive(source: str) -> bool:
    """Return whether a file is a zip archive; an image with an archive appended is an image."""
    if source.lower().endswith(".zip") or not zipfile.is_zipfile(source):
        return source.lower().endswith(".zip")
    with open(source, "rb") as file:
        return not name_format(file.read(1024))


def _refuse_table_settings(source: str, config: DataConfig) -> None:
    flags = [f"--{name.replace('_', '-')}" for name in TABLE_SETTINGS if getattr(config, name) is not None]
    if flags:
        raise ConfigError(
            f"{source} is not a table, so {', '.join(flags)} cannot be used; "
            "pass a table, or group images with --group-regex or --group-by-folder"
        )


def _dataset_from_class_folders(source: str, storage: FileStorage, config: DataConfig) -> ImageDataset:
    """Read class folders; in an archive, a table may give the labels instead."""
    files = list_image_files(storage)
    tables = [name for name in files.other_files if is_table(name) and not is_sample_submission(name)]
    wrapper = find_wrapper_folder(files.candidates)
    wrapped = [name for name in files.candidates if name.startswith(wrapper)]
    found = labels_from_folders(wrapped, wrapper)
    beside = [name for name in tables if name.rpartition("/")[0] == wrapper.rstrip("/")]
    by_table = _find_table_of_folders(storage, beside, found)
    if isinstance(storage, ZipStorage):
        n_classes = len(set(found.labels) - {None})
        if n_classes < 2:
            table, problems = _find_label_table(storage, tables, config, required=n_classes == 0)
            found.notes.extend(f"skipped a table: {problem}" for problem in problems)
            if table is not None:
                folder = config.images_dir or table.name.removeprefix(f"{source}/").rpartition("/")[0]
                dataset = dataset_from_table(table, storage, config, folder=folder.strip("/"))
                return replace(dataset, notes=(*dataset.notes, *found.notes))
        elif by_table is not None:
            images_dir = config.images_dir or by_table[1]
            return dataset_from_table(_read_member(storage, by_table[0]), storage, config, folder=images_dir)
        tables = []  # none of them has labels
    elif wrapper:
        raise DataError(
            f"{source} has one class folder, {wrapper.rstrip('/')!r}, whose subfolders look like classes; "
            f"pass {os.path.join(source, wrapper).rstrip('/')} instead"
        )
    elif by_table is not None:
        table_path, images_dir = (os.path.join(source, name) for name in by_table)
        raise DataError(
            f"the folders of {source} are no classes: {by_table[0]} labels their images; pass {table_path} "
            f"--images-dir {images_dir}"
        )
    check_has_classes(found, source, [os.path.join(source, name) for name in tables], files.skipped)
    _refuse_table_settings(source, config)
    inside = [name.removeprefix(wrapper) for name in files.empty_folders if name.startswith(wrapper)]
    if empty := empty_class_folders(inside):
        named = name_some(empty, EXAMPLES)
        found.notes.append(f"{counted(len(empty), 'folder')} without an image: {named}")
    found.notes.extend(files.notes())
    skipped = files.skipped | found.skipped
    if wrapper:
        found.notes.append(f"class folders are read from {wrapper} in the archive")
        n_outside = len(files.candidates) - len(wrapped)
        skipped |= {f"outside {wrapper}": n_outside} if n_outside else {}
    groups = find_group_names(found.paths, found.subfolders, config)
    return make_dataset(
        source, storage, found.paths, found.labels, found.splits, groups, skipped=skipped, notes=found.notes
    )


def _find_table_of_folders(
    storage: FileStorage, tables: Sequence[str], found: FolderLabels
) -> tuple[str, str] | None:
    """Find a table that labels the images, unlike the names of their folders; also return the images' folder.

    Competitions have this layout: train.csv, sample_submission.csv, train_images, test_images.
    """
    label_of = dict(zip(found.paths, found.labels, strict=True))
    by_ending = index_by_ending(found.paths)
    for name in tables:
        try:
            table = _read_member(storage, name)
        except DataError:
            continue  # whoever needs it is told why
        path_column, label_column = (find_column(table, role, None) for role in ("path", "label"))
        if path_column is None or label_column is None:
            continue
        cells = zip(table.columns[path_column], table.columns[label_column], strict=True)
        listed = [(by_ending[path.strip()], label) for path, label in cells if path.strip() in by_ending]
        n_same = sum(any(label_of[path] == label for path in matches) for matches, label in listed)
        if 2 * len(listed) >= len(table) > 2 * n_same:
            folders = Counter(path.rpartition("/")[0] for matches, _ in listed for path in matches)
            return name, max(folders, key=folders.__getitem__)
    return None


def _find_label_table(
    storage: ZipStorage, tables: Sequence[str], config: DataConfig, *, required: bool
) -> tuple[Table | None, list[str]]:
    """Find the only table in an archive that has paths and labels; also return why others are unreadable.

    It is required if nothing else in the archive gives labels.
    """
    if required and len(tables) == 1:  # whatever it lacks is reported later
        return _read_member(storage, tables[0]), []
    columns = {"path": config.path_column, "label": config.label_column}
    found: dict[str, Table] = {}
    problems = []
    for name in tables:
        try:
            table = _read_member(storage, name)
        except DataError as error:
            problems.append(str(error))
            continue
        used = [
            find_column(table, role, None) if column is None else column for role, column in columns.items()
        ]
        if all(column in table.columns for column in used):
            found[name] = table
    if problems and not found and required:
        raise DataError(problems[0])
    if len(found) > 1:
        named = name_some(list(found))
        raise DataError(f"{storage.archive} has several tables with labels: {named}; unpack it and pass one")
    return next(iter(found.values()), None), problems


def _read_member(storage: FileStorage, name: str, max_columns: int | None = None) -> Table:
    return parse_table(storage.read(name), storage.display_path(name), max_columns=max_columns)


def _table_storage(source: str, config: DataConfig) -> FolderStorage:
    if (folder := config.images_dir) is not None and not os.path.isdir(folder):
        raise DataError(f"--images-dir {folder} is not a folder; pass the folder with the images of {source}")
    return FolderStorage(folder or parent_folder(source))


def _add_expected_classes(dataset: ImageDataset) -> ImageDataset:
    """Add the classes that a sample submission expects, if one exists for these classes."""
    notes = list(dataset.notes)
    for storage, name in _find_sample_submissions(dataset):
        try:
            sample = _read_member(storage, name, LABEL_SUBMISSION_COLUMNS)
            expected = parse_expected_classes(sample)
        except DataError as error:
            notes.append(f"skipped a sample submission: {error}")
            continue
        is_placeholder = len(expected) == 1 and len(sample) > 1  # every row has the same label
        # without a common class it belongs to another task
        if not is_placeholder and expected.keys() & set(dataset.classes):
            notes.append(f"expected classes are read from {storage.display_path(name)}")
            return replace(dataset, expected=expected, notes=tuple(notes))
    return replace(dataset, notes=tuple(notes))


def _find_sample_submissions(dataset: ImageDataset) -> Iterator[tuple[FileStorage, str]]:
    """Yield the sample submissions in the archive, in the folder of the data and in its parent."""
    if isinstance(dataset.storage, ZipStorage):
        names = dataset.storage.names()
        yield from ((dataset.storage, name) for name in names if is_sample_submission(name))
    folder = dataset.source if os.path.isdir(dataset.source) else parent_folder(dataset.source)
    for each in (folder, os.path.normpath(os.path.join(folder, os.pardir))):
        with suppress(OSError):
            names = sorted(filter(is_sample_submission, os.listdir(each)))
            yield from ((FolderStorage(each), name) for name in names)
