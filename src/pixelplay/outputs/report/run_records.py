"""Read the files of a run that its report shows."""

import csv
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pixelplay.data.tables import unescape_label, unescape_path
from pixelplay.errors import BundleError
from pixelplay.outputs.label_issues import LABEL_ISSUES, LabelIssue, read_label_issues

TABLES = {"test": "predictions.csv", "oof": "oof.csv", "val": "val.csv"}  # split → table of its predictions
FIRST_REPEAT = ("", "0")
DUPLICATE_KINDS = ("conflicts", "near_duplicates", "duplicates", "similar_images")  # keys in metrics.json


@dataclass(frozen=True, kw_only=True)
class PredictionRow:
    """The label and the prediction of one held-out image."""

    path: str
    label: str
    prediction: str
    probability: float

    @property
    def is_correct(self) -> bool:
        """True if the prediction equals the label."""
        return self.label == self.prediction


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """The files of a run, parsed.

    Attributes:
        measured_on: split of the headline metric: "test", "oof" or "val".
        predictions: readable images of that split; of a repeated cross-validation, the first repeat.
        history: one row per epoch of fine-tuning.
    """

    folder: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Mapping[str, Any]
    measured_on: str
    predictions: tuple[PredictionRow, ...]
    history: tuple[Mapping[str, float], ...]
    label_issues: tuple[LabelIssue, ...]

    @property
    def errors(self) -> list[PredictionRow]:
        """Misclassified images in table order."""
        return [row for row in self.predictions if not row.is_correct]

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """Metrics of the split behind the headline."""
        return dict(self.metrics[self.measured_on])

    @property
    def source(self) -> str | None:
        """Path of the images at the time of the run."""
        source = self.config.get("source")
        return None if source is None else str(source)

    @property
    def root(self) -> str:
        """Common folder of all images if their paths are absolute, else ""."""
        if not self.predictions or not all(os.path.isabs(row.path) for row in self.predictions):
            return ""
        data = self.metrics["data"]
        paths = [row.path for row in self.predictions] + [issue.path for issue in self.label_issues]
        paths += [row["path"] for name in ("unreadable", "corrections") for row in data[name]]
        paths += [row["path"] for kind in DUPLICATE_KINDS for members in data[kind] for row in members]
        paths += data["removed_from_training"]
        folders = {os.path.dirname(path) for path in paths if os.path.isabs(path)}
        return os.path.join(os.path.commonpath(folders), "")

    def redact(self, text: str) -> str:
        """Replace local paths in a text, because reports are shared with others."""
        run = os.path.abspath(self.folder)
        places = {os.path.expanduser("~"): "~", os.path.dirname(run): "…"}
        places |= {self.root: "", self.source or "": "DATA", run: "RUN"}
        for place in sorted(filter(lambda p: len(p) > 1, places), key=len, reverse=True):
            end = "" if place.endswith(("/", "\\")) else r"(?![\w.-])"  # RUN, not the beginning of RUN-2
            text = re.sub(re.escape(place) + end, places[place], text)
        return text

    @property
    def command(self) -> list[str]:
        """Arguments of the command that wrote the run, without local paths; empty if Python did."""
        return [self._redact_word(word) for word in shlex.split(self.config.get("command") or "")]

    def _redact_word(self, word: str) -> str:
        option, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if not os.path.isabs(value):
            return word
        redacted = self.redact(value)
        is_known = redacted.startswith(("DATA", "RUN"))
        return option + sign + (redacted if is_known else os.path.basename(value.rstrip("/")))


def has_records(folder: str) -> bool:
    """Return True for a run; a bare model has no records."""
    return os.path.isfile(os.path.join(folder, "metrics.json"))


def read_records(folder: str) -> RunRecords:
    """Read the files of a run.

    Raises:
        BundleError: files are missing or damaged.
    """
    try:
        names = ("config.json", "environment.json", "metrics.json")
        config, environment, metrics = (_read_json(folder, name) for name in names)
        measured_on = str(metrics["headline"]["measured_on"])
        predictions = tuple(_read_predictions(os.path.join(folder, TABLES[measured_on])))
        history = tuple(_read_history(os.path.join(folder, "history.csv")))
    except FileNotFoundError as error:
        name = os.path.basename(str(error.filename))
        raise BundleError(f"{folder} has no {name}; run pixelplay train or crossval again") from None
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        raise damaged_records(folder, error) from None
    has_issues = os.path.isfile(os.path.join(folder, LABEL_ISSUES))
    return RunRecords(
        folder=folder,
        config=config,
        environment=environment,
        metrics=metrics,
        measured_on=measured_on,
        predictions=predictions,
        history=history,
        label_issues=read_label_issues(folder).label_issues if has_issues else (),
    )


def damaged_records(folder: str, error: Exception) -> BundleError:
    """Make the error for a run whose files cannot be used."""
    return BundleError(
        f"the records of {folder} are damaged or of another version ({type(error).__name__}: {error}); "
        "run pixelplay train or crossval again"
    )


def _read_json(folder: str, name: str) -> dict[str, Any]:
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        return dict(json.load(file))


def _read_predictions(path: str) -> list[PredictionRow]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [
            PredictionRow(
                path=unescape_path(row["path"]),
                label=unescape_label(row["label"]),
                prediction=unescape_label(row["prediction"]),
                probability=float(row["probability"]),
            )
            for row in csv.DictReader(file, strict=True)
            if row["status"] == "ok" and row["prediction"] and row.get("repeat", "") in FIRST_REPEAT
        ]


def _read_history(path: str) -> list[dict[str, float]]:
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [
            {name: float(cell) for name, cell in row.items() if cell}
            for row in csv.DictReader(file, strict=True)
        ]
