"""RunReport: results of a training or cross-validation, and the records that both write."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pixelplay.array_types import IntArray
from pixelplay.atomic import write_json
from pixelplay.config import Metric
from pixelplay.data.audit import describe_findings
from pixelplay.data.file_access import ZipStorage
from pixelplay.evaluation.decision_rule import DecisionRule
from pixelplay.evaluation.estimates import estimate_rate
from pixelplay.evaluation.evaluate import Evaluation
from pixelplay.evaluation.intervals import Estimate
from pixelplay.evaluation.novelty import NOVELTY_THRESHOLD
from pixelplay.outputs.evaluation_report import EvaluatedSplit
from pixelplay.outputs.label_issues import LABEL_ISSUES, LabelIssueReport, write_label_issues
from pixelplay.outputs.predictions_table import write_predictions
from pixelplay.training.run_context import RunContext
from pixelplay.training.training_data import TrainingData

METRICS_VERSION = 1
SELECTED_ON = {"oof": "train+val, out of fold", "val": "val"}
OTHER_FOLDS = "the other folds"


@dataclass(frozen=True, kw_only=True)
class FoldMetrics:
    """The folds of a cross-validation.

    Attributes:
        values: the declared metric in each fold, repetition by repetition.
        deployed: "ensemble" of all folds' classifiers, or "single", one trained on all images.
        folds: JSON-ready description of each fold and what it selected.
    """

    n_folds: int
    repeats: int
    values: tuple[float, ...]
    deployed: str
    folds: Sequence[Mapping[str, Any]]

    @property
    def sd(self) -> float:
        """Standard deviation of the declared metric between folds."""
        return float(np.std(self.values, ddof=1))


@dataclass(frozen=True, kw_only=True, repr=False)
class RunReport:
    """Metrics of a model, and the images and decisions behind them.

    Attributes:
        finetune: "none", "partial" or "full"; in a cross-validation the number of folds of each.
        splits: name → metrics of "test", "test_without_duplicates", "oof" or "val", and of these on the
            user's corrected labels ("test_corrected", …); only those that exist.
        held_out_split: "oof" or "val", the images that selected settings.
        baseline: metrics of always predicting the majority class on the headline's split.
        train_counts: class → training images.
        chosen: setting → its value and what selected it.
        data: unreadable files, duplicates and other findings.
        command: the command as typed; None where Python was used.
        novelty: threshold for images of no known class, and how many test images exceed it.
        calibration: effect of the temperature on images that did not fit it; None where there are none.
        learning_curve: metrics of linear probes fitted on fewer images; None for other classifiers.
        by_fold: metrics by fold; None where there are none.
    """

    run_dir: str
    metric: Metric
    finetune: str | Mapping[str, int]
    splits: Mapping[str, Evaluation]
    held_out_split: str
    baseline: Mapping[str, Any]
    train_counts: Mapping[str, int]
    chosen: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]
    notes: Sequence[str]
    command: str | None
    label_issues: LabelIssueReport
    novelty: Mapping[str, Any]
    calibration: Mapping[str, Any] | None
    learning_curve: Mapping[str, Any] | None = None
    by_fold: FoldMetrics | None = None

    def __repr__(self) -> str:
        return f"RunReport of {self.run_dir}, measured on {self.measured_on!r}: {self.evaluation!r}"

    @property
    def measured_on(self) -> str:
        """Split behind the headline: test where there is one; in a cross-validation always "oof"."""
        return "test" if self.by_fold is None and "test" in self.splits else self.held_out_split

    @property
    def evaluation(self) -> Evaluation:
        """Metrics behind the headline."""
        return self.splits[self.measured_on]

    @property
    def headline(self) -> Estimate:
        """The declared metric where it was measured; in a cross-validation it estimates the procedure."""
        estimate: Estimate = getattr(self.evaluation, self.metric)
        return estimate

    @property
    def held_out(self) -> Evaluation:
        """Metrics of the images that selected settings."""
        return self.splits[self.held_out_split]

    @property
    def test(self) -> Evaluation | None:
        """Metrics of the test split, if there is one."""
        return self.splits.get("test")

    @property
    def is_refitted(self) -> bool:
        """True if the final weights were trained on the validation images, after their evaluation."""
        return bool(self.chosen.get("refit_epochs", {}).get("value"))

    def to_json(self) -> dict[str, Any]:
        """Return metrics.json: every number with the split that selected and the split that measured."""
        selected = SELECTED_ON[self.held_out_split] if self.by_fold is None else OTHER_FOLDS
        on_test = selected if self.by_fold is None else "oof"
        both = self.by_fold is not None or self.held_out_split == "oof" or self.is_refitted
        measured = {"chosen_on": selected, "measured_on": self.measured_on}
        return {
            "format_version": METRICS_VERSION,
            "headline": {"metric": self.metric, **self.headline.to_json(), **measured},
            "finetune": self.finetune if isinstance(self.finetune, str) else dict(self.finetune),
            **({} if self.by_fold is None else self._folds_to_json(measured)),
            "baseline": {
                **self.baseline,
                "n": self.evaluation.n,
                "chosen_on": "train+val" if both else "train",
                "measured_on": self.measured_on,
            },
            "chosen": {name: dict(value) for name, value in self.chosen.items()},
            **{
                name: {
                    "chosen_on": on_test if name.startswith("test") else selected,
                    "measured_on": name.partition("_")[0],
                    **evaluation.to_json(),
                }
                for name, evaluation in self.splits.items()
            },
            "val_is_before_refit": self.is_refitted,
            "calibration": self.calibration and {"chosen_on": selected, **self.calibration},
            "novelty": {"chosen_on": selected, **self.novelty},
            "learning_curve": self.learning_curve and {"chosen_on": selected, **self.learning_curve},
            "train_counts": dict(self.train_counts),
            "data": dict(self.data),
            "label_issues": self.label_issues.summary(),
            "notes": list(self.notes),
        }

    def _folds_to_json(self, measured: Mapping[str, str]) -> dict[str, Any]:
        assert self.by_fold is not None
        values = list(self.by_fold.values)
        spread = {"values": values, "mean": float(np.mean(values)), "sd": self.by_fold.sd}
        return {
            "n_folds": self.by_fold.n_folds,
            "repeats": self.by_fold.repeats,
            "deployed": self.by_fold.deployed,
            "by_fold": {"metric": self.metric, **measured, **spread},
            "folds": [dict(fold) for fold in self.by_fold.folds],
        }


def write_config(command: str, report: RunReport, data: TrainingData, ctx: RunContext, **more: Any) -> None:
    """Write config.json: the settings, the command, and where the images are.

    Args:
        command: "train" or "crossval".
        more: options of the command that are not part of the settings.
    """
    dataset, images_dir = data.dataset, ctx.config.reading.images_dir
    if isinstance(dataset.storage, ZipStorage):  # a table, and the folder it refers to, are in the archive
        source = dataset.storage.archive
    else:
        source, images_dir = dataset.source, images_dir and os.path.abspath(images_dir)
    about = {"pixelplay": command, **more, "command": report.command, "source": os.path.abspath(source)}
    content = {**about, "images_dir": images_dir, **asdict(ctx.config)}
    write_json(content, os.path.join(ctx.run_dir, "config.json"))


def write_split(rows: Mapping[str, IntArray], data: TrainingData, folder: str) -> None:
    """Write split.json: the paths of the images in each split."""
    content = {name: list(data.paths_of(own)) for name, own in rows.items()}
    write_json(content, os.path.join(folder, "split.json"))


def write_history(history: Sequence[Mapping[str, float]], folder: str) -> None:
    """Write history.csv, one row per epoch; without one, remove the plan that was not carried out."""
    if history:
        with open(os.path.join(folder, "history.csv"), "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(history[0])
            for row in history:
                writer.writerow(f"{value:.6g}" if np.isfinite(value) else "" for value in row.values())
    elif os.path.isfile(plan := os.path.join(folder, "plan.json")):
        os.remove(plan)


def write_table(
    name: str, evaluated: EvaluatedSplit, folder: str, extra: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Write the predictions of a split with its labels."""
    predictions = evaluated.predictions
    write_predictions([predictions], predictions.classes, os.path.join(folder, name), extra)


def write_metrics(report: RunReport, folder: str) -> None:
    """Write label_issues.csv and, last, metrics.json."""
    write_label_issues(report.label_issues.label_issues, os.path.join(folder, LABEL_ISSUES))
    write_json(report.to_json(), os.path.join(folder, "metrics.json"))


def describe_rule(rule: DecisionRule, selected: str) -> dict[str, dict[str, Any]]:
    """Return temperature and tau with the evidence for them, JSON-ready."""
    temperature, tau = rule.evidence["temperature"], rule.evidence["tau"]
    by = {"chosen_on": selected, "n": temperature["n"]}
    source = "held_out" if selected == SELECTED_ON["val"] else "oof"
    return {
        "temperature": {"value": rule.temperature, **by, "source": source, **temperature},
        "tau": {"value": rule.tau, **by, **tau},
    }


def describe_novelty(test: EvaluatedSplit | None, data: TrainingData, seed: int) -> dict[str, Any]:
    """Return the threshold for images of no known class, and the fraction of test images above it.

    Images of known classes above it are false alarms; those of classes without training images are detected.
    """
    found: dict[str, Any] = {"threshold": NOVELTY_THRESHOLD, "measured_on": None}
    is_unknown = np.zeros(0, np.bool_) if test is None else data.original_labels[test.rows] >= data.n_known
    for name, kept in (("false_alarm_rate", ~is_unknown), ("detection_rate", is_unknown)):
        found[name] = None
        if test is None or test.predictions.novelty is None or not kept.any():
            continue
        groups = None if data.dataset.groups is None else data.dataset.groups[test.rows[kept]]
        rate = estimate_rate(test.predictions.novelty[kept] > NOVELTY_THRESHOLD, groups, seed)
        found |= {"measured_on": "test", name: rate.to_json()}
    return found


def describe_data(data: TrainingData) -> dict[str, Any]:
    """Return findings about the data, JSON-ready: unreadable files, duplicates and corrections."""
    dataset = data.dataset
    return {
        "n_usable": len(dataset),
        **describe_findings(dataset, data.errors.values(), data.duplicates),
        "removed_from_training": list(data.paths_of(data.split.removed)),
        "corrections": [
            {
                "path": dataset.paths[i],
                "label": data.classes[data.original_labels[i]],
                "corrected": data.classes[k] if (k := int(data.corrected_labels[i])) >= 0 else None,
            }
            for i in np.flatnonzero((data.corrected_labels != data.original_labels) | data.reviewed)
        ],
    }
