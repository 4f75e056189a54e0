"""Bad input gets one line that names the value, the limit and the remedy, and leaves no file behind."""

import csv
import json
import os
import re
import resource
import shutil
import sys
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import TINY, draw_folder, draw_of_class
from images import encode
from pixelplay.cli.main import main
from pixelplay.config import TrainConfig
from pixelplay.model.device import resolve_device
from pixelplay.run_log import RunLog
from pixelplay.text import counted
from pixelplay.training.resume import check_settings
from tables import read_rows

Refusal = Callable[..., str]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Run a command that must end with status 1, one line on stderr and no new file; returns the line."""

    def run(*argv: object) -> str:
        before = _everything_below(Path())
        status = main([*map(str, argv), "--quiet"])
        out, err = capsys.readouterr()
        assert status == 1, err
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert _everything_below(Path()) == before
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture
def train_tiny(small_settings: list[str]) -> list[str]:
    return ["--out", "run", "--finetune", "none", *small_settings]


def _assert_names(line: str, *words: object) -> None:
    """Check that a message names these values, limits and flags."""
    assert [str(word) for word in words if str(word) not in line] == [], line


def _everything_below(folder: Path) -> dict[str, tuple[int, int]]:
    """List files with size and time, and folders without, because reading a cache may change their time."""
    return {
        str(p): (0, 0) if p.is_dir() else (p.lstat().st_size, p.lstat().st_mtime_ns)
        for p in folder.rglob("*")
    }


def _write_table(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def _rows(photos: Path) -> list[list[str]]:
    found = sorted(photos.rglob("*.*"))
    return [["path", "label"], *([p.relative_to(photos).as_posix(), p.parent.name] for p in found)]


# --- images ---


@pytest.mark.parametrize("command", ["scan", "train"])
def test_empty_folder_is_refused(command: str, tmp_path: Path, refuse: Refusal) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    line = refuse(command, empty, *(["--out", "run"] if command == "train" else []))
    _assert_names(line, empty, f"{empty}/<class>/", "table")


def test_folder_that_does_not_exist_is_refused(refuse: Refusal) -> None:
    line = refuse("scan", "nowhere")
    _assert_names(line, "nowhere", "folder", "table", "zip archive")


def test_folder_without_class_folders_names_the_table_in_it(tmp_path: Path, refuse: Refusal) -> None:
    photos = tmp_path / "flat"
    photos.mkdir()
    (photos / "a.png").write_bytes(encode(draw_of_class("bars", 1), "PNG"))
    _write_table(photos / "labels.csv", [["path", "label"], ["a.png", "bars"]])
    line = refuse("train", photos, "--out", "run")
    _assert_names(line, photos, "<class>", f"{photos}/labels.csv")


def test_file_of_unknown_kind_is_refused(tmp_path: Path, refuse: Refusal) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("a")
    _assert_names(refuse("scan", path), path, ".csv, .tsv, .parquet", "zip archive")


def test_damaged_archive_is_refused(tmp_path: Path, drawn_images: Path, refuse: Refusal) -> None:
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(drawn_images / "bars" / "000.jpg", "bars/000.jpg")
    archive.write_bytes(archive.read_bytes()[:-30])
    line = refuse("scan", archive)
    assert str(archive) in line
    assert "zip archive" in line


def test_a_single_class_is_refused(tmp_path: Path, refuse: Refusal, train_tiny: list[str]) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 3})
    line = refuse("train", photos, *train_tiny)
    _assert_names(line, photos, "1 class", "'bars'", "at least 2")


def test_class_without_readable_image_is_refused(
    drawn_classes: Path, refuse: Refusal, train_tiny: list[str]
) -> None:
    for path in (drawn_classes / "rings").iterdir():
        path.write_bytes(b"no image")
    line = refuse("train", drawn_classes, *train_tiny)
    _assert_names(line, "'rings'", "9 ")


def test_too_few_images_to_hold_out_are_refused(
    tmp_path: Path, refuse: Refusal, train_tiny: list[str]
) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 1, "dots": 1})
    line = refuse("train", photos, *train_tiny)
    _assert_names(line, photos, "2 images", "--test-frac 0")


def test_split_without_labelled_images_is_refused(
    drawn_images: Path, tiny_run: Path, refuse: Refusal
) -> None:
    line = refuse("evaluate", tiny_run, drawn_images, "--split", "val")
    _assert_names(line, drawn_images, "val")


@pytest.mark.parametrize("is_table", [False, True])
def test_evaluation_without_a_class_of_the_model_is_refused(
    is_table: bool, tmp_path: Path, tiny_run: Path, refuse: Refusal
) -> None:
    data = draw_folder(tmp_path / "photos", {"bars": 2, "dots": 2})
    (data / "bars").rename(data / "cats")
    (data / "dots").rename(data / "dogs")
    if is_table:
        rows = [f"{path.relative_to(data)},{path.parent.name}" for path in data.rglob("*.*")]
        data = data / "labels.csv"
        data.write_text("\n".join(["path,label", *rows]))
    line = refuse("evaluate", tiny_run, data, "--out", "p.csv")
    _assert_names(line, data, "cats, dogs", "bars, dots, rings")


@pytest.mark.parametrize("content", [[], [b""], [b"", b"Dear Sir or Madam"]])
def test_predict_without_readable_images_is_an_error(
    content: list[bytes],
    tmp_path: Path,
    tiny_run: Path,
    refuse: Refusal,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for i, data in enumerate(content):
        (folder / f"{i}.jpg").write_bytes(data)
    if not content:
        line = refuse("predict", tiny_run, folder, "--out", "p.csv")
        _assert_names(line, folder)
        return
    assert main(["predict", str(tiny_run), str(folder), "--out", "p.csv", "--quiet"]) == 1
    line = capsys.readouterr().err
    n = counted(len(content), "image")
    # the first is named, with its reason, and each has its row
    _assert_names(line, "error: ", n, "p.csv", folder / "0.jpg")
    rows = read_rows("p.csv")
    assert [row["path"] for row in rows] == [str(folder / f"{i}.jpg") for i in range(len(content))]
    assert {row["status"] for row in rows} == {"unreadable"}


def test_predict_of_a_missing_file_is_an_error(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(tiny_run), "nowhere.jpg", "--out", "p.csv", "--quiet"]) == 1
    _assert_names(capsys.readouterr().err, "1 image", "nowhere.jpg: ")
    (row,) = read_rows("p.csv")
    assert (row["path"], row["status"]) == ("nowhere.jpg", "missing")
    assert row["error"]


def test_predict_of_a_missing_folder_is_refused(tiny_run: Path, refuse: Refusal) -> None:
    line = refuse("predict", tiny_run, "fotos/new", "--out", "p.csv")
    _assert_names(line, "fotos/new")
    assert not Path("p.csv").exists()


# --- outputs ---


def test_existing_run_is_refused(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    shutil.copytree(tiny_run, "run")
    line = refuse("train", drawn_images, "--out", "run")
    _assert_names(line, "run", "--force")


def test_force_does_not_replace_a_folder_that_is_not_a_run(drawn_images: Path, refuse: Refusal) -> None:
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("years of work")
    line = refuse("train", drawn_images, "--out", "run", "--force")
    _assert_names(line, "run", "--out")
    assert Path("run/thesis.txt").read_text() == "years of work"


def test_existing_table_of_predictions_is_refused(
    drawn_images: Path, tiny_run: Path, refuse: Refusal
) -> None:
    Path("p.csv").write_text("precious")
    line = refuse("predict", tiny_run, drawn_images, "--out", "p.csv")
    _assert_names(line, "p.csv", "--force")


def test_table_of_unknown_kind_is_refused(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    line = refuse("predict", tiny_run, drawn_images, "--out", "p.xlsx")
    _assert_names(line, "p.xlsx", ".csv", ".parquet")


def test_submission_of_another_kind_is_refused(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    Path("sample.csv").write_text("id,label\n000,bars\n")
    line = refuse("predict", tiny_run, drawn_images, "--out", "p.parquet", "--submission", "sample.csv")
    _assert_names(line, "p.parquet", "CSV")


def test_table_in_a_folder_that_does_not_exist_is_refused(
    drawn_images: Path, tiny_run: Path, refuse: Refusal
) -> None:
    line = refuse("predict", tiny_run, drawn_images, "--out", "no/such/p.csv")
    _assert_names(line, "no/such", "--out")


def test_run_below_a_file_is_refused(drawn_images: Path, refuse: Refusal) -> None:
    Path("notes.txt").write_text("a")
    line = refuse("train", drawn_images, "--out", "notes.txt/run")
    _assert_names(line, "notes.txt/run", "--out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("command", ["train", "predict"])
def test_read_only_folder_is_refused(
    command: str, drawn_images: Path, tiny_run: Path, refuse: Refusal
) -> None:
    Path("locked").mkdir(mode=0o555)
    if command == "train":
        line = refuse("train", drawn_images, "--out", "locked/run")
    else:
        line = refuse("predict", tiny_run, drawn_images, "--out", "locked/p.csv")
    _assert_names(line, "locked")


def test_disk_without_space_for_a_run_is_an_error(
    drawn_images: Path, refuse: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 3 << 20))
    line = refuse("train", drawn_images, "--out", "run")
    _assert_names(line, "3 MB", "--out")


@pytest.fixture
def no_large_files() -> Iterator[None]:
    """The system refuses to write past 100 kB, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("no_large_files")
def test_disk_that_fills_up_during_a_run_is_an_error(
    drawn_images: Path, refuse: Refusal, train_tiny: list[str]
) -> None:
    line = refuse("train", drawn_images, *train_tiny, "--cache-gb", "0")
    _assert_names(line, "File too large", "free some space")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_full_disk_for_predictions_is_an_error(
    ending: str, drawn_images: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink("/dev/full", f"p.{ending}.partial")
    command = ["predict", str(tiny_run), str(drawn_images), "--out", f"p.{ending}", "--quiet"]
    status = main([*command, "--force"])  # the link has the name of the partial file
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "No space left on device" in err
    assert "free some space" in err
    assert not Path(f"p.{ending}").exists()


# --- tables ---


def test_table_without_a_label_column_is_refused(tmp_path: Path, refuse: Refusal) -> None:
    table = _write_table(tmp_path / "t.csv", [["path", "colour"], ["a.jpg", "red"]])
    line = refuse("scan", table)
    _assert_names(line, table, "label", "path, colour", "--label-column")


def test_table_without_the_named_column_is_refused(tmp_path: Path, refuse: Refusal) -> None:
    table = _write_table(tmp_path / "t.csv", [["path", "grade"], ["a.jpg", "1"]])
    line = refuse("scan", table, "--label-column", "grad")
    _assert_names(line, table, "'grad'", "path, grade", "'grade'?")


def test_table_that_names_missing_files_is_refused(drawn_images: Path, refuse: Refusal) -> None:
    gone = [[f"gone/{i}.jpg", "bars"] for i in range(63)]
    table = _write_table(Path("t.csv"), [*_rows(drawn_images), *gone])
    line = refuse("scan", table, "--images-dir", drawn_images)
    _assert_names(line, table, "63 ", drawn_images, "gone/0.jpg, ", " more", "--images-dir")


def test_table_with_contradictory_rows_is_refused(drawn_images: Path, refuse: Refusal) -> None:
    rows = _rows(drawn_images)
    table = _write_table(Path("t.csv"), [*rows, [rows[1][0], "dots"]])
    line = refuse("scan", table, "--images-dir", drawn_images)
    _assert_names(line, table, "row 50", "bars/000.jpg", "row 2", "'dots' instead of 'bars'")


def test_table_with_an_unknown_split_is_refused(drawn_images: Path, refuse: Refusal) -> None:
    header, *rows = _rows(drawn_images)
    splits = ["train"] * (len(rows) - 1) + ["tset"]
    table = _write_table(
        Path("t.csv"), [[*header, "split"], *([*row, split] for row, split in zip(rows, splits, strict=True))]
    )
    line = refuse("scan", table, "--images-dir", drawn_images)
    _assert_names(line, table, "row 49", "'tset'", "'split'", "train, val, test", "'test'?")


def test_table_with_a_short_row_is_refused(tmp_path: Path, refuse: Refusal) -> None:
    table = tmp_path / "t.csv"
    table.write_text("path,label\na.jpg,bars\nb.jpg\n")
    _assert_names(refuse("scan", table), table, " 3 ", " 1 cell", " 2")


def test_sample_submission_that_does_not_exist_is_refused(
    drawn_images: Path, tiny_run: Path, refuse: Refusal
) -> None:
    line = refuse("predict", tiny_run, drawn_images, "--out", "p.csv", "--submission", "sample.csv")
    _assert_names(line, "sample.csv", "No such file or directory")


def test_sample_submission_of_other_classes_is_refused(
    drawn_images: Path, tiny_run: Path, refuse: Refusal
) -> None:
    Path("sample.csv").write_text("id,cat,dog\n000,0,0\n")
    line = refuse("predict", tiny_run, drawn_images / "bars", "--out", "p.csv", "--submission", "sample.csv")
    _assert_names(line, "sample.csv", "cat, dog", "bars, dots, rings")


# --- backbones and weights ---


def test_unknown_backbone_is_refused(drawn_images: Path, refuse: Refusal) -> None:
    line = refuse("train", drawn_images, "--out", "run", "--backbone", "resnet5O")
    _assert_names(line, "'resnet5O'", "'resnet5")


def test_backbone_from_a_hub_is_refused(drawn_images: Path, refuse: Refusal) -> None:
    line = refuse("train", drawn_images, "--out", "run", "--backbone", "hf-hub:someone/network")
    _assert_names(line, "'hf-hub:someone/network'")


def test_backbone_without_weights_offline_is_refused(drawn_images: Path, refuse: Refusal) -> None:
    line = refuse("train", drawn_images, "--out", "run", "--backbone", "resnet18", "--offline")
    _assert_names(line, "'resnet18'", "--offline", "lite0", "--weights")


def test_weights_of_another_network_are_refused(
    drawn_images: Path, tiny_weights: Path, refuse: Refusal
) -> None:
    line = refuse("train", drawn_images, "--out", "run", "--backbone", "test_vit", "--weights", tiny_weights)
    # ten keys are named, the rest is counted
    _assert_names(line, tiny_weights, "test_vit", "cls_token", " more")


def test_missing_weights_file_is_refused(drawn_images: Path, refuse: Refusal) -> None:
    line = refuse("train", drawn_images, "--out", "run", "--backbone", TINY, "--weights", "none.safetensors")
    _assert_names(line, "none.safetensors", ".pth")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_weights_file_without_tensors_is_refused(name: str, drawn_images: Path, refuse: Refusal) -> None:
    Path(name).write_bytes(b"no tensors at all")
    line = refuse("train", drawn_images, "--out", "run", "--backbone", TINY, "--weights", name)
    _assert_names(line, name, ".safetensors", ".pth")


# --- bundles ---


def _flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: _flip_a_byte(m / "head.safetensors"), ("head.safetensors",)),
        (lambda m: _flip_a_byte(m / "backbone.safetensors"), ("backbone.safetensors",)),
        (lambda m: (m / "head.safetensors").unlink(), ("head.safetensors",)),
        (lambda m: (m / "bundle.json").write_text("{"), ("bundle.json",)),
        (lambda m: (m / "bundle.json").write_text('{"classes": []}'), ("bundle.json",)),
        (lambda m: (m / "bundle.json").unlink(), ("copy", "pixelplay train")),
        (lambda m: _change_json(m / "bundle.json", classes=["one"]), ("bundle.json",)),
        (lambda m: _change_json(m / "bundle.json", format_version=99), ("version 99", " 4")),
    ],
    ids=["head", "backbone", "missing file", "no json", "foreign", "no bundle", "wrong content", "newer"],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_damaged_bundle_is_refused(
    command: str,
    damage: Callable[[Path], object],
    words: tuple[str, ...],
    drawn_images: Path,
    tiny_run: Path,
    refuse: Refusal,
) -> None:
    shutil.copytree(tiny_run, "copy")
    damage(Path("copy/model"))
    line = refuse(command, "copy", drawn_images, *(["--out", "p.csv"] if command == "predict" else []))
    _assert_names(line, *words)


def test_run_that_does_not_exist_is_refused(drawn_images: Path, refuse: Refusal) -> None:
    line = refuse("evaluate", "nowhere", drawn_images)
    _assert_names(line, "nowhere", "pixelplay train")


def test_other_run_that_does_not_exist_is_refused(
    drawn_images: Path, tiny_run: Path, refuse: Refusal
) -> None:
    line = refuse("evaluate", tiny_run, drawn_images, "--against", "nowhere")
    _assert_names(line, "nowhere", "pixelplay train")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "run"),
        (lambda run: (run / "label_issues.csv").unlink(), "label_issues.csv"),
        (lambda run: (run / "label_issues.csv").write_text("path\n1\n"), "run"),
        (lambda run: (run / "metrics.json").write_text("{}"), "run"),
    ],
    ids=["no run", "no table", "foreign table", "no metrics"],
)
def test_label_issues_of_a_damaged_run_are_refused(
    damage: Callable[[Path], object],
    words: str,
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    damage(run)
    assert main(["label-issues", str(run)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    _assert_names(err, words)


# --- cross-validation ---


@pytest.fixture
def refuse_crossval(tiny_weights: Path, refuse: Refusal) -> Refusal:
    def run(data: Path, *argv: object) -> str:
        tiny = ["--out", "run", "--finetune", "none", "--backbone", TINY, "--weights", tiny_weights]
        return refuse("crossval", data, *tiny, *argv)

    return run


def test_more_folds_than_images_of_a_class_are_refused(drawn_images: Path, refuse_crossval: Refusal) -> None:
    line = refuse_crossval(drawn_images, "--n-folds", "10")
    _assert_names(line, "'rings'", "9 images", "10", "--n-folds 9")


def test_more_folds_than_groups_of_a_class_are_refused(tmp_path: Path, refuse_crossval: Refusal) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 12, "dots": 12})
    for name in ("bars", "dots"):
        for i, path in enumerate(sorted((photos / name).iterdir())):
            path.rename(path.with_name(f"night{i % 3}_{path.name}"))
    line = refuse_crossval(photos, "--group-regex", r"night\d")
    _assert_names(line, "12 images", "3 groups", "5", "--n-folds 3")


@pytest.mark.parametrize("repeats", ["0", "21"])
def test_repeats_out_of_range_are_refused(repeats: str, drawn_images: Path, refuse_crossval: Refusal) -> None:
    line = refuse_crossval(drawn_images, "--repeats", repeats)
    assert line == f"--repeats {repeats} is outside its range 1 to 20"


def test_groups_that_leave_a_fold_empty_are_refused(tmp_path: Path, refuse_crossval: Refusal) -> None:
    photos = tmp_path / "photos"
    for camera in range(5):  # three of which have each a class that is nowhere else
        draw_folder(photos, {"bars": 4, "dots": 4}, first_seed=10 * camera)
        for name in ("bars", "dots"):
            for path in sorted((photos / name).glob("0*")):
                path.rename(path.with_name(f"camera{camera}_{path.name}"))
        if camera < 3:
            folder = draw_folder(photos, {"rings": 3}, first_seed=500 + 10 * camera) / "rings"
            lone = photos / f"lone{camera}"
            folder.rename(lone)
            for path in sorted(lone.iterdir()):
                path.rename(path.with_name(f"camera{camera}_{path.name}"))
    line = refuse_crossval(photos, "--group-regex", r"camera\d")
    _assert_names(line, "--n-folds 2", "groups")


def test_more_networks_than_a_model_holds_are_refused(drawn_images: Path, refuse: Refusal) -> None:
    line = refuse(
        "crossval",
        drawn_images,
        "--out",
        "run",
        "--finetune",
        "partial",
        "--n-folds",
        "10",
        "--repeats",
        "11",
    )
    _assert_names(line, "10 folds", "11", "100", "--single", "--finetune none")


# --- settings ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--test-frac", "2"], "--test-frac 2.0 is outside its range 0 to 0.9"),
        (["--n-folds", "1"], "--n-folds 1 is outside its range 2 to 20"),
        (["--input-size", "8"], "--input-size 8 is outside its range 16 to 4096"),
        (["--batch-size", "0"], "--batch-size 0 is outside its range 1 to 4096"),
        (["--group-regex", "("], "--group-regex '('"),
        (["--group-regex", "a{99999999999}"], "--group-regex 'a{99999999999}'"),
        (
            ["--group-by-folder", "--group-column", "camera"],
            "--group-column, --group-regex and --group-by-folder",
        ),
        pytest.param(
            ["--device", "mps"],
            "mps",
            marks=pytest.mark.skipif(sys.platform == "darwin", reason="it may have one"),
        ),
    ],
)
def test_invalid_setting_is_refused(
    options: list[str], words: str, drawn_images: Path, refuse: Refusal
) -> None:
    _assert_names(refuse("train", drawn_images, "--out", "run", *options), words)


@pytest.mark.parametrize("precision", ["0", "1.5", "-1", "nan"])
def test_precision_out_of_range_is_refused(
    precision: str, drawn_images: Path, tiny_run: Path, refuse: Refusal
) -> None:
    line = refuse("evaluate", tiny_run, drawn_images, f"--at-precision={precision}")
    _assert_names(line, float(precision), "0", "1")


def test_precision_of_three_classes_is_refused(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    line = refuse("evaluate", tiny_run, drawn_images, "--at-precision", "0.9")
    _assert_names(line, "3 classes", "2")


def test_positive_class_without_a_precision_is_refused(
    drawn_images: Path, tiny_run: Path, refuse: Refusal
) -> None:
    line = refuse("evaluate", tiny_run, drawn_images, "--positive", "bars")
    _assert_names(line, "'bars'", "--at-precision")


# --- fine-tuning ---


@pytest.fixture
def refuse_finetuning(drawn_images: Path, tiny_weights: Path, refuse: Refusal) -> Refusal:
    """Refuse to train on the drawn images, without touching them or the weights."""

    def run(*argv: object) -> str:
        inputs = (drawn_images, tiny_weights.parent)
        before = [_everything_below(folder) for folder in inputs]
        common = ("--out", "run", "--backbone", TINY, "--weights", tiny_weights)
        line = refuse("train", drawn_images, *common, *argv)
        assert [_everything_below(folder) for folder in inputs] == before
        return line

    return run


PARTIAL, FULL = ("--finetune", "partial"), ("--finetune", "full")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*PARTIAL, "--time-budget", "5x"), ["--time-budget '5x'", "90s, 5m or 2h"]),
        ((*PARTIAL, "--time-budget", "0s"), ["--time-budget '0s'", "90s, 5m or 2h"]),
        ((*PARTIAL, "--augment", "crop", "mixpu"), ["--augment 'mixpu'", "'mixup'", "erasing"]),
        (
            (*PARTIAL, "--imbalance", "class_weights", "--oversample-to", "20"),
            ["--oversample-to 20", "--imbalance 'class_weights'"],
        ),
        ((*PARTIAL, "--imbalance", "focal", "--augment", "crop", "mixup"), ["mixup", "focal"]),
        ((*FULL, "--imbalance", "focal", "--label-smoothing", "0.1"), ["label_smoothing", "focal"]),
        (("--finetune", "none", "--head", "mlp"), ["--head 'mlp'", "--finetune partial or full"]),
        (("--finetune", "none", "--oversample-to", "9"), ["--oversample-to 9", "--finetune partial"]),
        ((*PARTIAL, "--unfreeze-stages", "0"), ["--unfreeze-stages 0", "1 to"]),
        (
            (*PARTIAL, "--unfreeze-stages", "4", "--epochs", "1"),
            ["--unfreeze-stages 4", "1 to 3", TINY, "--finetune full"],
        ),
        ((*PARTIAL, "--unfreeze-stages", "4"), ["--unfreeze-stages 4", "1 to 3", "--finetune full"]),
        ((*FULL, "--initial-size-frac", "0.1"), ["--initial-size-frac 0.1", "0.25 to 1"]),
        ((*PARTIAL, "--head", "mlp", "--ensemble-probe", "on"), ["--ensemble-probe 'on'", "--head 'mlp'"]),
        (("--finetune", "auto", "--head", "mlp"), ["--head 'mlp'", "--finetune partial or full"]),
        ((*PARTIAL, "--head", "mlp", "--train-batch-size", "2"), ["--train-batch-size 2", "3 to 10000"]),
        ((*PARTIAL, "--initial-size-frac", "0.5"), ["--finetune partial", "--initial-size-frac 0.5"]),
        ((*FULL, "--cached-views", "2"), ["--finetune full", "--cached-views 2"]),
        (("--finetune", "none", "--epochs", "3"), ["--finetune none", "--epochs 3"]),
        (("--finetune", "none", "--crop-scale", "0.5"), ["--finetune none", "--crop-scale 0.5"]),
        (
            (*PARTIAL, "--epochs", "1", "--cached-views", "90", "--cache-gb", "0.001"),
            ["90", "38 images", " MB", "0.5 MB", "--cached-views"],
        ),
        (
            (*PARTIAL, "--epochs", "1", "--cache-gb", "0.00001"),
            ["38 images", " MB", "--cache-gb", "--finetune none"],
        ),
        ((*PARTIAL, "--mixup-alpha", "0.4"), ["--mixup-alpha 0.4", "--augment"]),
        ((*PARTIAL, "--refit-epochs", "-1"), ["--refit-epochs -1", "0 to 1000"]),
        ((*FULL, "--grad-accum-steps", "0"), ["--grad-accum-steps 0", "1 to 1024"]),
        ((*FULL, "--lr", "nan"), ["--lr nan", "1e-08 to 10"]),
        ((*PARTIAL, "--plan", "nowhere.json"), ["nowhere.json", "No such file"]),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, tuple) else "",
)
def test_invalid_finetuning_is_refused(
    options: tuple[str, ...], words: list[str], refuse_finetuning: Refusal
) -> None:
    _assert_names(refuse_finetuning(*options), *words)


@pytest.mark.parametrize("method", [PARTIAL, FULL])
def test_time_budget_that_is_too_short_is_refused(
    method: tuple[str, str], refuse_finetuning: Refusal
) -> None:
    line = refuse_finetuning(*method, "--time-budget", "0.1s", "--batch-size", "8", "--train-batch-size", "8")
    _assert_names(line, "--time-budget 0.1s", method[1], "38 images", "--finetune none")


def test_plan_for_another_backbone_is_refused(refuse_finetuning: Refusal) -> None:
    plan = {"finetune": "partial", "unfreeze_stages": 7, "cached_views": 1, "epochs": 1, "batch_size": 8}
    Path("plan.json").write_text(json.dumps({**plan, "seconds": {}}))
    line = refuse_finetuning(*PARTIAL, "--plan", "plan.json")
    _assert_names(line, "--unfreeze-stages 7", "1 to 3", TINY, "--finetune full")


# with this decay the weights change sign and grow a hundredfold in each step
RUNAWAY = (
    "--warmup-frac",
    "0",
    "--lr",
    "10",
    "--head-lr",
    "10",
    "--weight-decay",
    "10",
    "--train-batch-size",
    "2",
    "--epochs",
    "2",
)


def test_nan_loss_ends_training_from_a_random_head(refuse_finetuning: Refusal) -> None:
    line = refuse_finetuning(*PARTIAL, "--cached-views", "1", *RUNAWAY, "--head-init", "random")
    assert re.search(r"\bloss\b.* (nan|inf) .*step \d+ of 32\b", line)
    _assert_names(line, "--lr", "--head-lr")


def test_nan_loss_falls_back_to_the_linear_probe(
    drawn_images: Path,
    tiny_settings: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training starts from the linear probe, which is kept; the note names the step."""
    monkeypatch.setattr("pixelplay.training.schedule.LR_DOWN", 1.0)  # rates are not limited by the loss
    common = [
        "train",
        str(drawn_images),
        *tiny_settings,
    ]
    options = [*PARTIAL, "--cached-views", "1", "--val-frac", "0.15"]
    assert main([*common, "--out", "run", *options, *RUNAWAY]) == 0
    err = capsys.readouterr().err
    note = re.search(r"note: (.*\bloss\b.* (?:nan|inf) .*step \d+ of 32\b.*epoch 0.*)\n", err)
    assert note, err
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert note[1] in metrics["notes"]
    assert metrics["finetune"] == metrics["chosen"]["finetune"]["value"] == "none"
    assert metrics["test"]["accuracy"]["value"] > 0.7
    assert Path("run/history.csv").read_text().count("\n") == 2
    assert os.listdir() == ["run"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            (*FULL, "--epochs", "2", "--initial-size-frac", "0.5"),
            ["test_vit3", "64 px", "--initial-size-frac 0.5", "--initial-size-frac 1"],
        ),
        (
            ("--finetune", "none", "--input-size", "96"),
            ["test_vit3", "96 px", "160 px"],
        ),
    ],
    ids=["growing", "another"],
)
def test_backbone_with_fixed_input_size_is_refused(
    options: tuple[str, ...], words: list[str], drawn_images: Path, tmp_path: Path, refuse: Refusal
) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("test_vit3", pretrained=False, num_classes=0)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    line = refuse(
        "train", drawn_images, "--out", "run", "--backbone", "test_vit3",
        "--weights", tmp_path / "vit.safetensors", *options,
    )  # fmt: skip
    _assert_names(line, *words)


def test_resume_with_other_settings_is_refused(
    drawn_images: Path, tiny_probe: TrainConfig, refuse_finetuning: Refusal
) -> None:
    config = replace(tiny_probe, finetune="partial")
    device = resolve_device(config.compute)
    check_settings("run.partial/checkpoint", config, device, None, RunLog(quiet=True))
    Path("run.partial/checkpoint/checkpoint.safetensors").touch()
    Path("run.partial/.lock").touch()
    line = refuse_finetuning(*PARTIAL, "--resume", "--lr", "0.01", "--seed", "3", "--cache-gb", "1")
    assert re.search(r"finetuning\.lr\b.* None\b.* 0\.01\b", line)
    assert re.search(r"\bseed\b.* 0\b.* 3\b", line)
    assert "--force" in line
    assert "cache_gb" not in line


@pytest.mark.parametrize("command", ["train", "crossval"])
def test_resume_with_force_is_refused(command: str, drawn_images: Path, refuse: Refusal) -> None:
    line = refuse(command, drawn_images, "--out", "run", "--resume", "--force")
    _assert_names(line, "--resume", "--force")


def test_a_path_named_like_a_setting_is_kept_in_messages(refuse: Refusal) -> None:
    line = refuse("train", "images_dir", "--out", "run")
    _assert_names(line, "images_dir does not exist")


def test_interrupted_run_needs_resume_or_force(refuse_finetuning: Refusal) -> None:
    Path("run.partial/checkpoint").mkdir(parents=True)
    Path("run.partial/checkpoint/checkpoint.safetensors").touch()
    Path("run.partial/.lock").touch()
    line = refuse_finetuning(*PARTIAL)
    _assert_names(line, "run.partial", "--resume", "--force")


def test_foreign_folder_in_place_of_an_interrupted_run_is_refused(refuse_finetuning: Refusal) -> None:
    Path("run.partial").mkdir()
    Path("run.partial/thesis.txt").write_text("years of work")
    line = refuse_finetuning(*PARTIAL, "--force")
    _assert_names(line, "run.partial", "--out")


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "photos"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    _assert_names(line, "'trian'", "'train'?", "pixelplay --help")


def test_labels_in_another_encoding_are_refused(
    tmp_path: Path, refuse: Refusal, train_tiny: list[str]
) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 3, "dots": 3})
    rows = [f"bars/{i:03}.{end},m\xe9tal" for i, end in enumerate(("jpg", "png", "jpg"))]
    (photos / "labels.csv").write_bytes("\n".join(["path,label", *rows, ""]).encode("cp1252"))
    line = refuse("train", photos / "labels.csv", *train_tiny)
    _assert_names(line, "row 2", "'métal'", "UTF-8")


def test_classes_too_small_for_two_folds_are_refused(tmp_path: Path, refuse_crossval: Refusal) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 2, "dots": 2})
    line = refuse_crossval(photos, "--n-folds", "2")
    _assert_names(line, "3 images", "3")


def test_report_does_not_replace_a_foreign_temporary_file(tiny_run: Path, refuse: Refusal) -> None:
    Path("notes.html.tmp").write_text("mine")
    line = refuse("report", tiny_run, "--out", "notes.html")
    _assert_names(line, "notes.html.tmp", "--out", "--force")


def test_images_dir_without_a_table_is_refused(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    line = refuse("predict", tiny_run, drawn_images, "--images-dir", "there", "--out", "p.csv")
    _assert_names(line, "--images-dir", drawn_images)
