"""Exceptions, in one tree.

PixelPlayError            caught by the CLI: prints "error: …", exits 1
├── ConfigError           (ValueError) unknown, out-of-range or contradictory setting
├── DataError             (ValueError) unusable data
│   └── ImageError        one unusable image, with its status
├── BundleError           (RuntimeError) missing, damaged or incompatible model
└── MissingExtraError     (ImportError) names the extra to install

A message says in one sentence what is wrong, with the value and the place, the limit, and what to do.
"""

from typing import Literal

ImageStatus = Literal["ok", "missing", "unreadable", "too_large", "unsupported"]


class PixelPlayError(Exception):
    """An error that the user can fix; the message says how."""


class ConfigError(PixelPlayError, ValueError):
    """A setting is unknown, out of range or contradicts another one."""


class DataError(PixelPlayError, ValueError):
    """The data cannot be used."""


class ImageError(DataError):
    """One image cannot be used, for a reason in one clause; `status` is that of its row in tables."""

    def __init__(self, path: str, status: ImageStatus, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.status = status
        self.reason = reason

    def detached(self) -> "ImageError":
        """Copy this error without its traceback, which would keep the file's bytes in memory."""
        return ImageError(self.path, self.status, self.reason)


class BundleError(PixelPlayError, RuntimeError):
    """A model bundle or a weights file is missing, damaged or incompatible."""


class MissingExtraError(PixelPlayError, ImportError):
    """An optional dependency is not installed; the message names the extra."""
