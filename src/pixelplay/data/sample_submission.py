"""Which classes the test side expects: a list, counts, or a sample submission."""

import os

from pixelplay.data.tables import Table, is_table, read_table
from pixelplay.errors import DataError

CLASS_COLUMNS = ("class", "classes", "class_name", "label")
COUNT_COLUMNS = ("count", "counts", "n", "images", "n_images", "n_test")


def read_expected_classes(path: str) -> dict[str, int | None]:
    """Read class names, with their number of test images where the file has it.

    A text file has one class a line. A table has the columns `class,count`, or is a sample
    submission: an id column, then either one column of labels or one column a class.

    Raises:
        DataError: unreadable, or names no class.
    """
    return name_expected(read_table(path)) if is_table(path) else _read_lines(path)


def name_expected(table: Table) -> dict[str, int | None]:
    """Name the classes in a table that lists them, counts them, or is a sample submission.

    Raises:
        DataError: it names no class, or a count is no number.
    """
    header = list(table.columns)
    lower = [name.lower() for name in header]
    counted = next((name for name in header[1:] if name.lower() in COUNT_COLUMNS), None)
    if counted is not None and (len(header) == 2 or lower[0] in CLASS_COLUMNS):
        return _read_counts(table, header[0], counted)
    if len(header) == 2 and header[1].isdecimal():
        raise DataError(f"{table.name} has no header; make `class,count` its first line")
    if len(header) > 2:
        return dict.fromkeys(header[1:])
    if len(header) == 1:
        # a list without a header has its first class where a header would be
        first = [] if lower[0] in (*CLASS_COLUMNS, "name") else header
        return _not_empty(table.name, [*first, *table.columns[header[0]]])
    # sample submissions fill their labels in with one dummy or all classes: names, not counts
    return _not_empty(table.name, list(table.columns[header[1]]))


def is_sample_submission(path: str) -> bool:
    """Whether a file is named `sample_submission.csv` or the like."""
    name = path.replace(os.sep, "/").rpartition("/")[2].lower().replace("_", "")
    return is_table(name) and name.startswith("samplesubmission")


def find_sample_submissions(folder: str) -> list[str]:
    """Find sample submissions directly in a folder; none in one that cannot be read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [os.path.join(folder, name) for name in names if is_sample_submission(name)]


def _read_lines(path: str) -> dict[str, int | None]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = list(file)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text; expected one class a line, or a table") from None
    return _not_empty(path, lines)


def _read_counts(table: Table, name_column: str, count_column: str) -> dict[str, int | None]:
    counts: dict[str, int | None] = {}
    for name, count in zip(table.columns[name_column], table.columns[count_column], strict=True):
        if not count.strip().isdecimal():
            raise DataError(
                f"{table.name} has the count {count!r} for class {name!r}; expected a whole number"
            )
        if counts.setdefault(name.strip(), int(count)) != int(count):
            raise DataError(f"{table.name} counts class {name!r} twice; list each class once")
    return counts


def _not_empty(path: str, names: list[str]) -> dict[str, int | None]:
    """Classes without counts, blanks left out."""
    expected: dict[str, int | None] = dict.fromkeys(name.strip() for name in names if name.strip())
    if not expected:
        raise DataError(f"{path} names no class; expected one a line, or a table")
    return expected
