"""Read tables and JSON files without PixelPlay's own code."""

import csv
import json
from pathlib import Path
from typing import Any


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: str | Path) -> Any:
    """Read a JSON file; NaN and infinity are refused."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in {path}")

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
