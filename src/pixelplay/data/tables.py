"""Cells of a table that a spreadsheet does not run as formulas, and the way back."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pixelplay.config import SPLITS, DataConfig, SplitName
from pixelplay.data.class_folders import split_from_name
from pixelplay.data.dataset import ImageDataset, group_names, make_dataset, normalize_unicode
from pixelplay.data.file_listing import list_image_files
from pixelplay.data.storage import FolderStorage, ZipStorage
from pixelplay.errors import DataError
from pixelplay.text import counted, name_some, suggest

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def safe_path(path: str) -> str:
    """A path that is no formula and still opens the same file."""
    return f"./{path}" if path.startswith(_FORMULA_STARTS) else path


def safe_label(label: str) -> str:
    """A text cell that is no formula."""
    return f"'{label}" if label.lstrip("'").startswith(_FORMULA_STARTS) else label


def plain_path(cell: str) -> str:
    """The path behind a safe one."""
    return cell[2:] if cell.startswith("./") and cell[2:].startswith(_FORMULA_STARTS) else cell


def plain_label(cell: str) -> str:
    """The text behind a safe one."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(_FORMULA_STARTS) else cell


TABLE_EXTENSIONS = (".csv", ".tsv", ".parquet", ".pq")
# The usual names of each column, most telling first; compared without case.
USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "path": (
        "path", "filepath", "file_path", "image_path", "img_path", "filename", "file_name", "file",
        "image_name", "image", "img", "image_id", "img_id", "id", "name",
    ),
    "label": (
        "label", "labels", "class", "class_name", "classname", "category", "target", "species",
        "diagnosis", "breed", "label_name", "y",
    ),
    "split": ("split", "part", "subset"),
    "group": (
        "group", "group_id", "patient", "patient_id", "subject", "subject_id", "camera", "camera_id",
        "site", "site_id", "location", "location_id", "burst", "burst_id", "sequence", "seq_id",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns of text, all of one length; an empty cell is an empty string.

    Attributes:
        name: the file, as the user named it.
        columns: column name → cells (N,).
        delimiter: between the cells of a text file.
        header: the columns' names as the file has them, which may begin or end with a blank.
    """

    name: str
    columns: Mapping[str, Sequence[str]]
    delimiter: str = ","
    header: Sequence[str] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def is_table(path: str) -> bool:
    """Whether a file is read as a table, by its extension."""
    return path.lower().endswith(TABLE_EXTENSIONS)


def read_table(path: str, *, may_be_empty: bool = False, most_columns: int | None = None) -> Table:
    """Read a CSV, TSV or Parquet file with a header.

    Args:
        may_be_empty: a header without a row is no error.
        most_columns: of a text file with more only the header is read.

    Raises:
        DataError: not readable as its extension says, no header, no row, or a row of another length.
    """
    try:
        with open(path, "rb") as file:
            return parse_table(file.read(), path, may_be_empty=may_be_empty, most_columns=most_columns)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def parse_table(
    data: bytes, name: str, *, may_be_empty: bool = False, most_columns: int | None = None
) -> Table:
    """Parse the content of a table whose name says which kind it is.

    Raises:
        DataError: as `read_table`.
    """
    if name.lower().endswith((".parquet", ".pq")):
        (header, rows), delimiter = _parse_parquet(data, name), ","
    else:
        header, rows, delimiter = _parse_text(data, name, most_columns)
    names = [cell.strip() for cell in header]
    repeated = sorted({cell for cell in names if names.count(cell) > 1})
    if repeated:
        raise DataError(f"{name} has the column {repeated[0]!r} more than once; rename one of them")
    is_wide = most_columns is not None and len(header) > most_columns
    if not rows and not (header and (may_be_empty or is_wide)):
        raise DataError(f"{name} has no rows; a table needs a header and at least one row")
    cells = zip(*rows, strict=True) if rows else [()] * len(header)
    columns = dict(zip(names, cells, strict=True))
    return Table(name=name, columns=columns, delimiter=delimiter, header=header)


def _parse_text(
    data: bytes, name: str, most_columns: int | None = None
) -> tuple[list[str], list[Sequence[str]], str]:
    """Parse delimited text; the delimiter is the one of comma, tab, semicolon most used in the header."""
    # spreadsheets write UTF-16 as "Unicode text"; file names need not be valid UTF-8
    is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = data.decode("utf-16", "replace") if is_utf16 else data.decode("utf-8-sig", "surrogateescape")
    text = text.lstrip("\r\n")
    header_line = text.split("\n", 1)[0]
    delimiter = "\t" if name.lower().endswith(".tsv") else max(",\t;", key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Sequence[str]] = []
    try:
        for row in reader:
            if row and rows and len(row) != len(rows[0]):
                raise DataError(
                    f"{name}, line {reader.line_num} has {len(row)} cells where the header has "
                    f"{len(rows[0])}; mend the line"
                )
            if row:
                rows.append(row)
            if most_columns is not None and len(row) > most_columns:
                break
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num} cannot be read as a table: {error}") from None
    return list(rows[0]) if rows else [], rows[1:], delimiter


def _parse_parquet(data: bytes, name: str) -> tuple[list[str], list[Sequence[str]]]:
    """Take the columns of a Parquet file that can be written as text, so no embedded pictures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = pq.ParquetFile(pa.BufferReader(data))
        kinds = pa.types
        others = (kinds.is_nested, kinds.is_binary, kinds.is_large_binary, kinds.is_fixed_size_binary)
        header = [
            column.name for column in content.schema_arrow if not any(kind(column.type) for kind in others)
        ]
        read = content.read(columns=header)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{name} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    cells = [[_as_text(value) for value in column.to_pylist()] for column in read.columns]
    return header, list(zip(*cells, strict=True))


def _as_text(value: object) -> str:
    """Write a Parquet value as a CSV would hold it; None and NaN are empty."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # whole numbers with gaps are stored as 1.0, 2.0 and NaN
    return str(value)


def pick_column(table: Table, role: str, asked: str | None) -> str | None:
    """Find the column that plays a role, by its asked name or by the usual ones.

    Args:
        role: "path", "label", "split" or "group".
        asked: the name that the user gave, if any.

    Raises:
        DataError: the asked column is not there.
    """
    if asked is not None:
        if asked not in table.columns:
            hint = suggest(asked, list(table.columns))
            raise DataError(f"{table.name} has no column {asked!r}; it has {', '.join(table.columns)}{hint}")
        return asked
    by_lower = {name.lower(): name for name in reversed(list(table.columns))}
    return next((by_lower[usual] for usual in USUAL_NAMES[role] if usual in by_lower), None)


def need_column(table: Table, role: str, asked: str | None) -> str:
    """Find a column or say which ones there are and how to name it.

    Raises:
        DataError: no column plays the role.
    """
    found = pick_column(table, role, asked)
    if found is None:
        raise DataError(
            f"{table.name} has no column that looks like a {role} among {', '.join(table.columns)}; "
            f"name it with --{role}-column"
        )
    return found


def folder_of(table_path: str) -> str:
    """The folder that a table's relative paths start from."""
    return os.path.dirname(table_path) or "."


FIRST_ROW = 2  # as a spreadsheet counts: the header is row 1
MOST_MISSING = 0.5  # of a table's files: where more are, they are looked for in the wrong place
ANSWERS = {"status", "error", "label", "probability"}  # columns of a table of predictions


def dataset_from_table(
    table: Table,
    storage: FolderStorage | ZipStorage,
    config: DataConfig,
    *,
    folder: str = "",
    is_labelled: bool = True,
) -> ImageDataset:
    """Build an index from the rows of a table, in their order.

    Args:
        store: where the paths are looked up.
        folder: of the store, where paths are looked up first.
        is_labelled: False takes any table that names images, and keeps missing files as rows.

    Raises:
        DataError: a column is missing, a row is given twice, most files are missing, a part is unknown.
    """
    path_column = need_column(table, "path", config.path_column)
    references = [cell.strip() for cell in table.columns[path_column]]
    if not is_labelled:
        paths, _, notes = _resolve_all(table, references, storage, folder)
        nothing = [None] * len(table)
        return make_dataset(table.name, storage, paths, nothing, nothing, notes=notes)
    label_column = need_column(table, "label", config.label_column)
    labels = [cell.strip() or None for cell in table.columns[label_column]]
    if not any(labels):
        raise DataError(
            f"{table.name} has no label in column {label_column!r}; "
            "fill it in or name another with --label-column"
        )
    _check_text(table, label_column)
    notes = [f"{table.name}: images from column {path_column!r}, classes from {label_column!r}"]
    if set(table.columns) >= ANSWERS and "given" not in table.columns:
        notes.append(f"{table.name} holds predictions: its labels are a model's answers")
    _check_complete(table, references)
    paths, missing, passed_over = _resolve_all(table, references, storage, folder)
    notes += passed_over
    if len(missing) > MOST_MISSING * len(table):
        where = storage.root if isinstance(storage, FolderStorage) else storage.archive
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
    return make_dataset(table.name, storage, paths, labels, parts, groups, notes=notes)


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
        raise DataError(f"{table.name}, row {row} names no image; fill in the path or drop the row")


def _check_unrepeated(table: Table, references: Sequence[str], paths: Sequence[str]) -> None:
    first_row: dict[str, int] = {}
    for row, (reference, path) in enumerate(zip(references, paths, strict=True), start=FIRST_ROW):
        first = first_row.setdefault(os.path.normpath(path), row)
        if first != row:
            raise DataError(
                f"{table.name}, row {row} repeats the image of row {first}, {reference!r}; list each once"
            )


def _read_parts(table: Table, config: DataConfig, notes: list[str]) -> list[SplitName | None]:
    column = pick_column(table, "split", config.split_column)
    nothing: list[SplitName | None] = [None] * len(table)
    if column is None:
        return nothing
    cells = table.columns[column]
    parts = [split_from_name(cell) for cell in cells]
    if config.split_column is None and not any(parts):
        # a body part, or the number of a fold
        notes.append(
            f"{table.name}: column {column!r} names no part such as {', '.join(SPLITS)} and is not read"
        )
        return nothing
    for row, (cell, split) in enumerate(zip(cells, parts, strict=True), start=FIRST_ROW):
        if split is None and cell.strip():
            hint = suggest(cell.strip().lower(), SPLITS)
            raise DataError(
                f"{table.name}, row {row} has the part {cell!r} in column {column!r}; "
                f"expected {', '.join(SPLITS)}{hint or ', or an empty cell'}"
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
    table: Table, references: Sequence[str], storage: FolderStorage | ZipStorage, folder: str
) -> tuple[list[str], list[str], list[str]]:
    """Find the file of each reference; returns paths (N,), the references without a file, and notes."""
    paths, missing, notes = [], [], []
    by_ending: dict[str, list[str]] | None = None
    for reference in references:
        near = f"{folder}/{reference}" if folder else reference
        if reference and near in storage:
            paths.append(near)
            continue
        if by_ending is None:
            names = list_image_files(storage, is_lenient=True)
            by_ending = _by_ending(names.candidates)
            if names.closed:
                n = counted(len(names.closed), "folder")
                notes.append(f"{n} cannot be read, and nothing is found there: {name_some(names.closed)}")
        found = by_ending.get(normalize_unicode(reference.replace("\\", "/").removeprefix("./")), [])
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
                found.setdefault(normalize_unicode(way), []).append(path)
            ending = ending.partition("/")[2]
    return found
