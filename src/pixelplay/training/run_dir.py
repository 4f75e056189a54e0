"""The folder of a run: filled under a temporary name, then renamed, so that it is whole or not there."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from pixelplay.atomic import bring_back, put_in_place
from pixelplay.errors import ConfigError
from pixelplay.text import name_some
from pixelplay.training.checkpoint import has_progress
from pixelplay.training.resume import differences, flatten

RUN_NAMES = frozenset(
    {
        "config.json",
        "plan.json",
        "split.json",
        "metrics.json",
        "history.csv",
        "oof.csv",
        "oof.safetensors",
        "label_issues.csv",
        "val.csv",
        "predictions.csv",
        "report.html",
        "report.html.tmp",  # of a report that was killed
        "model",
        ".DS_Store",
    }
)  # what a run holds, and so what may be replaced
PARTIAL, CHECKPOINTS, LOCK = ".partial", "checkpoint", ".lock"
MADE_NAMES = RUN_NAMES | {CHECKPOINTS, LOCK}  # while it is being made
NEEDED_BYTES = 200 << 20  # of a run: a backbone, its head and tables


@contextmanager
def new_run_dir(out_dir: str, *, force: bool, resume: bool = False) -> Iterator[str]:
    """Give the folder OUT.partial, which becomes `out_dir` when the block ends without an error.

    Where the block fails or is killed, a folder that holds a checkpoint stays, to be continued;
    any other goes.

    Raises:
        ConfigError: `out_dir` exists and is not forced, is no run, cannot be written, is being made by
            another process, or its disk is full; an interrupted run waits there.
    """
    out_dir = os.path.realpath(out_dir)  # a link stays, what it points to is replaced
    partial = f"{out_dir}{PARTIAL}"
    parent = os.path.dirname(out_dir)
    bring_back(partial, out_dir, _is_run)
    if os.path.isfile(os.path.join(out_dir, LOCK)) and _is_run(out_dir, MADE_NAMES):
        _tidy_up(out_dir)  # a kill came after them
    _check_target(out_dir, force=force)
    if os.path.isdir(partial):  # before the lock, which would be one more file in it
        _check_ours(partial)
    try:
        os.makedirs(partial, exist_ok=True)
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise ConfigError(f"{out_dir} cannot be written: {error.strerror}; choose another --out") from None
    with _only_process(partial):
        try:
            _clear_the_ground(partial, out_dir, force=force, resume=resume)
            if free < NEEDED_BYTES:
                raise ConfigError(
                    f"{parent} has {free >> 20} MB free, a run needs {NEEDED_BYTES >> 20}; "
                    "free some or choose another --out"
                )
            yield partial
            _check_target(out_dir, force=force)  # someone else may have been quicker
            # with all that is resumable: a kill may come at any instant
            put_in_place(partial, out_dir, _is_run)
            _tidy_up(out_dir)
        except OSError as error:
            error.filename = error.filename or out_dir  # a full disk names no file by itself
            raise
        finally:
            if os.path.isdir(partial) and not _is_resumable(partial) and _is_ours(partial):
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _only_process(partial: str) -> Iterator[None]:
    """Hold the folder's lock; the system gives it back when a process is killed."""
    from filelock import FileLock, Timeout

    lock = FileLock(os.path.join(partial, LOCK))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another process is training into {partial}; wait for it or choose another --out"
        ) from None
    except OSError as error:
        raise ConfigError(f"{partial} cannot be written: {error.strerror}; choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def _clear_the_ground(partial: str, out_dir: str, *, force: bool, resume: bool) -> None:
    """Empty what an earlier process has left, unless it is to be continued."""
    _check_ours(partial)
    if _is_resumable(partial):
        if resume:
            return
        if not force:
            raise ConfigError(
                f"{partial} holds an interrupted run; go on with --resume, or start anew with --force"
            )
    for name in set(os.listdir(partial)) - {LOCK}:
        path = os.path.join(partial, name)
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def _is_resumable(partial: str) -> bool:
    return has_progress(os.path.join(partial, CHECKPOINTS))


def _check_ours(partial: str) -> None:
    if not _is_ours(partial):
        raise ConfigError(f"{partial} holds files that are not of a run; move them or choose another --out")


def _is_ours(partial: str) -> bool:
    names = {name.removesuffix(".tmp").removesuffix(PARTIAL) for name in os.listdir(partial)}
    return names <= MADE_NAMES


def _tidy_up(run: str) -> None:
    """Remove from a finished run what only its making needed, the lock last: it tells that this is ours."""
    shutil.rmtree(os.path.join(run, CHECKPOINTS), ignore_errors=True)
    with suppress(OSError):
        os.remove(os.path.join(run, LOCK))


def is_finished(run: str, about: Mapping[str, Any]) -> bool:
    """Whether a finished run lies there.

    Raises:
        ConfigError: its config.json has other values than these; they are named.
    """
    if not _is_run(run):
        return False
    own = dict(flatten(about))
    had = {name: value for name, value in flatten(_read_config(run)) if name in own}
    if changed := differences(had, own):
        raise ConfigError(
            f"{run} is finished, and had other settings: {name_some(changed)}; choose another --out, or "
            "replace it with --force instead of --resume"
        )
    return True


def is_record(path: str) -> bool:
    """Whether a file would be, or take the place of, one of the records of a run."""
    folder, name = os.path.split(os.path.abspath(path))
    return name.lower() in {each.lower() for each in RUN_NAMES} and "pixelplay" in _read_config(folder)


def _is_run(folder: str, names: frozenset[str] = RUN_NAMES) -> bool:
    """Whether a folder is a run of ours and holds nothing else, so that replacing it loses nothing."""
    return "pixelplay" in _read_config(folder) and set(os.listdir(folder)) <= names


def _read_config(folder: str) -> dict[str, Any]:
    """A run's settings; none where it is no run."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _check_target(out_dir: str, *, force: bool) -> None:
    if not os.path.lexists(out_dir):
        return
    if os.path.isdir(out_dir) and not os.listdir(out_dir):
        return
    if not _is_run(out_dir):
        raise ConfigError(
            f"{out_dir} exists and is no run of PixelPlay, or holds other files too: it is never replaced; "
            "choose another --out"
        )
    if not force:
        raise ConfigError(f"{out_dir} exists; choose another --out, or replace it with --force")
