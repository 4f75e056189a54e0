"""Corrected labels are learned from; figures stay on the given ones, the corrected beside."""

import csv
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
from pixelplay.data.sources import scan_source
from pixelplay.run_log import RunLog
from pixelplay.training.prepare import log_problems
from pixelplay.training.training_data import build_training_data
from tables import read_json, read_rows

N = 48


@pytest.fixture(scope="module")
def tiny(tiny_settings: list[str]) -> list[str]:
    return [
        "--finetune",
        "none",
        *tiny_settings,
        "--quiet",
    ]


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images of which four dots stand among the bars, and the table that mends it."""
    root = tmp_path_factory.mktemp("mislabelled")
    photos = draw_folder(root / "photos", {"bars": 20, "dots": 20, "rings": 8})
    rows = []
    for i in (1, 3, 5, 7):
        shutil.move(photos / f"dots/{i:03}.png", photos / f"bars/dot{i}.png")
        rows.append((f"bars/dot{i}.png", "dots"))
    rows.append(("rings/000.jpg", ""))
    with open(root / "mended.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    return photos, root / "mended.csv"


@pytest.mark.parametrize("command", ["train", "crossval"])
def test_figures_stay_on_the_given_labels(
    command: str, mislabelled: tuple[Path, Path], tiny: list[str], tmp_path: Path
) -> None:
    photos, table = mislabelled
    given, mended = tmp_path / "given", tmp_path / "mended"
    options = ["--n-folds", "4", *(["--test-frac", "0"] if command == "train" else []), *tiny]
    assert main([command, str(photos), "--out", str(given), *options]) == 0
    assert main([command, str(photos), "--out", str(mended), "--relabel", str(table), *options]) == 0
    metrics = read_json(mended / "metrics.json")
    assert metrics["oof"]["n"] == N  # what is left out of learning is measured all the same
    assert metrics["oof_corrected"]["n"] == N - 1
    assert metrics["oof_corrected"]["accuracy"]["value"] > metrics["oof"]["accuracy"]["value"]
    rows = {row["path"]: row for row in read_rows(mended / "oof.csv")}
    assert rows["bars/dot1.png"]["given"] == "bars"
    assert (rows["rings/000.jpg"]["status"], rows["rings/000.jpg"]["fold"]) == ("ok", "")
    right = np.mean([row["label"] == row["given"] for row in rows.values()])
    assert metrics["oof"]["accuracy"]["value"] == pytest.approx(right)
    corrections = {c["path"]: (c["given"], c["corrected"]) for c in metrics["data"]["corrections"]}
    assert corrections["bars/dot3.png"] == ("bars", "dots")
    assert corrections["rings/000.jpg"] == ("rings", None)
    assert "oof_corrected" not in read_json(given / "metrics.json")
    assert any("4 labels to learn from changed, 1 image left out" in note for note in metrics["notes"])


def test_what_is_left_out_of_train_is_no_part_of_val(
    mislabelled: tuple[Path, Path], tiny_settings: list[str], tmp_path: Path
) -> None:
    photos, _ = mislabelled
    options = [*tiny_settings, "--quiet", "--test-frac", "0"]
    options += ["--finetune", "partial", "--epochs", "1", "--unfreeze-stages", "1"]
    options += ["--head-init", "random", "--ensemble-probe", "off"]  # else the probe may be taken
    assert main(["train", str(photos), "--out", str(tmp_path / "given"), *options]) == 0
    split = read_json(tmp_path / "given/split.json")
    excluded = {*split["train"][:5], *split["val"][:2]}
    (tmp_path / "out.csv").write_text("".join(["path,label\n", *(f"{path},\n" for path in sorted(excluded))]))
    relabel = ["--relabel", str(tmp_path / "out.csv")]
    assert main(["train", str(photos), "--out", str(tmp_path / "less"), *options, *relabel]) == 0
    assert {row["path"] for row in read_rows(tmp_path / "less/val.csv")} == {*split["val"]}
    metrics = read_json(tmp_path / "less/metrics.json")
    assert metrics["val"]["n"] == len(split["val"])
    assert metrics["val_corrected"]["n"] == len(split["val"]) - 2


def test_what_is_left_out_is_not_learned_from(
    mislabelled: tuple[Path, Path], tiny: list[str], tmp_path: Path
) -> None:
    photos, table = mislabelled
    run = tmp_path / "run"
    command = ["train", str(photos), "--out", str(run), "--relabel", str(table), "--test-frac", "0"]
    assert main([*command, *tiny]) == 0
    assert pixelplay.evaluate(run, photos).n_trained_on == N - 1
    assert read_json(run / "metrics.json")["train_counts"] == {"bars": 20, "dots": 20, "rings": 7}


@pytest.mark.parametrize("command", ["train", "crossval"])
def test_dropped_suspects_are_recorded_and_still_measured(
    command: str, mislabelled: tuple[Path, Path], tiny: list[str], tmp_path: Path
) -> None:
    photos, run = mislabelled[0], tmp_path / "run"
    options = ["--test-frac", "0"] if command == "train" else []
    assert main([command, str(photos), "--out", str(run), "--drop-label-issues", *options, *tiny]) == 0
    metrics = read_json(run / "metrics.json")
    assert metrics["oof"]["n"] == N  # on the labels as given
    assert read_json(run / "config.json")["drop_suspects"] is True
    listed = {suspect.path for suspect in pixelplay.read_label_issues(str(run)).label_issues}
    if command == "train":
        dropped = set(metrics["data"]["dropped_suspects"])
        assert dropped == set(read_json(run / "split.json")["dropped"])
        assert len({f"bars/dot{i}.png" for i in (1, 3, 5, 7)} & dropped) >= 2
        assert dropped & listed
        assert pixelplay.evaluate(run, photos).n_trained_on == N - len(dropped)
        assert sum(metrics["train_counts"].values()) == N - len(dropped)
    else:
        each = [fold["chosen"]["dropped_suspects"]["value"] for fold in metrics["folds"]]
        assert len(each) == 5
        assert sum(each) > 0
    assert any("not learned from, as their labels look wrong" in note for note in metrics["notes"])


def test_what_the_user_has_mended_is_no_suspect_any_more(
    mislabelled: tuple[Path, Path], tiny: list[str], tmp_path: Path
) -> None:
    photos, table = mislabelled
    run = tmp_path / "run"
    assert main(["crossval", str(photos), "--out", str(run), "--relabel", str(table), *tiny]) == 0
    listed = {suspect.path for suspect in pixelplay.read_label_issues(str(run)).label_issues}
    assert "rings/000.jpg" not in listed
    for suspect in pixelplay.read_label_issues(str(run)).label_issues:
        assert not (suspect.path.startswith("bars/dot") and suspect.label == "bars")


def test_a_runs_own_suspects_are_such_a_table(
    mislabelled: tuple[Path, Path], tiny: list[str], tmp_path: Path
) -> None:
    photos, _ = mislabelled
    assert main(["crossval", str(photos), "--out", str(tmp_path / "first"), *tiny]) == 0
    table = tmp_path / "first/label_issues.csv"
    again = ["crossval", str(photos), "--out", str(tmp_path / "again"), "--relabel", str(table), *tiny]
    assert main(again) == 0  # nothing was mended in it, so nothing changes
    same = [(tmp_path / run / "oof.csv").read_bytes() for run in ("first", "again")]
    assert same[0] == same[1]


def test_a_test_part_keeps_its_labels(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    draw_folder(root / "train", {"bars": 4, "dots": 4})
    draw_folder(root / "test", {"bars": 2, "dots": 2}, first_seed=50)
    (tmp_path / "mended.csv").write_text(
        "path,label\ntest/bars/000.jpg,dots\ntrain/bars/000.jpg,dots\ntest/dots/000.jpg,\n"
    )
    dataset = scan_source(str(root))
    corrections = read_corrected_labels(str(tmp_path / "mended.csv"), dataset)
    data = build_training_data(dataset, featureless(dataset), TrainConfig(finetune="none"), corrections)
    plain = training_data_of(root, TrainConfig(finetune="none"))
    np.testing.assert_array_equal(data.split.test, plain.split.test)
    test = data.split.test
    np.testing.assert_array_equal(data.labels[test], data.given_labels[test])
    names = {dataset.paths[i]: data.classes[data.labels[i]] for i in data.fit_rows}
    assert names["train/bars/000.jpg"] == "dots"
    assert len(data.excluded) == 0
    assert (data.corrected_labels[test] == -1).sum() == 1


def test_a_table_without_rows_corrects_nothing(drawn_images: Path, tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("path,part,label\n")
    dataset = scan_source(str(drawn_images))
    corrections = read_corrected_labels(str(tmp_path / "none.csv"), dataset)
    np.testing.assert_array_equal(corrections.labels, dataset.labels)
    assert not corrections.is_reviewed.any()


# --- bad input ---


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("path,label\nbars/nowhere.jpg,dots\n", "names bars/nowhere.jpg, of which"),
        ("path,label\nbars/000.jpg,dotz\n", "names the class 'dotz'"),
        ("path,label\nbars/000.jpg,dotz\n", "did you mean 'dots'"),
        ("path,label\nbars/000.jpg,dots\nbars/000.jpg,rings\n", "gives bars/000.jpg two labels"),
        ("path,colour\nbars/000.jpg,red\n", "no column that looks like a label"),
        ("", "has no rows"),
        (None, "cannot be read"),
        ("path,label\n" + "".join(f"dots/{i:03}.{'jpg' if i % 2 == 0 else 'png'},\n" for i in range(15))
         + "".join(f"rings/{i:03}.{'jpg' if i % 2 == 0 else 'png'},\n" for i in range(9)), "has 1 class"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be(
    table: str | None,
    words: str,
    drawn_images: Path,
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if table is not None:
        (tmp_path / "mended.csv").write_text(table)
    command = ["train", str(drawn_images), "--out", str(tmp_path / "run"), *tiny]
    assert main([*command, "--relabel", str(tmp_path / "mended.csv")]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.partial").exists()


def notes_on(root: Path, corrections: str) -> list[str]:
    (root.parent / "mended.csv").write_text("path,label\n" + corrections)
    dataset = scan_source(str(root))
    config = TrainConfig(finetune="none", relabel=str(root.parent / "mended.csv"))
    log = RunLog(quiet=True)
    assert config.relabel is not None
    data = build_training_data(
        dataset, featureless(dataset), config, read_corrected_labels(config.relabel, dataset)
    )
    log_problems(data, config, log)
    return log.notes


def test_a_class_that_corrections_empty_is_said(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "photos", {"bars": 6, "dots": 6, "rings": 3})
    rings = sorted(path.relative_to(root) for path in (root / "rings").iterdir())
    notes = notes_on(root, "".join(f"{path},\n" for path in rings))
    assert "nothing is left to learn from, so these are never answered: rings" in notes


def test_a_class_that_corrections_fill_is_not_called_absent(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    draw_folder(root / "train", {"bars": 14, "dots": 4})
    draw_folder(root / "test", {"bars": 2, "rings": 2}, first_seed=50)
    assert any("no training image: rings" in note for note in notes_on(root, ""))
    few = [f"train/bars/{name},rings\n" for name in ("000.jpg", "001.png", "002.jpg")]
    notes = notes_on(root, "".join(few))
    assert not any("no training image" in note for note in notes)
    assert any("fewer than 10 training images: rings (3)" in note for note in notes)
