"""What is computed of an image once and reused, keyed by all that determines it; bounded, safe to delete.

CACHE/<kind>-<key>/<shard>.digests.npy  (n, 16) uint8, digests of the images' bytes
CACHE/<kind>-<key>/<shard>.values.npy   (n, …) features, pixels or maps in front of a cut, memory-mapped
"""

import contextlib
import os
import re
import shutil
import sys
import uuid
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16
SHARD_ROWS, SHARD_BYTES = 1024, 64 << 20  # what an interruption can lose, and what waits in memory
Kind = Literal["features", "pixels", "thumbs", "views"]
_KEY_FOLDER = re.compile(r"(features|pixels|thumbs|views)-.*")
_SHARD_FILE = re.compile(r"([0-9a-f]{32})\.(digests|values)\.npy(\.tmp)?")


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """What the cache holds at the moment."""

    folder: str
    n_files: int
    n_bytes: int


class ArrayCache:
    """Digest of an image's bytes → an array, the same shape and type for all under one key.

    A cache that cannot be written is no error: the run goes on without it.

    Args:
        folder: of the whole cache.
        kind: what the arrays are.
        key: names all that they depend on, beside the image's bytes.
        max_bytes: of the whole cache; 0 neither reads nor writes it.

    Attributes:
        failure: why nothing more is kept; "" while all is well.
    """

    def __init__(self, folder: str, kind: Kind, key: str, *, max_bytes: int) -> None:
        self._root = folder
        self._folder = os.path.join(folder, f"{kind}-{key}")
        self._max_bytes = max_bytes
        self.failure = ""
        self._rows: dict[bytes, tuple[NDArray[Any], int]] = {}
        self._new: dict[bytes, NDArray[Any]] = {}
        if max_bytes > 0:
            self._open_shards()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def get(self, digest: bytes) -> NDArray[Any]:
        """The array of an image that is in the cache."""
        values, row = self._rows[digest]
        return np.array(values[row])

    def add(self, digest: bytes, values: NDArray[Any]) -> None:
        """Remember an array; it reaches the disk with its shard, and can be had back from then on."""
        if self._max_bytes > 0:
            self._new[digest] = values
            if len(self._new) >= SHARD_ROWS or len(self._new) * values.nbytes >= SHARD_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write what is new, then drop the shards used longest ago until the bound is kept."""
        if not self._new:
            return
        digests = np.frombuffer(b"".join(self._new), np.uint8)
        values = np.stack(list(self._new.values()))
        self._new = {}
        try:
            os.makedirs(self._folder, exist_ok=True)
            shard = os.path.join(self._folder, uuid.uuid4().hex)
            # values first: a shard counts only once its digests are there
            _save(f"{shard}.values.npy", values)
            _save(f"{shard}.digests.npy", digests.reshape(-1, DIGEST_BYTES))
            is_back = self._open_shard(f"{shard}.digests.npy")
            prune_cache(self._root, self._max_bytes)
        except OSError as error:
            self._stop(error.strerror or str(error))  # disk full or read-only
        else:
            if not is_back:
                self._stop("what was written cannot be read back; too many files may be open")

    def drop(self) -> None:
        """Delete all that is kept under this key; nothing more is."""
        self._rows, self._new, self._max_bytes = {}, {}, 0
        shutil.rmtree(self._folder, ignore_errors=True)

    def _stop(self, why: str) -> None:
        self._max_bytes = 0
        self.failure = f"{self._folder}: {why}"

    def _open_shards(self) -> None:
        for name in sorted(_list(self._folder)):
            if name.endswith(".digests.npy"):
                self._open_shard(os.path.join(self._folder, name))

    def _open_shard(self, path: str) -> bool:
        """Map a shard into memory; returns whether its rows can be had."""
        try:
            digests = np.load(path, allow_pickle=False)
            values = np.load(path.replace(".digests.", ".values."), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):  # cut short by a crash, or deleted meanwhile
            return False
        if len(digests) != len(values):
            return False
        self._rows.update({digest.tobytes(): (values, row) for row, digest in enumerate(digests)})
        with contextlib.suppress(OSError):  # a read-only cache can be read all the same
            os.utime(path)
        return True


def default_cache_dir() -> str:
    """The user's cache folder on this system, without creating it."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~")
    elif sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "pixelplay")


def measure_cache(folder: str) -> CacheUse:
    """Count files and bytes that the cache wrote."""
    sizes = [size for files in _shards(folder).values() for size, _ in files.values()]
    return CacheUse(folder=folder, n_files=len(sizes), n_bytes=sum(sizes))


def clear_cache(folder: str) -> None:
    """Delete what the cache wrote, and nothing else in the folder."""
    prune_cache(folder, 0)
    for key in _key_folders(folder):
        with contextlib.suppress(OSError):  # something else lies in it
            os.rmdir(key)


def prune_cache(folder: str, max_bytes: int) -> None:
    """Delete the shards used longest ago until the cache keeps its bound."""
    shards = sorted(_shards(folder).values(), key=lambda files: max(used for _, used in files.values()))
    excess = sum(size for files in shards for size, _ in files.values()) - max_bytes
    for files in shards:
        if excess <= 0:
            return
        for path, (size, _) in files.items():
            with contextlib.suppress(OSError):  # another process was quicker, or has it open on Windows
                os.remove(path)
                excess -= size


def _shards(folder: str) -> dict[str, dict[str, tuple[int, float]]]:
    """Shard → its files, leftovers of a crash too → (bytes, time of last use)."""
    shards: dict[str, dict[str, tuple[int, float]]] = {}
    for key in _key_folders(folder):
        for name in sorted(_list(key)):  # digests first: a shard without them no longer counts
            matched = _SHARD_FILE.fullmatch(name)
            path = os.path.join(key, name)
            if matched is not None and os.path.isfile(path):
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path)
                    shards.setdefault(matched[1], {})[path] = (status.st_size, status.st_mtime)
    return shards


def _key_folders(folder: str) -> list[str]:
    return [os.path.join(folder, name) for name in _list(folder) if _KEY_FOLDER.fullmatch(name)]


def _list(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _save(path: str, array: NDArray[np.generic]) -> None:
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # a full disk has no room for half a shard
        raise
