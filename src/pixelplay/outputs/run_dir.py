"""The folder of a run: filled under a temporary name, then renamed, so that it is whole or not there."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from pixelplay.errors import ConfigError

RUN_NAMES = frozenset(
    {"config.json", "split.json", "metrics.json", "oof.csv", "predictions.csv", "model", ".DS_Store"}
)  # what a run holds, and so what may be replaced
NEEDED_BYTES = 200 << 20  # of a run: a backbone, its head and tables


@contextmanager
def new_run_dir(out_dir: str, *, is_forced: bool) -> Iterator[str]:
    """Give a temporary folder that becomes `out_dir` when the block ends without an error.

    Raises:
        ConfigError: `out_dir` exists and is not forced, is no run, cannot be written, or its disk
            is full.
    """
    out_dir = os.path.realpath(out_dir)  # a link stays, what it points to is replaced
    _check_target(out_dir, is_forced=is_forced)
    parent = os.path.dirname(out_dir)
    try:
        os.makedirs(parent, exist_ok=True)
        free = shutil.disk_usage(parent).free
        temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(out_dir)}.partial-", dir=parent)
    except OSError as error:
        raise ConfigError(f"{out_dir} cannot be written: {error.strerror}; choose another --out") from None
    try:
        if free < NEEDED_BYTES:
            raise ConfigError(
                f"{parent} has {free >> 20} MB free, a run needs {NEEDED_BYTES >> 20}; "
                "free some or choose another --out"
            )
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        _check_target(out_dir, is_forced=is_forced)  # someone else may have been quicker
        _put_in_place(temporary, out_dir)
    except OSError as error:
        error.filename = error.filename or out_dir  # a full disk names no file by itself
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: str, out_dir: str) -> None:
    """Rename the new run; the old one is kept until the new one stands in its place."""
    old = f"{temporary}.old"
    if os.path.isdir(out_dir):
        os.replace(out_dir, old)
    try:
        os.replace(temporary, out_dir)
    except BaseException:
        if os.path.isdir(old):
            os.replace(old, out_dir)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_run(folder: str) -> bool:
    """Whether a folder is a run of ours and holds nothing else, so that replacing it loses nothing."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "pixelplay" in config and set(os.listdir(folder)) <= RUN_NAMES


def _check_target(out_dir: str, *, is_forced: bool) -> None:
    if not os.path.lexists(out_dir):
        return
    if os.path.isdir(out_dir) and not os.listdir(out_dir):
        return
    if not _is_run(out_dir):
        raise ConfigError(
            f"{out_dir} exists and is no run of PixelPlay, or holds other files too: it is never replaced; "
            "choose another --out"
        )
    if not is_forced:
        raise ConfigError(f"{out_dir} exists; choose another --out, or replace it with --force")
