"""Fill in the sample submission of a competition with predictions."""

import io
import math
import os
import shlex
from collections.abc import Mapping, Sequence

from pixelplay.atomic import write_bytes
from pixelplay.config import UncertaintyConfig
from pixelplay.data.dataset import normalize_unicode
from pixelplay.data.tables import Table, csv_writer
from pixelplay.errors import ConfigError, DataError
from pixelplay.inference.predictor import Predictions
from pixelplay.text import EXAMPLES, counted, name_some, suggest


def check_submission(
    sample: Table | None,
    classes: Sequence[str],
    path: str,
    *,
    probability_of: str | None = None,
    uncertainty: UncertaintyConfig | None = None,
) -> None:
    """Check that a model of these classes can fill in a sample submission, if there is one.

    Args:
        path: output file.
        probability_of: class whose probability fills the only column besides the id.
        uncertainty: settings that would add columns.

    Raises:
        ConfigError: `path` is not a CSV file, `uncertainty` would add a column, or `probability_of` is not a
            class or does not fit the columns.
        DataError: the sample has neither a column of labels nor a column of a known class.
    """
    if sample is None:
        if probability_of is not None:
            raise ConfigError(f"probability_of={probability_of!r} has no effect without --submission")
        return
    if not path.lower().endswith(".csv"):
        raise ConfigError(f"--out {path} does not end in .csv; a submission is a CSV file")
    if uncertainty not in (None, UncertaintyConfig()):
        raise ConfigError(
            "a submission has only the columns of its sample; --coverage, --min-confidence and "
            "--target-accuracy cannot be used with --submission"
        )
    columns = list(sample.columns)
    if len(columns) < 2:
        raise DataError(
            f"{sample.name} has only the column {columns[0]!r}; a sample submission has an id column and at "
            "least one column to fill in"
        )
    if probability_of is not None:
        _check_probability_of(probability_of, sample, classes)
    if (filled := _classes_to_fill(sample, classes, probability_of)) is None:
        _check_labels(sample, classes)
    elif not _known(filled, classes):
        raise DataError(
            f"{sample.name} has the columns {name_some(columns[1:])}, none of which is a class of the model: "
            f"{name_some(classes)}"
        )


def write_submission(
    predictions: Predictions, sample: Table, path: str, *, probability_of: str | None = None
) -> list[str]:
    """Write the sample's header and ids, in its order, with predictions filled in.

    Columns named like classes, and the column for `probability_of`, get probabilities; any other single
    column gets labels. An id without a readable image keeps the sample's values.

    Returns:
        Notes on what was filled in and what could not be, one sentence each.

    Raises:
        ConfigError: see `check_submission`.
        DataError: see `check_submission`; also if an id matches two images, or no id matches a readable one.
    """
    check_submission(sample, predictions.classes, path, probability_of=probability_of)
    id_column, *columns = sample.columns
    ids = sample.columns[id_column]
    row_of = _match_ids(ids, predictions)
    matched = [row for row in row_of if row is not None]
    if not matched:
        raise DataError(
            f"no id of {sample.name} matches an image: ids such as {ids[0]!r}, images such as "
            f"{predictions.paths[0]!r}; pass the folder of the images that the sample lists"
        )
    row_of = [None if row is None or predictions.status[row] != "ok" else row for row in row_of]
    if all(row is None for row in row_of):
        first = f"{predictions.paths[matched[0]]}: {predictions.errors[matched[0]]}"
        raise DataError(f"none of the images listed in {sample.name} can be read; first: {first}")
    filled = _classes_to_fill(sample, predictions.classes, probability_of)
    spelling = {normalize_unicode(cell): cell for cell in sample.columns[columns[0]]}  # as in the sample
    # not made safe for spreadsheets: the file is for a program
    text = io.StringIO()
    writer = csv_writer(text, sample.delimiter)
    writer.writerow(sample.header or sample.columns)
    for i, row in enumerate(row_of):
        unfilled = [sample.columns[name][i] for name in columns]
        cells = unfilled if row is None else _fill(predictions, row, filled, spelling)
        writer.writerow([ids[i], *cells])
    write_bytes(text.getvalue().encode("utf-8", "surrogateescape"), path)
    what = _describe_filling(sample, filled, predictions.classes, probability_of)
    return [what, *_note_gaps(predictions, sample, row_of, filled, probability_of)]


def _classes_to_fill(
    sample: Table, classes: Sequence[str], probability_of: str | None
) -> Sequence[str] | None:
    """List the classes whose probabilities fill the columns after the id; None for a column of labels.

    A single column that holds classes is for labels even if it is named like a class, such as "label" in a
    model with the classes "label" and "other". Numbers are ambiguous here, as they may be classes too.
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
    """Select the names that are classes, whatever their Unicode normalization."""
    known = set(map(normalize_unicode, classes))
    return [name for name in names if normalize_unicode(name) in known]


def _check_probability_of(label: str, sample: Table, classes: Sequence[str]) -> None:
    if not _known([label], classes):
        hint = suggest(label, classes) or f"; its classes are {name_some(classes)}"
        raise ConfigError(f"the model has no class {label!r}{hint}")
    name, *others = list(sample.columns)[1:]
    if others:
        raise ConfigError(
            f"probability_of={label!r} needs a sample with one column besides the id, but {sample.name} has "
            f"{1 + len(others)}"
        )
    if _known([name], classes) and normalize_unicode(name) != normalize_unicode(label):
        raise ConfigError(f"probability_of={label!r} does not match {sample.name}, whose column is {name!r}")


def _check_labels(sample: Table, classes: Sequence[str]) -> None:
    """Raise DataError if the only column of a sample clearly holds probabilities."""
    name = list(sample.columns)[1]
    for cell in sample.columns[name]:
        if cell not in classes and _is_number(cell) and not float(cell).is_integer():
            raise DataError(
                f"{sample.name} has {cell!r} in its column {name!r}, which is a probability and not a class; "
                f"name the class it is for, as in --probability-of {shlex.quote(classes[-1])}"
            )


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _match_ids(ids: Sequence[str], predictions: Predictions) -> list[int | None]:
    """Find the row of each id's image by the end of its path, with or without the file extension."""
    depths = {name.strip().count("/") for name in ids}  # folders in an id
    rows: dict[str, list[int]] = {}
    for row, path in enumerate(predictions.paths):
        pieces = path.replace(os.sep, "/").split("/")
        ends = {"/".join(pieces[-1 - depth :]) for depth in depths}
        for key in ends | {os.path.splitext(end)[0] for end in ends}:
            rows.setdefault(normalize_unicode(key), []).append(row)
    found = [rows.get(normalize_unicode(name.strip()), []) for name in ids]
    for name, matches in zip(ids, found, strict=True):
        if len(matches) > 1:
            paths = name_some([predictions.paths[row] for row in matches])
            raise DataError(
                f"id {name!r} of the sample matches {len(matches)} images: {paths}; give only the folder "
                "that the sample lists"
            )
    return [matches[0] if matches else None for matches in found]


def _fill(
    predictions: Predictions, row: int, filled: Sequence[str] | None, spelling: Mapping[str, str]
) -> list[str]:
    """Return the cells after the id: the label, spelled as in the sample, or the probabilities."""
    if filled is None:
        label = predictions.classes[predictions.pred[row]]
        return [spelling.get(normalize_unicode(label), label)]
    probs = dict(zip(map(normalize_unicode, predictions.classes), predictions.probs[row], strict=True))
    names = map(normalize_unicode, filled)
    return [f"{probs[name]:.9g}" if name in probs else "0" for name in names]


def _describe_filling(
    sample: Table, filled: Sequence[str] | None, classes: Sequence[str], probability_of: str | None
) -> str:
    """Say what was written into the columns after the id, and why."""
    name, *others = list(sample.columns)[1:]
    if probability_of is not None:
        return f"column {name!r}: probability of class {probability_of!r}"
    if filled is not None:
        what = f"{1 + len(others)} columns" if others else f"column {name!r}"
        return f"{what}: probabilities of the classes that the header names"
    cells = sorted(set(sample.columns[name]))
    if _known(cells, classes):
        return f"column {name!r}: predicted classes, as in the sample"
    kind = "values are" if len(cells) > 1 else "only value is"
    return (
        f"column {name!r}: names of the predicted classes; the sample's {kind} no class of the model: "
        f"{name_some(cells, EXAMPLES)}"
    )


def _note_gaps(
    predictions: Predictions,
    sample: Table,
    row_of: Sequence[int | None],
    filled: Sequence[str] | None,
    probability_of: str | None,
) -> list[str]:
    """Note what the submission and the predictions do not have in common."""
    id_column, *columns = sample.columns
    classes, used = predictions.classes, set(row_of)
    unmatched = [name for name, row in zip(sample.columns[id_column], row_of, strict=True) if row is None]
    unused = [path for row, path in enumerate(predictions.paths) if row not in used]
    gaps = {
        f"{counted(len(unmatched), 'id')} without a readable image kept the sample's value": unmatched,
        f"skipped {counted(len(unused), 'image')} (unreadable or without an id in the sample)": unused,
    }
    if filled is not None and probability_of is None:
        known, present = _known(columns, classes), set(map(normalize_unicode, columns))
        unknown = [name for name in columns if name not in known]
        missing = [name for name in classes if normalize_unicode(name) not in present]
        gaps |= {
            f"filled {counted(len(unknown), 'column')} with 0, as the model has no such class": unknown,
            f"the rows do not sum to 1, as the sample lacks {len(missing)} classes of the model": missing,
        }
    return [f"{text}: {name_some(names, EXAMPLES)}" for text, names in gaps.items() if names]
