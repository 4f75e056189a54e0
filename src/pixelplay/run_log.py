"""What the user is told while it runs: notes, said once and kept, and progress on stderr.

A reader of stderr that has gone away stops neither.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Protocol

from pixelplay.text import printable

typed: ContextVar[Sequence[str]] = ContextVar(
    "typed", default=()
)  # words behind `pixelplay`, if it was typed
SECONDS_BETWEEN_OBJECTS = 0.5  # for programs
SECONDS_BETWEEN_LINES = 60.0  # where stderr is a file: a log is no place for a moving bar


class Progress(Protocol):
    """Counts what is done."""

    def update(self, n: int = 1) -> object:
        """Count n more units."""

    def expect(self, total: int) -> object:
        """Let there be so many units in all, other than was thought at first."""


class RunLog:
    """Collects what was skipped, repaired, assumed or downgraded, and shows it on stderr.

    Args:
        quiet: say nothing; notes are kept all the same.
        is_json: say everything as JSON, an object a line, for programs.

    Attributes:
        started: when it was made, on the monotonic clock; a time budget counts from there.
        notes: every note in the order it was made; the run's records keep them.
        command: what the user typed; None where Python was used.
    """

    def __init__(self, *, quiet: bool = False, is_json: bool = False) -> None:
        self.started = time.monotonic()
        self.notes: list[str] = []
        self.command = shlex.join(("pixelplay", *typed.get())) if typed.get() else None
        self._quiet = quiet
        self._is_json = is_json and not quiet
        self._chapter = ""
        self._bar: Any = None

    def note(self, text: str) -> None:
        """Say one line on stderr and keep it; a repeated line is said once."""
        text = f"{self._chapter}{text}"
        if text in self.notes:
            return
        self.notes.append(text)
        if self._is_json:
            _say_json({"note": text})
        else:
            self.tell(f"note: {text}")

    def note_for_all(self, text: str) -> None:
        """Note what is no more about one chapter than about any other."""
        chapter, self._chapter = self._chapter, ""
        self.note(text)
        self._chapter = chapter

    def keep(self, notes: Sequence[str]) -> None:
        """Take over notes that another process has said."""
        self.notes += [note for note in notes if note not in self.notes]

    def tell(self, text: str) -> None:
        """Say one line on stderr that nobody needs later."""
        if self._quiet:
            return
        if self._is_json:
            _say_json({"said": text})
            return
        if self._bar is not None:
            self._bar.clear()
        _say(text)

    @contextmanager
    def chapter(self, name: str) -> Iterator[None]:
        """Let every note and every progress say which of several like pieces of work it is about."""
        before, self._chapter = self._chapter, f"{name}: "
        try:
            yield
        finally:
            self._chapter = before

    @contextmanager
    def progress(self, what: str, total: int | None, unit: str = "images") -> Iterator[Progress]:
        """Show a bar with speed and remaining time; one line a minute where stderr is a file.

        Args:
            what: what is being done, in a word or two.
            total: units to do; None where that shows only at the end.
            unit: what is counted, in the plural.

        Yields an object whose `update(n)` counts n more units; `expect(total)` says that there are others
        in all than was thought.
        """
        if self._quiet:
            yield _Silence()
            return
        what = f"{self._chapter}{what}"
        start = time.monotonic()
        if self._is_json:
            lines = _JsonLines(what, total, unit)
            yield lines
            lines.say(is_done=True)
            return
        if sys.stderr is not None and sys.stderr.isatty():
            counter = self._bar = _make_bar(what, total, unit)
            try:
                yield counter
            finally:
                counter.close()
                self._bar = None
        else:
            counter = _Lines(what, total, unit)
            yield counter
        _say(f"{what}: {counter.n:,} {unit} in {_clock(time.monotonic() - start)}")

    def follow(self, what: str, blocks: Sequence[Sized], total: int, unit: str = "images") -> Iterator[Any]:
        """Go through blocks of units while their progress shows."""
        with self.progress(what, total, unit) as bar:
            for block in blocks:
                yield block
                bar.update(len(block))


class _Silence:
    def update(self, n: int = 1) -> None:
        pass

    def expect(self, total: int) -> None:
        pass


class _Lines:
    """Progress in lines that still read well tomorrow: at most one a minute."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._start = self._said = time.monotonic()
        self.n = 0

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            _say(f"{self._what}: {self.n:,} {self._unit}{self._rest(now - self._start)}")

    def expect(self, total: int) -> None:
        self._total = total

    def _rest(self, elapsed: float) -> str:
        if not self._total or not self.n:
            return ""
        return f" of {self._total:,}, {_clock(elapsed / self.n * (self._total - self.n))} left"


class _JsonLines:
    """Progress for programs: at most two lines a second, the first at once and the last at the end."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self._about: dict[str, Any] = {"progress": what, "unit": unit, "total": total}
        self._start = time.monotonic()
        self.n = 0
        self.say()

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self._said >= SECONDS_BETWEEN_OBJECTS:
            self.say()

    def expect(self, total: int) -> None:
        self._about["total"] = total

    def say(self, *, is_done: bool = False) -> None:
        """Say how far it is, how fast, and how long still; the last line says that it is done."""
        self._said = time.monotonic()
        elapsed, total = self._said - self._start, self._about["total"]
        rate = self.n / elapsed if elapsed > 0 else None
        left = (int(total) - self.n) / rate if total is not None and rate else None
        _say_json(
            {
                **self._about,
                "n": self.n,
                "done": is_done,
                "elapsed_s": round(elapsed, 2),
                "per_s": None if rate is None else round(rate, 2),
                "left_s": None if left is None else round(left, 1),
            }
        )


def _make_bar(what: str, total: int | None, unit: str) -> Any:
    """A moving bar; without a total it only counts, for a speed would tell nothing."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # untyped
        def expect(self, total: int) -> None:
            self.total = total

    has_size = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # some terminals do not tell theirs
    counted = "{desc}: {n_fmt} {unit} in {elapsed}"
    with_total = (
        "{desc}: {percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt}, {rate_noinv_fmt}, {remaining} left"
    )
    return Bar(
        total=total,
        desc=what,
        unit=f" {unit}" if total else unit,
        file=sys.stderr,
        dynamic_ncols=has_size,
        ncols=None if has_size else 80,
        nrows=None if has_size else 24,
        mininterval=0.2,
        leave=False,
        bar_format=with_total if total else counted,
    )


def _say_json(content: dict[str, Any]) -> None:
    _say(json.dumps(content))


def _say(line: str) -> None:
    if sys.stderr is None:  # a program without a console; print would take stdout instead
        return
    with suppress(OSError, ValueError):  # ValueError: stderr was closed
        print(printable(line), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """A duration for people: 7 s, 1:40 min, 2:05 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes}:{whole % 60:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"
