"""Benchmark scripts start, and RESULTS.md is generated from their records."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from pixelplay.evaluation.novelty import BENCHMARK_DETECTION, NOVELTY_THRESHOLD

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHARED = {"records", "commands", "probe_data"}
OTHER_ENVIRONMENT = {"fastai_worker"}  # runs where fastai is installed
SCRIPTS = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - SHARED - OTHER_ENVIRONMENT)


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmark_shows_help(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as exit_status:
        importlib.import_module(script).main()
    assert exit_status.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_record_has_mean_sd_and_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = importlib.import_module("records")
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["/somewhere/benchmarks/trashnet.py", "/data/trashnet", "--cache=/data/cache"]
    )
    record = records.Record("Accuracy", "A title", "a_name")
    record.add("/data/trashnet", "test", "linear probe", {"accuracy": [0.5, 0.75]}, seeds=[0, 1], seconds=3)
    record.write()
    text = (tmp_path / "a_name.json").read_text(encoding="utf-8")
    content = json.loads(text)
    accuracy = content["rows"][0]["metrics"]["accuracy"]
    assert (accuracy["mean"], accuracy["sd"]) == (0.625, pytest.approx(0.1768, abs=1e-4))
    assert content["command"].startswith("python benchmarks/trashnet.py trashnet")
    assert set(content["hardware"]) >= {"cpu", "cores"}
    assert "/data" not in text
    assert "/somewhere" not in text


def test_record_refuses_an_unknown_section() -> None:
    records = importlib.import_module("records")
    with pytest.raises(ValueError, match="Acuracy"):
        records.Record("Acuracy", "A title", "a_name")


def test_results_are_generated_from_the_records() -> None:
    results = importlib.import_module("make_results")
    records = results.read_records(BENCHMARKS / "results")
    assert (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8") == results.format_results(records)


def test_benchmark_detection_rates_of_the_report_are_those_of_the_record() -> None:
    record = json.loads((BENCHMARKS / "results/novelty-suite.json").read_text(encoding="utf-8"))
    rates = {
        row["data"]: row["metrics"][f"left out: above {NOVELTY_THRESHOLD}"]["mean"]
        for row in record["rows"]
        if row["method"] == "PixelPlay"
    }
    mean = rates.pop("mean of 10")
    found = (mean, min(rates.values()), max(rates.values()))
    assert len(rates) == 10
    assert tuple(round(rate, 2) for rate in found) == BENCHMARK_DETECTION


def test_commands_of_results_name_existing_scripts() -> None:
    results = importlib.import_module("make_results")
    for record in results.read_records(BENCHMARKS / "results"):
        for script in re.findall(r"benchmarks/(\w+)\.py", record["command"]):
            assert (BENCHMARKS / f"{script}.py").exists()
