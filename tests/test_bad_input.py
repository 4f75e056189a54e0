"""Bad input gets one line that names the value, the limit and the remedy, and leaves nothing behind."""

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
from pixelplay.model.device import find_device
from pixelplay.run_log import RunLog
from pixelplay.text import counted
from pixelplay.training.resume import check_settings
from tables import read_rows

Refusal = Callable[..., str]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are named relative to a folder of their own."""
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
def train_tiny(tiny_settings: list[str]) -> list[str]:
    return [
        "--out",
        "run",
        "--finetune",
        "none",
        *tiny_settings,
    ]


def _assert_says(line: str, *words: object) -> None:
    """The value, the limit, the remedy: what a line must hold, whatever else it says."""
    assert [str(word) for word in words if str(word) not in line] == [], line


def _everything_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Files with size and time; folders, empty ones too, without, as reading a cache may touch them."""
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
def test_empty_folder(command: str, tmp_path: Path, refuse: Refusal) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    line = refuse(command, empty, *(["--out", "run"] if command == "train" else []))
    _assert_says(line, f"{empty} has no images", f"{empty}/<class>/photo.jpg", "table")


def test_folder_that_does_not_exist(refuse: Refusal) -> None:
    line = refuse("scan", "nowhere")
    _assert_says(line, "nowhere does not exist", "give a folder, a table or a zip archive")


def test_folder_without_class_folders_names_the_table_beside(tmp_path: Path, refuse: Refusal) -> None:
    photos = tmp_path / "flat"
    photos.mkdir()
    (photos / "a.png").write_bytes(encode(draw_of_class("bars", 1), "PNG"))
    _write_table(photos / "labels.csv", [["path", "label"], ["a.png", "bars"]])
    line = refuse("train", photos, "--out", "run")
    _assert_says(line, f"{photos} has images but no class folders", f"{photos}/train/<class>/photo.jpg")
    _assert_says(line, f"{photos}/labels.csv", "table instead of the folder")


def test_file_that_is_no_source(tmp_path: Path, refuse: Refusal) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("a")
    _assert_says(refuse("scan", path), f"{path} is no folder", ".csv, .tsv, .parquet", "zip archive")


def test_damaged_archive(tmp_path: Path, drawn_images: Path, refuse: Refusal) -> None:
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(drawn_images / "bars" / "000.jpg", "bars/000.jpg")
    archive.write_bytes(archive.read_bytes()[:-30])
    line = refuse("scan", archive)
    assert str(archive) in line
    assert "zip archive" in line


def test_one_class(tmp_path: Path, refuse: Refusal, train_tiny: list[str]) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 3})
    line = refuse("train", photos, *train_tiny)
    _assert_says(line, f"{photos} has 1 class, 'bars'", "at least 2 are needed", "add another")


def test_class_without_a_readable_photograph(
    drawn_classes: Path, refuse: Refusal, train_tiny: list[str]
) -> None:
    for path in (drawn_classes / "rings").iterdir():
        path.write_bytes(b"no image")
    line = refuse("train", drawn_classes, *train_tiny)
    _assert_says(
        line,
        "class 'rings' has 9 images to learn from",
        "none can be read",
        "replace them or remove the class",
    )


def test_no_test_images_to_hold_out(tmp_path: Path, refuse: Refusal, train_tiny: list[str]) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 1, "dots": 1})
    line = refuse("train", photos, *train_tiny)
    _assert_says(line, "no test images", photos, "2 images", "add images", "--test-frac 0")


def test_no_labelled_photographs_in_the_asked_part(
    drawn_images: Path, tiny_run: Path, refuse: Refusal
) -> None:
    line = refuse("evaluate", tiny_run, drawn_images, "--split", "val")
    _assert_says(line, f"{drawn_images} has no labelled images", "val")


@pytest.mark.parametrize("content", [[], [b""], [b"", b"Dear Sir or Madam"]])
def test_predict_on_a_folder_with_nothing_readable(
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
        _assert_says(line, f"no images in {folder}", "give files, tables, zip archives or folders")
        return
    assert main(["predict", str(tiny_run), str(folder), "--out", "p.csv", "--quiet"]) == 1
    line = capsys.readouterr().err
    n = counted(len(content), "image")
    # the first is named, with its reason, and each has its row
    _assert_says(line, f"error: none of {n} can be read; p.csv says why", folder / "0.jpg")
    rows = read_rows("p.csv")
    assert [row["path"] for row in rows] == [str(folder / f"{i}.jpg") for i in range(len(content))]
    assert {row["status"] for row in rows} == {"unreadable"}


def test_predict_on_a_file_that_does_not_exist(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(tiny_run), "nowhere.jpg", "--out", "p.csv", "--quiet"]) == 1
    _assert_says(capsys.readouterr().err, "none of 1 image can be read", "nowhere.jpg: no such file")
    assert Path("p.csv").read_text().splitlines()[1].startswith("nowhere.jpg,missing,no such file,")


def test_a_folder_that_does_not_exist_leaves_no_table(tiny_run: Path, refuse: Refusal) -> None:
    line = refuse("predict", tiny_run, "fotos/new", "--out", "p.csv")
    _assert_says(line, "fotos/new does not exist", "give folders, files, tables or zip archives")
    assert not Path("p.csv").exists()


# --- outputs ---


def test_run_that_exists(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    shutil.copytree(tiny_run, "run")
    line = refuse("train", drawn_images, "--out", "run")
    _assert_says(line, f"{Path('run').absolute()} exists", "choose another --out", "--force")


def test_folder_that_is_no_run_is_not_replaced_even_when_forced(drawn_images: Path, refuse: Refusal) -> None:
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("years of work")
    line = refuse("train", drawn_images, "--out", "run", "--force")
    _assert_says(
        line, Path("run").absolute(), "is no run of PixelPlay", "never replaced", "choose another --out"
    )


def test_table_of_predictions_that_exists(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    Path("p.csv").write_text("precious")
    line = refuse("predict", tiny_run, drawn_images, "--out", "p.csv")
    _assert_says(line, "p.csv exists", "choose another --out", "--force")


def test_table_of_unknown_kind(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    line = refuse("predict", tiny_run, drawn_images, "--out", "p.xlsx")
    _assert_says(line, "--out p.xlsx", ".csv", ".parquet")


def test_submission_of_another_kind(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    Path("sample.csv").write_text("id,label\n000,bars\n")
    line = refuse("predict", tiny_run, drawn_images, "--out", "p.parquet", "--submission", "sample.csv")
    _assert_says(line, "--out p.parquet", "a submission is a CSV file")


def test_table_in_a_folder_that_does_not_exist(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    line = refuse("predict", tiny_run, drawn_images, "--out", "no/such/p.csv")
    _assert_says(line, "the folder no/such of --out does not exist", "create it")


def test_run_below_a_file(drawn_images: Path, refuse: Refusal) -> None:
    Path("notes.txt").write_text("a")
    line = refuse("train", drawn_images, "--out", "notes.txt/run")
    _assert_says(line, f"{Path('notes.txt/run').absolute()} cannot be written", "choose another --out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("command", ["train", "predict"])
def test_folder_without_leave_to_write(
    command: str, drawn_images: Path, tiny_run: Path, refuse: Refusal
) -> None:
    Path("locked").mkdir(mode=0o555)
    if command == "train":
        line = refuse("train", drawn_images, "--out", "locked/run")
    else:
        line = refuse("predict", tiny_run, drawn_images, "--out", "locked/p.csv")
    _assert_says(line, "locked", "choose another")


def test_disk_without_room_for_a_run(
    drawn_images: Path, refuse: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 3 << 20))
    line = refuse("train", drawn_images, "--out", "run")
    _assert_says(
        line, f"{Path().absolute()} has 3 MB free", "a run needs", "free some or choose another --out"
    )


@pytest.fixture
def no_large_files() -> Iterator[None]:
    """The system refuses to write past 100 kB, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("no_large_files")
def test_disk_that_fills_up_while_a_run_is_written(
    drawn_images: Path, refuse: Refusal, train_tiny: list[str]
) -> None:
    line = refuse("train", drawn_images, *train_tiny, "--cache-gb", "0")
    _assert_says(line, "File too large", "free some space, or write to another disk")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_disk_that_is_full_for_predictions(
    ending: str, drawn_images: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink("/dev/full", f"p.{ending}.partial")
    command = ["predict", str(tiny_run), str(drawn_images), "--out", f"p.{ending}", "--quiet"]
    status = main([*command, "--force"])  # the link stands where the partial file will
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "No space left on device" in err
    assert "free some space" in err
    assert not Path(f"p.{ending}").exists()


# --- tables ---


def test_table_without_a_label_column(tmp_path: Path, refuse: Refusal) -> None:
    table = _write_table(tmp_path / "t.csv", [["path", "colour"], ["a.jpg", "red"]])
    line = refuse("scan", table)
    _assert_says(line, f"{table} has no column", "label", "path, colour", "name it with --label-column")


def test_table_without_the_asked_column(tmp_path: Path, refuse: Refusal) -> None:
    table = _write_table(tmp_path / "t.csv", [["path", "grade"], ["a.jpg", "1"]])
    line = refuse("scan", table, "--label-column", "grad")
    _assert_says(line, f"{table} has no column 'grad'", "path, grade", "did you mean 'grade'?")


def test_table_that_names_missing_files(drawn_images: Path, refuse: Refusal) -> None:
    gone = [[f"gone/{i}.jpg", "bars"] for i in range(63)]
    table = _write_table(Path("t.csv"), [*_rows(drawn_images), *gone])
    line = refuse("scan", table, "--images-dir", drawn_images)
    _assert_says(line, table, "63 files", drawn_images, "gone/0.jpg, ", "gone/9.jpg and 53 more")
    _assert_says(line, "mend the table", "--images-dir")


def test_table_with_a_repeated_row(drawn_images: Path, refuse: Refusal) -> None:
    rows = _rows(drawn_images)
    table = _write_table(Path("t.csv"), [*rows, rows[1]])
    line = refuse("scan", table, "--images-dir", drawn_images)
    _assert_says(line, f"{table}, row 50 repeats", "'bars/000.jpg'", "row 2", "list each", "once")


def test_table_with_an_unknown_part(drawn_images: Path, refuse: Refusal) -> None:
    header, *rows = _rows(drawn_images)
    parts = ["train"] * (len(rows) - 1) + ["tset"]
    table = _write_table(
        Path("t.csv"), [[*header, "split"], *([*row, part] for row, part in zip(rows, parts, strict=True))]
    )
    line = refuse("scan", table, "--images-dir", drawn_images)
    _assert_says(line, f"{table}, row 49", "'tset'", "'part'", "train, val, test", "did you mean 'test'")


def test_table_with_a_short_row(tmp_path: Path, refuse: Refusal) -> None:
    table = tmp_path / "t.csv"
    table.write_text("path,label\na.jpg,bars\nb.jpg\n")
    _assert_says(refuse("scan", table), table, " 3 has 1 cells", "header has 2", "mend")


def test_sample_submission_that_does_not_exist(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    line = refuse("predict", tiny_run, drawn_images, "--out", "p.csv", "--submission", "sample.csv")
    _assert_says(line, "sample.csv", "No such file or directory")


def test_sample_submission_of_other_classes(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    Path("sample.csv").write_text("id,cat,dog\n000,0,0\n")
    line = refuse("predict", tiny_run, drawn_images / "bars", "--out", "p.csv", "--submission", "sample.csv")
    _assert_says(line, "sample.csv", "cat, dog", "bars, dots, rings")


# --- backbones and weights ---


def test_unknown_backbone(drawn_images: Path, refuse: Refusal) -> None:
    line = refuse("train", drawn_images, "--out", "run", "--backbone", "resnet5O")
    _assert_says(line, "backbone 'resnet5O' is unknown", "did you mean 'resnet5", "lite0")


def test_backbone_name_that_reaches_out(drawn_images: Path, refuse: Refusal) -> None:
    line = refuse("train", drawn_images, "--out", "run", "--backbone", "hf-hub:someone/network")
    _assert_says(line, "backbone 'hf-hub:someone/network' is unknown")


def test_backbone_without_weights_offline(drawn_images: Path, refuse: Refusal) -> None:
    line = refuse("train", drawn_images, "--out", "run", "--backbone", "resnet18", "--offline")
    _assert_says(line, "backbone 'resnet18' has no weights", "--offline is set", "lite0", "--weights FILE")


def test_weights_of_another_network(drawn_images: Path, tiny_weights: Path, refuse: Refusal) -> None:
    line = refuse("train", drawn_images, "--out", "run", "--backbone", "test_vit", "--weights", tiny_weights)
    # ten keys are named, the rest is counted
    _assert_says(line, f"{tiny_weights} does not fit test_vit", "lacks", "cls_token", " more")


def test_weights_that_do_not_exist(drawn_images: Path, refuse: Refusal) -> None:
    line = refuse("train", drawn_images, "--out", "run", "--backbone", TINY, "--weights", "none.safetensors")
    _assert_says(line, "none.safetensors does not exist", "give a .safetensors or .pth file")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_weights_that_are_no_tensors(name: str, drawn_images: Path, refuse: Refusal) -> None:
    Path(name).write_bytes(b"no tensors at all")
    line = refuse("train", drawn_images, "--out", "run", "--backbone", TINY, "--weights", name)
    _assert_says(line, f"weights {name}", "as .safetensors or .pth")


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
        (lambda m: _flip_a_byte(m / "head.safetensors"), ("head.safetensors is damaged", "copy it again")),
        (lambda m: _flip_a_byte(m / "backbone.safetensors"), ("backbone.safetensors is damaged", "copy it")),
        (lambda m: (m / "head.safetensors").unlink(), ("lacks head.safetensors", "copy the whole folder")),
        (
            lambda m: (m / "bundle.json").write_text("{"),
            ("bundle.json", "no bundle of PixelPlay, or damaged", "copy it again"),
        ),
        (
            lambda m: (m / "bundle.json").write_text('{"classes": []}'),
            ("bundle.json", "no bundle of PixelPlay, or damaged"),
        ),
        (lambda m: (m / "bundle.json").unlink(), ("copy is no model", "expected a run of pixelplay train")),
        (lambda m: _change_json(m / "bundle.json", classes=["one"]), ("bundle.json is damaged", "copy it")),
        (
            lambda m: _change_json(m / "bundle.json", format_version=99),
            ("format version 99", "reads 3", "update PixelPlay"),
        ),
    ],
    ids=["head", "backbone", "missing file", "no json", "foreign", "no bundle", "wrong content", "newer"],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_bundle_that_cannot_be_used(
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
    _assert_says(line, *words)


def test_run_that_does_not_exist(drawn_images: Path, refuse: Refusal) -> None:
    line = refuse("evaluate", "nowhere", drawn_images)
    _assert_says(line, "nowhere does not exist", "expected a run of pixelplay train")


def test_other_run_that_does_not_exist(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    line = refuse("evaluate", tiny_run, drawn_images, "--against", "nowhere")
    _assert_says(line, "nowhere does not exist", "expected a run of pixelplay train")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: shutil.rmtree(run), "run does not exist"),
        (lambda run: (run / "label_issues.csv").unlink(), "run has no label_issues.csv"),
        (lambda run: (run / "label_issues.csv").write_text("path\n1\n"), "missing or damaged"),
        (lambda run: (run / "metrics.json").write_text("{}"), "missing or damaged"),
    ],
)
def test_suspects_of_a_run_without_records(
    damage: Callable[[Path], object],
    words: str,
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    damage(run)
    assert main(["label_issues", str(run)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    _assert_says(err, words)


# --- cross-validation ---


@pytest.fixture
def refuse_crossval(tiny_weights: Path, refuse: Refusal) -> Refusal:
    def run(data: Path, *argv: object) -> str:
        tiny = ["--out", "run", "--finetune", "none", "--backbone", TINY, "--weights", tiny_weights]
        return refuse("crossval", data, *tiny, *argv)

    return run


def test_more_folds_than_photographs_of_a_class(drawn_images: Path, refuse_crossval: Refusal) -> None:
    line = refuse_crossval(drawn_images, "--n-folds", "10")
    assert line == ("class 'rings' has 9 images but n_folds=10 needs 10; add some or use --n-folds 9")


def test_groups_that_hold_a_class_together(tmp_path: Path, refuse_crossval: Refusal) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 12, "dots": 12})
    for name in ("bars", "dots"):
        for i, path in enumerate(sorted((photos / name).iterdir())):
            path.rename(path.with_name(f"night{i % 3}_{path.name}"))
    line = refuse_crossval(photos, "--group-regex", r"night\d")
    _assert_says(line, "12 images in 3 groups that stay together", "n_folds=5 needs 5", "--n-folds 3")


@pytest.mark.parametrize("repeats", ["0", "21"])
def test_repeats_out_of_range(repeats: str, drawn_images: Path, refuse_crossval: Refusal) -> None:
    line = refuse_crossval(drawn_images, "--repeats", repeats)
    assert line == f"repeats={repeats} is outside its range 1 to 20"


def test_groups_that_leave_a_fold_empty(tmp_path: Path, refuse_crossval: Refusal) -> None:
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
    _assert_says(line, "without an image to hold out", "use --n-folds 2 or smaller groups")


def test_more_networks_than_a_model_holds(drawn_images: Path, refuse: Refusal) -> None:
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
    _assert_says(
        line, "10 folds, 11 times, are 110 networks", "a model holds 100", "--single or --finetune none"
    )


# --- settings ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--test-frac", "2"], "test_frac=2.0 is outside its range 0 to 0.9"),
        (["--n-folds", "1"], "n_folds=1 is outside its range 2 to 20"),
        (["--input-size", "8"], "input_size=8 is outside its range 16 to 4096"),
        (["--batch-size", "0"], "batch_size=0 is outside its range 1 to 4096"),
        (["--group-regex", "("], "group_regex='(' is not a regular expression"),
        (["--group-regex", "a{99999999999}"], "group_regex='a{99999999999}' is not a regular expression"),
        (["--group-by-folder", "--group-column", "camera"], "exclude each other: give one"),
        pytest.param(
            ["--device", "mps"],
            "device 'mps' is not available here; use --device auto",
            marks=pytest.mark.skipif(sys.platform == "darwin", reason="it may have one"),
        ),
    ],
)
def test_setting_that_cannot_be_used(
    options: list[str], words: str, drawn_images: Path, refuse: Refusal
) -> None:
    _assert_says(refuse("train", drawn_images, "--out", "run", *options), words)


@pytest.mark.parametrize("precision", ["0", "1.5", "-1", "nan"])
def test_precision_out_of_range(precision: str, drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    line = refuse("evaluate", tiny_run, drawn_images, f"--at-precision={precision}")
    _assert_says(line, float(precision), "above 0 and at most 1")


def test_precision_of_three_classes(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    line = refuse("evaluate", tiny_run, drawn_images, "--at-precision", "0.9")
    _assert_says(line, "3 classes", "needs 2")


def test_positive_class_without_a_precision(drawn_images: Path, tiny_run: Path, refuse: Refusal) -> None:
    line = refuse("evaluate", tiny_run, drawn_images, "--positive", "bars")
    assert line == "positive='bars' has no effect without at_precision; add --at-precision 0.95, for example"


# --- tuning ---


@pytest.fixture
def refuse_tuning(drawn_images: Path, tiny_weights: Path, refuse: Refusal) -> Refusal:
    """Refuse to train on the drawn images, and leave them and the weights as they are."""

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
        ((*PARTIAL, "--time-budget", "5x"), ["time_budget='5x' is no duration", "write 90s, 5m or 2h"]),
        ((*PARTIAL, "--time-budget", "0s"), ["time_budget='0s' is no duration"]),
        (
            (*PARTIAL, "--augment", "crop", "mixpu"),
            ["'mixpu' is unknown", "did you mean 'mixup'", "trivial_"],
        ),
        (
            (*PARTIAL, "--imbalance", "class_weights", "--oversample-to", "20"),
            ["oversample_to=20 and imbalance='class_weights'", "both correct for class sizes", "give one"],
        ),
        (
            (*PARTIAL, "--imbalance", "focal", "--augment", "crop", "mixup"),
            ["mixup makes labels soft", "focal loss cannot take", "choose another imbalance"],
        ),
        (
            (*FULL, "--imbalance", "focal", "--label-smoothing", "0.1"),
            ["label_smoothing makes labels soft", "focal loss cannot take", "leave it out"],
        ),
        (
            ("--finetune", "none", "--head", "mlp"),
            ["head='mlp'", "not fitted by a probe", "--finetune partial or full"],
        ),
        (
            ("--finetune", "none", "--oversample-to", "9"),
            ["oversample_to", "a probe has none", "--finetune partial"],
        ),
        ((*PARTIAL, "--unfreeze-stages", "0"), ["unfreeze_stages=0 is outside its range 1 to"]),
        (
            (*PARTIAL, "--unfreeze-stages", "4", "--epochs", "1"),
            ["unfreeze_stages=4 is outside 1 to 3", TINY, "--finetune full trains everything"],
        ),
        ((*PARTIAL, "--unfreeze-stages", "4"), ["unfreeze_stages=4 is outside 1 to 3", "--finetune full"]),
        ((*FULL, "--initial-size-frac", "0.1"), ["initial_size_frac=0.1 is outside its range 0.25 to 1"]),
        (
            (*PARTIAL, "--head", "mlp", "--ensemble-probe", "on"),
            ["ensemble_probe='on' averages linear heads", "head='mlp'", "leave one out"],
        ),
        (
            ("--finetune", "auto", "--head", "mlp"),
            ["head='mlp'", "not fitted by a probe", "--finetune partial or full"],
        ),
        (
            (*PARTIAL, "--head", "mlp", "--imbalance", "crt"),
            ["imbalance='crt' ends with a linear head, not head='mlp'", "leave one out"],
        ),
        (
            (*PARTIAL, "--head", "mlp", "--train-batch-size", "2"),
            ["train_batch_size=2 is outside its range 3 to 10000"],
        ),
        (
            (*PARTIAL, "--initial-size-frac", "0.5"),
            ["--finetune partial has no use for initial_size_frac=0.5"],
        ),
        ((*FULL, "--cached-views", "2"), ["--finetune full has no use for n_views=2; leave one of them out"]),
        (("--finetune", "none", "--epochs", "3"), ["--finetune none has no use for epochs=3"]),
        (("--finetune", "none", "--crop-scale", "0.5"), ["--finetune none has no use for crop_scale=0.5"]),
        (
            (*PARTIAL, "--epochs", "1", "--cached-views", "90", "--cache-gb", "0.001"),
            [" MB are needed for 90 views of 38 images, and", "room for 0.5 MB", "lower --cached-views"],
        ),
        (
            (*PARTIAL, "--epochs", "1", "--cache-gb", "0.00001"),
            ["MB are needed for 1 view of 38 images, and", "raise --cache-gb or use --finetune none"],
        ),
        ((*PARTIAL, "--mixup-alpha", "0.4"), ["mixup_alpha=0.4 says nothing without mixup"]),
        ((*PARTIAL, "--refit-epochs", "-1"), ["refit_epochs=-1 is outside its range 0 to 1000"]),
        ((*FULL, "--grad-accum-steps", "0"), ["accumulate=0 is outside its range 1 to 1024"]),
        ((*FULL, "--lr", "nan"), ["lr=nan is outside its range"]),
        (
            (*PARTIAL, "--plan", "nowhere.json"),
            ["plan nowhere.json cannot be read: No such file", "a run that took the probe has none"],
        ),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, tuple) else "",
)
def test_tuning_that_cannot_be_done_as_asked(
    options: tuple[str, ...], words: list[str], refuse_tuning: Refusal
) -> None:
    _assert_says(refuse_tuning(*options), *words)


@pytest.mark.parametrize("method", [PARTIAL, FULL])
def test_a_time_budget_that_is_too_short(method: tuple[str, str], refuse_tuning: Refusal) -> None:
    line = refuse_tuning(*method, "--time-budget", "0.1s", "--batch-size", "8", "--train-batch-size", "8")
    _assert_says(line, f"--time-budget 0.1s is too short for {method[1]} tuning on 32 images: about ")
    _assert_says(line, " are needed here", "raise --time-budget", "--finetune none")


def test_a_plan_for_another_network(refuse_tuning: Refusal) -> None:
    plan = {"finetune": "partial", "unfreeze_stages": 7, "cached_views": 1, "epochs": 1, "batch_size": 8}
    Path("plan.json").write_text(json.dumps({**plan, "is_compiled": False, "seconds": {}}))
    line = refuse_tuning(*PARTIAL, "--plan", "plan.json")
    _assert_says(line, "unfreeze_stages=7 is outside 1 to 3", TINY, "--finetune full trains everything")


# weights that this decay turns over and a hundredfold in each step
RUNAWAY = (
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


def test_a_loss_that_is_no_number_ends_a_training_from_nothing(refuse_tuning: Refusal) -> None:
    line = refuse_tuning(*PARTIAL, "--cached-views", "1", *RUNAWAY, "--head-init", "random")
    assert re.match(r"the loss is (nan|inf) at step \d+ of 32, before anything was learned", line)
    _assert_says(line, "lower --lr and --head-lr")


def test_a_loss_that_is_no_number_leaves_the_probe(
    drawn_images: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What training started from is a classifier: it is kept, and the step is named."""
    common = [
        "train",
        str(drawn_images),
        *tiny_settings,
    ]
    assert main([*common, "--out", "run", *PARTIAL, "--cached-views", "1", *RUNAWAY]) == 0
    err = capsys.readouterr().err
    said = re.search(
        r"note: training ended early: the loss is (nan|inf) at step \d+ of 32; "
        r"the weights are those of epoch 0\n",
        err,
    )
    assert said, err
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert said[0].removeprefix("note: ").rstrip() in metrics["notes"]
    assert metrics["finetune"] == metrics["chosen"]["finetune"]["value"] == "none"
    assert metrics["test"]["accuracy"]["value"] > 0.7
    assert Path("run/history.csv").read_text().count("\n") == 2
    assert os.listdir() == ["run"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            (*FULL, "--epochs", "2", "--initial-size-frac", "0.5"),
            ["test_vit3 takes no images of 64 px", "initial_size_frac=0.5", "--initial-size-frac 1"],
        ),
        (
            ("--finetune", "none", "--input-size", "96"),
            ["test_vit3 takes no images of 96 px", "its weights were trained with 160 px"],
        ),
    ],
    ids=["growing", "another"],
)
def test_a_network_that_takes_one_image_size_only(
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
    _assert_says(line, *words)


def test_an_interrupted_run_with_other_settings(
    drawn_images: Path, tiny_probe: TrainConfig, refuse_tuning: Refusal
) -> None:
    config = replace(tiny_probe, finetune="partial")
    device = find_device(config.compute)
    check_settings("run.partial/checkpoint", config, device, None, RunLog(quiet=True))
    Path("run.partial/checkpoint/checkpoint.safetensors").touch()
    Path("run.partial/.lock").touch()
    line = refuse_tuning(*PARTIAL, "--resume", "--lr", "0.01", "--seed", "3", "--cache-gb", "1")
    _assert_says(line, "finetune.lr was None, is 0.01", "seed was 0, is 3", "give the same", "--force")
    assert "cache_gb" not in line


def test_an_interrupted_run_that_is_neither_resumed_nor_replaced(refuse_tuning: Refusal) -> None:
    Path("run.partial/checkpoint").mkdir(parents=True)
    Path("run.partial/checkpoint/checkpoint.safetensors").touch()
    Path("run.partial/.lock").touch()
    line = refuse_tuning(*PARTIAL)
    _assert_says(line, Path("run.partial").absolute(), "holds an interrupted run", "--resume", "--force")


def test_a_folder_in_the_way_of_an_interrupted_run(refuse_tuning: Refusal) -> None:
    Path("run.partial").mkdir()
    Path("run.partial/thesis.txt").write_text("years of work")
    line = refuse_tuning(*PARTIAL, "--force")
    _assert_says(line, Path("run.partial").absolute(), "files that are not of a run", "choose another --out")


def test_a_command_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "photos"]) == 2
    line = capsys.readouterr().err
    assert line == "error: no command 'trian'; did you mean 'train'?; pixelplay --help lists all\n"


def test_labels_that_are_no_utf8(tmp_path: Path, refuse: Refusal, train_tiny: list[str]) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 3, "dots": 3})
    rows = [f"bars/{i:03}.{end},m\xe9tal" for i, end in enumerate(("jpg", "png", "jpg"))]
    (photos / "labels.csv").write_bytes("\n".join(["path,label", *rows, ""]).encode("cp1252"))
    line = refuse("train", photos / "labels.csv", *train_tiny)
    _assert_says(line, "row 2 has a label that is no UTF-8, 'métal'", "save it as UTF-8")


def test_two_folds_of_classes_of_two(tmp_path: Path, refuse_crossval: Refusal) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 2, "dots": 2})
    line = refuse_crossval(photos, "--n-folds", "2")
    _assert_says(line, "no class has more than 2 images", "n_folds=2 needs a class of 3", "add some")


def test_a_report_in_the_place_of_another_files_first_draft(tiny_run: Path, refuse: Refusal) -> None:
    Path("notes.html.tmp").write_text("mine")
    line = refuse("report", tiny_run, "--out", "notes.html")
    _assert_says(line, "notes.html.tmp exists and is no report", "choose another --out", "--force")


def test_a_folder_for_names_in_a_table_without_any_table(
    drawn_images: Path, tiny_run: Path, refuse: Refusal
) -> None:
    line = refuse("predict", tiny_run, drawn_images, "--images-dir", "there", "--out", "p.csv")
    _assert_says(line, "--images-dir is about tables", drawn_images)
