"""Labels that look wrong: found where images were held out, written as label_issues.csv, read back."""

import csv
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pixelplay.arrays import Float64Array, IntArray
from pixelplay.data.tables import plain_label, plain_path, safe_label, safe_path
from pixelplay.errors import BundleError
from pixelplay.evaluation.label_issues import find_label_issues
from pixelplay.outputs.predictions_table import csv_writer
from pixelplay.training.training_data import TrainingData

LABEL_ISSUES = "label_issues.csv"
COLUMNS = ("path", "split", "label", "proposed", "quality", "prob_label", "prob_proposed", "reason")


@dataclass(frozen=True, kw_only=True)
class LabelIssue:
    """An image whose given label looks wrong.

    Attributes:
        path: as in the data.
        part: where it was held out: "oof", "val" or "test".
        label: the given class.
        proposed: the class that it looks like.
        quality: how well the given label fits, 0 to 1.
        prob_label: probability of the given class.
        prob_proposed: probability of the proposed one.
        reason: why, in words.
    """

    path: str
    split: str
    label: str
    proposed: str
    quality: float
    prob_label: float
    prob_proposed: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class LabelIssueReport:
    """What a run has found wrong with labels.

    Attributes:
        run_dir: the run.
        suspects: the most suspicious first.
        n_checked: part → images that were held out in it, and so could be checked.
    """

    run_dir: str
    label_issues: tuple[LabelIssue, ...]
    n_checked: Mapping[str, int]

    def summary(self) -> dict[str, Any]:
        """Return how many there are, as metrics.json has it."""
        return {"n": len(self.label_issues), "n_checked": dict(self.n_checked)}

    def to_json(self) -> dict[str, Any]:
        """Return all of them as plain values."""
        return {**self.summary(), "label_issues": [asdict(suspect) for suspect in self.label_issues]}


Answers = tuple[IntArray, Float64Array]  # positions (n,) in the material, probabilities (n, K)


def collect_label_issues(
    run_dir: str, data: TrainingData, held_out: Mapping[str, Answers]
) -> LabelIssueReport:
    """Find the suspects among held-out images, the most suspicious first.

    Beside those that the probabilities accuse, equal files with two labels are suspects.
    Images of classes that the model does not know cannot be judged.

    Args:
        held_out: part → its images and what a model that has not seen them says.
    """
    parts = np.repeat(list(held_out), [len(rows) for rows, _ in held_out.values()])  # (N,)
    positions, probs = (np.concatenate(arrays) for arrays in zip(*held_out.values(), strict=True))
    labels = data.corrected_labels[
        positions
    ]  # what the user has mended, left out or confirmed is no suspect any more
    is_known = (labels >= 0) & (labels < data.n_known) & ~data.reviewed[positions]
    parts, positions, probs, labels = parts[is_known], positions[is_known], probs[is_known], labels[is_known]
    found = find_label_issues(probs, labels)
    twins = _twins(data)
    label_issues = []
    for row in found.order:
        label, proposed = int(labels[row]), int(found.proposed[row])
        reasons = []
        if found.is_issue[row]:
            times = f"{probs[row, proposed]:.2f} for {data.classes[proposed]!r}"
            reasons.append(f"{times}, {probs[row, label]:.2f} for {data.classes[label]!r}")
        if (twin := twins.get(int(positions[row]))) is not None:
            other = int(data.corrected_labels[twin])
            reasons.append(f"the same image as {data.dataset.paths[twin]}, a {data.classes[other]!r}")
            proposed = proposed if found.is_issue[row] or other >= data.n_known else other
        if reasons:
            label_issues.append(
                LabelIssue(
                    path=data.dataset.paths[positions[row]],
                    split=str(parts[row]),
                    label=data.classes[label],
                    proposed=data.classes[proposed],
                    quality=float(found.quality[row]),
                    prob_label=float(probs[row, label]),
                    prob_proposed=float(probs[row, proposed]),
                    reason="; ".join(reasons),
                )
            )
    checked = Counter(parts.tolist())
    return LabelIssueReport(run_dir=run_dir, label_issues=tuple(label_issues), n_checked=dict(checked))


def _twins(data: TrainingData) -> dict[int, int]:
    """Position → an equal file with another label.

    Altered copies are no such evidence: slices of one block of silicon look the same, and one may be broken.
    """
    twins: dict[int, int] = {}
    labels = data.corrected_labels
    for members in data.duplicates.sets:
        kept = [i for i in members if labels[i] >= 0]
        for i in kept:
            others = [j for j in kept if labels[j] != labels[i]]
            twins |= {i: others[0]} if others else {}
    return twins


def write_label_issues(label_issues: Sequence[LabelIssue], path: str) -> None:
    """Write one row for each, the most suspicious first; `label` may be mended and given to --relabel."""
    temporary = f"{path}.partial"
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv_writer(file)
        writer.writerow(COLUMNS)
        for suspect in label_issues:
            cells = [getattr(suspect, name) for name in COLUMNS]
            shown = [f"{cell:.6f}" if isinstance(cell, float) else safe_label(cell) for cell in cells]
            writer.writerow([safe_path(suspect.path), *shown[1:]])
    os.replace(temporary, path)


def read_label_issues(run: str) -> LabelIssueReport:
    """Read what a run has found.

    Raises:
        BundleError: no run there, or one whose records are missing or damaged.
    """
    table, metrics = os.path.join(run, LABEL_ISSUES), os.path.join(run, "metrics.json")
    if not os.path.isfile(table):
        what = "has no label_issues.csv" if os.path.isdir(run) else "does not exist"
        raise BundleError(f"{run} {what}; give the folder that pixelplay train or crossval has made")
    try:
        with open(table, encoding="utf-8", errors="surrogateescape", newline="") as file:
            label_issues = tuple(_suspect(row) for row in csv.DictReader(file, strict=True))
        with open(metrics, encoding="utf-8") as file:
            n_checked = {
                str(split): int(n) for split, n in json.load(file)["label_issues"]["n_checked"].items()
            }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        raise BundleError(
            f"the records of {run} are missing or damaged ({type(error).__name__}: {error}); train again"
        ) from None
    return LabelIssueReport(run_dir=run, label_issues=label_issues, n_checked=n_checked)


def _suspect(row: Mapping[str, str]) -> LabelIssue:
    return LabelIssue(
        path=plain_path(row["path"]),
        split=row["split"],
        label=plain_label(row["label"]),
        proposed=plain_label(row["proposed"]),
        quality=float(row["quality"]),
        prob_label=float(row["prob_label"]),
        prob_proposed=float(row["prob_proposed"]),
        reason=plain_label(row["reason"]),
    )
