"""Text for messages and terminals: plurals, lists of names, suggestions, aligned columns."""

import difflib
import unicodedata
from collections.abc import Sequence

SHOWN = 10  # items named in a message before the rest is only counted
EXAMPLES = 3  # the same in a note


def align(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows as lines with aligned columns: the first to the left, the others to the right."""
    cells = [[printable(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        gaps = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        others = [gap + cell for gap, cell in zip(gaps[1:], row[1:], strict=True)]
        lines.append("  ".join([row[0] + gaps[0], *others]).rstrip())
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


def name_some(items: Sequence[object], limit: int = SHOWN, *, n: int | None = None) -> str:
    """Name at most `limit` items and count the rest of n, by default of the items: "a, b and 3 more"."""
    shown = items[:limit]
    n_more = (n or len(items)) - len(shown)
    return ", ".join(map(str, shown)) + (f" and {n_more} more" if n_more > 0 else "")


def counted(n: int, noun: str) -> str:
    """Format a number with its noun: "1 image", "2,624 images"."""
    return f"{n:,} {noun}{'' if n == 1 else 'es' if noun.endswith('s') else 's'}"


def percent(share: float, decimals: int = 1) -> str:
    """Format a share as a percentage, "92.6 %"; only 0 and 1 become "0.0 %" and "100.0 %".

    A share that would be rounded to one of them is "<0.1 %" or ">99.9 %".
    """
    text, least = f"{100 * share:.{decimals}f}", 10.0**-decimals
    if share > 0 and float(text) == 0:
        return f"<{least:.{decimals}f} %"
    if share < 1 and float(text) == 100:
        return f">{100 - least:.{decimals}f} %"
    return f"{text} %"


def suggest(name: str, known: Sequence[str], n: int = 3) -> str:
    """Name the closest known words: "; did you mean 'a' or 'b'?", or nothing."""
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def one_line(message: object, limit: int = 200) -> str:
    """Shorten the message of a library to one line."""
    return " ".join(str(message).split())[:limit]
