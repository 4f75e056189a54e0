"""Run log: notes that go into the records of a run, and progress on stderr.

A closed stderr does not stop the run.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from pixelplay.text import printable


class RunLog:
    """Collect notes on what was skipped, repaired, assumed or ignored, and show them on stderr.

    Args:
        quiet: print nothing; notes are still collected.
        json_progress: print JSON for programs, one object per line.

    Attributes:
        notes: every note, in order; the records of a run store them.
    """

    def __init__(self, *, quiet: bool = False, json_progress: bool = False) -> None:
        self.notes: list[str] = []
        self._quiet = quiet
        self._is_json = json_progress and not quiet
        self._prefix = ""
        self._progress = Progress("", None, "")

    def note(self, text: str) -> None:
        """Record and print one line, prefixed with the current section; a repeated note is dropped."""
        self.note_for_run(f"{self._prefix}{text}")

    def note_for_run(self, text: str) -> None:
        """Record and print a note that applies to the whole run, without the section as prefix."""
        if text in self.notes:
            return
        self.notes.append(text)
        if self._is_json:
            _print_line(json.dumps({"note": text}))
        else:
            self.info(f"note: {text}")

    def replay(self, notes: Sequence[str]) -> None:
        """Record notes that an earlier process has printed."""
        self.notes += [note for note in notes if note not in self.notes]

    def info(self, text: str) -> None:
        """Print one line that is not recorded."""
        if not self._quiet:
            self._progress.clear()
            _print_line(json.dumps({"info": text}) if self._is_json else text)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Prefix notes and progress with the name of a section, such as a fold."""
        before, self._prefix = self._prefix, f"{name}: "
        try:
            yield
        finally:
            self._prefix = before

    @contextmanager
    def progress(self, what: str, total: int | None, unit: str = "images") -> Iterator["Progress"]:
        """Show the progress of a task: a bar, or one line per minute where stderr is not a terminal.

        Args:
            total: number of units; None where only the end shows it.
            unit: name of the units, in the plural.
        """
        kind: type[Progress] = _LineProgress
        if self._quiet:
            kind = Progress
        elif self._is_json:
            kind = _JsonProgress
        elif sys.stderr is not None and sys.stderr.isatty():
            kind = _BarProgress
        before, self._progress = self._progress, kind(f"{self._prefix}{what}", total, unit)
        try:
            yield self._progress
            self._progress.clear(close=True)
            self._progress.show(done=True)
        finally:
            self._progress.clear(close=True)
            self._progress = before


class Progress:
    """Count finished units of a task; this class shows nothing, its subclasses do."""

    interval_s = math.inf  # between two calls of `show`

    def __init__(self, task: str, total: int | None, unit: str) -> None:
        self.task, self.total, self.unit, self.n = task, total, unit, 0
        self.start = self.shown = time.monotonic()

    def update(self, n: int = 1) -> None:
        """Count n more finished units."""
        self.n += n
        if time.monotonic() - self.shown >= self.interval_s:
            self.show()

    def set_total(self, total: int) -> None:
        """Correct the total number of units."""
        self.total = total

    def show(self, *, done: bool = False) -> None:
        """Print the progress, or the end of the task."""

    def clear(self, *, close: bool = False) -> None:
        """Remove a bar from the terminal, so that a line can be printed; `close` ends it."""

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the task ends; None if there is nothing to estimate from."""
        elapsed = time.monotonic() - self.start
        return elapsed / self.n * (self.total - self.n) if self.total and self.n else None


class _LineProgress(Progress):
    """Print at most one line per minute, and one at the end."""

    interval_s = 60.0  # a log file needs no moving bar

    def show(self, *, done: bool = False) -> None:
        self.shown = time.monotonic()
        left = self.seconds_left
        rest = "" if left is None else f" of {self.total:,}, {_format_duration(left)} left"
        if done:
            rest = f" in {_format_duration(self.shown - self.start)}"
        unit = re.sub("(?<=ch)es$|s$", "", self.unit) if self.n == 1 else self.unit
        _print_line(f"{self.task}: {self.n:,} {unit}{rest}")


class _BarProgress(_LineProgress):
    """Show a moving bar on a terminal, and one line at the end."""

    def __init__(self, task: str, total: int | None, unit: str) -> None:
        from tqdm import tqdm

        super().__init__(task, total, unit)
        has_size = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # some terminals do not report it
        counts = "{n_fmt} of {total_fmt}, {rate_noinv_fmt}, {remaining} left"
        self._bar = tqdm(
            total=total,
            desc=task,
            unit=f" {unit}" if total else unit,
            file=sys.stderr,
            dynamic_ncols=has_size,
            ncols=None if has_size else 80,
            nrows=None if has_size else 24,
            mininterval=0.2,
            leave=False,
            bar_format="{desc}: {percentage:3.0f}% |{bar}| " + counts
            if total
            else "{desc}: {n_fmt} {unit} in {elapsed}",
        )

    def update(self, n: int = 1) -> None:
        self.n += n
        self._bar.update(n)

    def set_total(self, total: int) -> None:
        self._bar.total = total

    def clear(self, *, close: bool = False) -> None:
        if close:
            self._bar.close()
        else:
            self._bar.clear()


class _JsonProgress(Progress):
    """Print at most two JSON objects per second, the first at once and the last at the end."""

    interval_s = 0.5

    def __init__(self, task: str, total: int | None, unit: str) -> None:
        super().__init__(task, total, unit)
        self.show()

    def show(self, *, done: bool = False) -> None:
        self.shown = time.monotonic()
        elapsed, left = self.shown - self.start, self.seconds_left
        content = {
            "progress": self.task,
            "unit": self.unit,
            "total": self.total,
            "n": self.n,
            "done": done,
            "elapsed_s": round(elapsed, 2),
            "per_s": round(self.n / elapsed, 2) if elapsed > 0 else None,
            "left_s": None if left is None else round(left, 1),
        }
        _print_line(json.dumps(content))


def _print_line(line: str) -> None:
    if sys.stderr is None:  # a program without a console; print would use stdout instead
        return
    with suppress(OSError, ValueError):  # ValueError: stderr was closed
        print(printable(line), file=sys.stderr, flush=True)


def _format_duration(seconds: float) -> str:
    """Format seconds as 7 s, 1:40 min or 2:05 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes}:{whole % 60:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"
