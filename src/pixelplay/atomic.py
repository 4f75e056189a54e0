"""Write a file or a folder completely or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

OLD = "-old"  # suffix of the folder being replaced, after the temporary name of the new one


@contextmanager
def atomic_write(path: str, *, suffix: str = ".tmp", keep_partial: bool = False) -> Iterator[str]:
    """Yield a temporary name to write to; rename that file to `path` when the block ends.

    Args:
        suffix: of the temporary name.
        keep_partial: keep the temporary file when the block raises, instead of removing it.
    """
    temporary = f"{path}{suffix}"
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        if not keep_partial:
            with suppress(OSError):
                os.remove(temporary)
        raise


@contextmanager
def atomic_files(folder: str, names: Sequence[str]) -> Iterator[str]:
    """Yield a temporary folder to write files to; move them to `folder` when the block ends.

    The last one is moved last. No file is moved when the block raises.
    """
    temporary = tempfile.mkdtemp(prefix=f".{names[-1]}-", suffix=".tmp", dir=folder)
    try:
        yield temporary
        for name in names:
            _sync(os.path.join(temporary, name))
        for name in names:
            os.replace(os.path.join(temporary, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(data: bytes, path: str) -> None:
    """Write a file atomically."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_json(content: Mapping[str, Any], path: str) -> None:
    """Write indented JSON atomically; NaN and infinity are errors."""
    write_bytes(f"{json.dumps(content, indent=1, allow_nan=False)}\n".encode(), path)


def replace_folder(temporary: str, target: str, is_ours: Callable[[str], bool]) -> None:
    """Rename a finished folder to `target`; an existing folder is kept until the new one is in place.

    The leftover of a killed process is removed if `is_ours` returns true for it.
    """
    for folder, _, names in os.walk(temporary):
        for name in names:
            _sync(os.path.join(folder, name))
    old = temporary + OLD
    if os.path.isdir(old) and is_ours(old):
        shutil.rmtree(old)
    if os.path.isdir(target):
        os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        if os.path.isdir(old):
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(temporary: str, target: str, is_ours: Callable[[str], bool]) -> None:
    """Restore the replaced folder if the process was killed between the two renames."""
    if not os.path.lexists(target) and os.path.isdir(temporary + OLD) and is_ours(temporary + OLD):
        os.replace(temporary + OLD, target)


def _sync(path: str) -> None:
    """Flush a file to the disk; otherwise its new name can reach the disk before its content."""
    file = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only writable files
    try:
        os.fsync(file)
    finally:
        os.close(file)
