"""Confusion matrix whose cells list the images behind their counts."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pixelplay.outputs.report.run_records import PredictionRow

MAX_ERRORS_SHOWN = 24  # images shown of a cell of errors
MAX_CORRECT_SHOWN = 8  # images shown of a cell of correct predictions
MAX_CLASSES = 25  # with more classes, a list of the most frequent confusions replaces the matrix

CellPaths = Mapping[tuple[str, str], Sequence[str]]  # (label, prediction) → paths


def sort_errors(rows: Sequence[PredictionRow]) -> list[PredictionRow]:
    """Return the misclassified images, the most confident first."""
    return sorted((row for row in rows if not row.is_correct), key=lambda row: -row.probability)


def find_typical(rows: Sequence[PredictionRow]) -> dict[str, str]:
    """Return for each class the path of its most confident correct prediction."""
    correct = sorted((row for row in rows if row.is_correct), key=lambda row: row.probability)
    return {row.label: row.path for row in correct}


def group_by_cell(rows: Sequence[PredictionRow]) -> dict[tuple[str, str], list[str]]:
    """Return the paths of each (label, prediction), the most confident first."""
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: -row.probability):
        cells[row.label, row.prediction].append(row.path)
    return dict(cells)


def make_matrix(rows: Sequence[PredictionRow], classes: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Return the (K, K) cells; rows are labels, columns predictions."""
    cells = group_by_cell(rows)
    return [[_make_cell(cells, label, prediction) for prediction in classes] for label in classes]


def list_confusions(rows: Sequence[PredictionRow]) -> list[dict[str, Any]]:
    """Return the cells with the most errors."""
    cells = group_by_cell(rows)
    errors = sorted(((len(paths), key) for key, paths in cells.items() if key[0] != key[1]), reverse=True)
    return [_make_cell(cells, *key) for _, key in errors[:MAX_CLASSES]]


def _make_cell(cells: CellPaths, label: str, prediction: str) -> dict[str, Any]:
    """Describe a cell: its size, its share of the row from 0 to 9, the most confident of its images."""
    paths = cells.get((label, prediction), ())
    n_row = sum(len(found) for key, found in cells.items() if key[0] == label)
    return {
        "label": label,
        "prediction": prediction,
        "n": len(paths),
        "shade": min(9, round(9 * len(paths) / n_row)) if n_row else 0,
        "paths": paths[: MAX_CORRECT_SHOWN if label == prediction else MAX_ERRORS_SHOWN],
    }
