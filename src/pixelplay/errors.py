"""What can go wrong, in one tree.

PixelPlayError            caught by the CLI: prints "error: …", exits 1
├── ConfigError           (ValueError) setting unknown, out of range, contradictory
├── DataError             (ValueError) data cannot be used as given
│   └── ImageError        one image cannot be used; carries its status
├── BundleError           (RuntimeError) model missing, damaged, or from another version
└── MissingExtraError     (ImportError) names the extra to install

A message says what is wrong with the value and the place, then the limit, then what to do,
in one sentence.
"""

from typing import Literal

ImageStatus = Literal["ok", "missing", "unreadable", "too_large", "unsupported"]


class PixelPlayError(Exception):
    """Anything that the user can mend; the message says how."""


class ConfigError(PixelPlayError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(PixelPlayError, ValueError):
    """The data cannot be used as given."""


class ImageError(DataError):
    """One image cannot be used.

    Attributes:
        path: the image, as the user named it.
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
