"""A folder that is whole or not there: the new one takes the place of the old one."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

OLD = "-old"  # what is being replaced waits under the new one's temporary name and this


def bring_back(temporary: str, target: str, is_ours: Callable[[str], bool]) -> None:
    """Give the old folder its place back where a kill came between the two renames."""
    if not os.path.lexists(target) and os.path.isdir(temporary + OLD) and is_ours(temporary + OLD):
        os.replace(temporary + OLD, target)


def put_in_place(temporary: str, target: str, is_ours: Callable[[str], bool]) -> None:
    """Rename the new folder; the old one is kept until the new one stands in its place.

    Args:
        is_ours: whether a folder, such as a killed process may have left, can be removed without loss.
    """
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


def write_bytes(data: bytes, path: str) -> None:
    """Write under a temporary name, then rename: whatever stops the machine, it is whole or not there."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # else the name could reach the disk before the content
    os.replace(f"{path}.tmp", path)


def write_json(content: Mapping[str, Any], path: str) -> None:
    """Write JSON under a temporary name, then rename."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")
    os.replace(temporary, path)
