"""What a training run writes down about itself, beside its model."""

import csv
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelplay.arrays import IntArray
from pixelplay.atomic import write_json
from pixelplay.config import PARTS, Metric, TrainConfig, to_json
from pixelplay.data.audit import describe_findings
from pixelplay.data.storage import ZipStore
from pixelplay.evaluation.calibration import compare_reliability, uncalibrated
from pixelplay.evaluation.decision_rule import Decision
from pixelplay.evaluation.evaluate import Baseline, Evaluation, majority_baseline
from pixelplay.evaluation.intervals import Estimate
from pixelplay.outputs.evaluation_report import Judged, judge_without_copies
from pixelplay.outputs.label_issues import SUSPECTS, SuspectReport, find_suspects_in, write_suspects
from pixelplay.outputs.predictions_table import write_predictions
from pixelplay.run_log import Journal
from pixelplay.training.learning_curve import measure_curve
from pixelplay.training.probe_or_finetune import Learned
from pixelplay.training.training_data import Material

METRICS_VERSION = 1


CHOOSERS = {"oof": "train+val, out of fold", "val": "val"}


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """How good a run is, and what that rests on.

    Attributes:
        run_dir: where the run lies.
        metric: the declared one.
        test: figures of the test part, if there is one.
        test_without_copies: the same without test photographs that had a copy in training.
        corrected: part → its figures on the labels as the user has corrected them, where some differ.
        depth: how deep it was trained: "probe", "partial" or "full".
        held_out: figures of the photographs that also chose: out of fold, or of the validation part.
        held_out_part: "oof" or "val".
        baseline: what always guessing the commonest class scores on the headline's part.
        train_counts: class → photographs learned from.
        chosen: setting → its value, and what chose it.
        data: unreadable files, duplicates and what else the data showed.
        notes: what was skipped, assumed or downgraded.
        command: what was typed; None where Python was used.
        suspects: labels that look wrong among the photographs held out.
        calibration: what the temperature does on the test part, which did not choose it; None without one.
        learning_curve: what fewer photographs would have taught a probe; None for a tuned network.
    """

    run_dir: str
    metric: Metric
    test: Evaluation | None
    test_without_copies: Evaluation | None
    corrected: Mapping[str, Evaluation]
    depth: str
    held_out: Evaluation
    held_out_part: str
    baseline: Baseline
    train_counts: Mapping[str, int]
    chosen: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]
    notes: Sequence[str]
    command: str | None
    suspects: SuspectReport
    calibration: Mapping[str, Any] | None
    learning_curve: Mapping[str, Any] | None

    @property
    def measured_on(self) -> str:
        """The part behind the headline: "test"; where there is none, "oof" or "val"."""
        return self.held_out_part if self.test is None else "test"

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
        chooser = CHOOSERS[self.held_out_part]
        parts = {
            "test": self.test,
            "test_without_copies": self.test_without_copies,
            self.held_out_part: self.held_out,
            **{f"{part}_corrected": evaluation for part, evaluation in self.corrected.items()},
        }
        return {
            "format_version": METRICS_VERSION,
            "headline": {
                "metric": self.metric,
                **self.headline.to_json(),
                "chosen_on": chooser,
                "measured_on": self.measured_on,
            },
            "depth": self.depth,
            "baseline": {
                **self.baseline.to_json(),
                "n": self.evaluation.n,
                "chosen_on": "train+val" if self.held_out_part == "oof" or self.is_refitted else "train",
                "measured_on": self.measured_on,
            },
            "chosen": {name: dict(value) for name, value in self.chosen.items()},
            **{
                # the images that chose are measured too: slightly optimistic, and it says so
                name: {"chosen_on": chooser, "measured_on": name, **part.to_json()}
                for name, part in parts.items()
                if part is not None
            },
            "val_is_before_refit": self.is_refitted,
            "calibration": chosen_by(chooser, self.calibration),
            "learning_curve": chosen_by(chooser, self.learning_curve),
            "train_counts": dict(self.train_counts),
            "data": dict(self.data),
            "suspects": self.suspects.summary(),
            "notes": list(self.notes),
        }


def chosen_by(chooser: str, figures: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Figures that say themselves what measured them, with what chose."""
    return None if figures is None else {"chosen_on": chooser, **figures}


def make_report(
    run_dir: str,
    config: TrainConfig,
    material: Material,
    learned: Learned,
    decision: Decision,
    judged: tuple[Judged, Judged | None],
    journal: Journal,
) -> TrainReport:
    """Put together what is known about a run.

    Args:
        judged: the photographs that chose, and the test part if there is one.
    """
    held_out, test = judged
    headline = test or held_out
    calibration = None
    if test is not None:
        probs = test.predictions.probs
        before = uncalibrated(probs, decision.temperature.temperature)
        calibration = compare_reliability(before, probs, material.given[test.positions], "test")
    counts = material.counts_of(learned.learned_from)
    return TrainReport(
        run_dir=run_dir,
        metric=config.metric,
        test=None if test is None else test.evaluation,
        test_without_copies=judge_without_copies(material, test, config.seed),
        corrected={
            name: part.corrected
            for name, part in ((learned.part, held_out), ("test", test))
            if part is not None and part.corrected is not None
        },
        depth=learned.depth,
        held_out=held_out.evaluation,
        held_out_part=learned.part,
        baseline=majority_baseline(counts, material.given[headline.positions], headline.evaluation.classes),
        train_counts={name: int(n) for name, n in zip(material.known_classes, counts, strict=True)},
        chosen={**learned.chosen, **describe_decision(decision, CHOOSERS[learned.part])},
        data={**describe_data(material), "dropped_suspects": list(_paths(material, material.dropped))},
        notes=tuple(journal.notes),
        command=journal.command,
        suspects=find_suspects_in(
            run_dir,
            material,
            {
                name: (part.positions, part.predictions.probs)
                for name, part in ((learned.part, held_out), ("test", test))
                if part is not None
            },
        ),
        calibration=calibration,
        learning_curve=measure_curve(material, learned, decision, config.seed),
    )


def write_records(
    folder: str,
    config: TrainConfig,
    material: Material,
    learned: Learned,
    report: TrainReport,
    judged: tuple[Judged, Judged | None],
) -> None:
    """Write config.json, split.json, history.csv, the tables of each part and, last, metrics.json."""
    held_out, test = judged
    about = {"pixelplay": "train", **describe_origin(material, report.command, config.data.images_dir)}
    write_json({**about, **to_json(config)}, os.path.join(folder, "config.json"))
    write_split(folder, material)
    if learned.history:
        write_history(os.path.join(folder, "history.csv"), learned.history)
    else:  # a plan that came to nothing
        with suppress(FileNotFoundError):
            os.remove(os.path.join(folder, "plan.json"))
    columns: dict[str, Sequence[str]] = {"given": held_out.given}
    if learned.folds is not None:
        fold_of = dict(zip(learned.held_out, learned.folds, strict=True))
        # what a correction leaves out is in no fold
        columns = {"fold": [str(fold_of.get(i, "")) for i in held_out.positions], **columns}
    write_part(os.path.join(folder, f"{learned.part}.csv"), held_out, columns)
    if test is not None:
        write_part(os.path.join(folder, "predictions.csv"), test, {"given": test.given})
    write_suspects(report.suspects.suspects, os.path.join(folder, SUSPECTS))
    write_json(report.to_json(), os.path.join(folder, "metrics.json"))


def describe_origin(material: Material, command: str | None, images_dir: str | None) -> dict[str, str | None]:
    """What was typed, and where the photographs are, for the report to find them again."""
    index = material.index
    if isinstance(index.store, ZipStore):  # a table is in it, and so is the folder that it is about
        source, folder = index.store.archive, images_dir
    else:
        source, folder = index.source, images_dir and os.path.abspath(images_dir)
    return {"command": command, "source": os.path.abspath(source), "images_dir": folder}


def write_split(folder: str, material: Material) -> None:
    """Write split.json: who is in which part."""
    split: dict[str, list[str]] = {
        part: list(_paths(material, getattr(material.parts.split, part))) for part in PARTS
    }
    split["removed"] = list(_paths(material, material.parts.removed))
    split["dropped"] = list(_paths(material, material.dropped))
    split["left_out"] = list(_paths(material, material.left_out))
    write_json(split, os.path.join(folder, "split.json"))


def write_history(path: str, history: Sequence[Mapping[str, float]]) -> None:
    """Write one row for each epoch; the first names the columns."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(history[0])
        for row in history:
            writer.writerow(f"{value:.6g}" if np.isfinite(value) else "" for value in row.values())


def write_part(path: str, judged: Judged, columns: Mapping[str, Sequence[str]]) -> None:
    """Write the predictions of a part beside what was given."""
    write_predictions([judged.predictions], judged.predictions.classes, path, columns)


def describe_decision(decision: Decision, chooser: str) -> dict[str, dict[str, Any]]:
    """T and tau with the evidence for them."""
    temperature, tau = decision.temperature, decision.tau
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


def describe_data(material: Material) -> dict[str, Any]:
    """What the data showed: unreadable files, duplicates, conflicts, copies of test photographs."""
    index = material.index
    return {
        "n_usable": len(index),
        **describe_findings(index, material.errors.values(), material.duplicates),
        "removed_from_training": list(_paths(material, material.parts.removed)),
        "corrections": [
            {
                "path": index.paths[i],
                "given": material.classes[material.given[i]],
                "corrected": material.classes[k] if (k := int(material.corrected[i])) >= 0 else None,
            }
            for i in np.flatnonzero((material.corrected != material.given) | material.reviewed)
        ],
    }


def _paths(material: Material, positions: Sequence[int] | IntArray) -> tuple[str, ...]:
    return tuple(material.index.paths[i] for i in positions)
