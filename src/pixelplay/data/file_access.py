"""Read the bytes of images from a folder or a zip archive; nothing is ever written."""

import os
import re
import stat
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from pixelplay.data.decode import MAX_BYTES
from pixelplay.errors import DataError, ImageError

MAX_ZIP_RATIO = 200  # images hardly compress; a higher ratio means a zip bomb
MIN_BOMB_BYTES = 64 << 20  # smaller members are harmless: a blank bitmap compresses a thousandfold
# With other methods a member can unpack to more than its declared size.
READABLE_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
UTF8_FLAG = 0x800  # general-purpose bit 11: the member's name is UTF-8


class ImageStorage(Protocol):
    """Reads the encoded bytes of an image by its path."""

    def read(self, path: str) -> bytes:
        """Read the bytes of one image; raises ImageError if it is missing, unreadable or too large."""

    def size(self, path: str) -> int:
        """Return the size of one image in bytes; raises ImageError if it is missing or no regular file."""

    def display_path(self, path: str) -> str:
        """Return the path to show to the user, including the folder or archive."""


class FolderStorage:
    """Files below a root folder; absolute paths are read as they are."""

    def __init__(self, root: str) -> None:
        self.root = root

    def display_path(self, path: str) -> str:
        return path if self.root in ("", ".") else os.path.join(self.root, path)

    def __contains__(self, path: str) -> bool:
        return os.path.isfile(os.path.join(self.root, path))

    def size(self, path: str) -> int:
        with _raise_image_error(path):
            status = os.stat(os.path.join(self.root, path))
        # reading a named pipe or a device could block or never end
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ImageError(path, "unreadable", kind)
        return status.st_size

    def read(self, path: str) -> bytes:
        size = self.size(path)
        if size > MAX_BYTES:
            raise ImageError(path, "too_large", f"{size:,} bytes; the limit is {MAX_BYTES:,} bytes")
        # unbuffered: the whole file is read at once
        with _raise_image_error(path), open(os.path.join(self.root, path), "rb", buffering=0) as file:
            return file.read()


@contextmanager
def _raise_image_error(path: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(path, "missing", "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL byte
        raise ImageError(path, "unreadable", _reason(error)) from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class ZipStorage:
    """Members of a zip archive, read in place and never unpacked to disk."""

    def __init__(self, archive: str) -> None:
        self.archive = archive
        try:
            self._zip = zipfile.ZipFile(archive)
        # damaged archives raise BadZipFile, ValueError, NotImplementedError, struct.error and others
        except Exception as error:
            problem = f"cannot be read as a zip archive: {_reason(error)}"
            raise DataError(f"{archive} {problem}; pack or download it again") from None
        self._lock = threading.Lock()
        self._members = {name: info for info in self._zip.infolist() if (name := _member_name(info))}

    def __contains__(self, path: str) -> bool:
        return path in self._members and not path.endswith("/")

    def display_path(self, path: str) -> str:
        return f"{self.archive}/{path}"

    def names(self) -> list[str]:
        """List the members that are files, in archive order."""
        return [name for name in self._members if not name.endswith("/")]

    def folders(self) -> list[str]:
        """List the members that are folders, in archive order."""
        return [name.rstrip("/") for name in self._members if name.endswith("/")]

    def size(self, path: str) -> int:
        return self._member(path).file_size

    def read(self, path: str) -> bytes:
        info = self._member(path)
        if info.flag_bits & 1:
            raise ImageError(path, "unsupported", "encrypted zip member; unpack the archive")
        if info.compress_type not in READABLE_METHODS:
            reason = f"zip compression method {info.compress_type} is not supported; use deflate"
            raise ImageError(path, "unsupported", reason)
        ratio = info.file_size / max(info.compress_size, 1)
        if info.file_size > MAX_BYTES or (info.file_size > MIN_BOMB_BYTES and ratio > MAX_ZIP_RATIO):
            reason = f"unpacks to {info.file_size:,} bytes, {ratio:,.0f} times its packed size"
            limits = f"limits: {MAX_BYTES:,} bytes, {MAX_ZIP_RATIO} times"
            raise ImageError(path, "too_large", f"{reason}; {limits}")
        try:
            # reads at most the declared size; if that is wrong, the checksum or the length shows it
            with self._lock, self._zip.open(info) as member:
                data = member.read(info.file_size)
        # damaged members raise BadZipFile, zlib.error, EOFError and others
        except Exception as error:
            raise ImageError(path, "unreadable", f"damaged zip member: {error}") from None
        if len(data) < info.file_size:
            raise ImageError(path, "unreadable", "damaged zip member: it ends early")
        return data

    def _member(self, path: str) -> zipfile.ZipInfo:
        if path not in self:
            raise ImageError(path, "missing", "no such member in the zip archive")
        return self._members[path]


FileStorage = FolderStorage | ZipStorage  # where files can be listed


def _member_name(member: zipfile.ZipInfo) -> str:
    """Decode a member's name; Windows tools may write backslashes, and tar archives begin with "./"."""
    name = member.filename
    if not member.flag_bits & UTF8_FLAG:  # macOS writes UTF-8 without setting it
        with suppress(UnicodeError):  # not UTF-8: keep the CP437 name that zipfile decoded
            name = name.encode("cp437").decode("utf-8")
    return re.sub(r"^(\./)+", "", name.replace("\\", "/"))


def is_unsafe_member(name: str) -> bool:
    """Return whether a zip member's name points outside the archive's own tree."""
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or (len(parts[0]) > 1 and parts[0][1] == ":")
