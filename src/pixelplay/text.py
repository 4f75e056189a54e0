"""Text for messages and terminals: plurals, lists of names, suggestions, aligned columns."""

import difflib
import unicodedata
from collections.abc import Sequence

SHOWN = 10  # items named in a message before the rest is only counted


def align(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows as lines with aligned columns: the first to the left, the others to the right."""
    cells = [[printable(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        padded = [first + " " * (widths[0] - _width(first))]
        padded += [
            " " * (width - _width(cell)) + cell for cell, width in zip(others, widths[1:], strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _width(text: str) -> int:
    """Count terminal columns: two for a wide character, none for a combining accent."""
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def printable(text: str) -> str:
    """Escape control characters, so that a file name cannot break a line or steer a terminal."""
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    return char.encode("ascii", "backslashreplace").decode() if char > "\x7f" else repr(char)[1:-1]


def name_some(items: Sequence[object]) -> str:
    """Name the first ten items and count the rest: "a, b and 3 more"."""
    return name_first(items[:SHOWN], len(items))


def name_first(items: Sequence[object], n: int) -> str:
    """Name the given items and count the rest of n."""
    shown = ", ".join(map(str, items))
    rest = n - len(items)
    return shown if rest <= 0 else f"{shown} and {rest} more"


def counted(n: int, noun: str) -> str:
    """Format a number with its noun: "1 image", "2,624 images"."""
    return f"{n:,} {noun}{'' if n == 1 else 'es' if noun.endswith('s') else 's'}"


def percent(share: float, decimals: int = 1) -> str:
    """Format a share as a percentage: "92.6 %"."""
    return f"{100 * share:.{decimals}f} %"


def suggest(name: str, known: Sequence[str], n: int = 3) -> str:
    """Name the closest known words: "; did you mean 'a' or 'b'?", or nothing."""
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
