"""CSV, TSV and Parquet tables → ImageDataset; escaped cells for the tables that PixelPlay writes."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from pixelplay.config import SPLITS, DataConfig, SplitName
from pixelplay.data.class_folders import split_from_name
from pixelplay.data.dataset import ImageDataset, find_group_names, make_dataset, normalize_unicode
from pixelplay.data.file_access import FileStorage, FolderStorage
from pixelplay.data.file_listing import list_image_files
from pixelplay.errors import DataError
from pixelplay.text import EXAMPLES, counted, name_some, suggest

TABLE_EXTENSIONS = (".csv", ".tsv", ".parquet", ".pq")
# Usual names of each column, preferred ones first; case is ignored.
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
FIRST_ROW = 2  # row numbers as in a spreadsheet: the header is row 1
MAX_MISSING_FRAC = 0.5  # if more of the files are missing, the folder must be wrong
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs such a cell as a formula


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text columns (N,) of equal length; an empty cell is an empty string."""

    name: str  # the file, as the user named it
    columns: Mapping[str, Sequence[str]]
    delimiter: str = ","
    header: Sequence[str] = ()  # exactly as in the file, including leading and trailing spaces

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def is_table(path: str) -> bool:
    """Return whether a file has the extension of a table."""
    return path.lower().endswith(TABLE_EXTENSIONS)


def parent_folder(path: str) -> str:
    """Return the folder of a table, where its relative paths start."""
    return os.path.dirname(path) or "."


def read_table(path: str, *, allow_empty: bool = False, max_columns: int | None = None) -> Table:
    """Read a CSV, TSV or Parquet file with a header.

    Args:
        allow_empty: accept a header without rows.
        max_columns: read only the header of a text file with more columns.

    Raises:
        DataError: unreadable, no header, no rows, or a row with too many or too few cells.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return parse_table(data, path, allow_empty=allow_empty, max_columns=max_columns)


def parse_table(
    data: bytes, name: str, *, allow_empty: bool = False, max_columns: int | None = None
) -> Table:
    """Parse the content of a table as `read_table` does; its name gives the format."""
    delimiter = ","
    if name.lower().endswith((".parquet", ".pq")):
        header, rows = _parse_parquet(data, name)
    else:
        header, rows, delimiter = _parse_text(data, name, max_columns)
    names = [cell.strip() for cell in header]
    repeated = sorted({cell for cell in names if names.count(cell) > 1})
    if repeated:
        raise DataError(f"{name} has the column {repeated[0]!r} more than once; rename one of them")
    is_too_wide = max_columns is not None and len(header) > max_columns
    if not rows and not (header and (allow_empty or is_too_wide)):
        raise DataError(f"{name} has no rows; a table needs a header and at least one row")
    cells = zip(*rows, strict=True) if rows else [()] * len(header)
    return Table(name=name, columns=dict(zip(names, cells, strict=True)), delimiter=delimiter, header=header)


def _parse_text(
    data: bytes, name: str, max_columns: int | None
) -> tuple[list[str], list[Sequence[str]], str]:
    """Parse header, rows and delimiter: the most frequent of comma, tab and semicolon in the header."""
    # spreadsheets save "Unicode text" as UTF-16; paths may be invalid UTF-8
    is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = data.decode("utf-16", "replace") if is_utf16 else data.decode("utf-8-sig", "surrogateescape")
    text = text.lstrip("\r\n")
    header_line = text.split("\n", 1)[0]
    delimiter = "\t" if name.lower().endswith(".tsv") else max(",\t;", key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Sequence[str]] = []
    try:
        for row in filter(None, reader):  # without empty lines
            if rows and len(row) != len(rows[0]):
                n = f"{len(row)} cells but the header has {len(rows[0])}"
                raise DataError(f"{name}, line {reader.line_num} has {n}; fix the line")
            rows.append(row)
            if max_columns is not None and len(row) > max_columns:
                break
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num} cannot be read as a table: {error}") from None
    return list(rows[0]) if rows else [], rows[1:], delimiter


def _parse_parquet(data: bytes, name: str) -> tuple[list[str], list[Sequence[str]]]:
    """Parse the columns of a Parquet file that can be text; nested and binary ones hold the images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = pq.ParquetFile(pa.BufferReader(data))
        kinds = pa.types
        skipped = (kinds.is_nested, kinds.is_binary, kinds.is_large_binary, kinds.is_fixed_size_binary)
        header = [field.name for field in content.schema_arrow if not any(is_(field.type) for is_ in skipped)]
        read = content.read(columns=header)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{name} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    cells = [[_as_text(value) for value in column.to_pylist()] for column in read.columns]
    return header, list(zip(*cells, strict=True))


def _as_text(value: object) -> str:
    """Write a Parquet value as a CSV file would hold it; None and NaN are empty."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # integers with gaps are stored as 1.0, 2.0 and NaN
    return str(value)


def find_column(table: Table, role: str, name: str | None) -> str | None:
    """Find the path, label, split or group column by the name the user gave, or by its usual names.

    Raises:
        DataError: the table has no column of this name.
    """
    if name is not None and name not in table.columns:
        hint = suggest(name, list(table.columns))
        raise DataError(f"{table.name} has no column {name!r}; it has {', '.join(table.columns)}{hint}")
    if name is not None:
        return name
    by_lower = {column.lower(): column for column in reversed(list(table.columns))}
    return next((by_lower[usual] for usual in USUAL_NAMES[role] if usual in by_lower), None)


def require_column(table: Table, role: str, name: str | None) -> str:
    """Find the column for a role as `find_column` does, or raise DataError."""
    found = find_column(table, role, name)
    if found is None:
        columns = ", ".join(table.columns)
        raise DataError(f"{table.name} has no {role} column among {columns}; name it with --{role}-column")
    return found


def escape_path(path: str) -> str:
    """Escape a path so that a spreadsheet does not run it; it still opens the same file."""
    return f"./{path}" if path.startswith(FORMULA_STARTS) else path


def escape_label(label: str) -> str:
    """Escape a text cell so that a spreadsheet does not run it."""
    return f"'{label}" if label.lstrip("'").startswith(FORMULA_STARTS) else label


def unescape_path(cell: str) -> str:
    """Undo `escape_path`."""
    return cell[2:] if cell.startswith("./") and cell[2:].startswith(FORMULA_STARTS) else cell


def unescape_label(cell: str) -> str:
    """Undo `escape_label`."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULA_STARTS) else cell


def csv_writer(file: IO[str], delimiter: str = ",") -> Any:
    """Create a CSV writer that quotes all line breaks and ends lines with "\\n"."""
    # Python quotes a carriage return only if line ends contain it; readers would split the row there
    return csv.writer(_UnixLines(file), delimiter=delimiter, lineterminator="\r\n")


class _UnixLines:
    """Replaces the CRLF at the end of each line by LF."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(line.removesuffix("\r\n") + "\n")


def dataset_from_table(
    table: Table,
    storage: FileStorage,
    config: DataConfig,
    *,
    folder: str = "",
    labelled: bool = True,
) -> ImageDataset:
    """Build a dataset from the rows of a table, in their order.

    Args:
        storage: where the paths are looked up.
        folder: folder of the storage where paths are looked up first.
        labelled: False accepts any table that names images, and keeps missing and repeated files.

    Raises:
        DataError: a column or label is missing, the labels are predictions, an image is repeated, a
            split is unknown, or more than half of the files are missing.
    """
    has_label = config.label_column is not None or "label" in table.columns
    if labelled and not has_label and _holds_predictions(table):
        raise DataError(f"{table.name} holds model predictions but no 'label' column; pass labelled images")
    path_column = require_column(table, "path", config.path_column)
    references = [cell.strip() for cell in table.columns[path_column]]
    if not labelled:
        paths, _, notes = _resolve_paths(table, references, storage, folder)
        return make_dataset(table.name, storage, paths, notes=notes)
    label_column = require_column(table, "label", config.label_column)
    labels = _read_labels(table, label_column)
    if "" in references:
        row = references.index("") + FIRST_ROW
        raise DataError(f"{table.name}, row {row} has no path; fill it in or remove the row")
    paths, missing, notes = _resolve_paths(table, references, storage, folder)
    notes.insert(0, f"{table.name}: paths from column {path_column!r}, labels from column {label_column!r}")
    if len(missing) > MAX_MISSING_FRAC * len(table):
        where = storage.root if isinstance(storage, FolderStorage) else storage.archive
        raise DataError(
            f"{table.name} lists {counted(len(missing), 'file')} not found in {where}: {name_some(missing)}; "
            "fix the table or set --images-dir"
        )
    if missing:  # treated like unreadable images
        shown = name_some(missing, EXAMPLES)
        notes.append(f"{table.name}: {counted(len(missing), 'file')} of {len(table):,} not found: {shown}")
    _check_no_repeats(table, references, paths)
    splits = _read_splits(table, config, notes)
    groups = _read_group_names(table, paths, config, notes)
    return make_dataset(table.name, storage, paths, labels, splits, groups, notes=notes)


def _holds_predictions(table: Table) -> bool:
    """Return whether a table has the columns that PixelPlay writes for predictions."""
    has_probs = any(name == "probability" or name.startswith("prob_") for name in table.columns)
    return has_probs and "prediction" in table.columns


def _read_labels(table: Table, column: str) -> list[str | None]:
    """Read class names, None for an empty cell; unlike paths, they must be valid UTF-8."""
    for row, cell in enumerate(table.columns[column], start=FIRST_ROW):
        if any("\udc80" <= letter <= "\udcff" for letter in cell):
            shown = cell.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
            raise DataError(f"{table.name}, row {row} has the label {shown!r}; save the table as UTF-8")
    cells = [cell.strip() for cell in table.columns[column]]
    if not any(cells):
        raise DataError(f"{table.name} has no label in column {column!r}; fill it in or set --label-column")
    if _holds_predictions(table):  # written by PixelPlay
        cells = [unescape_label(cell) for cell in cells]
    return [cell or None for cell in cells]


def _resolve_paths(
    table: Table, references: Sequence[str], storage: FileStorage, folder: str
) -> tuple[list[str], list[str], list[str]]:
    """Find each file by its path or a unique ending of it; also return the references not found, and notes.

    References that no file matches stay in the paths (N,) unchanged.
    """
    prefix = f"{folder}/" if folder else ""
    is_exact = [reference != "" and prefix + reference in storage for reference in references]
    if all(is_exact):
        return [prefix + reference for reference in references], [], []
    listing = list_image_files(storage, skip_unreadable=True)
    by_ending = _index_by_ending(listing.candidates)
    paths, missing = [], []
    for reference, exact in zip(references, is_exact, strict=True):
        key = normalize_unicode(reference.replace("\\", "/").removeprefix("./"))
        found = [prefix + reference] if exact else by_ending.get(key, [])
        found = [path for path in found if path.startswith(prefix)] or found
        if len(found) > 1:
            matches = f"{reference!r}, which matches {name_some(found)}"
            raise DataError(f"{table.name} lists {matches}; write the full path or set --images-dir")
        paths.append(found[0] if found else reference)
        missing += [] if found else [reference]
    notes = []
    if closed := listing.unreadable_folders:
        shown = name_some(closed, EXAMPLES)
        notes.append(f"skipped {counted(len(closed), 'unreadable folder')} while looking for images: {shown}")
    return paths, missing, notes


def _index_by_ending(paths: Sequence[str]) -> dict[str, list[str]]:
    """Map every ending of each path, with and without its extension, to the paths."""
    found: dict[str, list[str]] = {}
    for path in paths:
        ending = path
        while ending:
            for key in {ending, os.path.splitext(ending)[0]}:
                found.setdefault(normalize_unicode(key), []).append(path)
            ending = ending.partition("/")[2]
    return found


def _check_no_repeats(table: Table, references: Sequence[str], paths: Sequence[str]) -> None:
    first_row: dict[str, int] = {}
    for row, (reference, path) in enumerate(zip(references, paths, strict=True), start=FIRST_ROW):
        first = first_row.setdefault(os.path.normpath(path), row)
        if first != row:
            raise DataError(
                f"{table.name}, row {row} repeats row {first}, {reference!r}; list each image once"
            )


def _read_splits(table: Table, config: DataConfig, notes: list[str]) -> list[SplitName | None]:
    column = find_column(table, "split", config.split_column)
    if column is None:
        return [None] * len(table)
    cells = table.columns[column]
    splits = [split_from_name(cell) for cell in cells]
    if config.split_column is None and not any(splits):  # for example one of body parts
        notes.append(f"{table.name}: column {column!r} is ignored, it contains none of {', '.join(SPLITS)}")
        return splits
    for row, (cell, split) in enumerate(zip(cells, splits, strict=True), start=FIRST_ROW):
        if split is None and cell.strip():
            hint = suggest(cell.strip().lower(), SPLITS)
            expected = f"expected {', '.join(SPLITS)}{hint or ' or an empty cell'}"
            raise DataError(
                f"{table.name}, row {row} has the split {cell!r} in column {column!r}; {expected}"
            )
    notes.append(f"{table.name}: splits from column {column!r}")
    return splits


def _read_group_names(
    table: Table, paths: Sequence[str], config: DataConfig, notes: list[str]
) -> Sequence[str] | None:
    from_paths = find_group_names(paths, [path.rpartition("/")[0] for path in paths], config)
    if from_paths is not None:
        return from_paths
    column = find_column(table, "group", config.group_column)
    if column is None:
        return None
    names = [cell.strip() for cell in table.columns[column]]
    if config.group_column is None and len(set(names)) == 1:
        notes.append(f"{table.name}: column {column!r} is ignored, all its values are equal")
        return None
    notes.append(f"{table.name}: groups from column {column!r}; each group stays in one split")
    return names
