"""predictions.csv and .parquet, oof.csv, and the summary of predictions."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pixelplay.atomic import atomic_write
from pixelplay.config import StrPath
from pixelplay.data.tables import csv_writer, escape_label, escape_path
from pixelplay.errors import ConfigError, DataError, PixelPlayError
from pixelplay.evaluation.novelty import NOVELTY_THRESHOLD
from pixelplay.inference.predictor import DECIMALS, Predictions, join_predictions
from pixelplay.run_log import RunLog
from pixelplay.text import SHOWN, counted, name_some, printable
from pixelplay.training.cross_validation import CrossValidation
from pixelplay.training.run_dir import is_record
from pixelplay.training.training_data import TrainingData

GROUP_CELLS = 1 << 18  # cells per row group of a Parquet file
Columns = Mapping[str, Sequence[str]]
NO_COLUMNS: Columns = {}


def write_predictions(
    chunks: Iterable[Predictions], classes: Sequence[str], path: str, extra: Columns | None = None
) -> None:
    """Write predictions to a .csv or .parquet file, with `extra` text columns (N,) over all chunks."""
    start = 0
    with open_predictions_table(path, classes) as table:
        for chunk in chunks:
            rows = slice(start, start + len(chunk))
            table.write(chunk, {name: column[rows] for name, column in (extra or {}).items()})
            start += len(chunk)


@contextmanager
def open_predictions_table(path: str, classes: Sequence[str]) -> Iterator["CsvTable | ParquetTable"]:
    """Open a .csv or .parquet table whose `write` adds predictions.

    The columns are path, status, error, extra columns, label if known, prediction, probability, prob_<class>,
    and abstained, prediction_set and novelty if the predictions have them.

    The file is written as `<path>.partial` and renamed at the end; an interrupt leaves the partial file.

    Raises:
        PixelPlayError: from the block; it names the partial file if there are finished rows.
    """
    with atomic_write(path, suffix=".partial", keep_partial=True) as partial:
        table: CsvTable | ParquetTable
        if path.lower().endswith(".csv"):
            file = open(partial, "w", encoding="utf-8", errors="surrogateescape", newline="")  # noqa: SIM115
            table = CsvTable(file, tuple(classes))
        else:
            table = ParquetTable(partial, tuple(classes))
        try:
            with table:
                yield table
        except PixelPlayError as error:
            if table.n_rows:
                raise PixelPlayError(
                    f"{error}; {counted(table.n_rows, 'finished row')} in {partial}"
                ) from None
            with suppress(FileNotFoundError):  # Parquet files are created with the first row
                os.remove(partial)
            raise
        except OSError as error:
            error.filename = error.filename or partial  # the error of a full disk has no file name
            raise


class PredictionWriter(Protocol):
    """Takes predictions chunk by chunk."""

    def write(self, chunk: Predictions, extra: Columns = NO_COLUMNS) -> None:
        """Append rows, with extra text columns."""


class PrintedPredictions:
    """Prints one readable line per image."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, chunk: Predictions, extra: Columns = NO_COLUMNS) -> None:
        """Print the rows of a chunk."""
        columns = _columns(chunk, extra)
        for row in zip(*columns.values(), strict=True):
            cells = dict(zip(columns, row, strict=True))
            if cells["prediction"] is None:
                text = f"{cells['status']}: {cells['error']}"
            else:
                text = f"{cells['prediction']} ({cells['probability']:.3f})"
                text += ", abstained" * bool(cells.get("abstained"))
                if (others := cells.get("prediction_set")) is not None:
                    text += f", prediction set: {', '.join(others) or 'empty'}"
                if (cells.get("novelty") or 0) >= NOVELTY_THRESHOLD:
                    text += f", unusual (novelty {cells['novelty']:.3f})"
            self._file.write(f"{printable(cells['path'])}: {printable(text)}\n")
        self._file.flush()


class JsonPredictions:
    """Collects one JSON object per image."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, chunk: Predictions, extra: Columns = NO_COLUMNS) -> None:
        """Add the rows of a chunk."""
        columns = _columns(chunk, extra)
        self.rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class CsvTable(AbstractContextManager["CsvTable"]):
    """A CSV file of predictions, flushed after each chunk; the file is closed at the end."""

    def __init__(self, file: IO[str], classes: tuple[str, ...]) -> None:
        self.n_rows = 0
        self._classes, self._file = classes, file
        self._writer = csv_writer(self._file)
        self._has_header = False

    def __exit__(self, error: object, *details: object) -> None:
        with self._file:
            if error is None and not self._has_header:
                self.write(join_predictions([], self._classes))

    def write(self, chunk: Predictions, extra: Columns = NO_COLUMNS) -> None:
        """Append rows, with extra text columns."""
        columns = _columns(chunk, extra)
        if not self._has_header:
            self._writer.writerow(columns)
            self._has_header = True
        cells = [[_csv_cell(name, value) for value in values] for name, values in columns.items()]
        self._writer.writerows(zip(*cells, strict=True))
        self._file.flush()
        self.n_rows += len(chunk)


class ParquetTable(AbstractContextManager["ParquetTable"]):
    """A Parquet file of predictions, in row groups of about GROUP_CELLS cells."""

    def __init__(self, path: str, classes: tuple[str, ...]) -> None:
        self.n_rows = 0
        self._path, self._classes = path, classes
        self._group: list[dict[str, Sequence[Any]]] = []
        self._writer: Any = None

    def __exit__(self, error: object, *details: object) -> None:
        try:
            if error is None and self._writer is None:
                self.write(join_predictions([], self._classes))
            if self.n_rows:  # also after an interrupt
                self._write_group()
        finally:
            if self._writer is not None:
                self._writer.close()

    def write(self, chunk: Predictions, extra: Columns = NO_COLUMNS) -> None:
        """Append rows, with extra text columns."""
        import pyarrow.parquet as pq

        columns = _columns(chunk, extra)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, _parquet_schema(columns))
        self._group.append(columns)
        if sum(len(each["path"]) for each in self._group) * len(columns) >= GROUP_CELLS:
            self._write_group()
        self.n_rows += len(chunk)

    def _write_group(self) -> None:
        import pyarrow as pa

        group, self._group = self._group, []  # rows that cannot be written are not tried again
        if group:
            columns = [
                [_parquet_cell(name, value) for each in group for value in each[name]] for name in group[0]
            ]
            self._writer.write_table(pa.table(columns, schema=self._writer.schema))


def _columns(chunk: Predictions, extra: Columns) -> dict[str, Sequence[Any]]:
    """Return the columns by name, with the extra ones behind the status."""
    own = chunk.columns()
    first = ("path", "status", "error")
    return {name: own[name] for name in first} | dict(extra) | own


def _csv_cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in ("abstained", "prediction_set", "novelty"):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return f"{value:.{DECIMALS}f}"
    return escape_path(value) if name == "path" else escape_label(value)


def _parquet_schema(columns: Iterable[str]) -> Any:
    import pyarrow as pa

    types = {"abstained": pa.bool_(), "prediction_set": pa.list_(pa.string()), "novelty": pa.float64()}
    return pa.schema(
        (_valid_unicode(name), types.get(name, pa.float64() if name.startswith("prob") else pa.string()))
        for name in columns
    )


def _parquet_cell(name: str, value: Any) -> Any:
    if name == "error" and not value:
        return None
    if isinstance(value, list):
        return list(map(_valid_unicode, value))
    return _valid_unicode(value) if isinstance(value, str) else value


def _valid_unicode(name: str) -> str:
    """Escape bytes that are not UTF-8 like "\\xe4", as Parquet rejects them.

    Different names stay different: of two columns with one name Parquet would keep one.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def check_output(out: StrPath | PredictionWriter, *, force: bool, is_submission: bool) -> str:
    """Return the path of a new table, "" for a writer; errors as `check_new_file`."""
    if isinstance(out, str | os.PathLike):
        check_new_file(os.fspath(out), force=force)
        return os.fspath(out)
    if is_submission:
        raise ConfigError("--submission needs --out FILE.csv")
    return ""


def open_output(
    out: StrPath | PredictionWriter, classes: Sequence[str]
) -> AbstractContextManager[PredictionWriter]:
    """Open a new table, or use a writer as it is."""
    if isinstance(out, str | os.PathLike):
        return open_predictions_table(os.fspath(out), classes)
    return nullcontext(out)


def check_new_file(path: str, *, force: bool) -> None:
    """Check that a table can be written to a path.

    Raises:
        ConfigError: it exists, has an unknown extension, or its folder cannot be written to.
    """
    if is_record(path):
        raise ConfigError(f"{path} is or looks like a record of the run; choose another --out")
    for existing in (path, f"{path}.partial"):
        if os.path.isdir(existing):
            raise ConfigError(f"{existing} is a folder; choose another --out")
        if os.path.lexists(existing) and not force:
            raise ConfigError(f"{existing} already exists; choose another --out or use --force to replace it")
    if not path.lower().endswith((".csv", ".parquet")):
        raise ConfigError(f"--out {path} must end in .csv or .parquet")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ConfigError(f"the folder {folder} of --out does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"the folder {folder} of --out is not writable; choose another")


NOT_HELD_OUT = "not_held_out"  # a status in oof.csv only


def write_oof(folder: str, data: TrainingData, validation: CrossValidation) -> None:
    """Write out-of-fold predictions and logits, a row per image and repeat."""
    from safetensors.numpy import save

    dataset = data.all_images
    shown = np.flatnonzero(~dataset.in_split("test"))
    readable = np.full(len(dataset), -1)  # index in data.dataset of each image
    readable[np.setdiff1d(np.arange(len(dataset)), list(data.errors))] = np.arange(len(data.dataset))
    validated = np.full(len(data.dataset), -1)  # row of the cross-validation of each readable image
    validated[validation.rows] = np.arange(len(validation.rows))
    where = np.where(readable[shown] >= 0, validated[readable[shown]], -1)
    removed = set(data.split.removed.tolist())

    def status(i: int, pred: int) -> tuple[str, str]:
        if (error := data.errors.get(i)) is not None:
            return error.status, error.reason
        if pred >= 0:
            return "ok", ""
        if readable[i] in removed:
            return NOT_HELD_OUT, "removed from training as a duplicate of a test image"
        return NOT_HELD_OUT, "always in training, as its class has no other training images or groups"

    def shown_rows(values: NDArray[Any], missing: float) -> NDArray[Any]:
        last = np.full((1, *values.shape[1:]), missing, values.dtype)
        return np.concatenate([values, last])[where]  # index -1 selects the appended last row

    chunks, columns, logits = [], {"repeat": [], "fold": []}, []  # type: ignore[var-annotated]
    for repeat, folds in enumerate(validation.folds):
        pred = shown_rows(validation.pred[repeat], -1)
        states = [status(int(i), int(k)) for i, k in zip(shown, pred, strict=True)]
        chunks.append(
            Predictions(
                paths=tuple(dataset.paths[i] for i in shown),
                status=tuple(name for name, _ in states),
                errors=tuple(reason for _, reason in states),
                probs=shown_rows(validation.probs[repeat], np.nan),
                pred=pred,
                classes=data.known_classes,
                digests=(b"",) * len(shown),
                label=tuple(dataset.classes[k] for k in dataset.labels[shown]),
            )
        )
        columns["repeat"] += [str(repeat)] * len(shown)
        columns["fold"] += ["" if fold < 0 else str(fold) for fold in shown_rows(folds, -1)]
        logits.append(shown_rows(validation.logits[repeat], np.nan))
    write_predictions(chunks, data.known_classes, os.path.join(folder, "oof.csv"), columns)
    content = save({"logits": np.concatenate(logits)}, metadata={"rows": "those of oof.csv"})
    with open(os.path.join(folder, "oof.safetensors"), "wb") as file:
        file.write(content)


N_CLASSES_SHOWN = 3


@dataclass(kw_only=True)
class PredictionSummary:
    """Counts over all predictions so far.

    Attributes:
        n_unreadable: images without prediction.
        n_abstained: predictions the model abstains from; None if abstention was not requested.
        n_unusual: predictions with novelty >= NOVELTY_THRESHOLD; None if novelty was not measured.
        counts: predicted class → images.
        errors: path and reason of the first unreadable images.
    """

    n: int = 0
    n_unreadable: int = 0
    n_abstained: int | None = None
    n_unusual: int | None = None
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def add(self, chunk: Predictions) -> None:
        """Count further predictions."""
        is_ok = chunk.pred >= 0
        self.n += len(chunk)
        self.n_unreadable += int((~is_ok).sum())
        self.counts.update(chunk.classes[k] for k in chunk.pred[is_ok])
        if chunk.abstained is not None:
            self.n_abstained = (self.n_abstained or 0) + int((is_ok & chunk.abstained).sum())
        if chunk.novelty is not None:
            self.n_unusual = (self.n_unusual or 0) + int((chunk.novelty[is_ok] >= NOVELTY_THRESHOLD).sum())
        n_more = SHOWN - len(self.errors)
        self.errors += [f"{chunk.paths[i]}: {chunk.errors[i]}" for i in np.flatnonzero(~is_ok)[:n_more]]

    def log_unreadable(self, table: str | None, log: RunLog) -> None:
        """Note how many images could not be read, and why, unless a table has the reasons.

        Raises:
            DataError: no image can be read.
        """
        if self.n_unreadable == self.n:
            hint = "" if table is None else f"see the error column of {table}; "
            raise DataError(
                f"could not read any of {counted(self.n, 'image')}; {hint}first: {self.errors[0]}"
            )
        if self.n_unreadable:
            reasons = name_some(self.errors, n=self.n_unreadable) if table is None else "see the error column"
            log.note(f"could not read {self.n_unreadable:,} of {counted(self.n, 'image')}; {reasons}")

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        return asdict(self) | {"counts": dict(self.counts)}

    def describe(self, out: str, *, submission: bool = False) -> str:
        """Describe the counts in one or two lines; a submission has no error column."""
        shown = [f"{name} {n:,}" for name, n in self.counts.most_common(N_CLASSES_SHOWN)]
        n_more = len(self.counts) - len(shown)
        shown += [f"{n_more} more class{'es' if n_more > 1 else ''}"] if n_more else []
        lines = [f"{counted(self.n, 'image')} → {out} ({', '.join(shown)})"]
        details = []
        if self.n_unreadable:
            where = "" if submission else " (see the error column)"
            details.append(f"{self.n_unreadable:,} unreadable{where}")
        if self.n_abstained is not None:
            details.append(f"{self.n_abstained:,} abstained")
        if self.n_unusual:
            details.append(f"{self.n_unusual:,} unusual (novelty ≥ {NOVELTY_THRESHOLD})")
        return "\n".join(map(printable, [*lines, " · ".join(details)] if details else lines))
