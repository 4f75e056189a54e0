"""What a cross-validation writes down about itself, beside its model."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelplay.arrays import IntArray
from pixelplay.atomic import write_json
from pixelplay.config import Metric, to_json
from pixelplay.evaluation.calibration import compare_reliability, natural_probs
from pixelplay.evaluation.decision_rule import DecisionRule
from pixelplay.evaluation.evaluate import (
    Baseline,
    Evaluation,
    average_evaluations,
    evaluate_probs,
    majority_baseline,
)
from pixelplay.evaluation.intervals import Estimate
from pixelplay.evaluation.metrics import label_metric
from pixelplay.outputs.evaluation_report import EvaluatedSplit, evaluate_without_duplicates
from pixelplay.outputs.label_issues import (
    LABEL_ISSUES,
    LabelIssueReport,
    collect_label_issues,
    write_label_issues,
)
from pixelplay.outputs.predictions_table import write_oof
from pixelplay.outputs.train_report import (
    METRICS_VERSION,
    chosen_by,
    describe_data,
    describe_decision,
    describe_origin,
    write_history,
    write_part,
)
from pixelplay.training.checkpoint import FoldResult
from pixelplay.training.cross_validation import CrossValidation
from pixelplay.training.run_context import RunContext
from pixelplay.training.trained_classifier import TrainedClassifier
from pixelplay.training.training_data import TrainingData

CHOOSER = "the other folds"


@dataclass(frozen=True, kw_only=True)
class CrossvalReport:
    """How good classifiers are that are learned like this, and what is deployed of them.

    Attributes:
        run_dir: where the run lies.
        metric: the declared one.
        n_folds: in each repeat.
        n_repeats: how often the images were dealt anew.
        oof: figures of all images, each predicted by a classifier, a temperature and a tau that had
            not seen it; with repeats the mean over them, intervals too.
        oof_corrected: the same on the labels as the user has corrected them; None where none differs.
        fold_values: the declared metric in each fold, repeat by repeat.
        finetune: how deep the folds were trained → how many.
        deployed: "ensemble", the mean of all folds' classifiers, or "single", one that learned from all.
        test: figures of the given test part for what is deployed; None where the data gives none.
        test_without_duplicates: the same without test images that had a copy in training.
        test_corrected: on the labels as the user has corrected them; None where none differs.
        baseline: what always guessing the commonest class scores.
        train_counts: class → images that took part.
        folds: what each fold has chosen.
        chosen: how the deployed model decides, and what chose it.
        data: unreadable files, duplicates and what else the data showed.
        notes: what was skipped, assumed or downgraded.
        command: what was typed; None where Python was used.
        suspects: labels that look wrong; with repeats by the mean of their probabilities.
        calibration: what the temperatures do, each on the fold that did not choose it.
    """

    run_dir: str
    metric: Metric
    n_folds: int
    repeats: int
    oof: Evaluation
    oof_corrected: Evaluation | None
    fold_values: tuple[float, ...]
    finetune: Mapping[str, int]
    deployed: str
    test: Evaluation | None
    test_without_duplicates: Evaluation | None
    test_corrected: Evaluation | None
    baseline: Baseline
    train_counts: Mapping[str, int]
    folds: Sequence[Mapping[str, Any]]
    chosen: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]
    notes: Sequence[str]
    command: str | None
    label_issues: LabelIssueReport
    calibration: Mapping[str, Any] | None

    @property
    def evaluation(self) -> Evaluation:
        """The figures behind the headline."""
        return self.oof

    @property
    def headline(self) -> Estimate:
        """The declared metric, out of fold: an estimate of the procedure, not of the deployed model."""
        estimate: Estimate = getattr(self.oof, self.metric)
        return estimate

    @property
    def fold_sd(self) -> float:
        """Standard deviation of the declared metric between folds."""
        return float(np.std(self.fold_values, ddof=1))

    def to_json(self) -> dict[str, Any]:
        """Turn the report into metrics.json: every number with who chose and who measured."""
        by = {"chosen_on": CHOOSER, "measured_on": "oof"}
        by_deployed = {"chosen_on": "oof", "measured_on": "test"}
        more = {
            "oof_corrected": (by, self.oof_corrected),
            "test": (by_deployed, self.test),
            "test_without_duplicates": (by_deployed, self.test_without_duplicates),
            "test_corrected": (by_deployed, self.test_corrected),
        }
        return {
            "format_version": METRICS_VERSION,
            "headline": {"metric": self.metric, **self.headline.to_json(), **by},
            "n_folds": self.n_folds,
            "repeats": self.repeats,
            "finetune": dict(self.finetune),
            "by_fold": {
                "metric": self.metric,
                **by,
                "values": list(self.fold_values),
                "mean": float(np.mean(self.fold_values)),
                "sd": self.fold_sd,
            },
            "baseline": {
                **self.baseline.to_json(),
                "n": self.oof.n,
                "chosen_on": "train+val",
                "measured_on": "oof",
            },
            "oof": {**by, **self.oof.to_json()},
            "deployed": self.deployed,
            "chosen": {name: dict(value) for name, value in self.chosen.items()},
            **{
                name: {**who, **figures.to_json()}
                for name, (who, figures) in more.items()
                if figures is not None
            },
            "folds": [dict(fold) for fold in self.folds],
            "train_counts": dict(self.train_counts),
            "data": dict(self.data),
            "calibration": chosen_by(CHOOSER, self.calibration),
            "label_issues": self.label_issues.summary(),
            "notes": list(self.notes),
        }


def make_crossval_report(
    out_dir: str,
    validation: CrossValidation,
    classifier: TrainedClassifier,
    rule: DecisionRule,
    test: EvaluatedSplit | None,
    data: TrainingData,
    ctx: RunContext,
    command: str | None,
    *,
    single: bool,
) -> CrossvalReport:
    """Collect what is known about a cross-validation.

    Args:
        out_dir: final folder of the run.
        classifier: the deployed classifier.
        rule: its decision rule.
        test: the given test split as the deployed classifier predicts it; None where there is none.
        command: the command as typed; None where Python was used.
        single: whether one classifier is deployed instead of the ensemble.
    """
    config, counts = ctx.config, data.fit_counts
    oof = _evaluate(validation, data, data.given_labels, config.seed)
    is_corrected = bool((data.corrected_labels != data.given_labels)[validation.rows].any())
    held_out = validation.rules[0].pred >= 0
    labels = data.given_labels[validation.rows]
    return CrossvalReport(
        run_dir=out_dir,
        metric=config.metric,
        n_folds=config.n_folds,
        repeats=len(validation.folds),
        oof=oof,
        oof_corrected=_evaluate(validation, data, data.corrected_labels, config.seed)
        if is_corrected
        else None,
        fold_values=tuple(_fold_values(validation, labels, config.metric)),
        finetune=Counter(result.finetune for result in validation.results),
        deployed="single" if single else "ensemble",
        test=None if test is None else test.evaluation,
        test_without_duplicates=evaluate_without_duplicates(data, test, config.seed),
        test_corrected=None if test is None else test.corrected,
        baseline=majority_baseline(counts, labels[held_out], oof.classes),
        train_counts={name: int(n) for name, n in zip(data.known_classes, counts, strict=True)},
        folds=[_describe_fold(result, validation) for result in validation.results],
        chosen={**classifier.chosen, **describe_decision(rule, "oof")},
        data=describe_data(data),
        notes=tuple(ctx.log.notes),
        command=command,
        label_issues=_collect_label_issues(out_dir, data, validation, test),
        calibration=_compare_reliability(validation, labels),
    )


def write_crossval_records(
    report: CrossvalReport,
    validation: CrossValidation,
    classifier: TrainedClassifier,
    test: EvaluatedSplit | None,
    data: TrainingData,
    ctx: RunContext,
) -> None:
    """Write config.json, split.json, history.csv, the tables and logits and, last, metrics.json."""
    folder, config = ctx.run_dir, ctx.config
    about = {"pixelplay": "crossval", "repeats": report.repeats, "deployed": report.deployed}
    origin = describe_origin(data, report.command, config.reading.images_dir)
    write_json({**about, **origin, **to_json(config)}, os.path.join(folder, "config.json"))
    _write_split(folder, data, validation)
    history: list[Mapping[str, float]] = [
        {"repeat": result.repeat, "fold": result.fold, **row}
        for result in validation.results
        for row in result.history
    ]
    # a single classifier is in no fold; an ensemble has no history of its own
    history += [{"repeat": np.nan, "fold": np.nan, **row} for row in classifier.history]
    if history:
        write_history(os.path.join(folder, "history.csv"), history)
    elif os.path.isfile(plan := os.path.join(folder, "plan.json")):
        os.remove(plan)  # it was not carried out
    write_oof(folder, data, validation)
    if test is not None:
        write_part(os.path.join(folder, "predictions.csv"), test, {"given": test.labels})
    write_label_issues(report.label_issues.label_issues, os.path.join(folder, LABEL_ISSUES))
    write_json(report.to_json(), os.path.join(folder, "metrics.json"))


def _write_split(folder: str, data: TrainingData, validation: CrossValidation) -> None:
    """Write split.json: the images of each fold and those outside the folds."""
    folds = {
        f"repeat {result.repeat}, fold {result.fold}": list(data.paths_of(result.rows))
        for result in validation.results
    }
    never = np.setdiff1d(validation.rows[validation.folds[0] < 0], data.excluded)
    others = {
        "never_held_out": never,
        "excluded": data.excluded,
        "test": data.split.test,
        "removed": data.split.removed,
    }
    named = {name: list(data.paths_of(rows)) for name, rows in others.items()}
    write_json({**folds, **named}, os.path.join(folder, "split.json"))


def _evaluate(validation: CrossValidation, data: TrainingData, labels: IntArray, seed: int) -> Evaluation:
    """Average the metrics of all repetitions, each of which measures every image once.

    Args:
        labels: (N,) of all images in the training data; images with -1 are skipped.
    """
    groups, found = data.dataset.groups, []
    for fit in validation.rules:
        kept = (fit.pred >= 0) & (labels[validation.rows] >= 0)
        rows = validation.rows[kept]
        evaluation = evaluate_probs(
            fit.probs[kept],
            fit.pred[kept],
            labels[rows],
            data.classes,
            n_known=data.n_known,
            groups=None if groups is None else groups[rows],
            seed=seed,
        )
        found.append(evaluation)
    return average_evaluations(found)


def _compare_reliability(validation: CrossValidation, labels: IntArray) -> dict[str, Any] | None:
    """Compare calibration in the first repetition; repeated images are no further evidence."""
    held_out = validation.folds[0] >= 0  # excluded images have the deployed temperature
    before = natural_probs(validation.logits[0][held_out], 1.0)
    return compare_reliability(before, validation.rules[0].probs[held_out], labels[held_out], "oof")


def _collect_label_issues(
    run_dir: str, data: TrainingData, validation: CrossValidation, test: EvaluatedSplit | None
) -> LabelIssueReport:
    held_out = validation.rules[0].pred >= 0  # (N,) a class's only image never is
    probs = np.mean([fit.probs[held_out] for fit in validation.rules], axis=0)
    found = {"oof": (validation.rows[held_out], probs)}
    if test is not None:
        found["test"] = (test.rows, test.predictions.probs)
    return collect_label_issues(run_dir, data, found)


def _fold_values(validation: CrossValidation, labels: IntArray, metric: Metric) -> list[float]:
    return [
        label_metric(metric, validation.rules[result.repeat].pred[own], labels[own])
        for result in validation.results
        if (own := validation.folds[result.repeat] == result.fold).any()
    ]


def _describe_fold(result: FoldResult, validation: CrossValidation) -> dict[str, Any]:
    rule = validation.rules[result.repeat].rules.get(result.fold)
    return {
        "repeat": result.repeat,
        "fold": result.fold,
        "n": len(result.rows),
        "finetune": result.finetune,
        "chosen": {**result.chosen, **({} if rule is None else describe_decision(rule, CHOOSER))},
    }
