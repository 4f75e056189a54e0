"""Results as text for people and JSON for programs."""

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pixelplay.evaluation.evaluate import Evaluation
from pixelplay.evaluation.intervals import Estimate
from pixelplay.evaluation.metrics import ECE_BINS
from pixelplay.evaluation.selective import OperatingPoint
from pixelplay.text import align, counted, printable

if TYPE_CHECKING:  # they come with torch, which a scan does not need
    from pixelplay.outputs.crossval_report import CrossvalReport
    from pixelplay.outputs.evaluation_report import EvaluationReport, RunComparison
    from pixelplay.outputs.label_issues import LabelIssueReport
    from pixelplay.outputs.train_report import TrainReport
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
from pixelplay.text import SHOWN, name_some

# figure → its name in tables
TITLES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "log_loss": "log-loss",
    "brier": "Brier score",
    "roc_auc": "ROC-AUC",
    "average_precision": "average precision",
}
HEADLINES = ("accuracy", "balanced_accuracy", "macro_f1")
MAX_CLASS_ROWS = 60  # more are hard to read: then only the classes found worst
MAX_CONFUSION = 12
MAX_LABEL_ISSUES = 20
PARTS_IN_WORDS = {"oof": "out of fold", "val": "in the validation part", "test": "in the test part"}


def format_train_report(report: "TrainReport") -> str:
    """The headline with its interval, the baseline, each class, and what to try next."""
    evaluation = report.evaluation
    where = {
        "test": "test part",
        "oof": "out of fold (no test part; slightly optimistic)",
        "val": "validation part (no test part; it also chose, so slightly optimistic)",
    }[report.measured_on]
    lines = [f"{report.finetune}: {where}, {counted(evaluation.n, 'image')}; intervals are 95 %", ""]
    rows = _headline_rows(report)
    lines += align(["", "value", "interval", f"always {report.baseline.name!r}"], rows)
    lines += _legend(rows, "← what decisions are tuned for")
    if report.measured_on == "test" and report.held_out_split == "oof":
        value, interval = _value_and_interval(getattr(report.held_out, report.metric))
        n = counted(report.held_out.n, "image")
        lines += ["", f"out of fold, {n} learned from: {TITLES[report.metric]} {value}  {interval}"]
    lines += ["", *_class_table(evaluation, report.train_counts)]
    lines += _without_copies(report)
    if (corrected := report.corrected.get(report.measured_on)) is not None:
        value, interval = _value_and_interval(corrected.accuracy)
        lines += ["", f"on the labels as you have corrected them: accuracy {value}  {interval}"]
    return "\n".join([*lines, "", *_what_next(report.run_dir, len(report.label_issues.label_issues))])


def format_crossval_report(report: "CrossvalReport") -> str:
    """The headline with its interval, the baseline, the spread of the folds, each class, what is deployed."""
    evaluation = report.evaluation
    n_all = report.n_folds * report.repeats
    finetune = ", ".join(f"{n} {method}" for method, n in report.finetune.items())
    often = "" if report.repeats == 1 else f", each {report.repeats} times"
    lines = [
        f"{n_all} folds ({finetune}): {counted(evaluation.n, 'image')}{often}, "
        "predicted by classifiers that had not seen them; intervals are 95 %",
        "",
    ]
    rows = _headline_rows(report)
    lines += align(["", "value", "interval", f"always {report.baseline.name!r}"], rows)
    lines += _legend(rows, "← what decisions are tuned for")
    low, high = min(report.fold_values), max(report.fold_values)
    lines += [
        "",
        f"{TITLES[report.metric]} of single folds: {low:.3f} to {high:.3f} (sd {report.fold_sd:.3f})",
        "",
        *_class_table(evaluation, report.train_counts),
        "",
    ]
    what = {
        "ensemble": f"the mean of all {n_all} classifiers",
        "single": "one classifier that learned from everything",
    }[report.deployed]
    if report.test is None:
        lines.append(f"deployed: {what}; the figures above are of classifiers like it, not of itself")
    else:
        value, interval = _value_and_interval(getattr(report.test, report.metric))
        n = counted(report.test.n, "image")
        title = TITLES[report.metric]
        lines.append(f"deployed: {what}; on the given test part, {n}: {title} {value}  {interval}")
    lines += _without_copies(report)
    return "\n".join([*lines, "", *_what_next(report.run_dir, len(report.label_issues.label_issues))])


def format_evaluation_report(report: "EvaluationReport") -> str:
    """All figures with intervals, each class, and the confusion matrix."""
    evaluation = report.evaluation
    lines = [f"{report.split}: {counted(evaluation.n, 'image')}; intervals are 95 %", ""]
    columns = {"": evaluation}
    if evaluation.known_only is not None:
        columns["known classes only"] = evaluation.known_only
    if report.unseen is not None:
        columns["not trained on"] = report.unseen
    header = ["", *(cell for name in columns for cell in (name or "value", "interval"))]
    rows = [
        [title, *(cell for e in columns.values() for cell in _value_and_interval(getattr(e, name)))]
        for name, title in TITLES.items()
    ]
    rows.append(
        [f"ECE ({ECE_BINS} bins)", *(cell for e in columns.values() for cell in (f"{e.ece:.3f}", ""))]
    )
    rows.append(["AURC", *(cell for e in columns.values() for cell in (f"{e.aurc:.3f}", ""))])
    lines += [*align(header, rows), *_legend(rows)]
    if evaluation.known_only is not None:
        lines.append(
            "log-loss, Brier score, ROC-AUC and average precision leave unknown classes out everywhere"
        )
    if report.n_trained_on:
        lines.append(f"the tables below include {counted(report.n_trained_on, 'image')} that were trained on")
    lines += ["", *_class_table(evaluation, None)]
    lines += ["", *_confusion_table(evaluation)]
    fair = evaluation if report.unseen is None else report.unseen
    if fair.operating_point is not None:
        where = "" if report.unseen is None else ", without those that were trained on"
        if report.unseen is None and report.n_trained_on:
            where = ", which were trained on"
        lines += ["", _operating_point(fair.operating_point, where)]
    elif evaluation.operating_point is not None:
        lines += ["", "no threshold: all images of the positive class were trained on"]
    if report.against is not None:
        lines += ["", *_comparison(report.against)]
    return "\n".join(lines)


def _comparison(found: "RunComparison") -> list[str]:
    """Both models' figures, how far they are apart, and whether that is shown."""
    first, second = found.runs
    fairest = found.fairest
    where = " that neither model was trained on" if found.unseen else ""
    if found.n_trained_on and not found.unseen:
        where = ", each of which a model was trained on"
    lines = [f"{first} less {second}: {counted(fairest.n, 'image')}{where}"]
    rows = []
    for name, difference in fairest.differences.items():
        values = [f"{value:.3f}" for value in fairest.values[name]]
        doubt = "" if difference.reliable else " ?"
        interval = f"{difference.low:+.3f} to {difference.high:+.3f}{doubt}"
        mark = " ←" if name == found.metric else ""
        title = "log-loss (less is better)" if name == "log_loss" else TITLES[name]
        rows.append([title + mark, *values, f"{difference.value:+.3f}", interval])
    lines += align(["", first, second, "difference", "interval"], rows)
    has_doubt = any(row[-1].endswith("?") for row in rows)
    lines += ["? few images of a class, or few on which they differ: a rough interval"] * has_doubt
    evidence = "" if fairest.p_value is None else f" (McNemar's mid-p = {fairest.p_value:.2g})"
    lines.append(
        f"right by {first} alone: {fairest.n_only_first_right}, by {second} alone: "
        f"{fairest.n_only_second_right}{evidence}"
    )
    difference = fairest.differences[found.metric]
    if difference.low > 0 or difference.high < 0:
        verdict = "is better" if difference.reliable else "seems better, on few images"
        lines.append(f"{TITLES[found.metric]}: {first if difference.low > 0 else second} {verdict}")
    else:
        lines.append(f"{TITLES[found.metric]}: no difference is shown, for its interval holds 0")
    return [printable(line) for line in lines]


def format_label_issues(report: "LabelIssueReport") -> str:
    """The most suspicious labels, and where all of them stand."""
    n_checked = sum(report.n_checked.values())
    where = ", ".join(f"{n:,} {PARTS_IN_WORDS.get(split, split)}" for split, n in report.n_checked.items())
    found = report.label_issues
    share = len(found) / max(n_checked, 1)
    lines = [
        f"{len(found):,} of {n_checked:,} held-out images ({where}) have a label that looks wrong, "
        f"{share:.1%}"
    ]
    if "val" in report.n_checked:
        lines.append("what a tuned network learned from is not checked; pixelplay crossval checks everything")
    rows = [
        [s.path, s.split, s.label, f"{s.prob_label:.2f}", s.proposed, f"{s.prob_proposed:.2f}"]
        for s in found[:MAX_LABEL_ISSUES]
    ]
    if rows:
        lines += ["", *align(["path", "split", "label", "its prob", "looks like", "its prob"], rows)]
    if len(found) > MAX_LABEL_ISSUES:
        lines.append(f"… and {len(found) - MAX_LABEL_ISSUES} more")
    table = os.path.join(report.run_dir, "label_issues.csv")
    return "\n".join([*lines, "", f"all of them, with reasons, are in {printable(table)}"])


def _operating_point(point: OperatingPoint, where: str) -> str:
    if point.threshold is None:
        return (
            f"precision {point.asked_precision} for {point.positive!r} is not reached{where}; "
            f"the highest is {point.highest_precision:.3f}"
        )
    precision, recall = (" ".join(_value_and_interval(e)) for e in (point.precision, point.recall))
    return (
        f"{point.positive!r} at probability ≥ {point.threshold:.4f}: precision {precision}, "
        f"recall {recall} (threshold chosen on these images{where})"
    )


def _legend(rows: Sequence[Sequence[str]], *also: str) -> list[str]:
    """Say what the signs in a table of figures mean, where they occur."""
    has_doubt = any(cell.endswith(" ?") for row in rows for cell in row)
    signs = [*also, *(["? a class has few images: a rough interval"] if has_doubt else [])]
    return ["   ".join(signs)] if signs else []


def _class_table(evaluation: Evaluation, train_counts: Any) -> list[str]:
    rows, shown = [], list(evaluation.per_class)
    if len(shown) > MAX_CLASS_ROWS:
        measured = [scores for scores in shown if scores.recall is not None]
        shown = sorted(measured, key=lambda scores: scores.recall.value)[:MAX_CLASS_ROWS]  # type: ignore[union-attr]
    for scores in shown:
        known = [] if train_counts is None else [str(train_counts.get(scores.name, 0))]
        precision = "–" if scores.precision is None else f"{scores.precision.value:.3f}"
        f1 = "–" if scores.f1 is None else f"{scores.f1.value:.3f}"
        rows.append([scores.name, *known, str(scores.n), *_value_and_interval(scores.recall), precision, f1])
    header = [
        "class",
        *([] if train_counts is None else ["learned"]),
        "n",
        "recall",
        "interval",
        "precision",
        "F1",
    ]
    rest = len(evaluation.per_class) - len(shown)
    more = [f"… and {rest} more; these have the lowest recall (--json lists all)"] if rest else []
    return [*align(header, rows), *more]


def _confusion_table(evaluation: Evaluation) -> list[str]:
    names = list(evaluation.classes)
    if len(names) > MAX_CONFUSION:
        return [f"confusion matrix of {len(names)} classes: see --json"]
    rows = [[name, *map(str, row)] for name, row in zip(names, evaluation.confusion, strict=True)]
    short = [name[:9] for name in names]
    columns = short if len(set(short)) == len(names) else names
    return ["rows are given labels, columns decisions", *align(["", *columns], rows)]


def _value_and_interval(estimate: Estimate | None) -> tuple[str, str]:
    if estimate is None:
        return "–", ""
    doubt = "" if estimate.reliable else " ?"
    return f"{estimate.value:.3f}", f"{estimate.low:.3f}–{estimate.high:.3f}{doubt}"


def _headline_rows(report: "TrainReport | CrossvalReport") -> list[list[str]]:
    rows = [
        [TITLES[name], *_value_and_interval(getattr(report.evaluation, name)), _baseline(report, name)]
        for name in HEADLINES
    ]
    rows[HEADLINES.index(report.metric)][0] += " ←"
    return rows


def _what_next(run_dir: str, n_label_issues: int) -> list[str]:
    run = shlex.quote(run_dir)
    explained = f"{counted(n_label_issues, 'label')} that {'looks' if n_label_issues == 1 else 'look'} wrong"
    return [
        f"model and records are in {run_dir}; try next:",
        f"  pixelplay predict {run} PHOTOS --out predictions.csv",
        f"  pixelplay evaluate {run} LABELLED_PHOTOS",
        *([f"  pixelplay label-issues {run}   ({explained})"] if n_label_issues else []),
    ]


def _without_copies(report: "TrainReport | CrossvalReport") -> list[str]:
    if report.test_without_duplicates is None:
        return []
    value, interval = _value_and_interval(report.test_without_duplicates.accuracy)
    return ["", f"without test images that had a copy in training: accuracy {value}  {interval}"]


def _baseline(report: "TrainReport | CrossvalReport", name: str) -> str:
    value = getattr(report.baseline, name)
    return f"{value.value if isinstance(value, Estimate) else value:.3f}"


SETS = {  # finding → its title
    "duplicates": "duplicates",
    "near_duplicates": "near duplicates",
    "look_alikes": "look-alikes in sets too large for copies",
    "conflicts": "conflicts",
    "leaks": "leaks",
}


def scan_to_json(dataset: ImageDataset, audit: Audit) -> dict[str, Any]:
    """Everything that scan found, each finding with its files."""
    counts = dataset.class_counts()
    formats, smallest, largest = summarize_formats(audit)
    coverage = find_coverage(dataset)
    return {
        "source": dataset.source,
        "n": len(dataset),
        "n_unlabelled": int((dataset.labels < 0).sum()),
        "classes": {name: int(n) for name, n in zip(dataset.classes, counts, strict=True)},
        "parts": {
            split: int(dataset.in_split(split).sum())
            for split in ("train", "val", "test")
            if dataset.in_split(split).any()
        },
        "imbalance_ratio": imbalance_ratio(counts),
        "formats": dict(formats.most_common()),
        "smallest_px": smallest,
        "largest_px": largest,
        **describe_findings(dataset, audit.errors.values(), audit.duplicates),
        "leaks": [describe_set(dataset, members) for members in audit.duplicates.leaks],
        "expected_without_images": list(coverage.absent),
        "expected_with_few_images": dict(coverage.few),
        "reachable_accuracy": coverage.reachable,
        "test_share_with_few_images": coverage.in_few,
        "notes": list(dataset.notes),
    }


def format_scan(dataset: ImageDataset, audit: Audit) -> str:
    """What scan found, for reading."""
    found = scan_to_json(dataset, audit)
    lines = [f"{printable(dataset.source)}: {counted(found['n'], 'image')}, {len(dataset.classes)} classes"]
    if found["n_unlabelled"]:
        lines.append(f"  {found['n_unlabelled']:,} without a label")
    lines += align(
        ["class", "n", "share"],
        [
            [name, f"{n:,}", f"{n / max(sum(found['classes'].values()), 1):.1%}"]
            for name, n in found["classes"].items()
        ],
    )
    lines += ["", f"imbalance  {found['imbalance_ratio']:.1f} : 1"]
    if found["parts"]:
        lines.append("parts      " + ", ".join(f"{split} {n:,}" for split, n in found["parts"].items()))
    if found["formats"]:
        lines.append("formats    " + ", ".join(f"{name} {n:,}" for name, n in found["formats"].items()))
        sizes = [f"{width} × {height}" for width, height in (found["smallest_px"], found["largest_px"])]
        lines.append(f"sizes      {' to '.join(dict.fromkeys(sizes))} px")
    lines += _expectations(found)
    lines += _findings("unreadable", [f"{e['path']}: {e['reason']}" for e in found["unreadable"]])
    for name, title in SETS.items():
        lines += _findings(title, [" = ".join(_name(member, name) for member in s) for s in found[name]])
    if not any(found[name] for name in ("unreadable", *SETS)):
        lines.append("nothing wrong was found with the files")
    return "\n".join(lines)


def _expectations(found: Mapping[str, Any]) -> list[str]:
    """Expected classes that have no or too few images."""
    lines = []
    if absent := found["expected_without_images"]:
        bound = found["reachable_accuracy"]
        lines.append(
            f"absent     {len(absent)} expected classes have no image: {printable(name_some(absent))}"
            + ("" if bound is None else f"; accuracy cannot pass {bound:.1%}")
        )
    if few := found["expected_with_few_images"]:
        share = found["test_share_with_few_images"]
        named = printable(name_some([f"{name} ({n})" for name, n in few.items()]))
        lines.append(
            f"few        expected classes with fewer than {FEW_IMAGES} images: {named}"
            + ("" if share is None else f"; they are {share:.1%} of the test images")
        )
    return lines


def _findings(name: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    more = [f"  … and {len(items) - SHOWN} more (--json lists all)"] if len(items) > SHOWN else []
    return [f"{name}: {len(items)}", *(f"  {printable(item)}" for item in items[:SHOWN]), *more]


def _name(member: dict[str, Any], finding: str) -> str:
    return f"{member['path']} ({member['label']})" if finding == "conflicts" else str(member["path"])
