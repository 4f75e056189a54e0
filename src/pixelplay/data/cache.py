"""On-disk cache of arrays computed from images: bounded, keyed by everything they depend on, safe to delete.

CACHE/<kind>-<key>/<shard>.digests.npy  (n, 16) uint8, digests of the image files, or of whole datasets
CACHE/<kind>-<key>/<shard>.values.npy   (n, …) features, pixels, thumbnails, views or pairs, memory-mapped
"""

import contextlib
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_dir

from pixelplay.atomic import atomic_write

DIGEST_BYTES = 16
SHARD_ROWS, SHARD_BYTES = 1024, 64 << 20  # the most that an interruption loses and that is held in memory
Kind = Literal["features", "pixels", "thumbs", "views", "pairs"]
_KEY_FOLDER = re.compile(r"(features|pixels|thumbs|views|pairs)-.*")
_SHARD_FILE = re.compile(r"([0-9a-f]{32})\.(digests|values)\.npy(\.tmp)?")


class CacheUse(NamedTuple):
    """Current size of the cache."""

    n_files: int
    n_bytes: int


class ArrayCache:
    """Map the digest of an image file to an array; all arrays under one key share shape and dtype.

    A cache that cannot be written is not an error: the run continues without it.

    Args:
        folder: root of the cache, shared by all keys.
        key: identifies everything the arrays depend on besides the image.
        max_bytes: size limit of the cache over all keys; 0 neither reads nor writes it.

    Attributes:
        failure: why nothing more is cached; "" if nothing went wrong.
    """

    def __init__(self, folder: str, kind: Kind, key: str, *, max_bytes: int) -> None:
        self._root = folder
        self._folder = os.path.join(folder, f"{kind}-{key}")
        self._max_bytes = max_bytes
        self.failure = ""
        self._rows: dict[bytes, tuple[NDArray[Any], int]] = {}
        self._new: dict[bytes, NDArray[Any]] = {}
        for path in sorted(Path(self._folder).glob("*.digests.npy")) if max_bytes > 0 else []:
            self._open_shard(str(path))

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def get(self, digest: bytes) -> NDArray[Any]:
        """Return a copy of a cached array."""
        values, row = self._rows[digest]
        return np.array(values[row])

    def add(self, digest: bytes, values: NDArray[Any]) -> None:
        """Add an array; it can be read once its shard is on the disk."""
        if self._max_bytes > 0:
            self._new[digest] = values
            if len(self._new) >= SHARD_ROWS or len(self._new) * values.nbytes >= SHARD_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write new arrays, then delete the least recently used shards above the size limit."""
        if not self._new:
            return
        digests = np.frombuffer(b"".join(self._new), np.uint8)
        values = np.stack(list(self._new.values()))
        self._new = {}
        try:
            os.makedirs(self._folder, exist_ok=True)
            shard = os.path.join(self._folder, uuid.uuid4().hex)
            # values first: a shard is valid only once its digests exist
            for kind, array in (("values", values), ("digests", digests.reshape(-1, DIGEST_BYTES))):
                with atomic_write(f"{shard}.{kind}.npy") as temporary, open(temporary, "wb") as file:
                    np.save(file, array, allow_pickle=False)
            is_readable = self._open_shard(f"{shard}.digests.npy")
            prune_cache(self._root, self._max_bytes)
        except OSError as error:
            self._stop(error.strerror or str(error))  # disk full or read-only
        else:
            if not is_readable:
                self._stop("a new cache file cannot be read back; too many files may be open")

    def drop(self) -> None:
        """Delete everything under this key and stop caching."""
        self._rows, self._new, self._max_bytes = {}, {}, 0
        shutil.rmtree(self._folder, ignore_errors=True)

    def _stop(self, reason: str) -> None:
        self._max_bytes = 0
        self.failure = f"{self._folder}: {reason}"

    def _open_shard(self, path: str) -> bool:
        """Map a shard into memory; return False if it cannot be read."""
        try:
            digests = np.load(path, allow_pickle=False)
            values = np.load(path.replace(".digests.", ".values."), mmap_mode="r", allow_pickle=False)
            rows = zip(digests, range(len(values)), strict=True)
            self._rows |= {digest.tobytes(): (values, row) for digest, row in rows}
        except (OSError, ValueError, EOFError):  # truncated by a crash, or deleted in the meantime
            return False
        with contextlib.suppress(OSError):  # a read-only cache can still be read
            os.utime(path)
        return True


def default_cache_dir() -> str:
    """Name the user's cache folder on this system, without creating it."""
    return user_cache_dir("pixelplay", appauthor=False, opinion=False)


def measure_cache(folder: str) -> CacheUse:
    """Count the files and bytes that the cache wrote."""
    sizes = [size for files in _shards(folder).values() for size, _ in files.values()]
    return CacheUse(n_files=len(sizes), n_bytes=sum(sizes))


def clear_cache(folder: str) -> None:
    """Delete what the cache wrote, and nothing else in the folder."""
    prune_cache(folder, 0)
    for key in _key_folders(folder):
        with contextlib.suppress(OSError):  # it holds other files
            os.rmdir(key)


def prune_cache(folder: str, max_bytes: int) -> None:
    """Delete the least recently used shards until the cache fits the limit."""
    shards = sorted(_shards(folder).values(), key=lambda files: max(used for _, used in files.values()))
    excess = sum(size for files in shards for size, _ in files.values()) - max_bytes
    for files in shards:
        if excess <= 0:
            return
        for path, (size, _) in files.items():
            with contextlib.suppress(OSError):  # deleted by another process, or open in one on Windows
                os.remove(path)
                excess -= size


def _shards(folder: str) -> dict[str, dict[str, tuple[int, float]]]:
    """Map each shard, leftovers of a crash included, to its files: path → (bytes, time of last use)."""
    shards: dict[str, dict[str, tuple[int, float]]] = {}
    for key in _key_folders(folder):
        for path in sorted(key.glob("*")):  # digests first: without them a shard is invalid
            matched = _SHARD_FILE.fullmatch(path.name)
            if matched is not None and path.is_file():
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    shards.setdefault(matched[1], {})[str(path)] = (status.st_size, status.st_mtime)
    return shards


def _key_folders(folder: str) -> list[Path]:
    return [path for path in Path(folder).glob("*") if _KEY_FOLDER.fullmatch(path.name)]
