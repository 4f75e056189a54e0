"""Rows of text → lines with aligned columns."""

import difflib
import unicodedata
from collections.abc import Sequence


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


SHOWN = 10  # items named in a message before the rest is only counted


def printable(text: str) -> str:
    """Text for one line of a terminal: control characters in a name show as escapes."""
    return "".join(sign if sign.isprintable() else _escape(sign) for sign in text)


def _escape(sign: str) -> str:
    return sign.encode("ascii", "backslashreplace").decode() if sign > "\x7f" else repr(sign)[1:-1]


def name_some(items: Sequence[object]) -> str:
    """Name the first ten items and count the rest: "a, b and 3 more"."""
    return name_first(items[:SHOWN], len(items))


def name_first(items: Sequence[object], n: int) -> str:
    """The same, given only the first of n items."""
    shown = ", ".join(str(item) for item in items)
    rest = n - len(items)
    return shown if rest <= 0 else f"{shown} and {rest} more"


def counted(n: int, noun: str) -> str:
    """A number and its noun: "1 image", "2,624 images"."""
    return f"{n:,} {noun}{'' if n == 1 else 'es' if noun.endswith('s') else 's'}"


def percent(share: float, decimals: int = 1) -> str:
    """A share for people: "92.6 %"."""
    return f"{100 * share:.{decimals}f} %"


def suggest(name: str, known: Sequence[str], n: int = 3) -> str:
    """Name the closest known words: "; did you mean 'a' or 'b'?", or nothing."""
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
