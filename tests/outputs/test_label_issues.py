"""label_issues.csv and its command: planted wrong labels, files with two labels, unusual names."""

import json
import re
import shutil
from pathlib import Path

import pytest

import pixelplay
from conftest import draw_folder
from pixelplay.cli.main import main
from pixelplay.errors import BundleError
from tables import read_rows


@pytest.fixture(scope="module")
def run(tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: a cross-validated run with three planted wrong labels and one file with two labels."""
    root = tmp_path_factory.mktemp("label_issues")
    images = draw_folder(root / "photos", {"bars": 24, "dots": 24, "rings": 24})
    for i in (3, 5, 7):
        shutil.move(images / f"dots/{i:03}.png", images / f"bars/wrong{i}.png")
    (images / "dots").rename(images / "=dots")
    shutil.copy(images / "rings/002.jpg", images / "bars/twin.jpg")
    options = [*tiny_settings, "--finetune", "none", "--quiet"]
    assert main(["crossval", str(images), "--out", str(root / "run"), *options]) == 0
    return root / "run"


def test_label_issues_table_has_the_documented_columns(run: Path) -> None:
    header = (run / "label_issues.csv").read_text().splitlines()[0]
    assert header == "path,split,label,suggested,score,prob_label,prob_suggested,reason"


def test_planted_wrong_labels_become_label_issues(run: Path) -> None:
    wrong = [row for row in read_rows(run / "label_issues.csv") if "wrong" in row["path"]]
    assert wrong  # random layers separate few of them
    assert read_rows(run / "label_issues.csv")[0] == wrong[0]
    for row in wrong:
        assert (row["label"], row["suggested"]) == ("bars", "'=dots")
        assert re.fullmatch(r"0\.\d\d for '=dots', 0\.0\d for 'bars'", row["reason"])


def test_duplicates_with_different_labels_are_both_label_issues(run: Path) -> None:
    found = {row["path"]: row for row in read_rows(run / "label_issues.csv")}
    assert "same file as rings/002.jpg, labelled 'rings'" in found["bars/twin.jpg"]["reason"]
    assert "same file as bars/twin.jpg, labelled 'bars'" in found["rings/002.jpg"]["reason"]


def test_label_issues_are_sorted_by_score(run: Path) -> None:
    scores = [float(row["score"]) for row in read_rows(run / "label_issues.csv")]
    assert scores == sorted(scores)
    assert {row["split"] for row in read_rows(run / "label_issues.csv")} == {"oof"}


def test_label_issues_command_and_python_agree(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label-issues", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    report = pixelplay.read_label_issues(str(run))
    assert shown == report.to_json()
    assert shown["n_checked"] == {"oof": 73}
    # the leading ' in the table is only for spreadsheets
    assert {issue.suggested for issue in report.label_issues if "wrong" in issue.path} == {"=dots"}
    assert json.loads((run / "metrics.json").read_text())["label_issues"]["n"] == len(report.label_issues)
    assert main(["label-issues", str(run)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{len(report.label_issues)} of 73 held-out images have a label that looks wrong")
    assert "out of fold 73" in text.splitlines()[0]
    assert "bars/twin.jpg" in text


def test_label_issues_of_a_trained_run_cover_all_held_out_images(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["label-issues", str(tiny_run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_checked"] == {"oof": 38, "test": 10}


def test_label_issues_of_a_damaged_run_are_an_error(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "run"
    with pytest.raises(BundleError, match=f"{damaged} does not exist"):
        pixelplay.read_label_issues(str(damaged))
    damaged.mkdir()
    with pytest.raises(BundleError, match=r"run has no label_issues\.csv"):
        pixelplay.read_label_issues(str(damaged))
    shutil.copy(run / "label_issues.csv", damaged)
    with pytest.raises(BundleError, match=r"run are missing or damaged \(FileNotFoundError: .*metrics\.json"):
        pixelplay.read_label_issues(str(damaged))
