"""Expected classes of a test set: from a list, class counts or a sample submission."""

import os

from pixelplay.data.tables import Table, is_table, read_table
from pixelplay.errors import DataError

CLASS_COLUMNS = ("class", "classes", "class_name", "label")
COUNT_COLUMNS = ("count", "counts", "n", "images", "n_images", "n_test")


def is_sample_submission(path: str) -> bool:
    """Return whether a file is named `sample_submission.csv` or similar."""
    name = path.replace(os.sep, "/").rpartition("/")[2].lower().replace("_", "")
    return is_table(name) and name.startswith("samplesubmission")


def read_expected_classes(path: str) -> dict[str, int | None]:
    """Read class names, with the number of test images where the file gives it.

    A text file has one class per line. A table has the columns `class,count` or is a sample
    submission: an id column, then either one column of labels or one column per class.

    Returns:
        class → number of test images, None if unknown.

    Raises:
        DataError: it cannot be read or names no class.
    """
    if is_table(path):
        return parse_expected_classes(read_table(path))
    try:
        with open(path, encoding="utf-8-sig") as file:
            return _without_counts(path, list(file))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a text file; expected one class per line, or a table") from None


def parse_expected_classes(table: Table) -> dict[str, int | None]:
    """Read the classes of a table as `read_expected_classes` does.

    Raises:
        DataError: it names no class, or a count is not a number.
    """
    header = list(table.columns)
    first = header[0].lower()
    count_column = next((name for name in header[1:] if name.lower() in COUNT_COLUMNS), None)
    if count_column is not None and (len(header) == 2 or first in CLASS_COLUMNS):
        return _with_counts(table, header[0], count_column)
    if len(header) == 2 and header[1].isdecimal():
        raise DataError(f"{table.name} has no header; make `class,count` its first line")
    if len(header) > 2:
        return dict.fromkeys(header[1:])
    if len(header) == 1:
        # a list without a header has its first class there
        missing = [] if first in (*CLASS_COLUMNS, "name") else header
        return _without_counts(table.name, [*missing, *table.columns[header[0]]])
    # the labels of a sample submission are placeholders, so they give names but no counts
    return _without_counts(table.name, list(table.columns[header[1]]))


def _with_counts(table: Table, name_column: str, count_column: str) -> dict[str, int | None]:
    counts: dict[str, int | None] = {}
    for name, count in zip(table.columns[name_column], table.columns[count_column], strict=True):
        if not count.strip().isdecimal():
            raise DataError(
                f"{table.name} has the count {count!r} for class {name!r}; expected a whole number"
            )
        if counts.setdefault(name.strip(), int(count)) != int(count):
            raise DataError(f"{table.name} gives two counts for class {name!r}; list each class once")
    return counts


def _without_counts(path: str, names: list[str]) -> dict[str, int | None]:
    expected: dict[str, int | None] = dict.fromkeys(name.strip() for name in names if name.strip())
    if not expected:
        raise DataError(f"{path} names no class; expected one per line, or a table")
    return expected
