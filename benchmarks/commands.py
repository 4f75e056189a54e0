"""Run `pixelplay` commands in separate processes and read what they write."""

import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixelplay.data.dataset import ImageDataset


@dataclass(frozen=True)
class FinishedRun:
    """The folder of a finished `pixelplay train` or `pixelplay crossval`, and the seconds it took."""

    folder: Path
    seconds: float

    @property
    def metrics(self) -> dict[str, Any]:
        """Return the content of metrics.json."""
        content: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        return content

    def read_table(self, name: str) -> list[dict[str, str]]:
        """Return the rows of a CSV file of the run."""
        with open(self.folder / name, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def pixelplay_command(command: str, data: str | Path, options: Sequence[str] = ()) -> list[str]:
    """Return the arguments of one quiet `pixelplay` command in this interpreter."""
    return [sys.executable, "-m", "pixelplay", command, str(data), "--quiet", *options]


@contextmanager
def run_pixelplay(
    command: str,
    data: str | Path,
    options: Sequence[str] = (),
    *,
    cache_dir: str | Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[FinishedRun]:
    """Run one command in a new process and yield its folder, which is removed afterwards.

    Args:
        command: "train" or "crossval".
        options: further command-line arguments.
        cache_dir: default: an empty folder, so that the time is that of a cold start.
        env: environment of the process (default: this one's).
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        words = pixelplay_command(command, data, ["--out", str(folder), *options])
        words += ["--cache-dir", str(cache_dir or Path(scratch) / "cache")]
        start = time.perf_counter()
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=env)
        yield FinishedRun(folder, time.perf_counter() - start)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV table of images."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_split_table(path: Path, dataset: ImageDataset, splits: Mapping[int, str]) -> None:
    """Write the images of `dataset` whose positions are keys of `splits` as a table with a split column."""
    rows = [
        (dataset.paths[i], dataset.classes[dataset.labels[i]], split) for i, split in sorted(splits.items())
    ]
    write_table(path, ("path", "label", "split"), rows)
