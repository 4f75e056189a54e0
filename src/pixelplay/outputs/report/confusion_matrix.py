"""Answers → who is taken for whom, and the images that show it."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pixelplay.outputs.report.run_records import Answer

N_IN_CELL = 24  # pictures of a cell of the confusion matrix
N_RIGHT = 8  # of a cell of right answers
MAX_MATRIX = 25  # classes; more are shown as a list of what is taken for what


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the confusion matrix.

    Attributes:
        n: images in it.
        shade: 0 to 9, of the row's images.
        paths: those whose pictures are shown.
    """

    n: int
    shade: int
    is_right: bool
    paths: tuple[str, ...]


def worst_first(answers: Sequence[Answer]) -> list[Answer]:
    """Wrong answers, the most confident first."""
    return sorted((a for a in answers if not a.is_right), key=lambda a: -a.probability)


def typical_of(answers: Sequence[Answer]) -> dict[str, str]:
    """Class → the image of it that was answered rightly with most confidence."""
    right = sorted((a for a in answers if a.is_right), key=lambda a: a.probability)
    return {answer.given: answer.path for answer in right}


def fill_cells(answers: Sequence[Answer]) -> dict[tuple[str, str], list[str]]:
    """Given and decided class → images, the most confident answer first."""
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    for answer in sorted(answers, key=lambda a: -a.probability):
        cells[answer.given, answer.label].append(answer.path)
    return cells


def make_matrix(answers: Sequence[Answer], names: Sequence[str]) -> tuple[tuple[Cell, ...], ...]:
    """Rows of given labels, columns of decisions, each cell with its images."""
    cells = fill_cells(answers)
    n_given = Counter(answer.given for answer in answers)
    return tuple(
        tuple(
            _cell(cells, given, label, len(cells.get((given, label), ())), n_given[given]) for label in names
        )
        for given in names
    )


def _cell(cells: Mapping[tuple[str, str], Sequence[str]], given: str, label: str, n: int, n_row: int) -> Cell:
    is_right = given == label
    return Cell(
        n=n,
        shade=min(9, round(9 * n / n_row)) if n_row else 0,
        is_right=is_right,
        paths=tuple(cells.get((given, label), ())[: N_RIGHT if is_right else N_IN_CELL]),
    )


def list_confusions(answers: Sequence[Answer]) -> list[tuple[str, str, Cell]]:
    """What is most often taken for what."""
    cells = fill_cells(answers)
    n_given = Counter(answer.given for answer in answers)
    wrong = sorted(((len(paths), key) for key, paths in cells.items() if key[0] != key[1]), reverse=True)
    return [
        (given, label, _cell(cells, given, label, n, n_given[given]))
        for n, (given, label) in wrong[:MAX_MATRIX]
    ]
