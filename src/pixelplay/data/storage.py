"""Where the bytes of images lie: a folder or a zip archive. Read-only."""

import os
import stat
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from pixelplay.data.decode import MAX_BYTES
from pixelplay.errors import DataError, ImageError

MAX_ZIP_RATIO = 200  # images hardly shrink in a zip; a larger ratio is a bomb
MIN_BOMB_BYTES = 64 << 20  # what is smaller does no harm: a blank bitmap shrinks a thousand times
# The other methods of zip unpack as much as they like, whatever size the member declares.
READABLE_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
SAYS_UTF8 = 0x800  # flag of a member: its name is UTF-8


class ImageStorage(Protocol):
    """Gives the encoded bytes of an image by its path."""

    def read(self, path: str) -> bytes:
        """Read one image's bytes.

        Raises:
            ImageError: missing, unreadable or too large.
        """

    def size(self, path: str) -> int:
        """Bytes that `read` would give.

        Raises:
            ImageError: missing, or no file.
        """

    def display_path(self, path: str) -> str:
        """The image's name for a user who stands outside the store."""


class FolderStorage:
    """Files below one folder; absolute paths are taken as they are."""

    def __init__(self, root: str) -> None:
        self.root = root

    def display_path(self, path: str) -> str:
        return path if self.root in ("", ".") else os.path.join(self.root, path)

    def __contains__(self, path: str) -> bool:
        return os.path.isfile(os.path.join(self.root, path))

    def size(self, path: str) -> int:
        with _as_image_error(path):
            status = os.stat(os.path.join(self.root, path))
        # a named pipe or a device would block or never end
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ImageError(path, "unreadable", kind)
        return status.st_size

    def read(self, path: str) -> bytes:
        size = self.size(path)
        if size > MAX_BYTES:
            raise ImageError(path, "too_large", f"{size:,} bytes; the limit is {MAX_BYTES:,} bytes")
        # read whole, so a buffer would only cost
        with _as_image_error(path), open(os.path.join(self.root, path), "rb", buffering=0) as file:
            return file.read()


class ZipStorage:
    """Members of a zip archive, read in place and never unpacked to disk."""

    def __init__(self, archive: str) -> None:
        self.archive = archive
        try:
            self._zip = zipfile.ZipFile(archive)
        # on hostile bytes zipfile raises BadZipFile, ValueError, NotImplementedError, struct.error and more
        except Exception as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise DataError(
                f"{archive} cannot be read as a zip archive: {reason}; pack or download it again"
            ) from None
        self._lock = threading.Lock()
        named = ((_name_of(info), info) for info in self._zip.infolist())
        self._members = {name: info for name, info in named if name}

    def __contains__(self, path: str) -> bool:
        return path in self._members and not path.endswith("/")

    def display_path(self, path: str) -> str:
        return f"{self.archive}/{path}"

    def names(self) -> list[str]:
        """All members that are files, in archive order."""
        return [name for name in self._members if not name.endswith("/")]

    def folders(self) -> list[str]:
        """All members that are folders, in archive order."""
        return [name.rstrip("/") for name in self._members if name.endswith("/")]

    def size(self, path: str) -> int:
        return self._member(path).file_size

    def read(self, path: str) -> bytes:
        info = self._member(path)
        if info.flag_bits & 1:
            raise ImageError(path, "unsupported", "encrypted zip member; unpack the archive")
        if info.compress_type not in READABLE_METHODS:
            reason = f"packed by zip method {info.compress_type}; pack the archive with deflate"
            raise ImageError(path, "unsupported", reason)
        ratio = info.file_size / max(info.compress_size, 1)
        if info.file_size > MAX_BYTES or (info.file_size > MIN_BOMB_BYTES and ratio > MAX_ZIP_RATIO):
            reason = f"unpacks to {info.file_size:,} bytes, {ratio:,.0f} times its packed size"
            limits = f"limits: {MAX_BYTES:,} bytes, {MAX_ZIP_RATIO} times"
            raise ImageError(path, "too_large", f"{reason}; {limits}")
        try:
            # never reads past the declared size, which may lie; its checksum then fails
            with self._lock, self._zip.open(info) as member:
                data = member.read(info.file_size)
        # zipfile raises BadZipFile, zlib.error, EOFError and others for damage
        except Exception as error:
            raise ImageError(path, "unreadable", f"damaged zip member: {error}") from None
        if len(data) < info.file_size:
            raise ImageError(path, "unreadable", "damaged zip member: it ends early")
        return data

    def _member(self, path: str) -> zipfile.ZipInfo:
        if path not in self:
            raise ImageError(path, "missing", "no such member in the zip archive")
        return self._members[path]


def _name_of(member: zipfile.ZipInfo) -> str:
    """A member's name as it was meant: a Mac does not say that it is UTF-8, tar begins with a dot."""
    name = member.filename
    if not member.flag_bits & SAYS_UTF8:
        with suppress(UnicodeError):  # then it is what Python has taken it for
            name = name.encode("cp437").decode("utf-8")
    name = name.replace("\\", "/")  # of some archives made on Windows
    while name.startswith("./"):
        name = name[2:]
    return name


@contextmanager
def _as_image_error(path: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(path, "missing", "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError(path, "unreadable", reason) from None


def is_unsafe_member(name: str) -> bool:
    """Whether a zip member's name points outside the archive's own tree."""
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or (len(parts[0]) > 1 and parts[0][1] == ":")
