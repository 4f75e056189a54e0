"""What a training run writes down about itself, beside its model."""

import csv
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelplay.atomic import write_json
from pixelplay.config import Metric, to_json
from pixelplay.data.audit import describe_findings
from pixelplay.data.storage import ZipStorage
from pixelplay.evaluation.calibration import compare_reliability, uncalibrated
from pixelplay.evaluation.decision_rule import DecisionRule
from pixelplay.evaluation.evaluate import Baseline, Evaluation, majority_baseline
from pixelplay.evaluation.intervals import Estimate
from pixelplay.outputs.evaluation_report import EvaluatedSplit, evaluate_without_duplicates
from pixelplay.outputs.label_issues import (
    LABEL_ISSUES,
    LabelIssueReport,
    collect_label_issues,
    write_label_issues,
)
from pixelplay.outputs.predictions_table import write_predictions
from pixelplay.training.run_context import RunContext
from pixelplay.training.trained_classifier import TrainedClassifier
from pixelplay.training.training_data import TrainingData

METRICS_VERSION = 1
CHOOSERS = {"oof": "train+val, out of fold", "val": "val"}


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """How good a run is, and what that rests on.

    Attributes:
        run_dir: where the run lies.
        metric: the declared one.
        test: figures of the test part, if there is one.
        test_without_duplicates: the same without test images that had a copy in training.
        corrected: part → its figures on the labels as the user has corrected them, where some differ.
        finetune: how deep it was trained: "none", "partial" or "full".
        held_out: figures of the images that also chose: out of fold, or of the validation part.
        held_out_part: "oof" or "val".
        baseline: what always guessing the commonest class scores on the headline's part.
        train_counts: class → images learned from.
        chosen: setting → its value, and what chose it.
        data: unreadable files, duplicates and what else the data showed.
        notes: what was skipped, assumed or downgraded.
        command: what was typed; None where Python was used.
        suspects: labels that look wrong among the images held out.
        calibration: what the temperature does on the test part, which did not choose it; None without one.
        learning_curve: what fewer images would have taught a probe; None for a tuned network.
    """

    run_dir: str
    metric: Metric
    test: Evaluation | None
    test_without_duplicates: Evaluation | None
    corrected: Mapping[str, Evaluation]
    finetune: str
    held_out: Evaluation
    held_out_split: str
    baseline: Baseline
    train_counts: Mapping[str, int]
    chosen: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]
    notes: Sequence[str]
    command: str | None
    label_issues: LabelIssueReport
    calibration: Mapping[str, Any] | None
    learning_curve: Mapping[str, Any] | None

    @property
    def measured_on(self) -> str:
        """The part behind the headline: "test"; where there is none, "oof" or "val"."""
        return self.held_out_split if self.test is None else "test"

    @property
    def is_refitted(self) -> bool:
        """Whether the validation part was learned from, once it had chosen and been measured."""
        return bool(self.chosen.get("refit_epochs", {}).get("value"))

    @property
    def evaluation(self) -> Evaluation:
        """The figures behind the headline."""
        return self.held_out if self.test is None else self.test

    @property
    def headline(self) -> Estimate:
        """The declared metric where it was measured."""
        estimate: Estimate = getattr(self.evaluation, self.metric)
        return estimate

    def to_json(self) -> dict[str, Any]:
        """Turn the report into metrics.json: every number with who chose and who measured."""
        chooser = CHOOSERS[self.held_out_split]
        parts = {
            "test": self.test,
            "test_without_duplicates": self.test_without_duplicates,
            self.held_out_split: self.held_out,
            **{f"{split}_corrected": evaluation for split, evaluation in self.corrected.items()},
        }
        return {
            "format_version": METRICS_VERSION,
            "headline": {
                "metric": self.metric,
                **self.headline.to_json(),
                "chosen_on": chooser,
                "measured_on": self.measured_on,
            },
            "finetune": self.finetune,
            "baseline": {
                **self.baseline.to_json(),
                "n": self.evaluation.n,
                "chosen_on": "train+val" if self.held_out_split == "oof" or self.is_refitted else "train",
                "measured_on": self.measured_on,
            },
            "chosen": {name: dict(value) for name, value in self.chosen.items()},
            **{
                # the images that chose are measured too: slightly optimistic, and it says so
                name: {"chosen_on": chooser, "measured_on": name, **split.to_json()}
                for name, split in parts.items()
                if split is not None
            },
            "val_is_before_refit": self.is_refitted,
            "calibration": chosen_by(chooser, self.calibration),
            "learning_curve": chosen_by(chooser, self.learning_curve),
            "train_counts": dict(self.train_counts),
            "data": dict(self.data),
            "label_issues": self.label_issues.summary(),
            "notes": list(self.notes),
        }


def chosen_by(chooser: str, figures: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Figures that say themselves what measured them, with what chose."""
    return None if figures is None else {"chosen_on": chooser, **figures}


def make_train_report(
    out_dir: str,
    classifier: TrainedClassifier,
    rule: DecisionRule,
    held_out: EvaluatedSplit,
    test: EvaluatedSplit | None,
    learning_curve: Mapping[str, Any] | None,
    data: TrainingData,
    ctx: RunContext,
    command: str | None,
) -> TrainReport:
    """Collect what is known about a run.

    Args:
        out_dir: final folder of the run.
        held_out: the images that selected settings.
        test: the test split if there is one.
        learning_curve: as measured; None for a fine-tuned network.
        command: the command as typed; None where Python was used.
    """
    split, seed = classifier.held_out_split, ctx.config.seed
    splits = {split: held_out} | ({} if test is None else {"test": test})
    headline = test or held_out
    calibration = None
    if test is not None:
        probs = test.predictions.probs
        before = uncalibrated(probs, rule.temperature.temperature)
        calibration = compare_reliability(before, probs, data.given_labels[test.rows], "test")
    counts = data.counts_of(classifier.trained_on)
    return TrainReport(
        run_dir=out_dir,
        metric=ctx.config.metric,
        test=None if test is None else test.evaluation,
        test_without_duplicates=evaluate_without_duplicates(data, test, seed),
        corrected={name: each.corrected for name, each in splits.items() if each.corrected is not None},
        finetune=classifier.finetune,
        held_out=held_out.evaluation,
        held_out_split=split,
        baseline=majority_baseline(counts, data.given_labels[headline.rows], headline.evaluation.classes),
        train_counts={name: int(n) for name, n in zip(data.known_classes, counts, strict=True)},
        chosen={**classifier.chosen, **describe_decision(rule, CHOOSERS[split])},
        data={**describe_data(data), "dropped_label_issues": list(data.paths_of(data.dropped))},
        notes=tuple(ctx.log.notes),
        command=command,
        label_issues=collect_label_issues(
            out_dir, data, {name: (each.rows, each.predictions.probs) for name, each in splits.items()}
        ),
        calibration=calibration,
        learning_curve=learning_curve,
    )


def write_train_records(
    report: TrainReport,
    classifier: TrainedClassifier,
    held_out: EvaluatedSplit,
    test: EvaluatedSplit | None,
    data: TrainingData,
    ctx: RunContext,
) -> None:
    """Write config.json, split.json, history.csv, the tables of each split and, last, metrics.json."""
    folder = ctx.run_dir
    about = {"pixelplay": "train", **describe_origin(data, report.command, ctx.config.reading.images_dir)}
    write_json({**about, **to_json(ctx.config)}, os.path.join(folder, "config.json"))
    write_split(folder, data)
    if classifier.history:
        write_history(os.path.join(folder, "history.csv"), classifier.history)
    else:  # the plan was not carried out
        with suppress(FileNotFoundError):
            os.remove(os.path.join(folder, "plan.json"))
    columns: dict[str, Sequence[str]] = {"given": held_out.labels}
    if classifier.folds is not None:
        fold_of = dict(zip(classifier.held_out, classifier.folds, strict=True))
        # excluded images are in no fold
        columns = {"fold": [str(fold_of.get(i, "")) for i in held_out.rows], **columns}
    write_part(os.path.join(folder, f"{classifier.held_out_split}.csv"), held_out, columns)
    if test is not None:
        write_part(os.path.join(folder, "predictions.csv"), test, {"given": test.labels})
    write_label_issues(report.label_issues.label_issues, os.path.join(folder, LABEL_ISSUES))
    write_json(report.to_json(), os.path.join(folder, "metrics.json"))


def describe_origin(data: TrainingData, command: str | None, images_dir: str | None) -> dict[str, str | None]:
    """What was typed, and where the images are, for the report to find them again."""
    dataset = data.dataset
    if isinstance(dataset.storage, ZipStorage):  # a table is in it, and so is the folder that it is about
        source, folder = dataset.storage.archive, images_dir
    else:
        source, folder = dataset.source, images_dir and os.path.abspath(images_dir)
    return {"command": command, "source": os.path.abspath(source), "images_dir": folder}


def write_split(folder: str, data: TrainingData) -> None:
    """Write split.json: who is in which part."""
    content: dict[str, list[str]] = {split: list(data.paths_of(rows)) for split, rows in data.split.items()}
    content["removed"] = list(data.paths_of(data.split.removed))
    content["dropped"] = list(data.paths_of(data.dropped))
    content["excluded"] = list(data.paths_of(data.excluded))
    write_json(content, os.path.join(folder, "split.json"))


def write_history(path: str, history: Sequence[Mapping[str, float]]) -> None:
    """Write one row for each epoch; the first names the columns."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(history[0])
        for row in history:
            writer.writerow(f"{value:.6g}" if np.isfinite(value) else "" for value in row.values())


def write_part(path: str, evaluated: EvaluatedSplit, columns: Mapping[str, Sequence[str]]) -> None:
    """Write the predictions of a part beside what was given."""
    write_predictions([evaluated.predictions], evaluated.predictions.classes, path, columns)


def describe_decision(rule: DecisionRule, chooser: str) -> dict[str, dict[str, Any]]:
    """T and tau with the evidence for them."""
    temperature, tau = rule.temperature, rule.tau
    chosen = {"chosen_on": chooser, "n": temperature.n}
    return {
        "temperature": {
            "value": temperature.temperature,
            **chosen,
            "source": "held_out" if chooser == CHOOSERS["val"] else "oof",
            "nll_before": temperature.nll_before,
            "nll_after": temperature.nll_after,
            "at_bound": temperature.at_bound,
        },
        "tau": {
            "value": tau.tau,
            **chosen,
            "expected": tau.expected_tau,
            "metric_value": tau.value,
            "metric_at_zero": tau.value_at_zero,
            "standard_error": tau.standard_error,
        },
    }


def describe_data(data: TrainingData) -> dict[str, Any]:
    """What the data showed: unreadable files, duplicates, conflicts, copies of test images."""
    dataset = data.dataset
    return {
        "n_usable": len(dataset),
        **describe_findings(dataset, data.errors.values(), data.duplicates),
        "removed_from_training": list(data.paths_of(data.split.removed)),
        "corrections": [
            {
                "path": dataset.paths[i],
                "given": data.classes[data.given_labels[i]],
                "corrected": data.classes[k] if (k := int(data.corrected_labels[i])) >= 0 else None,
            }
            for i in np.flatnonzero((data.corrected_labels != data.given_labels) | data.reviewed)
        ],
    }
