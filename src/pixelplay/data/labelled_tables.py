"""Tables of labelled images → ImageDataset: paths, labels, splits and groups of the rows."""

import os
from collections.abc import Mapping, Sequence

from pixelplay.config import SPLITS, DataConfig, SplitName
from pixelplay.data.class_folders import split_from_name
from pixelplay.data.dataset import ImageDataset, find_group_names, make_dataset, normalize_unicode
from pixelplay.data.file_access import FileStorage, FolderStorage
from pixelplay.data.file_listing import list_image_files
from pixelplay.data.tables import Table, find_column, require_column, unescape_label
from pixelplay.errors import DataError
from pixelplay.text import EXAMPLES, counted, name_some, suggest

FIRST_ROW = 2  # row numbers as in a spreadsheet: the header is row 1
MAX_MISSING_FRAC = 0.5  # if more of the files are missing, the folder must be wrong
# labels that stand for a missing one in exported tables
MISSING_WORDS = frozenset(
    {"nan", "NaN", "NAN", "None", "none", "NA", "N/A", "n/a", "#N/A", "<NA>", "null", "NULL", "-"}
)
SEPARATORS = ";|,"  # of several labels in one cell; in a column of these names also a space:
PLURALS = ("labels", "tags", "classes", "categories")
BOOLEAN_SPLITS: Mapping[str, SplitName] = {"is_valid": "val", "is_val": "val", "is_test": "test"}
BOOLEANS: Mapping[str, bool | None] = {
    **dict.fromkeys(("true", "1", "yes", "t"), True),
    **dict.fromkeys(("false", "0", "no", "f"), False),
    "": None,
}


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
    label_column = find_column(table, "label", config.label_column)
    if label_column is None and (columns := _onehot_columns(table)):
        raise DataError(
            f"{table.name} has no label column but one column per class ({name_some(columns)}); "
            "write the class name of each image into a column 'label'"
        )
    label_column = require_column(table, "label", label_column)
    label_notes: list[str] = []
    labels = _read_labels(table, label_column, config.missing_label, label_notes)
    if "" in references:
        row = references.index("") + FIRST_ROW
        raise DataError(f"{table.name}, row {row} has no path; fill it in or remove the row")
    paths, missing, notes = _resolve_paths(table, references, storage, folder)
    notes.insert(0, f"{table.name}: paths from column {path_column!r}, labels from column {label_column!r}")
    notes += label_notes
    if len(missing) > MAX_MISSING_FRAC * len(table):
        where = storage.root if isinstance(storage, FolderStorage) else storage.archive
        raise DataError(
            f"{table.name} lists {counted(len(missing), 'file')} not found in {where}: {name_some(missing)}; "
            "fix the table or set --images-dir"
        )
    if missing:  # treated like unreadable images
        shown = name_some(missing, EXAMPLES)
        notes.append(f"{table.name}: {counted(len(missing), 'file')} of {len(table):,} not found: {shown}")
    splits, split_column = _read_splits(table, config, notes)
    groups, group_column = _read_group_names(table, paths, config, notes)
    used = {path_column, label_column, split_column, group_column}
    if unused := [name for name in table.columns if name not in used]:
        n = counted(len(unused), "unused column")
        notes.append(f"{table.name}: {n}: {name_some(list(map(repr, unused)), EXAMPLES)}")
    kept = _without_repeats(table, paths, labels, splits, groups, notes)
    return make_dataset(
        table.name,
        storage,
        [paths[i] for i in kept],
        [labels[i] for i in kept],
        [splits[i] for i in kept],
        None if groups is None else [groups[i] for i in kept],
        notes=notes,
    )


def _holds_predictions(table: Table) -> bool:
    """Return whether a table has the columns that PixelPlay writes for predictions."""
    has_probs = any(name == "probability" or name.startswith("prob_") for name in table.columns)
    return has_probs and "prediction" in table.columns


def _onehot_columns(table: Table) -> list[str]:
    """Return the columns that contain 0 and 1 only, if there are several with both."""
    found = [name for name, cells in table.columns.items() if {c.strip() for c in cells} == {"0", "1"}]
    return found if len(found) > 1 else []


def _read_labels(table: Table, column: str, missing_label: str | None, notes: list[str]) -> list[str | None]:
    """Read class names, None for an empty cell or a word for a missing value.

    Unlike paths they must be valid UTF-8. Notes say what was read as missing and what may be several labels.
    """
    for row, cell in enumerate(table.columns[column], start=FIRST_ROW):
        if any("\udc80" <= letter <= "\udcff" for letter in cell):
            shown = cell.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
            raise DataError(f"{table.name}, row {row} has the label {shown!r}; save the table as UTF-8")
    cells = [cell.strip() for cell in table.columns[column]]
    if not any(cells):
        raise DataError(f"{table.name} has no label in column {column!r}; fill it in or set --label-column")
    if _holds_predictions(table):  # written by PixelPlay
        cells = [unescape_label(cell) for cell in cells]
    words = MISSING_WORDS if missing_label is None else {missing_label}
    missing = [cell for cell in cells if cell in words and cell]
    if missing:
        n, named = counted(len(missing), "label"), name_some(sorted(set(map(repr, missing))))
        keep = "" if missing_label is not None else "; --missing-label '' keeps such words as classes"
        notes.append(f"{table.name}: {n} read as missing: {named}{keep}")
    marks = SEPARATORS + (" " if column.lower() in PLURALS else "")
    if several := [name for name in dict.fromkeys(cells) if any(mark in name for mark in marks)]:
        named = name_some(list(map(repr, several)), EXAMPLES)
        notes.append(
            f"{table.name}: {counted(len(several), 'class name')} may be several labels and counts as one "
            f"class: {named}"
        )
    return [None if cell in words else cell or None for cell in cells]


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
    listing = list_image_files(storage)
    by_ending = index_by_ending(listing.candidates)
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
    return paths, missing, listing.notes()


def index_by_ending(paths: Sequence[str]) -> dict[str, list[str]]:
    """Map every ending of each path, with and without its extension, to the paths."""
    found: dict[str, list[str]] = {}
    for path in paths:
        ending = path
        while ending:
            for key in {ending, os.path.splitext(ending)[0]}:
                found.setdefault(normalize_unicode(key), []).append(path)
            ending = ending.partition("/")[2]
    return found


def _without_repeats(
    table: Table,
    paths: Sequence[str],
    labels: Sequence[str | None],
    splits: Sequence[SplitName | None],
    groups: Sequence[str] | None,
    notes: list[str],
) -> list[int]:
    """Return the positions of the first row of each image; rows that contradict each other are refused."""
    first: dict[str, int] = {}
    kept = []
    for i, path in enumerate(paths):
        before = first.setdefault(os.path.normpath(path), i)
        if before == i:
            kept.append(i)
            continue
        for name, column in (("label", labels), ("split", splits), ("group", groups)):
            if column is not None and column[i] != column[before]:
                raise DataError(
                    f"{table.name}, row {i + FIRST_ROW} repeats row {before + FIRST_ROW}, {path!r}, with "
                    f"another {name}: {column[i]!r} instead of {column[before]!r}; remove one of them"
                )
    if n := len(paths) - len(kept):
        notes.append(f"{table.name}: {counted(n, 'repeated row')} skipped")
    return kept


def _read_splits(
    table: Table, config: DataConfig, notes: list[str]
) -> tuple[list[SplitName | None], str | None]:
    """Return the split of each row, and the column that gives it."""
    column = find_column(table, "split", config.split_column)
    if column is None:
        return [None] * len(table), None
    cells = table.columns[column]
    held_out = BOOLEAN_SPLITS.get(column.strip().lower())
    if held_out is not None and all(cell.strip().lower() in BOOLEANS for cell in cells):
        names = {True: held_out, False: "train", None: ""}
        cells = [names[BOOLEANS[cell.strip().lower()]] for cell in cells]
    splits = [split_from_name(cell) for cell in cells]
    if config.split_column is None and not any(splits):  # for example one of body parts
        notes.append(f"{table.name}: column {column!r} is ignored, it contains none of {', '.join(SPLITS)}")
        return splits, column
    for row, (cell, split) in enumerate(zip(cells, splits, strict=True), start=FIRST_ROW):
        if split is None and cell.strip():
            hint = suggest(cell.strip().lower(), SPLITS)
            expected = f"expected {', '.join(SPLITS)}{hint or ' or an empty cell'}"
            raise DataError(
                f"{table.name}, row {row} has the split {cell!r} in column {column!r}; {expected}"
            )
    notes.append(f"{table.name}: splits from column {column!r}")
    return splits, column


def _read_group_names(
    table: Table, paths: Sequence[str], config: DataConfig, notes: list[str]
) -> tuple[Sequence[str] | None, str | None]:
    """Return the group of each row, and the column that gives it."""
    from_paths = find_group_names(paths, [path.rpartition("/")[0] for path in paths], config)
    if from_paths is not None:
        return from_paths, None
    column = find_column(table, "group", config.group_column)
    if column is None:
        return None, None
    names = [cell.strip() for cell in table.columns[column]]
    if config.group_column is None and len(set(names)) == 1:
        notes.append(f"{table.name}: column {column!r} is ignored, all its values are equal")
        return None, column
    notes.append(f"{table.name}: groups from column {column!r}; each group stays in one split")
    return names, column
