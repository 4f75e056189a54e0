"""Folder, table or archive → ImageIndex; reads names, never pixels."""

import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np

from pixelplay.config import DataConfig, StrPath, TrainConfig
from pixelplay.data.class_folders import (
    FolderLabels,
    check_some_classes,
    empty_class_folders,
    labels_from_folders,
    unwrap_single_folder,
)
from pixelplay.data.dataset import ImageDataset, group_names, make_dataset
from pixelplay.data.decode import IMAGE_EXTENSIONS, name_format
from pixelplay.data.file_listing import FileListing, list_image_files
from pixelplay.data.sample_submission import (
    find_sample_submissions,
    is_sample_submission,
    name_expected,
    read_expected_classes,
)
from pixelplay.data.splits import check_learnable
from pixelplay.data.storage import FolderStorage, ZipStorage
from pixelplay.data.tables import (
    Table,
    dataset_from_table,
    folder_of,
    is_table,
    parse_table,
    pick_column,
    read_table,
)
from pixelplay.errors import ConfigError, DataError
from pixelplay.run_log import RunLog
from pixelplay.text import counted, name_some

ID_AND_LABEL = 2  # columns of a sample submission; one with more names its classes in its header


def scan_source(source: str, config: DataConfig | None = None, classes: str | None = None) -> ImageDataset:
    """Read the labels of a folder, table or zip archive from its names.

    Args:
        classes: file of the classes that the test side expects; a sample submission beside the
            data is found by itself.

    Raises:
        DataError: it does not exist, cannot be read, or holds no labelled image.
    """
    config = config or DataConfig()
    if os.path.isdir(source):
        _check_no_columns(source, config)
        dataset = _index_folder(source, config)
    elif not os.path.exists(source):
        raise DataError(f"{source} does not exist; give a folder, a table or a zip archive of images")
    elif is_table(source):
        dataset = dataset_from_table(read_table(source), _table_store(source, config), config)
    elif _is_archive(source):
        dataset = _index_archive(ZipStorage(source), config)
    else:
        raise DataError(f"{source} is no folder, table (.csv, .tsv, .parquet) or zip archive")
    if classes is not None:
        return replace(dataset, expected=read_expected_classes(classes))
    return _with_sample(dataset)


def list_images(source: str, config: DataConfig | None = None) -> ImageDataset:
    """Name the images of a folder, table, zip archive or single file, without labels.

    A file that does not exist stays in the list: it becomes a row that says so.

    Raises:
        DataError: a folder, table or archive cannot be read.
    """
    config = config or DataConfig()
    if os.path.isdir(source):
        return _unlabelled(source, FolderStorage(source))
    if is_table(source) and os.path.exists(source):
        return dataset_from_table(read_table(source), _table_store(source, config), config, is_labelled=False)
    if os.path.exists(source) and _is_archive(source):
        return _unlabelled(source, ZipStorage(source))
    return list_files([source])


def list_all(sources: Sequence[str], config: DataConfig) -> list[ImageDataset]:
    """Name all images in order; single files in a row share an index, and so share batches.

    Raises:
        DataError: there are none.
    """
    if sources and not any(map(is_table, sources)):
        _check_no_columns(name_some(sources), config)
    listed = (list_images(source, config) for source in sources)
    datasets: list[ImageDataset] = []
    for is_file, neighbours in groupby(listed, key=lambda dataset: not dataset.source):
        together = list(neighbours)
        datasets += [list_files([dataset.paths[0] for dataset in together])] if is_file else together
    if not any(len(dataset) for dataset in datasets):
        where = f"in {name_some(sources)}" if sources else "named"
        raise DataError(f"no images {where}; give files, tables, zip archives or folders that hold some")
    return datasets


def list_files(paths: Iterable[str]) -> ImageDataset:
    """Name single files, in the order given."""
    files = list(paths)
    return make_dataset("", FolderStorage(""), files, [None] * len(files), [None] * len(files))


def _is_archive(source: str) -> bool:
    """Whether a file is a zip archive, and no image that something was appended to."""
    if source.lower().endswith(".zip"):
        return True
    if not zipfile.is_zipfile(source):
        return False
    with open(source, "rb") as file:
        return not name_format(file.read(1024))


def _check_no_columns(source: str, config: DataConfig) -> None:
    """Raise where settings about tables are given for something that is none."""
    names = ("path_column", "label_column", "split_column", "group_column", "images_dir")
    asked = [f"--{name.replace('_', '-')}" for name in names if getattr(config, name) is not None]
    if asked:
        raise ConfigError(
            f"{', '.join(asked)} is about tables, and {source} is none; "
            "give a table, or group with --group-regex or --group-by-folder"
        )


def _index_folder(root: str, config: DataConfig) -> ImageDataset:
    storage = FolderStorage(root)
    names = list_image_files(storage)
    found = labels_from_folders(names.candidates)
    wrapper = unwrap_single_folder(names.candidates).rstrip("/")
    if wrapper:
        raise DataError(
            f"{root} has one class folder, {wrapper!r}, whose subfolders look like classes; "
            f"give {os.path.join(root, wrapper)} instead"
        )
    tables = [name for name in names.others if is_table(name) and not is_sample_submission(name)]
    check_some_classes(found, root, [os.path.join(root, name) for name in tables], names.skipped)
    found.notes.extend(_note_empty(names.empty))
    return _labelled(root, storage, names, found, config)


def _index_archive(storage: ZipStorage, config: DataConfig) -> ImageDataset:
    names = list_image_files(storage)
    wrapper = unwrap_single_folder(names.candidates)
    wrapped = [name for name in names.candidates if name.startswith(wrapper)]
    inner = labels_from_folders([name[len(wrapper) :] for name in wrapped])
    classes = {label for label in inner.labels if label is not None}
    if len(classes) < 2:
        broken: list[str] = []
        table_name = _pick_table(storage, names.others, config, broken, is_needed=not classes)
        inner.notes.extend(f"a table is not used: {reason}" for reason in broken)
        if table_name is not None:
            table = _parse_member(storage, table_name)
            folder = config.images_dir or table_name.rpartition("/")[0]
            dataset = dataset_from_table(table, storage, config, folder=folder.strip("/"))
            return replace(dataset, notes=(*dataset.notes, *inner.notes))
        check_some_classes(inner, storage.archive, (), names.skipped)
    _check_no_columns(storage.archive, config)
    empty = [name[len(wrapper) :] for name in names.empty if name.startswith(wrapper)]
    inner.notes.extend(_note_empty(empty))
    if wrapper:
        inner.notes.append(f"the images of the archive lie in {wrapper}: classes are the folders inside")
        n_outside = len(names.candidates) - len(wrapped)
        inner.skipped.update({f"outside {wrapper}": n_outside} if n_outside else {})
        inner.names[:] = [wrapper + name for name in inner.names]
    return _labelled(storage.archive, storage, names, inner, config)


def _note_empty(folders: Sequence[str]) -> list[str]:
    empty = empty_class_folders(folders)
    n = counted(len(empty), "folder")
    return [f"{n} without an image: {name_some(empty)}"] if empty else []


def _pick_table(
    storage: ZipStorage, names: Iterable[str], config: DataConfig, broken: list[str], *, is_needed: bool
) -> str | None:
    """Choose the one table in an archive that names images and their labels.

    Args:
        broken: why tables cannot be read is put here.
        is_needed: there is nothing else to go by, so a single table is taken: what it lacks will be said.

    Raises:
        DataError: there are several, or all that might be it cannot be read.
    """
    tables = [name for name in names if is_table(name) and not is_sample_submission(name)]
    if is_needed and len(tables) == 1:
        return tables[0]
    found = []
    for name in tables:
        try:
            if _is_labelling(_parse_member(storage, name), config):
                found.append(name)
        except DataError as error:
            broken.append(str(error))
    if broken and not found and is_needed:
        raise DataError(broken[0])
    if len(found) > 1:
        raise DataError(
            f"{storage.archive} holds several tables with labels: {name_some(found)}; "
            "unpack it and give one of them"
        )
    return found[0] if found else None


def _is_labelling(table: Table, config: DataConfig) -> bool:
    asked = {"path": config.path_column, "label": config.label_column}
    return all(
        pick_column(table, role, None) is not None if name is None else name in table.columns
        for role, name in asked.items()
    )


def _parse_member(storage: ZipStorage, name: str, most_columns: int | None = None) -> Table:
    return parse_table(storage.read(name), storage.display_path(name), most_columns=most_columns)


def _labelled(
    source: str,
    storage: FolderStorage | ZipStorage,
    names: FileListing,
    found: FolderLabels,
    config: DataConfig,
) -> ImageDataset:
    return make_dataset(
        source,
        storage,
        found.names,
        found.labels,
        found.splits,
        group_names(found.names, found.subfolders, config),
        skipped=names.skipped | found.skipped,
        notes=found.notes,
    )


def _unlabelled(source: str, storage: FolderStorage | ZipStorage) -> ImageDataset:
    names = list_image_files(storage)
    nothing = [None] * len(names.candidates)
    return make_dataset(source, storage, names.candidates, nothing, nothing, skipped=names.skipped)


def _table_store(source: str, config: DataConfig) -> FolderStorage:
    if config.images_dir is not None and not os.path.isdir(config.images_dir):
        raise DataError(
            f"--images-dir {config.images_dir} is no folder; give the one with the images of {source}"
        )
    return FolderStorage(config.images_dir or folder_of(source))


def _with_sample(dataset: ImageDataset) -> ImageDataset:
    """Add the classes that a sample submission expects, if there is one for these classes."""
    notes = list(dataset.notes)
    expected: Mapping[str, int | None] = {}
    for shown, read in _find_samples(dataset):
        try:
            sample = read()
            found = name_expected(sample)
        except DataError as error:
            notes.append(f"a sample submission is not used: {error}")
            continue
        is_dummy = len(found) == 1 and len(sample) > 1  # the same label in every row
        if not is_dummy and set(found) & set(dataset.classes):  # else of another task
            notes.append(f"expected classes are read from {shown}")
            expected = found
            break
    return replace(dataset, expected=expected, notes=tuple(notes))


def _find_samples(dataset: ImageDataset) -> list[tuple[str, Callable[[], Table]]]:
    """Sample submissions in the archive, in the folder of the data and in the one above it, unread."""
    found: list[tuple[str, Callable[[], Table]]] = []
    if isinstance(dataset.storage, ZipStorage):
        members = filter(is_sample_submission, dataset.storage.names())
        found += [
            (dataset.storage.display_path(name), partial(_parse_member, dataset.storage, name, ID_AND_LABEL))
            for name in members
        ]
    folder = dataset.source if os.path.isdir(dataset.source) else folder_of(dataset.source)
    for place in (folder, os.path.normpath(os.path.join(folder, os.pardir))):
        found += [
            (path, partial(read_table, path, most_columns=ID_AND_LABEL))
            for path in find_sample_submissions(place)
        ]
    return found


def list_labelled_images(source: str, config: TrainConfig, log: RunLog) -> ImageDataset:
    """Name all labelled images, and check what names alone can show.

    Raises:
        DataError: nothing there, or not two classes to learn from.
    """
    dataset = log_assumptions(scan_source(source, config.reading, config.classes), log)
    dataset = select_labelled(dataset, log)
    check_learnable(dataset, np.ones(len(dataset), dtype=np.bool_))
    return dataset


def list_all_images(
    sources: StrPath | Sequence[StrPath], config: DataConfig, log: RunLog
) -> list[ImageDataset]:
    """Name all images to be answered about, in order, without labels.

    Raises:
        DataError: there are none, or the only source does not exist and does not look like an image.
    """
    names = [os.fspath(source) for source in as_list(sources)]
    if len(names) == 1 and not names[0].lower().endswith(IMAGE_EXTENSIONS) and not os.path.lexists(names[0]):
        raise DataError(f"{names[0]} does not exist; give folders, files, tables or zip archives")
    listed = list_all(names, config)
    return [log_assumptions(dataset, log) for dataset in listed]


def as_list(paths: StrPath | Sequence[StrPath]) -> Sequence[StrPath]:
    """One path as a sequence of one, which its letters are not."""
    return [paths] if isinstance(paths, str | os.PathLike) else paths


def select_labelled(dataset: ImageDataset, log: RunLog) -> ImageDataset:
    """Leave out images without a label, and say how many."""
    is_labelled = dataset.labels >= 0
    if not is_labelled.all():
        log.note(f"{(~is_labelled).sum()} of {len(dataset)} images have no label and play no part")
    return dataset.select(is_labelled)


def log_assumptions(dataset: ImageDataset, log: RunLog) -> ImageDataset:
    """Note what reading names has assumed and passed over; returns the index."""
    for note in dataset.notes:
        log.note(note)
    if dataset.skipped:
        named = ", ".join(f"{n} {why}" for why, n in dataset.skipped.items())
        log.note(f"{dataset.source}: passed over by name: {named}")
    return dataset
