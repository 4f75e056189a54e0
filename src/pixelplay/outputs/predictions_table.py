"""Predictions → CSV or Parquet, written as they come (Parquet in groups), complete or not there at all."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import IO, Any

import numpy as np

from pixelplay.data.tables import safe_label, safe_path
from pixelplay.errors import ConfigError, DataError, PixelPlayError
from pixelplay.inference.predictor import Predictions, join_predictions
from pixelplay.run_log import RunLog
from pixelplay.text import SHOWN, counted, name_first
from pixelplay.training.cross_validation import CrossValidation
from pixelplay.training.run_dir import is_record
from pixelplay.training.training_data import TrainingData

DECIMALS = 6
GROUP_CELLS = 1 << 18  # of a Parquet file, that are written, and can be read, together


def write_predictions(
    chunks: Iterable[Predictions],
    classes: Sequence[str],
    path: str,
    extra: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write one row for each prediction as chunks arrive; the file's ending names the format.

    Where predictions say whether they are answers, how novel their images are, or which classes stand
    beside them, columns follow.

    Args:
        extra: further text columns (N,), put before the label.

    What is written so far stays as `<path>.partial` when the work is interrupted.
    """
    partial, written = f"{path}.partial", 0

    def watch() -> Iterator[Predictions]:
        nonlocal written
        for chunk in chunks:
            yield chunk
            written += len(chunk)

    try:
        if path.lower().endswith(".csv"):
            with open(partial, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                _write_csv(watch(), classes, file, extra or {})
        else:
            _write_parquet(watch(), classes, partial, extra or {})
    except PixelPlayError as error:
        if written:
            raise PixelPlayError(f"{error}; {counted(written, 'finished row')} in {partial}") from None
        with suppress(FileNotFoundError):  # not begun
            os.remove(partial)  # the input was no good: nothing to keep
        raise
    except OSError as error:
        error.filename = error.filename or partial  # a full disk names no file by itself
        raise
    os.replace(partial, path)


def check_new_file(path: str, *, force: bool) -> None:
    """Raise unless a table can be written under this name.

    Raises:
        ConfigError: it exists, has an unknown ending, or its folder cannot be written to.
    """
    if is_record(path):
        raise ConfigError(f"{path} is, or would pass for, a record of the run; choose another --out")
    for taken in (path, f"{path}.partial"):
        if os.path.isdir(taken) or (os.path.lexists(taken) and not force):
            way_on = "" if os.path.isdir(taken) else ", or replace it with --force"
            raise ConfigError(f"{taken} exists; choose another --out{way_on}")
    if not path.lower().endswith((".csv", ".parquet")):
        raise ConfigError(
            f"--out {path} ends neither in .csv nor in .parquet; one of them says what to write"
        )
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ConfigError(f"the folder {folder} of --out does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"the folder {folder} of --out cannot be written to; choose another")


def _write_csv(
    chunks: Iterable[Predictions], classes: Sequence[str], file: IO[str], extra: Mapping[str, Sequence[str]]
) -> None:
    writer = csv_writer(file)
    names = [f"prob_{name}" for name in classes]
    cautious, chunks = _peek(chunks)
    writer.writerow(["path", "status", "error", *extra, "label", "probability", *names, *cautious])
    row = 0
    for chunk in chunks:
        cautious = _cautious(chunk)
        for i, path in enumerate(chunk.paths):
            k = int(chunk.pred[i])
            if k < 0:
                cells = ["", "", *[""] * len(classes)]
            else:
                shown = [f"{p:.{DECIMALS}f}" for p in chunk.probs[i]]
                cells = [safe_label(classes[k]), shown[k], *shown]
            first = [safe_path(path), chunk.status[i], safe_label(chunk.errors[i])]
            cells += ["" if k < 0 else _as_json(column[i]) for column in cautious.values()]
            writer.writerow([*first, *(safe_label(column[row]) for column in extra.values()), *cells])
            row += 1
        file.flush()


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _peek(chunks: Iterable[Predictions]) -> tuple[dict[str, list[Any]], Iterable[Predictions]]:
    """Which further columns there are, by the first chunk, and all chunks."""
    rest = iter(chunks)
    first = list(islice(rest, 1))
    return (_cautious(first[0]) if first else {}), chain(first, rest)


def _cautious(chunk: Predictions) -> dict[str, list[Any]]:
    """Columns about a prediction's own worth, those that there are."""
    found: dict[str, list[Any]] = {}
    if chunk.answered is not None:
        found["answered"] = [bool(x) for x in chunk.answered]
    if chunk.novelty is not None:
        found["novelty"] = [round(float(x), DECIMALS) for x in chunk.novelty]
    if chunk.sets is not None:
        found["prediction_set"] = [
            [name for name, is_in in zip(chunk.classes, row, strict=True) if is_in] for row in chunk.sets
        ]
    return found


def csv_writer(file: IO[str], delimiter: str = ",") -> Any:
    """A writer of lines that end in a newline; cells with any kind of line break are quoted."""
    # Python quotes a carriage return only where it ends lines, and readers would end a row there
    return csv.writer(_Newlines(file), delimiter=delimiter, lineterminator="\r\n")


class _Newlines:
    """A file that takes lines ending in CRLF and writes them ending in LF."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, line: str) -> None:
        """Write one line."""
        self._file.write(line.removesuffix("\r\n") + "\n")


def _write_parquet(
    chunks: Iterable[Predictions], classes: Sequence[str], path: str, extra: Mapping[str, Sequence[str]]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [(name, pa.string()) for name in ("path", "status", "error", *extra, "label")]
    fields += [("probability", pa.float64()), *((_as_text(f"prob_{name}"), pa.float64()) for name in classes)]
    kinds = {"answered": pa.bool_(), "novelty": pa.float64(), "prediction_set": pa.list_(pa.string())}
    cautious, chunks = _peek(chunks)
    schema = pa.schema([*fields, *((name, kinds[name]) for name in cautious)])
    with pq.ParquetWriter(path, schema) as writer:
        group: list[Predictions] = []
        further = {name: map(_as_text, values) for name, values in extra.items()}

        def write() -> None:
            whole = join_predictions(group, tuple(classes))
            group.clear()  # what cannot be written is not tried again
            texts = {name: list(islice(values, len(whole))) for name, values in further.items()}
            writer.write_table(pa.table(_columns(whole) | texts, schema=schema))

        try:
            for chunk in chunks:
                group.append(chunk)
                if sum(map(len, group)) * len(schema) >= GROUP_CELLS:
                    write()
        finally:  # also when interrupted
            if group:
                write()


def _columns(chunk: Predictions) -> dict[str, list[Any]]:
    is_ok = [k >= 0 for k in chunk.pred]
    columns: dict[str, list[Any]] = {
        "path": [_as_text(path) for path in chunk.paths],
        "status": list(chunk.status),
        "error": [error or None for error in chunk.errors],
        "label": [label if label is None else _as_text(label) for label in chunk.labels],
        "probability": [chunk.probs[i, k] if k >= 0 else None for i, k in enumerate(chunk.pred)],
    }
    for j, name in enumerate(chunk.classes):
        columns[_as_text(f"prob_{name}")] = [chunk.probs[i, j] if ok else None for i, ok in enumerate(is_ok)]
    for name, values in _cautious(chunk).items():
        columns[name] = [value if ok else None for value, ok in zip(values, is_ok, strict=True)]
    if chunk.sets is not None:
        columns["prediction_set"] = [
            names and [_as_text(name) for name in names] for names in columns["prediction_set"]
        ]
    return columns


def _as_text(name: str) -> str:
    """A file name in valid Unicode, which Parquet asks for; a byte that is none shows as "\\xe4".

    Different names stay different: of two columns with one name Parquet would keep one.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


NOT_HELD_OUT = "not_held_out"  # a status of oof.csv alone


def write_oof(folder: str, data: TrainingData, validation: CrossValidation) -> None:
    """One row for each image and repeat, a given test part left out; the same rows as logits."""
    from safetensors.numpy import save

    dataset, errors = data.all_images, data.errors
    usable = np.full(len(dataset), -1)  # position in the material of each image
    usable[np.setdiff1d(np.arange(len(dataset)), list(errors))] = np.arange(len(data.dataset))
    shown = np.flatnonzero(~dataset.in_split("test"))
    place = np.full(len(data.dataset), -1)
    place[validation.rows] = np.arange(len(validation.rows))
    where = np.where(usable[shown] >= 0, place[usable[shown]], -1)  # row of the cross-validation, or -1
    removed = set(data.split.removed.tolist())

    def status(i: int, pred: int) -> tuple[str, str]:
        if (error := errors.get(i)) is not None:
            return error.status, error.reason
        if pred >= 0:
            return "ok", ""
        if usable[i] in removed:
            return NOT_HELD_OUT, "a copy of a test image, not learned from"
        return NOT_HELD_OUT, "without it, or its group, nothing would be left to learn a class from"

    chunks, columns, logits = [], {"repeat": [], "fold": [], "given": []}, []  # type: ignore[var-annotated]
    for repeat, (folds, fit) in enumerate(zip(validation.folds, validation.rules, strict=True)):
        # a row of NaN and -1 at the end is what position -1 takes
        probs = np.vstack([fit.probs, np.full(fit.probs.shape[1], np.nan)])[where]
        pred = np.append(fit.pred, -1)[where]
        states = [status(int(i), int(k)) for i, k in zip(shown, pred, strict=True)]
        chunks.append(
            Predictions(
                paths=tuple(dataset.paths[i] for i in shown),
                status=tuple(state for state, _ in states),
                errors=tuple(why for _, why in states),
                probs=probs,
                pred=pred,
                classes=data.known_classes,
                digests=(b"",) * len(shown),
            )
        )
        own = np.append(folds, -1)[where]
        columns["repeat"] += [str(repeat)] * len(shown)
        columns["fold"] += ["" if fold < 0 else str(fold) for fold in own]
        columns["given"] += [dataset.classes[k] for k in dataset.labels[shown]]
        none = np.full(data.n_known, np.nan, np.float32)
        logits.append(np.vstack([validation.logits[repeat], none])[where])
    write_predictions(chunks, data.known_classes, os.path.join(folder, "oof.csv"), columns)
    content = save({"logits": np.concatenate(logits)}, metadata={"rows": "those of oof.csv"})
    with open(os.path.join(folder, "oof.safetensors"), "wb") as file:
        file.write(content)


NOVEL = 0.99  # novelty that one in a hundred of the images like those learned from has
N_LABELS = 8  # that are named


@dataclass(kw_only=True)
class PredictionSummary:
    """Counts over all predictions so far.

    Attributes:
        n: images.
        n_bad: those without a prediction.
        n_unsure: those with one that is not answered; None where nothing was asked of answers.
        n_novel: those that are less like what was learned from than one in a hundred is; None where the
            model cannot tell.
        labels: decided class → images.
        errors: path and reason of the first ones without a prediction.
    """

    n: int = 0
    n_bad: int = 0
    n_unsure: int | None = None
    n_novel: int | None = None
    labels: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def add(self, chunk: Predictions) -> None:
        """Count further predictions."""
        is_ok = chunk.pred >= 0
        self.n += len(chunk)
        self.n_bad += int((~is_ok).sum())
        self.labels.update(chunk.classes[k] for k in chunk.pred[is_ok])
        if chunk.answered is not None:
            self.n_unsure = (self.n_unsure or 0) + int((is_ok & ~chunk.answered).sum())
        if chunk.novelty is not None:
            self.n_novel = (self.n_novel or 0) + int((chunk.novelty[is_ok] >= NOVEL).sum())
        room = SHOWN - len(self.errors)
        self.errors += [f"{chunk.paths[i]}: {chunk.errors[i]}" for i in np.flatnonzero(~is_ok)[:room]]

    def say_what_is_missing(self, table: str | None, log: RunLog) -> None:
        """Note how many have no prediction, and why.

        Args:
            table: where a row of each says so; None: nowhere else.

        Raises:
            DataError: none has one.
        """
        if self.n_bad == self.n:
            where = "" if table is None else f"{table} says why; "
            raise DataError(f"none of {counted(self.n, 'image')} can be read; {where}first: {self.errors[0]}")
        if self.n_bad:
            why = name_first(self.errors, self.n_bad) if table is None else "their rows say why"
            log.note(f"{self.n_bad} of {self.n} images could not be read; {why}")

    def describe(self) -> str:
        """One line for people."""
        named = [f"{label} {n:,}" for label, n in self.labels.most_common(N_LABELS)]
        if len(self.labels) > N_LABELS:
            named.append(f"{len(self.labels) - N_LABELS} more classes")
        told = [f"{counted(self.n, 'image')}", ", ".join(named)]
        told += [f"{self.n_bad:,} without a prediction"] if self.n_bad else []
        told += [f"{self.n_unsure:,} not answered"] if self.n_unsure is not None else []
        told += [f"{self.n_novel:,} unlike what was learned from"] if self.n_novel else []
        return "; ".join(filter(None, told))
