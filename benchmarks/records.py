"""Write the measurements of one benchmark run as JSON; `make_results.py` turns them into RESULTS.md.

A record is one file in `benchmarks/results/`: section, title, command, commit, date, hardware, notes and
rows. A row is one method on one dataset: metrics with the value of each seed, mean and standard
deviation, and the time in s. It contains no host names and no folders.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SECTIONS = (
    "Accuracy",
    "Comparison with fastai",
    "Class imbalance",
    "Calibration and uncertainty",
    "Label issues and near-duplicates",
    "Explanations",
    "Speed",
    "Robustness",
)


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Build a parser with the script's docstring as its description and the option --record."""
    description = (doc or "").partition("\nUsage:")[0]
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    script = Path(sys.argv[0]).stem
    parser.add_argument(
        "--record",
        metavar="NAME",
        default=script,
        help=f"write benchmarks/results/NAME.json; git ignores names that start with 'trial' [{script}]",
    )
    return parser


class Record:
    """Collect the rows of one benchmark run and write them as JSON.

    Args:
        section: heading of RESULTS.md, one of SECTIONS.
        title: name of the table below it.
        name: file name without suffix.
        notes: sentences to print below the table.
    """

    def __init__(self, section: str, title: str, name: str, *, notes: Sequence[str] = ()) -> None:
        if section not in SECTIONS:
            raise ValueError(f"unknown section {section!r}; use one of {', '.join(SECTIONS)}")
        self.path = RESULTS / f"{name}.json"
        self.content: dict[str, Any] = {
            "section": section,
            "title": title,
            "command": command_line(sys.argv),
            "commit": current_commit(),
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": hardware(),
            "notes": list(notes),
            "rows": [],
        }

    def add(
        self,
        data: str | Path,
        split: str,
        method: str,
        metrics: Mapping[str, float | Sequence[float] | dict[str, Any]],
        *,
        seeds: Sequence[int] = (),
        seconds: float | Sequence[float] = (),
    ) -> None:
        """Add one row.

        Args:
            data: name of the dataset; of a path, its last part without the suffix of a table or archive.
            metrics: name → one value, the value of each seed or run, or what `difference` returns.
            seeds: of the values, in the same order; empty where nothing is random.
            seconds: time of each run.
        """
        row = {
            "data": re.sub(r"\.(csv|tsv|parquet|zip)$", "", Path(data).name),
            "split": split,
            "method": method,
            "seeds": list(seeds),
            "metrics": {
                name: value if isinstance(value, dict) else summarize(value)
                for name, value in metrics.items()
            },
            "seconds": [round(float(s), 1) for s in _as_list(seconds)],
        }
        self.content["rows"].append(row)

    def write(self) -> None:
        """Write the file and print its name."""
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps(self.content, indent=1, ensure_ascii=False)
        self.path.write_text(text + "\n", encoding="utf-8")
        print(f"record: benchmarks/results/{self.path.name}", file=sys.stderr)


def summarize(values: float | Sequence[float]) -> dict[str, Any]:
    """Return values, mean and sample standard deviation (None for a single value)."""
    numbers = [_plain(value) for value in _as_list(values)]
    sd = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"values": numbers, "mean": _plain(statistics.mean(numbers)), "sd": sd}


def difference(value: float, low: float, high: float) -> dict[str, Any]:
    """Return a difference with its interval; both are printed with a sign."""
    return {**summarize(value), "interval": [float(low), float(high)], "signed": True}


def hardware() -> dict[str, Any]:
    """Return CPU model, number of cores and, where torch is loaded and finds one, the GPU."""
    found: dict[str, Any] = {"cpu": _cpu_model(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def current_commit() -> str:
    """Return the abbreviated commit of this checkout, with "-dirty" where src has other changes."""
    root = RESULTS.parents[1]
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "src"], cwd=root, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changes else commit


def command_line(argv: Sequence[str]) -> str:
    """Return the command as it would be typed at the root of the project, without folders of this machine."""
    words = [re.sub(r"(?<![\w.])(?:/|\.\./|~/)[^\s=]*", lambda m: Path(m[0]).name, word) for word in argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(argv[0]).name}", *words])


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, Sequence) else [values]


def _plain(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)
