"""The report and records of `train`."""

from collections.abc import Mapping, Sequence
from typing import Any

from pixelplay.evaluation.calibration import compare_reliability, remove_temperature
from pixelplay.evaluation.decision_rule import DecisionRule
from pixelplay.evaluation.evaluate import majority_baseline
from pixelplay.outputs import metrics_json
from pixelplay.outputs.evaluation_report import EvaluatedSplit, evaluate_without_duplicates
from pixelplay.outputs.label_issues import collect_label_issues
from pixelplay.outputs.model_card import write_provenance
from pixelplay.training.run_context import RunContext
from pixelplay.training.trained_classifier import TrainedClassifier
from pixelplay.training.training_data import TrainingData


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
) -> metrics_json.RunReport:
    """Build the report of a run.

    Args:
        out_dir: final folder of the run.
        held_out: the images that selected settings.
        learning_curve: None for a fine-tuned network.
        command: the command as typed; None where Python was used.
    """
    split = classifier.held_out_split
    evaluated = {split: held_out} if test is None else {"test": test, split: held_out}
    splits = {name: each.evaluation for name, each in evaluated.items()}
    unique = evaluate_without_duplicates(data, test, ctx.config.seed)
    splits |= {} if unique is None else {"test_without_duplicates": unique}
    splits |= {f"{name}_corrected": e.corrected for name, e in evaluated.items() if e.corrected is not None}
    calibration = None
    if test is not None:
        probs = test.predictions.probs
        before = remove_temperature(probs, rule.temperature)
        calibration = compare_reliability(before, probs, data.original_labels[test.rows], "test")
    checked = {split: (held_out.rows, held_out.predictions.probs)}
    if test is not None:
        checked["test"] = (test.rows, test.predictions.probs)
    headline, counts = test or held_out, data.counts_of(classifier.trained_on)
    return metrics_json.RunReport(
        run_dir=out_dir,
        metric=ctx.config.metric,
        finetune=classifier.finetune,
        splits=splits,
        held_out_split=split,
        baseline=majority_baseline(counts, data.original_labels[headline.rows], headline.evaluation.classes),
        train_counts={name: int(n) for name, n in zip(data.known_classes, counts, strict=True)},
        chosen={
            **ctx.input_evidence,
            **classifier.chosen,
            **metrics_json.describe_rule(rule, metrics_json.SELECTED_ON[split]),
        },
        data={**metrics_json.describe_data(data), "dropped_label_issues": list(data.paths_of(data.dropped))},
        notes=tuple(ctx.log.notes),
        command=command,
        label_issues=collect_label_issues(out_dir, data, checked),
        novelty=metrics_json.describe_novelty(test, data, ctx.config.seed),
        calibration=calibration,
        learning_curve=learning_curve,
    )


def write_train_records(
    report: metrics_json.RunReport,
    classifier: TrainedClassifier,
    held_out: EvaluatedSplit,
    test: EvaluatedSplit | None,
    data: TrainingData,
    ctx: RunContext,
) -> None:
    """Write config.json, split.json, history.csv, the tables of each split and, last, metrics.json."""
    folder = ctx.run_dir
    metrics_json.write_config("train", report, data, ctx)
    others = {"removed": data.split.removed, "dropped": data.dropped, "excluded": data.excluded}
    metrics_json.write_split({**dict(data.split.items()), **others}, data, folder)
    metrics_json.write_history(classifier.history, folder)
    folds: dict[str, Sequence[str]] = {}
    if classifier.folds is not None:
        fold_of = dict(zip(classifier.held_out, classifier.folds, strict=True))
        folds = {"fold": [str(fold_of.get(i, "")) for i in held_out.rows]}  # excluded images are in no fold
    metrics_json.write_table(f"{classifier.held_out_split}.csv", held_out, folder, folds)
    if test is not None:
        metrics_json.write_table("predictions.csv", test, folder)
    write_provenance(report, data, ctx)
    metrics_json.write_metrics(report, folder)
