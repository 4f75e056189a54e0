"""What can go wrong, in one tree.

PixelPlayError            caught by the CLI: prints "error: …", exits 1
├── ConfigError           (ValueError) setting unknown, out of range, contradictory
├── DataError             (ValueError) data cannot be used as given
│   └── ImageError        one photograph cannot be used; carries its status
├── BundleError           (RuntimeError) model missing, damaged, or from another version
└── MissingExtraError     (ImportError) names the extra to install

A message says what is wrong with the value and the place, then the limit, then what to do,
in one sentence.
"""

import difflib
from collections.abc import Sequence
from typing import Literal

ImageStatus = Literal["ok", "missing", "unreadable", "too_large", "unsupported"]

SHOWN = 10  # items named in a message before the rest is only counted


class PixelPlayError(Exception):
    """Anything that the user can mend; the message says how."""


class ConfigError(PixelPlayError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(PixelPlayError, ValueError):
    """The data cannot be used as given."""


class ImageError(DataError):
    """One photograph cannot be used.

    Attributes:
        path: the photograph, as the user named it.
        status: what becomes of its row: "missing", "unreadable", "too_large" or "unsupported".
        reason: one clause that says why, without the path.
    """

    def __init__(self, path: str, status: ImageStatus, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.status = status
        self.reason = reason

    def detached(self) -> "ImageError":
        """The same error without its traceback, which would keep the file's bytes in memory."""
        return ImageError(self.path, self.status, self.reason)


class BundleError(PixelPlayError, RuntimeError):
    """A model bundle or a weights file is missing, damaged, or from another version."""


class MissingExtraError(PixelPlayError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


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
    """A number and its noun: "1 photograph", "2,624 photographs"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def percent(share: float, decimals: int = 1) -> str:
    """A share for people: "92.6 %"."""
    return f"{100 * share:.{decimals}f} %"


def suggest(name: str, known: Sequence[str], n: int = 3) -> str:
    """Name the closest known words: "; did you mean 'a' or 'b'?", or nothing."""
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
