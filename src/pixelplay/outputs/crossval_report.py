"""The report and records of `crossval`."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from pixelplay.array_types import IntArray
from pixelplay.evaluation.calibration import compare_reliability, temperature_softmax
from pixelplay.evaluation.decision_rule import DecisionRule
from pixelplay.evaluation.evaluate import Evaluation, average_evaluations, majority_baseline
from pixelplay.evaluation.metrics import label_metric
from pixelplay.outputs import metrics_json
from pixelplay.outputs.evaluation_report import EvaluatedSplit, evaluate_without_duplicates, score_rows
from pixelplay.outputs.label_issues import collect_label_issues
from pixelplay.outputs.model_card import write_provenance
from pixelplay.outputs.predictions_table import write_oof
from pixelplay.training.checkpoint import FoldResult
from pixelplay.training.cross_validation import CrossValidation
from pixelplay.training.run_context import RunContext
from pixelplay.training.trained_classifier import TrainedClassifier
from pixelplay.training.training_data import TrainingData


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
) -> metrics_json.RunReport:
    """Build the report of a cross-validation.

    Args:
        out_dir: final folder of the run.
        classifier: the deployed classifier.
        test: evaluation of the deployed classifier on a predefined test split; None if there is none.
        command: the command as typed; None where Python was used.
        single: one classifier is deployed instead of the ensemble.
    """
    config, counts, rows = ctx.config, data.fit_counts, validation.rows
    labels, held_out = data.original_labels[rows], validation.pred[0] >= 0  # a class's only image never is
    splits = {"oof": _evaluate(validation, data, data.original_labels, config.seed)}
    if (data.corrected_labels != data.original_labels)[rows].any():
        splits["oof_corrected"] = _evaluate(validation, data, data.corrected_labels, config.seed)
    on_test = {} if test is None else {"test": test.evaluation, "test_corrected": test.corrected}
    on_test |= {"test_without_duplicates": evaluate_without_duplicates(data, test, config.seed)}
    splits |= {name: each for name, each in on_test.items() if each is not None}
    checked = {"oof": (rows[held_out], np.mean([each[held_out] for each in validation.probs], axis=0))}
    if test is not None:
        checked["test"] = (test.rows, test.predictions.probs)
    # without excluded images, which have the deployed temperature, and repetitions, which add no evidence
    in_fold = validation.folds[0] >= 0
    before = temperature_softmax(validation.logits[0][in_fold], 1.0)
    return metrics_json.RunReport(
        run_dir=out_dir,
        metric=config.metric,
        finetune=Counter(result.finetune for result in validation.results),
        splits=splits,
        held_out_split="oof",
        baseline=majority_baseline(counts, labels[held_out], splits["oof"].classes),
        train_counts={name: int(n) for name, n in zip(data.known_classes, counts, strict=True)},
        chosen={**ctx.input_evidence, **classifier.chosen, **metrics_json.describe_rule(rule, "oof")},
        data=metrics_json.describe_data(data),
        notes=tuple(ctx.log.notes),
        command=command,
        label_issues=collect_label_issues(out_dir, data, checked),
        novelty=metrics_json.describe_novelty(test, data, config.seed),
        calibration=compare_reliability(before, validation.probs[0][in_fold], labels[in_fold], "oof"),
        by_fold=metrics_json.FoldMetrics(
            n_folds=config.n_folds,
            repeats=len(validation.folds),
            values=tuple(
                label_metric(config.metric, validation.pred[result.repeat][own], labels[own])
                for result in validation.results
                if (own := validation.folds[result.repeat] == result.fold).any()
            ),
            deployed="single" if single else "ensemble",
            folds=[_describe_fold(result, validation) for result in validation.results],
        ),
    )


def write_crossval_records(
    report: metrics_json.RunReport,
    validation: CrossValidation,
    classifier: TrainedClassifier,
    test: EvaluatedSplit | None,
    data: TrainingData,
    ctx: RunContext,
) -> None:
    """Write config.json, split.json, history.csv, the tables and logits and, last, metrics.json."""
    assert report.by_fold is not None
    folder, folds = ctx.run_dir, report.by_fold
    metrics_json.write_config("crossval", report, data, ctx, repeats=folds.repeats, deployed=folds.deployed)
    rows = {f"repeat {each.repeat}, fold {each.fold}": each.rows for each in validation.results}
    never = np.setdiff1d(validation.rows[validation.folds[0] < 0], data.excluded)
    others = {"never_held_out": never, "excluded": data.excluded}
    others |= {"test": data.split.test, "removed": data.split.removed}
    metrics_json.write_split({**rows, **others}, data, folder)
    history: list[Mapping[str, float]] = [
        {"repeat": result.repeat, "fold": result.fold, **row}
        for result in validation.results
        for row in result.history
    ]
    # a single classifier is in no fold; an ensemble has no history of its own
    history += [{"repeat": np.nan, "fold": np.nan, **row} for row in classifier.history]
    metrics_json.write_history(history, folder)
    write_oof(folder, data, validation)
    if test is not None:
        metrics_json.write_table("predictions.csv", test, folder)
    write_provenance(report, data, ctx)
    metrics_json.write_metrics(report, folder)


def _evaluate(validation: CrossValidation, data: TrainingData, labels: IntArray, seed: int) -> Evaluation:
    """Average the metrics of all repetitions, each of which measures every image once.

    Args:
        labels: (N,) of all images in the training data; images with -1 are skipped.
    """
    found = []
    for probs, pred in zip(validation.probs, validation.pred, strict=True):
        kept = (pred >= 0) & (labels[validation.rows] >= 0)
        rows = validation.rows[kept]
        found.append(score_rows(data, rows, probs[kept], pred[kept], labels[rows], seed))
    return average_evaluations(found)


def _describe_fold(result: FoldResult, validation: CrossValidation) -> dict[str, Any]:
    rule = validation.rules[result.repeat].get(result.fold)
    by_rule = {} if rule is None else metrics_json.describe_rule(rule, metrics_json.OTHER_FOLDS)
    return {
        "repeat": result.repeat,
        "fold": result.fold,
        "n": len(result.rows),
        "finetune": result.finetune,
        "chosen": {**result.chosen, **by_rule},
    }
