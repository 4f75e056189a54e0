"""Rows of text → lines with aligned columns."""

import unicodedata
from collections.abc import Sequence

from pixelplay.errors import printable


def align(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [[printable(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(_pad, row, widths, [True, *[False] * len(row)])).rstrip() for row in cells]


def _pad(cell: str, width: int, is_left: bool) -> str:
    space = " " * (width - _width(cell))
    return cell + space if is_left else space + cell


def _width(text: str) -> int:
    """Columns that a terminal needs: two for a wide letter, none for an accent of its own."""
    return sum(
        0 if unicodedata.combining(sign) else 1 + (unicodedata.east_asian_width(sign) in "WF")
        for sign in text
    )
