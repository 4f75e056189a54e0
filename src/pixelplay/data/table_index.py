"""Rows of a table → ImageIndex, with Kaggle's extension-less ids resolved."""

import os
from collections.abc import Sequence

from pixelplay.config import PARTS, DataConfig, Part
from pixelplay.data.folders import part_named
from pixelplay.data.index import ImageIndex, composed, group_names, make_index
from pixelplay.data.names import list_names
from pixelplay.data.store import FolderStore, ZipStore
from pixelplay.data.tables import Table, need_column, pick_column
from pixelplay.errors import DataError
from pixelplay.text import counted, name_some, suggest

FIRST_ROW = 2  # as a spreadsheet counts: the header is row 1


MOST_MISSING = 0.5  # of a table's files: where more are, they are looked for in the wrong place
ANSWERS = {"status", "error", "label", "probability"}  # columns of a table of predictions


def index_table(
    table: Table,
    store: FolderStore | ZipStore,
    config: DataConfig,
    *,
    folder: str = "",
    is_labelled: bool = True,
) -> ImageIndex:
    """Build an index from the rows of a table, in their order.

    Args:
        store: where the paths are looked up.
        folder: of the store, where paths are looked up first.
        is_labelled: False takes any table that names photographs, and keeps missing files as rows.

    Raises:
        DataError: a column is missing, a row is given twice, most files are missing, a part is unknown.
    """
    path_column = need_column(table, "path", config.path_column)
    references = [cell.strip() for cell in table.columns[path_column]]
    if not is_labelled:
        paths, _, notes = _resolve_all(table, references, store, folder)
        nothing = [None] * len(table)
        return make_index(table.name, store, paths, nothing, nothing, notes=notes)
    label_column = need_column(table, "label", config.label_column)
    labels = [cell.strip() or None for cell in table.columns[label_column]]
    if not any(labels):
        raise DataError(
            f"{table.name} has no label in column {label_column!r}; "
            "fill it in or name another with --label-column"
        )
    _check_text(table, label_column)
    notes = [f"{table.name}: photographs from column {path_column!r}, classes from {label_column!r}"]
    if set(table.columns) >= ANSWERS and "given" not in table.columns:
        notes.append(f"{table.name} holds predictions: its labels are a model's answers")
    _check_complete(table, references)
    paths, missing, passed_over = _resolve_all(table, references, store, folder)
    notes += passed_over
    if len(missing) > MOST_MISSING * len(table):
        where = store.root if isinstance(store, FolderStore) else store.archive
        raise DataError(
            f"{table.name} names {counted(len(missing), 'file')} not to be found in {where}: "
            f"{name_some(missing)}; "
            "mend the table or say where they are with --images-dir"
        )
    if missing:  # like those that cannot be read
        named = name_some(missing)
        notes.append(
            f"{table.name}: {counted(len(missing), 'file')} of {len(table):,} not to be found: {named}"
        )
    _check_unrepeated(table, references, paths)
    parts = _read_parts(table, config, notes)
    groups = _read_groups(table, paths, config, notes)
    return make_index(table.name, store, paths, labels, parts, groups, notes=notes)


def _check_text(table: Table, column: str) -> None:
    """Raise where labels are no valid UTF-8; file names may be anything."""
    for row, cell in enumerate(table.columns[column], start=FIRST_ROW):
        if any("\udc80" <= letter <= "\udcff" for letter in cell):
            shown = cell.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
            raise DataError(
                f"{table.name}, row {row} has a label that is no UTF-8, {shown!r}; save it as UTF-8"
            )


def _check_complete(table: Table, references: Sequence[str]) -> None:
    if "" in references:
        row = references.index("") + FIRST_ROW
        raise DataError(f"{table.name}, row {row} names no photograph; fill in the path or drop the row")


def _check_unrepeated(table: Table, references: Sequence[str], paths: Sequence[str]) -> None:
    first_row: dict[str, int] = {}
    for row, (reference, path) in enumerate(zip(references, paths, strict=True), start=FIRST_ROW):
        first = first_row.setdefault(os.path.normpath(path), row)
        if first != row:
            raise DataError(
                f"{table.name}, row {row} repeats the photograph of row {first}, {reference!r}; "
                "list each once"
            )


def _read_parts(table: Table, config: DataConfig, notes: list[str]) -> list[Part | None]:
    column = pick_column(table, "part", config.part_column)
    nothing: list[Part | None] = [None] * len(table)
    if column is None:
        return nothing
    cells = table.columns[column]
    parts = [part_named(cell) for cell in cells]
    if config.part_column is None and not any(parts):
        # a body part, or the number of a fold
        notes.append(
            f"{table.name}: column {column!r} names no part such as {', '.join(PARTS)} and is not read"
        )
        return nothing
    for row, (cell, part) in enumerate(zip(cells, parts, strict=True), start=FIRST_ROW):
        if part is None and cell.strip():
            hint = suggest(cell.strip().lower(), PARTS)
            raise DataError(
                f"{table.name}, row {row} has the part {cell!r} in column {column!r}; "
                f"expected {', '.join(PARTS)}{hint or ', or an empty cell'}"
            )
    notes.append(f"{table.name}: parts from column {column!r}")
    return parts


def _read_groups(
    table: Table, paths: Sequence[str], config: DataConfig, notes: list[str]
) -> Sequence[str] | None:
    by_path = group_names(paths, [path.rpartition("/")[0] for path in paths], config)
    if by_path is not None:
        return by_path
    column = pick_column(table, "group", config.group_column)
    if column is None:
        return None
    groups = [cell.strip() for cell in table.columns[column]]
    if (
        config.group_column is None and len(set(groups)) == 1
    ):  # nobody asked for it, and it tells nothing apart
        notes.append(f"{table.name}: column {column!r} has one value and groups nothing")
        return None
    notes.append(f"{table.name}: column {column!r} groups what stays on one side of a split")
    return groups


def _resolve_all(
    table: Table, references: Sequence[str], store: FolderStore | ZipStore, folder: str
) -> tuple[list[str], list[str], list[str]]:
    """Find the file of each reference; returns paths (N,), the references without a file, and notes."""
    paths, missing, notes = [], [], []
    by_ending: dict[str, list[str]] | None = None
    for reference in references:
        near = f"{folder}/{reference}" if folder else reference
        if reference and near in store:
            paths.append(near)
            continue
        if by_ending is None:
            names = list_names(store, is_lenient=True)
            by_ending = _by_ending(names.candidates)
            if names.closed:
                n = counted(len(names.closed), "folder")
                notes.append(f"{n} cannot be read, and nothing is found there: {name_some(names.closed)}")
        found = by_ending.get(composed(reference.replace("\\", "/").removeprefix("./")), [])
        if len(found) > 1 and folder:
            found = [path for path in found if path.startswith(f"{folder}/")] or found
        if len(found) > 1:
            raise DataError(
                f"{table.name} names {reference!r}, which could be {name_some(found)}; "
                "write the path out, or say which folder is meant with --images-dir"
            )
        paths.append(found[0] if found else reference)
        if not found:
            missing.append(reference)
    return paths, missing, notes


def _by_ending(candidates: Sequence[str]) -> dict[str, list[str]]:
    """Every way to name a file: any ending of its path, with or without its extension."""
    found: dict[str, list[str]] = {}
    for path in candidates:
        ending = path
        while ending:
            for way in {ending, os.path.splitext(ending)[0]}:
                found.setdefault(composed(way), []).append(path)
            ending = ending.partition("/")[2]
    return found
