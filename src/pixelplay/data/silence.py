"""Pillow's warnings and log lines, kept from the user while photographs are decoded."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def silence_pillow() -> Iterator[None]:
    """Keep Pillow's warnings and log lines from the user while a job decodes images.

    Filters for warnings belong to the process: the first job that enters changes them, the last that
    leaves restores them, however the jobs overlap. Each worker process needs its own.
    """
    with _SILENCE.lock:
        _SILENCE.n_jobs += 1
        if _SILENCE.n_jobs == 1:
            _SILENCE.begin()
    try:
        yield
    finally:
        with _SILENCE.lock:
            _SILENCE.n_jobs -= 1
            if _SILENCE.n_jobs == 0:
                _SILENCE.undo.close()


class _Silence:
    """How many jobs want silence, and how to end it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.n_jobs = 0
        self.undo = ExitStack()

    def begin(self) -> None:
        self.undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\b")
        logger = logging.getLogger("PIL")
        self.undo.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL + 1)


_SILENCE = _Silence()
