"""Tests of corrected labels: they are trained on, and metrics use the original labels."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import pixelplay
from conftest import draw_folder
from contexts import featureless, training_data_of
from pixelplay.cli.main import main
from pixelplay.config import TrainConfig
from pixelplay.data.relabel import read_corrected_labels
from pixelplay.data.sources import open_dataset
from pixelplay.run_log import RunLog
from pixelplay.training.prepare import log_problems
from pixelplay.training.training_data import build_training_data
from tables import read_json, read_rows

N = 48


@pytest.fixture(scope="module")
def tiny(tiny_settings: list[str]) -> list[str]:
    return ["--finetune", "none", *tiny_settings, "--quiet"]


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images with four dots labelled as bars; a table that corrects them and excludes one of the rings."""
    root = tmp_path_factory.mktemp("mislabelled")
    photos = draw_folder(root / "photos", {"bars": 20, "dots": 20, "rings": 8})
    rows = []
    for i in (1, 3, 5, 7):
        shutil.move(photos / f"dots/{i:03}.png", photos / f"bars/dot{i}.png")
        rows.append((f"bars/dot{i}.png", "dots"))
    rows.append(("rings/000.jpg", ""))
    with open(root / "corrected.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    return photos, root / "corrected.csv"


@pytest.mark.parametrize("command", ["train", "crossval"])
def test_relabel_keeps_metrics_on_the_original_labels(
    command: str, mislabelled: tuple[Path, Path], tiny: list[str], tmp_path: Path
) -> None:
    photos, table = mislabelled
    original, corrected = tmp_path / "original", tmp_path / "corrected"
    options = ["--n-folds", "4", *(["--test-frac", "0"] if command == "train" else []), *tiny]
    assert main([command, str(photos), "--out", str(original), *options]) == 0
    assert main([command, str(photos), "--out", str(corrected), "--relabel", str(table), *options]) == 0
    metrics = read_json(corrected / "metrics.json")
    assert metrics["oof"]["n"] == N  # excluded images are still measured
    assert metrics["oof_corrected"]["n"] == N - 1
    assert metrics["oof_corrected"]["accuracy"]["value"] > metrics["oof"]["accuracy"]["value"]
    rows = {row["path"]: row for row in read_rows(corrected / "oof.csv")}
    assert rows["bars/dot1.png"]["label"] == "bars"
    assert (rows["rings/000.jpg"]["status"], rows["rings/000.jpg"]["fold"]) == ("ok", "")
    accuracy = np.mean([row["prediction"] == row["label"] for row in rows.values()])
    assert metrics["oof"]["accuracy"]["value"] == pytest.approx(accuracy)
    corrections = {c["path"]: (c["label"], c["corrected"]) for c in metrics["data"]["corrections"]}
    assert corrections["bars/dot3.png"] == ("bars", "dots")
    assert corrections["rings/000.jpg"] == ("rings", None)
    assert "oof_corrected" not in read_json(original / "metrics.json")
    assert any(re.search(r"corrected\.csv: 4 .* 1 image ", note) for note in metrics["notes"])


def test_excluded_training_images_do_not_join_val(
    mislabelled: tuple[Path, Path], tiny_settings: list[str], tmp_path: Path
) -> None:
    photos, _ = mislabelled
    options = [*tiny_settings, "--quiet", "--test-frac", "0"]
    options += ["--finetune", "partial", "--epochs", "1", "--unfreeze-stages", "1"]
    options += ["--head-init", "random", "--ensemble-probe", "off"]  # otherwise the probe may be selected
    assert main(["train", str(photos), "--out", str(tmp_path / "original"), *options]) == 0
    split = read_json(tmp_path / "original/split.json")
    excluded = {*split["train"][:5], *split["val"][:2]}
    (tmp_path / "out.csv").write_text("".join(["path,label\n", *(f"{path},\n" for path in sorted(excluded))]))
    relabel = ["--relabel", str(tmp_path / "out.csv")]
    assert main(["train", str(photos), "--out", str(tmp_path / "fewer"), *options, *relabel]) == 0
    assert {row["path"] for row in read_rows(tmp_path / "fewer/val.csv")} == {*split["val"]}
    metrics = read_json(tmp_path / "fewer/metrics.json")
    assert metrics["val"]["n"] == len(split["val"])
    assert metrics["val_corrected"]["n"] == len(split["val"]) - 2


def test_excluded_images_are_not_trained_on(
    mislabelled: tuple[Path, Path], tiny: list[str], tmp_path: Path
) -> None:
    photos, table = mislabelled
    run = tmp_path / "run"
    command = ["train", str(photos), "--out", str(run), "--relabel", str(table), "--test-frac", "0"]
    assert main([*command, *tiny]) == 0
    assert pixelplay.evaluate(run, photos).n_trained_on == N - 1
    assert read_json(run / "metrics.json")["train_counts"] == {"bars": 20, "dots": 20, "rings": 7}


@pytest.mark.parametrize("command", ["train", "crossval"])
def test_dropped_label_issues_are_recorded_and_still_measured(
    command: str, mislabelled: tuple[Path, Path], tiny: list[str], tmp_path: Path
) -> None:
    photos, run = mislabelled[0], tmp_path / "run"
    options = ["--test-frac", "0"] if command == "train" else []
    assert main([command, str(photos), "--out", str(run), "--drop-label-issues", *options, *tiny]) == 0
    metrics = read_json(run / "metrics.json")
    assert metrics["oof"]["n"] == N  # on the original labels
    assert read_json(run / "config.json")["drop_label_issues"] is True
    listed = {issue.path for issue in pixelplay.read_label_issues(str(run)).label_issues}
    if command == "train":
        dropped = set(metrics["data"]["dropped_label_issues"])
        assert dropped == set(read_json(run / "split.json")["dropped"])
        assert len({f"bars/dot{i}.png" for i in (1, 3, 5, 7)} & dropped) >= 2
        assert dropped & listed
        assert pixelplay.evaluate(run, photos).n_trained_on == N - len(dropped)
        assert sum(metrics["train_counts"].values()) == N - len(dropped)
    else:
        n_dropped = [fold["chosen"]["dropped_label_issues"]["value"] for fold in metrics["folds"]]
        assert len(n_dropped) == 5
        assert sum(n_dropped) > 0
    assert any(re.search(r"dropped \d+ images? of \d+ .*bars/dot", note) for note in metrics["notes"])


def test_corrected_labels_are_no_label_issues(
    mislabelled: tuple[Path, Path], tiny: list[str], tmp_path: Path
) -> None:
    photos, table = mislabelled
    run = tmp_path / "run"
    assert main(["crossval", str(photos), "--out", str(run), "--relabel", str(table), *tiny]) == 0
    listed = {issue.path for issue in pixelplay.read_label_issues(str(run)).label_issues}
    assert "rings/000.jpg" not in listed
    for issue in pixelplay.read_label_issues(str(run)).label_issues:
        assert not (issue.path.startswith("bars/dot") and issue.label == "bars")


def test_relabel_accepts_label_issues_csv_of_a_run(
    mislabelled: tuple[Path, Path], tiny: list[str], tmp_path: Path
) -> None:
    photos, _ = mislabelled
    assert main(["crossval", str(photos), "--out", str(tmp_path / "first"), *tiny]) == 0
    table = tmp_path / "first/label_issues.csv"
    again = ["crossval", str(photos), "--out", str(tmp_path / "again"), "--relabel", str(table), *tiny]
    assert main(again) == 0  # nothing was corrected in it, so nothing changes
    assert (tmp_path / "first/oof.csv").read_bytes() == (tmp_path / "again/oof.csv").read_bytes()


def test_relabel_does_not_change_a_predefined_test_split(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    draw_folder(root / "train", {"bars": 4, "dots": 4})
    draw_folder(root / "test", {"bars": 2, "dots": 2}, first_seed=50)
    (tmp_path / "corrected.csv").write_text(
        "path,label\ntest/bars/000.jpg,dots\ntrain/bars/000.jpg,dots\ntest/dots/000.jpg,\n"
    )
    dataset = open_dataset(str(root))
    corrections = read_corrected_labels(str(tmp_path / "corrected.csv"), dataset)
    data = build_training_data(dataset, featureless(dataset), TrainConfig(finetune="none"), corrections)
    plain = training_data_of(root, TrainConfig(finetune="none"))
    np.testing.assert_array_equal(data.split.test, plain.split.test)
    test = data.split.test
    np.testing.assert_array_equal(data.labels[test], data.original_labels[test])
    names = {dataset.paths[i]: data.classes[data.labels[i]] for i in data.fit_rows}
    assert names["train/bars/000.jpg"] == "dots"
    assert len(data.excluded) == 0
    assert (data.corrected_labels[test] == -1).sum() == 1


def test_relabel_with_an_empty_table_corrects_nothing(drawn_images: Path, tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("path,split,label\n")
    dataset = open_dataset(str(drawn_images))
    corrections = read_corrected_labels(str(tmp_path / "none.csv"), dataset)
    np.testing.assert_array_equal(corrections.labels, dataset.labels)
    assert not corrections.reviewed.any()


# --- bad input ---


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ("path,label\nbars/nowhere.jpg,dots\n", r"corrected\.csv .*bars/nowhere\.jpg, .*photos"),
        ("path,label\nbars/000.jpg,dotz\n", r"corrected\.csv .*'dotz', .*'dots'"),
        ("path,label\nbars/000.jpg,dots\nbars/000.jpg,rings\n", r"bars/000\.jpg .*'dots' and 'rings'"),
        ("path,colour\nbars/000.jpg,red\n", r"corrected\.csv .*path, colour; .*--label-column"),
        ("", r"corrected\.csv has no rows"),
        (None, r"corrected\.csv cannot be read"),
        ("path,label\n" + "".join(f"dots/{i:03}.{'jpg' if i % 2 == 0 else 'png'},\n" for i in range(15))
         + "".join(f"rings/{i:03}.{'jpg' if i % 2 == 0 else 'png'},\n" for i in range(9)), "has 1 class"),
    ],
)  # fmt: skip
def test_invalid_relabel_table_is_an_error_in_one_line(
    table: str | None,
    match: str,
    drawn_images: Path,
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if table is not None:
        (tmp_path / "corrected.csv").write_text(table)
    command = ["train", str(drawn_images), "--out", str(tmp_path / "run"), *tiny]
    assert main([*command, "--relabel", str(tmp_path / "corrected.csv")]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(match, err)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.partial").exists()


def notes_on(root: Path, corrections: str) -> list[str]:
    (root.parent / "corrected.csv").write_text("path,label\n" + corrections)
    dataset = open_dataset(str(root))
    config = TrainConfig(finetune="none", relabel=str(root.parent / "corrected.csv"))
    log = RunLog(quiet=True)
    assert config.relabel is not None
    data = build_training_data(
        dataset, featureless(dataset), config, read_corrected_labels(config.relabel, dataset)
    )
    log_problems(data, config, log)
    return log.notes


def test_class_left_empty_by_relabel_is_noted(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "photos", {"bars": 6, "dots": 6, "rings": 3})
    rings = sorted(path.relative_to(root) for path in (root / "rings").iterdir())
    notes = notes_on(root, "".join(f"{path},\n" for path in rings))
    assert any("1 of 3 classes" in note and note.endswith(": rings") for note in notes)


def test_class_filled_by_relabel_is_not_noted_as_absent(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    draw_folder(root / "train", {"bars": 14, "dots": 4})
    draw_folder(root / "test", {"bars": 2, "rings": 2}, first_seed=50)
    absent = r"^1 expected class .*: rings(?! \()"
    assert any(re.match(absent, note) for note in notes_on(root, ""))
    few = [f"train/bars/{name},rings\n" for name in ("000.jpg", "001.png", "002.jpg")]
    notes = notes_on(root, "".join(few))
    assert not any(re.match(absent, note) for note in notes)
    assert any(re.match(r"1 expected class .* 10 .*: rings \(3\)", note) for note in notes)
