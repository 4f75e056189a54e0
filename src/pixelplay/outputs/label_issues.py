"""Label issues of a run: collect them from held-out images, write and read label_issues.csv."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from pixelplay.array_types import Float64Array, IntArray
from pixelplay.atomic import write_bytes
from pixelplay.data.tables import csv_writer, escape_label, escape_path, unescape_label, unescape_path
from pixelplay.errors import BundleError
from pixelplay.evaluation.label_issues import find_label_issues
from pixelplay.training.training_data import TrainingData

LABEL_ISSUES = "label_issues.csv"


@dataclass(frozen=True, kw_only=True)
class LabelIssue:
    """An image whose label looks wrong: a row of label_issues.csv.

    Attributes:
        split: where the image was held out: "oof", "val" or "test".
        suggested: the class it looks like.
        score: label quality in [0, 1]; low means suspicious.
        prob_label: probability of `label`.
        reason: the evidence, for people.
    """

    path: str
    split: str
    label: str
    suggested: str
    score: float
    prob_label: float
    prob_suggested: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class LabelIssueReport:
    """All label issues of a run.

    Attributes:
        label_issues: the most suspicious first.
        n_checked: split → number of held-out images whose labels were checked.
    """

    run_dir: str
    label_issues: tuple[LabelIssue, ...]
    n_checked: Mapping[str, int]

    def summary(self) -> dict[str, Any]:
        """Return the counts for metrics.json."""
        return {"n": len(self.label_issues), "n_checked": dict(self.n_checked)}

    def to_json(self) -> dict[str, Any]:
        """Return the counts and every label issue as plain values."""
        return {**self.summary(), "label_issues": [asdict(issue) for issue in self.label_issues]}


def collect_label_issues(
    run_dir: str, data: TrainingData, held_out: Mapping[str, tuple[IntArray, Float64Array]]
) -> LabelIssueReport:
    """Collect the label issues among held-out images, the most suspicious first.

    Besides labels that the probabilities contradict, identical files with different labels are listed.
    Images of classes that the model does not know are not checked, nor are images that the user has
    reviewed.

    Args:
        held_out: split → positions (n,) in `data`, and probabilities (n, K) from a model not trained on them.
    """
    splits = np.repeat(list(held_out), [len(rows) for rows, _ in held_out.values()])  # (N,)
    positions, probs = (np.concatenate(arrays) for arrays in zip(*held_out.values(), strict=True))
    labels = data.corrected_labels[positions]
    keep = (labels >= 0) & (labels < data.n_known) & ~data.reviewed[positions]
    splits, positions, probs, labels = splits[keep], positions[keep], probs[keep], labels[keep]
    scores, best_other, issue_mask = find_label_issues(probs, labels)
    duplicates = _find_conflicting_duplicates(data)
    issues = []
    for row in np.argsort(scores, kind="stable"):
        label, suggested, is_issue = int(labels[row]), int(best_other[row]), bool(issue_mask[row])
        reasons = []
        if is_issue:
            name, other_name = data.classes[label], data.classes[suggested]
            reasons.append(
                f"{probs[row, suggested]:.2f} for {other_name!r}, {probs[row, label]:.2f} for {name!r}"
            )
        if (duplicate := duplicates.get(int(positions[row]))) is not None:
            other = int(data.corrected_labels[duplicate])
            reasons.append(f"same file as {data.dataset.paths[duplicate]}, labelled {data.classes[other]!r}")
            if not is_issue and other < data.n_known:
                suggested = other
        if reasons:
            issue = LabelIssue(
                path=data.dataset.paths[positions[row]],
                split=str(splits[row]),
                label=data.classes[label],
                suggested=data.classes[suggested],
                score=float(scores[row]),
                prob_label=float(probs[row, label]),
                prob_suggested=float(probs[row, suggested]),
                reason="; ".join(reasons),
            )
            issues.append(issue)
    return LabelIssueReport(
        run_dir=run_dir, label_issues=tuple(issues), n_checked=dict(Counter(splits.tolist()))
    )


def _find_conflicting_duplicates(data: TrainingData) -> dict[int, int]:
    """Map the position of an image to that of an identical file with another label.

    Near-duplicates are not compared: slices of one block of silicon look the same, and one may be broken.
    """
    labels, conflicting = data.corrected_labels, {}
    for members in data.duplicates.sets:
        labelled = [i for i in members if labels[i] >= 0]
        for i in labelled:
            others = [j for j in labelled if labels[j] != labels[i]]
            if others:
                conflicting[i] = others[0]
    return conflicting


def write_label_issues(label_issues: Sequence[LabelIssue], path: str) -> None:
    """Write label_issues.csv; once its `label` column is corrected, it can be passed to --relabel."""
    text = io.StringIO()
    writer = csv_writer(text)
    writer.writerow(field.name for field in fields(LabelIssue))
    for issue in label_issues:
        _, *cells = asdict(issue).values()
        shown = [f"{cell:.6f}" if isinstance(cell, float) else escape_label(cell) for cell in cells]
        writer.writerow([escape_path(issue.path), *shown])
    write_bytes(text.getvalue().encode("utf-8", "surrogateescape"), path)


def read_label_issues(run: str) -> LabelIssueReport:
    """Read the label issues of a run of train or crossval.

    Raises:
        BundleError: `run` is not a run, or its records are missing or damaged.
    """
    table, metrics = os.path.join(run, LABEL_ISSUES), os.path.join(run, "metrics.json")
    if not os.path.isfile(table):
        problem = f"has no {LABEL_ISSUES}" if os.path.isdir(run) else "does not exist"
        raise BundleError(f"{run} {problem}; pass the output folder of pixelplay train or crossval")
    try:
        with open(table, encoding="utf-8", errors="surrogateescape", newline="") as file:
            label_issues = tuple(_parse_row(row) for row in csv.DictReader(file, strict=True))
        with open(metrics, encoding="utf-8") as file:
            counts = json.load(file)["label_issues"]["n_checked"]
        n_checked = {str(split): int(n) for split, n in counts.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        raise BundleError(
            f"the records of {run} are missing or damaged ({type(error).__name__}: {error}); train again"
        ) from None
    return LabelIssueReport(run_dir=run, label_issues=label_issues, n_checked=n_checked)


def _parse_row(row: Mapping[str, str]) -> LabelIssue:
    numbers = {name: float(row[name]) for name in ("score", "prob_label", "prob_suggested")}
    texts = {name: unescape_label(row[name]) for name in ("split", "label", "suggested", "reason")}
    return LabelIssue(path=unescape_path(row["path"]), **texts, **numbers)  # type: ignore[arg-type]
