"""label_issues.csv and its command: planted wrong labels, files with two labels, hostile names."""

import json
import re
import shutil
from pathlib import Path

import pytest

import pixelplay
from conftest import draw_folder
from pixelplay.cli.main import main
from tables import read_rows


@pytest.fixture(scope="module")
def run(tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: a cross-validated run with three planted wrong labels and one file with two labels."""
    root = tmp_path_factory.mktemp("label_issues")
    photos = draw_folder(root / "photos", {"bars": 24, "dots": 24, "rings": 24})
    for i in (3, 5, 7):
        shutil.move(photos / f"dots/{i:03}.png", photos / f"bars/wrong{i}.png")
    (photos / "dots").rename(photos / "=dots")
    shutil.copy(photos / "rings/002.jpg", photos / "bars/twin.jpg")
    tiny = [
        *tiny_settings,
        "--finetune",
        "none",
        "--quiet",
    ]
    assert main(["crossval", str(photos), "--out", str(root / "run"), *tiny]) == 0
    return root / "run"


def test_planted_wrong_labels_are_listed_with_what_they_are(run: Path) -> None:
    wrong = [row for row in read_rows(run / "label_issues.csv") if "wrong" in row["path"]]
    assert wrong  # random layers tell few of them
    assert read_rows(run / "label_issues.csv")[0] == wrong[0]
    for row in wrong:
        assert (row["label"], row["proposed"]) == ("bars", "'=dots")
        assert re.fullmatch(r"0\.\d\d for '=dots', 0\.0\d for 'bars'", row["reason"])


def test_a_file_with_two_labels_is_listed_under_both(run: Path) -> None:
    found = {row["path"]: row for row in read_rows(run / "label_issues.csv")}
    assert "the same image as rings/002.jpg, a 'rings'" in found["bars/twin.jpg"]["reason"]
    assert "the same image as bars/twin.jpg, a 'bars'" in found["rings/002.jpg"]["reason"]


def test_rows_stand_in_the_order_of_suspicion(run: Path) -> None:
    quality = [float(row["quality"]) for row in read_rows(run / "label_issues.csv")]
    assert quality == sorted(quality)
    assert {row["split"] for row in read_rows(run / "label_issues.csv")} == {"oof"}


def test_command_and_python_read_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label_issues", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    report = pixelplay.read_label_issues(str(run))
    assert shown == report.to_json()
    assert shown["n_checked"] == {"oof": 73}
    # the table's leading ' is a spreadsheet's matter
    assert {suspect.proposed for suspect in report.label_issues if "wrong" in suspect.path} == {"=dots"}
    assert json.loads((run / "metrics.json").read_text())["label_issues"]["n"] == len(report.label_issues)
    assert main(["label_issues", str(run)]) == 0
    text = capsys.readouterr().out
    assert (
        f"{len(report.label_issues)} of 73 held-out images (73 out of fold) have a label that looks wrong"
        in text
    )
    assert "bars/twin.jpg" in text


def test_a_trained_run_checks_what_it_held_out(
    drawn_images: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["label_issues", str(tiny_run), "--json"]) == 0
    n_checked = json.loads(capsys.readouterr().out)["n_checked"]
    assert n_checked == {"oof": 38, "test": 10}
