"""CSV, TSV and Parquet → columns of text."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pixelplay.errors import DataError
from pixelplay.text import suggest

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
    "part": ("part", "split", "subset"),
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
        role: "path", "label", "part" or "group".
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
