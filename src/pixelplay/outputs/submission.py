"""Predictions → exactly the file that a competition's sample submission asks for."""

import math
import os
import shlex
from collections.abc import Mapping, Sequence

from pixelplay.config import UncertaintyConfig
from pixelplay.data.dataset import normalize_unicode
from pixelplay.data.tables import Table
from pixelplay.errors import ConfigError, DataError
from pixelplay.inference.predictor import Predictions
from pixelplay.outputs.predictions_table import csv_writer
from pixelplay.text import counted, name_some, suggest


def check_submission(
    sample: Table | None,
    classes: Sequence[str],
    path: str,
    *,
    probability_of: str | None = None,
    uncertainty: UncertaintyConfig | None = None,
) -> None:
    """Raise unless a sample submission, if there is one, can be filled in by a model of these classes.

    Args:
        probability_of: class whose probability the only column besides the id is to hold.

    Raises:
        ConfigError: `path` is no CSV file, something is asked for that would add a column, or
            `probability_of` is no class, or there is no such column.
        DataError: the sample has neither one column of labels nor a column of a known class.
    """
    if sample is None:
        if probability_of is not None:
            raise ConfigError(
                f"probability_of={probability_of!r} says nothing without --submission; give both"
            )
        return
    if not path.lower().endswith(".csv"):
        raise ConfigError(f"--out {path} does not end in .csv; a submission is a CSV file")
    if uncertainty not in (None, UncertaintyConfig()):
        raise ConfigError(
            "a submission has exactly its sample's columns; leave out coverage and what says when to answer"
        )
    columns = list(sample.columns)
    if len(columns) < 2:
        raise DataError(
            f"{sample.name} has the one column {columns[0]!r}; a sample submission has an id column "
            "and one or more to fill in"
        )
    if probability_of is not None:
        _check_probability_of(probability_of, sample, classes)
    asked = _asked_classes(sample, classes, probability_of)
    if asked is None:
        _check_labels(sample, classes)
    elif not _known(asked, classes):
        raise DataError(
            f"{sample.name} has the columns {name_some(columns[1:])}, none of which is a class of the model: "
            f"{name_some(classes)}"
        )


def write_submission(
    predictions: Predictions, sample: Table, path: str, *, probability_of: str | None = None
) -> list[str]:
    """Write the sample's header, ids and order, with predictions filled in.

    Probabilities where the header is an id and class names, or where one is asked for, otherwise labels. An
    id without a readable image keeps the sample's value.

    Returns:
        What could not be filled in, one sentence each.

    Raises:
        ConfigError: as of `check_submission`.
        DataError: the columns fit neither form, an id fits two images, or no id fits any.
    """
    check_submission(sample, predictions.classes, path, probability_of=probability_of)
    columns = list(sample.columns)
    ids = list(sample.columns[columns[0]])
    row_of = _match_ids(ids, predictions)
    named = [row for row in row_of if row is not None]
    if not named:
        raise DataError(
            f"no id of {sample.name} names an image: ids such as {ids[0]!r}, images such as "
            f"{predictions.paths[0]!r}; give the folder that the ids are about"
        )
    row_of = [None if row is None or predictions.status[row] != "ok" else row for row in row_of]
    if all(row is None for row in row_of):
        first = f"{predictions.paths[named[0]]}: {predictions.errors[named[0]]}"
        raise DataError(f"no image that {sample.name} names can be read; first: {first}")
    asked = _asked_classes(sample, predictions.classes, probability_of)
    spelling = {normalize_unicode(cell): cell for cell in sample.columns[columns[1]]}  # the sample's own
    # ids and labels are written exactly as they are: the file is for a program
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv_writer(file, sample.delimiter)
        writer.writerow(sample.header or columns)
        for i, row in enumerate(row_of):
            own = [sample.columns[name][i] for name in columns[1:]]
            writer.writerow([ids[i], *(own if row is None else _fill(predictions, row, asked, spelling))])
    os.replace(partial, path)
    notes = _note_ids(ids, row_of, predictions)
    if asked is None:
        return notes + _note_labels(sample.columns[columns[1]], predictions.classes)
    return notes if probability_of is not None else notes + _note_columns(asked, predictions.classes)


def _asked_classes(sample: Table, classes: Sequence[str], probability_of: str | None) -> Sequence[str] | None:
    """Classes whose probabilities the columns behind the id are to hold; None: a column of labels.

    A column may be named like a class and hold classes all the same: "label" among the classes "label" and
    "other". A number says nothing there, where classes are numbers too.
    """
    if probability_of is not None:
        return [probability_of]
    columns = list(sample.columns)[1:]
    if len(columns) > 1:
        return columns
    cells = sample.columns[columns[0]]
    holds_classes = len(_known(cells, classes)) == len(cells) and not any(map(_is_number, cells))
    return None if holds_classes or not _known(columns, classes) else columns


def _known(names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Those that are classes, in whatever spelling of Unicode."""
    known = set(map(normalize_unicode, classes))
    return [name for name in names if normalize_unicode(name) in known]


def _check_probability_of(label: str, sample: Table, classes: Sequence[str]) -> None:
    if not _known([label], classes):
        hint = suggest(label, classes) or f"; it knows {name_some(classes)}"
        raise ConfigError(f"the model has no class {label!r}{hint}")
    name, *others = list(sample.columns)[1:]
    if others:
        raise ConfigError(
            f"probability_of={label!r} is for a sample with one column besides the id, and {sample.name} has "
            f"{1 + len(others)}"
        )
    if _known([name], classes) and normalize_unicode(name) != normalize_unicode(label):
        raise ConfigError(f"probability_of={label!r} does not go into {sample.name}, which asks for {name!r}")


def _check_labels(sample: Table, classes: Sequence[str]) -> None:
    """Raise DataError where the one column of a sample plainly wants a probability."""
    name = list(sample.columns)[1]
    fractions = [
        cell
        for cell in sample.columns[name]
        if cell not in classes and _is_number(cell) and not float(cell).is_integer()
    ]
    if fractions:
        raise DataError(
            f"{sample.name} has {fractions[0]!r} in its column {name!r}, a probability and no class; say of "
            f"which class, as with --probability-of {shlex.quote(classes[-1])}"
        )


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _match_ids(ids: Sequence[str], predictions: Predictions) -> list[int | None]:
    """Row of the image that each id names: by the end of its path, with extension or without."""
    rows: dict[str, list[int]] = {}
    finetune = {name.strip().count("/") for name in ids}
    for row, path in enumerate(predictions.paths):
        pieces = path.replace(os.sep, "/").split("/")
        ends = {"/".join(pieces[-1 - method :]) for method in finetune}
        for way in ends | {os.path.splitext(end)[0] for end in ends}:
            rows.setdefault(normalize_unicode(way), []).append(row)
    found: list[int | None] = []
    for name in ids:
        matches = rows.get(normalize_unicode(name.strip()), [])
        if len(matches) > 1:
            named = name_some([predictions.paths[row] for row in matches])
            raise DataError(
                f"id {name!r} of the sample fits {len(matches)} images: {named}; give only the right folder"
            )
        found.append(matches[0] if matches else None)
    return found


def _fill(
    predictions: Predictions, row: int, asked: Sequence[str] | None, spelling: Mapping[str, str]
) -> list[str]:
    """A row's label, spelled as in the sample, or the probabilities of the classes that are asked for."""
    if asked is None:
        label = predictions.classes[predictions.pred[row]]
        return [spelling.get(normalize_unicode(label), label)]
    shown = dict(zip(map(normalize_unicode, predictions.classes), predictions.probs[row], strict=True))
    return [
        f"{shown[normalize_unicode(name)]:.9g}" if normalize_unicode(name) in shown else "0" for name in asked
    ]


def _note_ids(ids: Sequence[str], row_of: Sequence[int | None], predictions: Predictions) -> list[str]:
    without = [name for name, row in zip(ids, row_of, strict=True) if row is None]
    used = set(row_of)
    unasked = [path for row, path in enumerate(predictions.paths) if row not in used]
    notes = []
    if without:
        notes.append(
            f"the sample's value stays for {counted(len(without), 'id')} without a readable image: "
            f"{name_some(without)}"
        )
    if unasked:
        notes.append(
            f"the submission leaves out {counted(len(unasked), 'image')} that no id names "
            f"or that cannot be read: {name_some(unasked)}"
        )
    return notes


def _note_labels(cells: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Say where a sample's labels are of other classes; one and the same everywhere is a place holder."""
    theirs = sorted({cell for cell in cells if cell})
    if len(theirs) < 2 or _known(theirs, classes):
        return []
    return [f"no label of the sample ({name_some(theirs)}) is a class of the model ({name_some(classes)})"]


def _note_columns(columns: Sequence[str], classes: Sequence[str]) -> list[str]:
    known, asked = _known(columns, classes), set(map(normalize_unicode, columns))
    unknown = [name for name in columns if name not in known]
    unasked = [name for name in classes if normalize_unicode(name) not in asked]
    notes = []
    if unknown:
        notes.append(
            f"the model does not know {len(unknown)} columns of the sample, they are 0: {name_some(unknown)}"
        )
    if unasked:
        notes.append(
            f"the sample has no column for {len(unasked)} classes of the model, "
            f"so its rows do not add up to 1: {name_some(unasked)}"
        )
    return notes
