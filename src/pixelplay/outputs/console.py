"""Results as text for people, and scan results as JSON for programs."""

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pixelplay.config import SPLITS
from pixelplay.data.audit import (
    FEW_IMAGES,
    Audit,
    describe_findings,
    describe_set,
    find_coverage,
    summarize_formats,
)
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sampling import imbalance_ratio
from pixelplay.evaluation.evaluate import Evaluation
from pixelplay.evaluation.intervals import Estimate
from pixelplay.evaluation.metrics import ECE_BINS
from pixelplay.text import EXAMPLES, align, counted, name_some, percent, printable

if TYPE_CHECKING:  # these import torch, which a scan does not need
    from pixelplay.outputs.evaluation_report import EvaluationReport, RunComparison
    from pixelplay.outputs.label_issues import LabelIssueReport
    from pixelplay.outputs.metrics_json import RunReport

METRIC_TITLES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "log_loss": "log loss",
    "brier": "Brier score",
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
}
HEADLINE_METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
SPLIT_TITLES = {
    "all": "All images",
    "train": "Training split",
    "val": "Validation split",
    "test": "Test split",
    "oof": "Out of fold",
}
METHOD_TITLES = {"none": "linear probe", "partial": "partial fine-tuning", "full": "full fine-tuning"}
MAX_CLASS_ROWS = 60  # with more classes, only those of the lowest recall
MAX_CONFUSION = 12
MAX_LABEL_ISSUES = 20
TITLE_WIDTH = 18


def format_run_report(report: "RunReport", *, verbose: bool = False, report_path: str | None = None) -> str:
    """Format the summary that `train` and `crossval` print; `verbose` adds the table of all classes."""
    if report.by_fold is not None:
        return _format_crossval(report, verbose=verbose, report_path=report_path)
    assert isinstance(report.finetune, str)
    split, warnings = report.measured_on, []
    trained_on = counted(sum(report.train_counts.values()), "image")
    sections = {"Model": [f"{METHOD_TITLES[report.finetune]}, trained on {trained_on}"]}
    if split != "test":
        selected = {"oof": "the out-of-fold predictions", "val": "the validation split"}[split]
        warnings.append(f"no test split; {selected} also selected settings, so metrics are optimistic")
    elif report.held_out_split == "oof":
        sections["Model"].append(f"out of fold: {_describe_metric(report.held_out, report.metric)}")
    if (corrected := report.splits.get(f"{split}_corrected")) is not None:
        sections["Corrected labels"] = [_describe_metric(corrected, "accuracy")]
    title = f"{SPLIT_TITLES[split]} ({counted(report.evaluation.n, 'image')})"
    return _format_run(report, title, sections, warnings, verbose=verbose, report_path=report_path)


def _format_crossval(report: "RunReport", *, verbose: bool, report_path: str | None) -> str:
    assert report.by_fold is not None
    assert not isinstance(report.finetune, str)
    folds = report.by_fold
    repeated = "" if folds.repeats == 1 else f", repeated {folds.repeats} times"
    title = f"{folds.n_folds}-fold cross-validation{repeated} ({counted(report.evaluation.n, 'image')})"
    methods = ", ".join(f"{n} × {METHOD_TITLES[method]}" for method, n in report.finetune.items())
    low, high = min(folds.values), max(folds.values)
    spread = f"{METRIC_TITLES[report.metric]} {low:.3f}–{high:.3f} (sd {folds.sd:.3f})"
    deployed = "one model trained on all images"
    if folds.deployed == "ensemble":
        deployed = f"mean of the {folds.n_folds * folds.repeats} fold models"
    tested = "not evaluated itself; the metrics above are those of models trained like it"
    if report.test is not None:
        tested = f"test split: {_describe_metric(report.test, report.metric)}"
    sections = {"Folds": [methods, spread], "Deployed": [deployed, tested]}
    return _format_run(report, title, sections, [], verbose=verbose, report_path=report_path)


def _format_run(
    report: "RunReport",
    title: str,
    sections: Mapping[str, Sequence[str]],
    warnings: list[str],
    *,
    verbose: bool,
    report_path: str | None,
) -> str:
    """Put the headline first, then the sections, the weakest classes, warnings and the next commands."""
    evaluation, baseline = report.evaluation, report.baseline
    rows = [
        [
            _title(name, report.metric) + describe_average(evaluation, name),
            *_format_estimate(getattr(evaluation, name)),
            f"{value['value'] if isinstance(value := baseline[name], dict) else value:.3f}",
        ]
        for name in HEADLINE_METRICS
    ]
    unique = report.splits.get("test_without_duplicates")
    if report.test is not None and unique is not None:
        n_duplicated = counted(report.test.n - unique.n, "test image")
        fair = _describe_metric(unique, "accuracy")
        warnings.append(f"duplicates of {n_duplicated} removed from training; without these images: {fair}")
    run = shlex.quote(report.run_dir)
    commands = [f"pixelplay predict {run} NEW_IMAGES --out predictions.csv"]
    if n_issues := len(report.label_issues.label_issues):
        issues = f"{counted(n_issues, 'label')} that {'looks' if n_issues == 1 else 'look'} wrong"
        commands.append(f"pixelplay label-issues {run}   ({issues})")
    results = {
        **sections,
        "Weakest classes": _describe_weakest(evaluation),
        "Warnings": [*warnings, *_warn_rough(rows)],
    }
    outputs = {"Run": [report.run_dir], "Report": [report_path] if report_path else [], "Next": commands}
    return _join_blocks(
        align([title, "value", "95 % CI", f"majority class {baseline['class']!r}"], rows),
        _class_table(evaluation, report.train_counts) if verbose else [],
        _format_sections(results),
        _format_sections(outputs),
    )


def format_evaluation_report(report: "EvaluationReport", *, verbose: bool = False) -> str:
    """Format all metrics with intervals, the weakest classes and the comparison with another run.

    `verbose` adds the table of all classes and the confusion matrix.
    """
    evaluation, warnings = report.evaluation, []
    images = counted(evaluation.n, "image")
    columns = {"value": evaluation}
    if evaluation.known_only is not None:
        columns["known classes only"] = evaluation.known_only
        warnings.append("log loss, Brier score, ROC AUC and average precision ignore unknown classes")
    if report.n_trained_on:
        warnings.append(f"{report.n_trained_on:,} of {images} were trained on, so metrics are optimistic")
    if report.unseen is not None:
        columns["not trained on"] = report.unseen
        warnings.append("'not trained on' excludes these images, the results per class include them")
    titles = {**METRIC_TITLES, "ece": f"ECE ({ECE_BINS} bins)", "aurc": "AURC"}
    rows = [
        [
            f"  {title}{describe_average(evaluation, name)}",
            *(cell for e in columns.values() for cell in _format_estimate(getattr(e, name))),
        ]
        for name, title in titles.items()
    ]
    header = [f"{SPLIT_TITLES[report.split]} ({images})"]
    header += [cell for name in columns for cell in (name, "95 % CI")]
    results = {
        "Weakest classes": _describe_weakest(evaluation),
        "Threshold": _describe_threshold(report),
        "Warnings": [*warnings, *_warn_rough(rows)],
    }
    return _join_blocks(
        align(header, rows),
        _format_sections(results),
        *((_class_table(evaluation, None), _confusion_table(evaluation)) if verbose else ()),
        *(() if report.against is None else _compare(report.against)),
    )


def _describe_threshold(report: "EvaluationReport") -> list[str]:
    """Describe the operating point, measured without images that were trained on if there are others."""
    fair = report.evaluation if report.unseen is None else report.unseen
    if (point := fair.operating_point) is None:
        is_missing = report.evaluation.operating_point is not None
        return ["none: the model was trained on all images of the positive class"] * is_missing
    where = "these images"
    if report.unseen is not None:
        where += ", excluding those trained on"
    elif report.n_trained_on:
        where += ", which the model was trained on"
    if point.threshold is None or point.precision is None:
        return [
            f"precision {point.target_precision} for {point.positive!r} is not reached on {where}; "
            f"the highest is {point.highest_precision:.3f}"
        ]
    return [
        f"{point.positive!r} at probability ≥ {point.threshold:.4f}: precision {_inline(point.precision)}, "
        f"recall {_inline(point.recall)} (threshold chosen on {where})"
    ]


def _compare(comparison: "RunComparison") -> tuple[list[str], list[str]]:
    """Show the metrics of both runs, their differences, and the images that only one run gets right."""
    first, second = comparison.runs
    paired = comparison.fairest
    rows, significances, warnings = [], [""], []
    for name, difference in paired.differences.items():
        values = (f"{value:.3f}" for value in paired.values[name])
        rough = "" if difference.reliable else " ?"
        interval = f"({difference.low:+.3f} to {difference.high:+.3f})"
        rows.append([_title(name, comparison.metric), *values, f"{difference.value:+.3f} {interval}{rough}"])
        significance = "not significant"
        if not difference.low <= 0 <= difference.high:
            # the higher value is better, except for the log loss
            better = comparison.runs[(difference.low > 0) == (name == "log_loss")]
            significance = f"{better} {'is better' if difference.reliable else 'seems better, on few images'}"
        if name == "accuracy" and paired.p_value is not None:
            significance += f" (McNemar p = {paired.p_value:.2g})"
        significances.append(significance)
    images = f"{counted(paired.n, 'image')}{' unseen by both' if comparison.unseen else ''}"
    header = [f"Comparison ({images})", first, second, "difference (95 % CI)"]
    table = zip(align(header, rows), significances, strict=True)
    n_first, n_second = paired.n_only_first_right, paired.n_only_second_right
    only_right = f"only {first} is right on {counted(n_first, 'image')}, only {second} on {n_second:,}"
    if comparison.n_trained_on and not comparison.unseen:
        warnings.append("every image was used to train at least one of the runs")
    if any(row[-1].endswith("?") for row in rows):
        warnings.append("? rough interval: few images of a class, or few on which the runs differ")
    notes = _format_sections({"Disagreements": [only_right], "Warnings": warnings})
    return [f"{line}   {printable(text)}".rstrip() for line, text in table], notes


def format_label_issues(report: "LabelIssueReport") -> str:
    """Format the most suspicious labels and where to find all of them."""
    n_checked, found = sum(report.n_checked.values()), report.label_issues
    share = percent(len(found) / max(n_checked, 1))
    splits = ", ".join(f"{SPLIT_TITLES[split].lower()} {n:,}" for split, n in report.n_checked.items())
    summary = [
        f"{len(found):,} of {n_checked:,} held-out images have a label that looks wrong ({share}): {splits}"
    ]
    if "val" in report.n_checked:
        summary.append("images used for fine-tuning are not checked; pixelplay crossval checks all images")
    rows = [
        [s.path, s.split, s.label, f"{s.prob_label:.2f}", s.suggested, f"{s.prob_suggested:.2f}"]
        for s in found[:MAX_LABEL_ISSUES]
    ]
    table = (
        align(["path", "split", "label", "prob_label", "suggested", "prob_suggested"], rows) if rows else []
    )
    if len(found) > MAX_LABEL_ISSUES:
        table.append(f"… {len(found) - MAX_LABEL_ISSUES:,} more")
    path = printable(os.path.join(report.run_dir, "label_issues.csv"))
    command = (
        f"pixelplay label-issues {shlex.quote(report.run_dir)} --relabel CORRECTIONS --out corrected.csv"
    )
    outputs = [f"All of them, with reasons: {path}", f"All images with corrected labels: {command}"]
    return _join_blocks(summary, table, outputs)


def scan_to_json(dataset: ImageDataset, audit: Audit) -> dict[str, Any]:
    """Return everything that a scan found as plain values, each problem with all its files."""
    counts = dataset.class_counts()
    formats, smallest, largest = summarize_formats(audit)
    coverage = find_coverage(dataset)
    return {
        "source": dataset.source,
        "n": len(dataset),
        "n_unlabelled": int((dataset.labels < 0).sum()),
        "classes": {name: int(n) for name, n in zip(dataset.classes, counts, strict=True)},
        "splits": {name: int(where.sum()) for name, where in _predefined_splits(dataset).items()},
        "imbalance_ratio": imbalance_ratio(counts),
        "formats": dict(formats.most_common()),
        "smallest_px": smallest,
        "largest_px": largest,
        **describe_findings(dataset, audit.errors.values(), audit.duplicates),
        "leaks": [describe_set(dataset, members) for members in audit.duplicates.leaks],
        "expected_without_images": list(coverage.absent),
        "expected_with_few_images": dict(coverage.few),
        "reachable_accuracy": coverage.max_accuracy,
        "test_share_with_few_images": coverage.few_share,
        "notes": list(dataset.notes),
    }


def format_scan(dataset: ImageDataset, audit: Audit, *, near_duplicates: bool = False) -> str:
    """Format what a scan found, which includes `near_duplicates` only on request."""
    splits = _predefined_splits(dataset)
    title = f"{printable(dataset.source)}: {counted(len(dataset), 'image')}, {len(dataset.classes)} classes"
    if splits:
        title += (
            f", predefined splits ({' · '.join(f'{name} {where.sum():,}' for name, where in splits.items())})"
        )
    if n_unlabelled := int((dataset.labels < 0).sum()):
        title += f", {n_unlabelled:,} without a label"
    if splits and (dataset.splits < 0).any():
        splits["no split"] = dataset.splits < 0
    columns = {name: dataset.class_counts(where) for name, where in splits.items()}
    columns = columns or {"images": dataset.class_counts()}
    rows = [
        [name, *(f"{n:,}" for n in counts)]
        for name, *counts in zip(dataset.classes, *columns.values(), strict=True)
    ]
    summary = [f"imbalance {imbalance_ratio(dataset.class_counts()):.1f} : 1"]
    formats, smallest, largest = summarize_formats(audit)
    if smallest is not None and largest is not None:
        summary.append(", ".join(f"{name} {n:,}" for name, n in formats.most_common()))
        sizes = [f"{width}×{height}" for width, height in (smallest, largest)]
        summary.append(f"{' to '.join(dict.fromkeys(sizes))} px")
    problems = [*_describe_coverage(dataset), *_describe_problems(dataset, audit)]
    end = ["Problems", *(f"  {line}" for line in problems)] if problems else ["No problems found."]
    if not near_duplicates:
        end.append("Near-duplicates were not searched; add --near-duplicates.")
    return _join_blocks([title], [*align(["class", *columns], rows), " · ".join(summary)], end)


def _predefined_splits(dataset: ImageDataset) -> dict[str, Any]:
    """Map each predefined split to its mask (N,)."""
    masks = {name: dataset.in_split(name) for name in SPLITS}
    return {name: where for name, where in masks.items() if where.any()}


def _describe_coverage(dataset: ImageDataset) -> list[str]:
    """Name expected classes that have no or too few images."""
    coverage, lines = find_coverage(dataset), []
    if absent := coverage.absent:
        bound = coverage.max_accuracy
        effect = "" if bound is None else f"; accuracy cannot exceed {percent(bound)}"
        lines.append(f"expected classes without images ({len(absent)}): {_name_examples(absent)}{effect}")
    if few := [f"{name} ({n})" for name, n in coverage.few.items()]:
        share = coverage.few_share
        effect = "" if share is None else f"; they are {percent(share)} of the test images"
        title = f"expected classes with fewer than {FEW_IMAGES} images ({len(few)})"
        lines.append(f"{title}: {_name_examples(few)}{effect}")
    return lines


def _describe_problems(dataset: ImageDataset, audit: Audit) -> list[str]:
    """Count the problems of each kind, with up to three examples."""
    duplicates = audit.duplicates
    problems = {
        "unreadable images": [f"{error.path}: {error.reason}" for error in audit.errors.values()],
        "sets of exact duplicates": _name_sets(dataset, duplicates.sets),
        "sets of near-duplicates": _name_sets(dataset, duplicates.near),
        "sets of similar images, too large to be duplicates": _name_sets(dataset, duplicates.large),
        "sets of duplicates with different labels": _name_sets(dataset, duplicates.conflicts, labels=True),
        "sets of duplicates across splits": _name_sets(dataset, duplicates.leaks),
    }
    lines = []
    for title, items in problems.items():
        if items:
            lines += [f"{title}: {len(items):,}", *(f"   {printable(item)}" for item in items[:EXAMPLES])]
        if len(items) > EXAMPLES:
            lines.append(f"   … {len(items) - EXAMPLES:,} more (--json lists all)")
    return lines


def _name_sets(dataset: ImageDataset, sets: Sequence[Sequence[int]], *, labels: bool = False) -> list[str]:
    """Join the paths of each set by equals signs, at most three per set."""
    names = []
    for members in sets:
        images = describe_set(dataset, members[:EXAMPLES])
        shown = [f"{image['path']} ({image['label']})" if labels else str(image["path"]) for image in images]
        names.append(" = ".join(shown + ["…"] * (len(members) > EXAMPLES)))
    return names


def _name_examples(names: Sequence[str]) -> str:
    return printable(name_some(names, EXAMPLES))


def _title(name: str, selected: str) -> str:
    """Title the row of a metric and mark the selection metric."""
    direction = " (lower is better)" if name == "log_loss" else ""
    return f"  {METRIC_TITLES[name]}{direction}{' (selection metric)' if name == selected else ''}"


def describe_average(evaluation: Evaluation, name: str) -> str:
    """Return " (over 1 of 2 classes)" for a macro average that lacks classes without images, else ""."""
    averaged, n = getattr(getattr(evaluation, name, None), "n_classes", None), len(evaluation.classes)
    return "" if averaged in (None, n) else f" (over {averaged} of {n} classes)"


def _join_blocks(*blocks: Sequence[str]) -> str:
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _format_sections(sections: Mapping[str, Sequence[str]]) -> list[str]:
    """Put each title in front of its first item, one item per line; a section without items is not shown."""
    return [
        f"{'' if i else title:<{TITLE_WIDTH}}{printable(item)}"
        for title, items in sections.items()
        for i, item in enumerate(items)
    ]


def _format_estimate(estimate: Estimate | float | None) -> tuple[str, str]:
    """Return the cells of a value and its interval; a question mark means that the interval is rough."""
    if not isinstance(estimate, Estimate):
        return "–" if estimate is None else f"{estimate:.3f}", ""
    rough = "" if estimate.reliable else " ?"
    return f"{estimate.value:.3f}", f"{estimate.low:.3f}–{estimate.high:.3f}{rough}"


def _inline(estimate: Estimate) -> str:
    return "{} ({})".format(*_format_estimate(estimate))


def _describe_metric(evaluation: Evaluation, name: str) -> str:
    return f"{METRIC_TITLES[name]} {_inline(getattr(evaluation, name))} on {counted(evaluation.n, 'image')}"


def _warn_rough(rows: Sequence[Sequence[str]]) -> list[str]:
    """Explain the question marks in a table of metrics, if there are any."""
    is_rough = any(cell.endswith(" ?") for row in rows for cell in row)
    return ["? rough interval: a class has few images"] if is_rough else []


def _describe_weakest(evaluation: Evaluation) -> list[str]:
    """Describe up to three classes of the lowest recall, unless all their images are right."""
    weak = [
        (scores.recall.value, k)
        for k, scores in enumerate(evaluation.per_class)
        if scores.recall is not None and scores.recall.value < 1
    ]
    names, lines = evaluation.classes, []
    for recall, k in sorted(weak)[:EXAMPLES]:
        row = evaluation.confusion[k]  # (K,) predictions for images of the class
        other = max((j for j in range(len(row)) if j != k), key=row.__getitem__)
        confused = (
            f", confused with {names[other]}" if row[other] else ""
        )  # none: wrong in other repeats only
        lines.append(f"{names[k]}: recall {recall:.2f} ({row[k]}/{row.sum()}){confused}")
    return lines


def _class_table(evaluation: Evaluation, train_counts: Mapping[str, int] | None) -> list[str]:
    """Tabulate the classes, or those of the lowest recall if there are many."""
    shown = list(evaluation.per_class)
    if len(shown) > MAX_CLASS_ROWS:
        measured = [scores for scores in shown if scores.recall is not None]
        shown = sorted(measured, key=lambda scores: scores.recall.value)[:MAX_CLASS_ROWS]  # type: ignore[union-attr]
    rows = []
    for scores in shown:
        trained = [] if train_counts is None else [str(train_counts.get(scores.name, 0))]
        precision, f1 = (_format_estimate(estimate)[0] for estimate in (scores.precision, scores.f1))
        rows.append([scores.name, *trained, str(scores.n), *_format_estimate(scores.recall), precision, f1])
    trained = [] if train_counts is None else ["trained"]
    header = ["class", *trained, "n", "recall", "95 % CI", "precision", "F1"]
    rest = len(evaluation.per_class) - len(shown)
    more = [f"… {rest} more; these have the lowest recall (--json lists all)"] if rest else []
    return [*align(header, rows), *more]


def _confusion_table(evaluation: Evaluation) -> list[str]:
    names = list(evaluation.classes)
    if len(names) > MAX_CONFUSION:
        return [f"Confusion matrix of {len(names)} classes: see --json"]
    rows = [[name, *map(str, row)] for name, row in zip(names, evaluation.confusion, strict=True)]
    short = [name[:9] for name in names]
    columns = short if len(set(short)) == len(names) else names
    return ["Confusion matrix: rows are labels, columns are predictions", *align(["", *columns], rows)]
