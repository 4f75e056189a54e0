"""The folder of a run: written under a temporary name and renamed once it is complete."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from pixelplay.atomic import replace_folder, restore_folder
from pixelplay.errors import ConfigError
from pixelplay.text import name_some
from pixelplay.training.checkpoint import has_checkpoints, has_progress
from pixelplay.training.resume import differences, flatten

# what a finished run consists of, and so what may be replaced
RUN_FILES = frozenset(
    "config.json environment.json plan.json split.json metrics.json history.csv oof.csv oof.safetensors "  # noqa: SIM905
    "val.csv predictions.csv label_issues.csv report.html report.html.tmp model .DS_Store".split()
)
PARTIAL, CHECKPOINTS, LOCK = ".partial", "checkpoint", ".lock"
UNFINISHED_FILES = RUN_FILES | {CHECKPOINTS, LOCK}
MIN_FREE_BYTES = 200 << 20  # for a backbone, its head and tables


@contextmanager
def new_run_dir(out_dir: str, *, force: bool, resume: bool = False) -> Iterator[str]:
    """Provide the folder OUT.partial, which is renamed to `out_dir` when the block succeeds.

    An interrupted run that was to replace another one, by `force`, still replaces it when resumed.
    Where the block fails, a folder with a checkpoint stays and can be resumed; where it is interrupted or
    killed, also one with only a plan. Any other is removed.

    Raises:
        ConfigError: both `force` and `resume`; `out_dir` exists without `force`, is not a run, cannot be
            written, is in use by another process, its disk is full, or an interrupted run is waiting there.
    """
    if force and resume:
        raise ConfigError("--resume and --force contradict each other; use --force only to start over")
    out_dir = os.path.realpath(out_dir)  # a symbolic link stays, its target is replaced
    partial = f"{out_dir}{PARTIAL}"
    parent = os.path.dirname(out_dir)
    restore_folder(partial, out_dir, _is_run)
    if os.path.isfile(os.path.join(out_dir, LOCK)) and _is_run(out_dir, UNFINISHED_FILES):
        _remove_temporary(out_dir)  # the process was killed after the rename
    is_replaced = force or (resume and _is_resumable(partial) and _is_run(out_dir))
    _check_target(out_dir, force=is_replaced)
    if os.path.isdir(partial):  # checked before the lock adds a file
        _check_ours(partial)
    try:
        os.makedirs(partial, exist_ok=True)
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise _not_writable(out_dir, error) from None
    with _locked(partial):
        is_kept = _is_resumable(partial) and not force  # also where this process fails
        try:
            _clear(partial, force=force, resume=resume)
            if free < MIN_FREE_BYTES:
                missing = f"{parent} has {free >> 20} MB free but a run needs {MIN_FREE_BYTES >> 20} MB"
                raise ConfigError(f"{missing}; free some space or choose another --out")
            yield partial
            _check_target(out_dir, force=is_replaced)  # another process may have created it meanwhile
            # with the checkpoint: the process may be killed at any instant
            replace_folder(partial, out_dir, _is_run)
            _remove_temporary(out_dir)
        except KeyboardInterrupt:
            is_kept = _is_resumable(partial)
            raise
        except OSError as error:
            error.filename = error.filename or out_dir  # a full disk names no file
            raise
        finally:
            is_kept = is_kept or has_checkpoints(os.path.join(partial, CHECKPOINTS))
            if os.path.isdir(partial) and not is_kept and _is_ours(partial):
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(partial: str) -> Iterator[None]:
    """Hold the folder's lock; the system releases it when a process is killed."""
    from filelock import FileLock, Timeout

    lock = FileLock(os.path.join(partial, LOCK))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{partial} is in use by another process; wait, or choose another --out") from None
    except OSError as error:
        raise _not_writable(partial, error) from None
    try:
        yield
    finally:
        lock.release()


def _not_writable(folder: str, error: OSError) -> ConfigError:
    return ConfigError(f"could not write {folder}: {error.strerror}; choose another --out")


def _clear(partial: str, *, force: bool, resume: bool) -> None:
    """Empty what an earlier process has left, unless it is to be resumed."""
    _check_ours(partial)
    if _is_resumable(partial):
        if resume:
            return
        if not force:
            raise ConfigError(f"{partial} is an interrupted run; use --resume, or --force to start over")
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
    return names <= UNFINISHED_FILES


def _remove_temporary(run: str) -> None:
    """Remove checkpoints and the lock from a finished run; the lock last, since it marks the rest as ours."""
    shutil.rmtree(os.path.join(run, CHECKPOINTS), ignore_errors=True)
    with suppress(OSError):
        os.remove(os.path.join(run, LOCK))


def is_finished(run: str, settings: Mapping[str, Any]) -> bool:
    """Return True if a folder is a finished run with the same settings, False if there is one to resume.

    Raises:
        ConfigError: its config.json has other values; they are named.
    """
    if not _is_run(run) or _is_resumable(f"{os.path.realpath(run)}{PARTIAL}"):
        return False
    own = dict(flatten(settings))
    had = {name: value for name, value in flatten(_read_config(run)) if name in own}
    if changed := differences(had, own):
        remedy = "choose another --out, or use --force instead of --resume"
        raise ConfigError(f"{run} is finished and had other settings: {name_some(changed)}; {remedy}")
    return True


def is_record(path: str) -> bool:
    """Return True if a path is, or would be, one of the files of a run."""
    folder, name = os.path.split(os.path.abspath(path))
    return name.lower() in {each.lower() for each in RUN_FILES} and "pixelplay" in _read_config(folder)


def _is_run(folder: str, names: frozenset[str] = RUN_FILES) -> bool:
    """Return True if a folder is a run and holds nothing else: it can be replaced without loss."""
    return "pixelplay" in _read_config(folder) and set(os.listdir(folder)) <= names


def _read_config(folder: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _check_target(out_dir: str, *, force: bool) -> None:
    if not os.path.lexists(out_dir) or (os.path.isdir(out_dir) and not os.listdir(out_dir)):
        return
    if not _is_run(out_dir):
        raise ConfigError(f"{out_dir} is not a run or holds other files, so it is kept; choose another --out")
    if not force:
        raise ConfigError(f"{out_dir} already exists; use --force to replace it or choose another --out")
