"""What a run has written about itself → plain values for its report."""

import csv
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pixelplay.data.tables import plain_label, plain_path
from pixelplay.errors import BundleError
from pixelplay.outputs.label_issues import LABEL_ISSUES, LabelIssue, read_label_issues

TABLES = {"test": "predictions.csv", "oof": "oof.csv", "val": "val.csv"}  # part → its table
FIRST_REPEAT = ("", "0")
SETS = ("conflicts", "near_duplicates", "duplicates", "look_alikes")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An image that was held out, and what was decided.

    Attributes:
        path: as in the data.
        given: its label.
        label: the decision.
        probability: of the decision.
    """

    path: str
    given: str
    label: str
    probability: float

    @property
    def is_right(self) -> bool:
        """Whether the decision is the given label."""
        return self.given == self.label


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """Everything that a run's report tells, but for pictures.

    Attributes:
        folder: of the run.
        config: config.json.
        metrics: metrics.json.
        measured_on: the part behind the headline.
        answers: that part's images.
        history: one row for each epoch of a tuned network.
        suspects: labels that look wrong, the most suspicious first.
    """

    folder: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    measured_on: str
    answers: tuple[Answer, ...]
    history: tuple[Mapping[str, float], ...]
    label_issues: tuple[LabelIssue, ...]

    @property
    def source(self) -> str | None:
        """Where the images were when the run was made."""
        source = self.config.get("source")
        return None if source is None else str(source)

    @property
    def root(self) -> str:
        """The folder that all images lie in where their paths are absolute; else nothing."""
        if not self.answers or not all(os.path.isabs(answer.path) for answer in self.answers):
            return ""
        data = self.metrics["data"]
        paths = [answer.path for answer in self.answers] + [suspect.path for suspect in self.label_issues]
        paths += [row["path"] for name in ("unreadable", "corrections") for row in data[name]]
        paths += [row["path"] for name in SETS for members in data[name] for row in members]
        paths += data["removed_from_training"]
        folders = {os.path.dirname(path) for path in paths if os.path.isabs(path)}
        return os.path.join(os.path.commonpath(folders), "")

    def discreet(self, text: str) -> str:
        """A text without where things lie on this machine: a report is made to be shown to others."""
        run = os.path.abspath(self.folder)
        places = {os.path.expanduser("~"): "~", os.path.dirname(run): "…"}
        places |= {self.root: "", self.source or "": "DATA", run: "RUN"}
        for place in sorted(filter(lambda p: len(p) > 1, places), key=len, reverse=True):
            end = "" if place.endswith(("/", "\\")) else r"(?![\w.-])"  # RUN, and not the beginning of RUN-2
            text = re.sub(re.escape(place) + end, places[place], text)
        return text

    @property
    def command(self) -> list[str]:
        """The words that made the run, without where files elsewhere lie; none where Python made it."""
        return [self._placeless(word) for word in shlex.split(self.config.get("command") or "")]

    def _placeless(self, word: str) -> str:
        """A word of a command: of an absolute path, also an option's, the name alone."""
        option, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if not os.path.isabs(value):
            return word
        told = self.discreet(value)
        is_known = told.startswith(("DATA", "RUN"))
        return option + sign + (told if is_known else os.path.basename(value.rstrip("/")))

    @property
    def figures(self) -> Mapping[str, Any]:
        """Figures of the part behind the headline."""
        figures: Mapping[str, Any] = self.metrics[self.measured_on]
        return figures


def has_records(folder: str) -> bool:
    """Whether a folder is a run, not a model alone."""
    return os.path.isfile(os.path.join(folder, "metrics.json"))


def read_records(folder: str) -> RunRecords:
    """Read what a run has written.

    Raises:
        BundleError: records are missing or damaged; the command that makes them is named.
    """
    try:
        config, metrics = (_read_json(folder, name) for name in ("config.json", "metrics.json"))
        part = str(metrics["headline"]["measured_on"])
        answers = tuple(_read_answers(os.path.join(folder, TABLES[part])))
        history = tuple(_read_history(os.path.join(folder, "history.csv")))
    except FileNotFoundError as error:
        name = os.path.basename(str(error.filename))
        raise BundleError(f"{folder} lacks {name}; pixelplay train or crossval makes it anew") from None
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        raise BundleError(
            f"the records of {folder} are damaged ({type(error).__name__}: {error}); "
            "pixelplay train or crossval makes them anew"
        ) from None
    label_issues = (
        read_label_issues(folder).label_issues if os.path.isfile(os.path.join(folder, LABEL_ISSUES)) else ()
    )
    return RunRecords(
        folder=folder,
        config=config,
        metrics=metrics,
        measured_on=part,
        answers=answers,
        history=history,
        label_issues=label_issues,
    )


def _read_json(folder: str, name: str) -> dict[str, Any]:
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        return dict(json.load(file))


def _read_answers(path: str) -> list[Answer]:
    """Rows with a decision; of a repeated cross-validation those of its first turn."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [
            Answer(
                path=plain_path(row["path"]),
                given=plain_label(row["label"]),
                label=plain_label(row["prediction"]),
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
