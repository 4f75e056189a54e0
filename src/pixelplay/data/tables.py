"""Read CSV, TSV and Parquet tables and find their columns; escape the cells of written ones."""

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from pixelplay.errors import DataError
from pixelplay.text import suggest

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
    "split": ("split", "part", "subset", "set", "partition", "is_valid", "is_val", "is_test"),
    "group": (
        "group", "group_id", "patient", "patient_id", "subject", "subject_id", "camera", "camera_id",
        "site", "site_id", "location", "location_id", "burst", "burst_id", "sequence", "seq_id",
    ),
}  # fmt: skip
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
    header_line, _, rest = text.partition("\n")
    if stated := re.fullmatch(r"\"?sep=(.)\"?\r?", header_line):  # Excel's own way to state it
        text, delimiter = rest, stated[1]
    else:
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
