"""Commands as users type them: output, files and exit status."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from select import select
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import pixelplay
from conftest import TINY_COUNTS, draw_folder, draw_of_class
from images import altered, draw, encode, scene
from pixelplay.cli.commands import COMMANDS
from pixelplay.cli.help import command_options
from pixelplay.cli.main import main
from pixelplay.cli.usage import SYNONYMS
from pixelplay.config import TrainConfig
from pixelplay.data.cache import measure_cache
from pixelplay.model.backbone import Backbone
from tables import read_rows

RECORDS = {
    "config.json",
    "environment.json",
    "split.json",
    "metrics.json",
    "oof.csv",
    "predictions.csv",
    "label_issues.csv",
    "model",
}
BUNDLE = {"bundle.json", "README.md"} | {
    f"{name}.safetensors" for name in ("backbone", "calibration", "head", "novelty")
}


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Shell = Callable[..., Outcome]


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Run a command in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*argv: object) -> Outcome:
        capfd.readouterr()
        status = main(list(map(str, argv)))
        return Outcome(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def tiny_train(small_settings: list[str]) -> list[str]:
    return ["--finetune", "none", *small_settings]


@pytest.fixture(scope="module")
def two_class_run(
    tiny_train: list[str], drawn_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("two")
    for name in ("bars", "dots"):
        shutil.copytree(drawn_images / name, root / "photos" / name)
    assert main(["train", str(root / "photos"), "--out", str(root / "run"), *tiny_train, "--quiet"]) == 0
    return root / "run"


def _hash_tree(root: Path) -> dict[str, tuple[str, int]]:
    """Content and time of change of every file."""
    return {
        str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in root.rglob("*")
        if p.is_file()
    }


# --- usage ---


def test_version(shell: Shell) -> None:
    assert shell("--version") == Outcome(0, f"pixelplay {pixelplay.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "label-issues"),
        (["trian"], "trian"),
        (["train", "photos"], "--out RUN"),
        (["scan"], "DATA"),
        (["train", "photos", "--out", "run", "--sed", "1"], "--seed"),
        (["train", "photos", "--out", "run", "--seed", "one"], "--seed 'one' has the wrong form"),
        (["train", "photos", "extra", "--out", "run"], "unexpected argument extra"),
        (["train", "photos", "--out"], "--out needs a value: --out RUN"),
        (["train", "photos", "--out", "--force"], "--out needs a value: --out RUN"),
        (["train", "--data", "photos", "--out", "run"], "--data; write DATA without an option"),
        (["train", "photos", "-o", "run"], "-o; did you mean --out?"),
        (["train", "photos", "--out", "run", "--learning-rate", "1"], "did you mean --lr?"),
        (["train", "photos", "--out", "run", "--img-size", "64"], "did you mean --input-size?"),
        (["train", "photos", "--out", "run", "--model=lite0"], "did you mean --backbone?"),
        (["train", "photos", "--out", "run", "--val_split", "0.1"], "did you mean --val-frac?"),
        (["train", "photos", "--out", "run", "--epoch", "3"], "did you mean --epochs?"),
        (["scan", "--nodecode", "photos"], "unknown option --nodecode; see pixelplay scan --help"),
        (["explain", "--model", "run", "photos", "--out", "c"], "write RUN without an option"),
        (["train", "photos", "--out", "run", "--metric", "f1"], "macro_f1"),
        (["train", "photos", "--out", "run", "--classes", "None", "--seed"], "--seed"),
        (["evaluate", "run", "photos", "--split", "tset"], "--split"),
        (["predict", "run", "--out", "p.csv"], "IMAGES"),
        (
            ["train", "photos", "--out", "run", "--imbalance", "sampler", "--imbalance=focal"],
            "--imbalance",
        ),
        (["train", "photos", "--out", "run", "--val_frac", "0.1", "--val-frac", "0.2"], "--val-frac"),
        (
            ["predict", "run", "new", "--ensemble-with", "a", "--ensemble-with", "b", "--out", "p.csv"],
            "--ensemble-with",
        ),
    ],
)
def test_wrong_usage_exits_2_and_names_the_argument(argv: list[str], word: str, shell: Shell) -> None:
    done = shell(*argv)
    assert (done.status, done.out) == (2, "")
    assert word in done.err
    assert "tyro" not in done.err
    if argv and argv[0] in COMMANDS:
        assert done.err.count("\n") == 1
        assert done.err.startswith("error: ")
        assert done.err.endswith(f"; see pixelplay {argv[0]} --help\n") or "repeated" in done.err


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_and_usage_errors_end_in_any_terminal_width(
    command: str | None, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [] if command is None else [command]
    for columns in (1, 2, 10, 80, 200, 0, 10**6):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert shell(*argv, "--help").status == shell(*argv, "--help-all").status == 0
        assert shell(*argv, "a", "b", "--json-progress=maybe").status == 2
    assert os.environ["COLUMNS"] == str(10**6)


def test_every_synonym_names_an_option_of_some_command(shell: Shell) -> None:
    flags = {
        each.usage.split()[0] for run in COMMANDS.values() for each in command_options(run, TrainConfig())
    }
    assert set(SYNONYMS) <= flags


# --- help ---


def test_help_shows_ten_options_and_help_all_shows_all(shell: Shell) -> None:
    short, full = shell("train", "--help").out, shell("train", "--help-all").out
    first = "--out --finetune --time-budget --metric --backbone --imbalance --test-frac --no-hflip --seed"
    assert re.findall(r"^  (--\S+)", short, re.MULTILINE) == [*first.split(), "--resume", "--force"]
    assert short.endswith(
        "\nData, fine-tuning, augmentation, compute and output options: pixelplay train --help-all\n"
    )
    headings = re.findall(r"^(\S.*):$", full, re.MULTILINE)
    assert headings == ["Options", "Training", "Data", "Fine-tuning", "Augmentation", "Compute", "Output"]
    flags = set(re.findall(r"^  --(?:no-)?(\S+)", full, re.MULTILINE))
    settings = (pixelplay.TrainConfig, pixelplay.FinetuneConfig, pixelplay.AugmentConfig)
    groups = {"finetuning", "augmenting", "reading", "compute"}
    names = {field.name for kind in settings for field in dataclasses.fields(kind)} - groups
    assert {name.replace("_", "-") for name in names} <= flags


def test_help_shows_the_range_that_is_checked(shell: Shell) -> None:
    shown = " ".join(shell("train", "--help-all").out.split())
    assert re.search(r"--test-frac FRACTION [^[]*\(0 to 0.9\) \[0.2\]", shown)
    assert re.search(r"--n-folds N [^[]*\(2 to 20\) \[5\]", shown)
    refused = shell("train", "photos", "--out", "run", "--test-frac", "2")
    assert (refused.status, refused.err) == (1, "error: --test-frac 2.0 is outside its range 0 to 0.9\n")


def test_help_shows_the_defaults_of_the_recipe(shell: Shell) -> None:
    def defaults(*argv: str) -> dict[str, str]:
        entries = re.split(r"\n(?:  (?=--)|\S.*:\n)", shell("train", *argv, "--help-all").out)
        matches = [re.match(r"\s*--(\S+).*\[(.*)\]\s*$", " ".join(entry.split())) for entry in entries]
        return {match[1]: match[2] for match in matches if match}

    ours, theirs = defaults(), defaults("--recipe", "pixelplay25")
    names = ("finetune", "backbone", "imbalance", "lr", "dropout", "label-smoothing", "crop-scale")
    assert [ours[name] for name in names] == ["auto", "auto", "auto", "1e-3; full: 2e-4", "0.0", "0.0", "0.7"]
    assert [theirs[name] for name in names] == [
        "full", "convnext_tiny.in12k_ft_in1k", "sampler", "0.0001", "0.6", "0.1", "0.5"
    ]  # fmt: skip
    assert (theirs["epochs"], theirs["patience"]) == ("30", "3")
    assert (ours["epochs"], ours["patience"]) == ("as many as it allows", "off")


# --- scan ---


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    """Images with predefined splits and one problem of each kind."""
    root = draw_folder(tmp_path / "flawed/train", {"bars": 4, "dots": 4}).parent
    draw_folder(root / "test", {"bars": 2, "dots": 2}, first_seed=100)
    train, test = root / "train", root / "test"
    shutil.copy(train / "bars/000.jpg", train / "bars/copy.jpg")  # a duplicate
    shutil.copy(train / "dots/000.jpg", train / "bars/doubt.jpg")  # a conflict
    shutil.copy(train / "dots/002.jpg", test / "dots/leaked.jpg")  # a leak
    (train / "dots/broken.jpg").write_bytes(b"")
    (train / ".DS_Store").write_bytes(b"\0")
    return root


def test_scan_json_names_the_files_of_each_finding(flawed: Path, shell: Shell) -> None:
    done = shell("scan", flawed, "--json", "--quiet")
    assert (done.status, done.err) == (0, "")
    found = done.json

    def files(name: str) -> list[set[str]]:
        return [{member["path"] for member in members} for members in found[name]]

    leak = {"train/dots/002.jpg", "test/dots/leaked.jpg"}
    conflict = {"train/dots/000.jpg", "train/bars/doubt.jpg"}
    assert found["classes"] == {"bars": 8, "dots": 8}
    assert found["splits"] == {"train": 11, "test": 5}
    assert found["n"] == 16
    assert found["imbalance_ratio"] == 1.0
    assert [entry["path"] for entry in found["unreadable"]] == ["train/dots/broken.jpg"]
    assert found["unreadable"][0]["status"] == "unreadable"
    assert "empty" in found["unreadable"][0]["reason"]
    assert sorted(map(sorted, files("duplicates"))) == sorted(
        map(sorted, [{"train/bars/000.jpg", "train/bars/copy.jpg"}, conflict, leak])
    )
    assert files("conflicts") == [conflict]
    assert {member["label"] for member in found["conflicts"][0]} == {"bars", "dots"}
    assert files("leaks") == [leak]
    assert {member["split"] for member in found["leaks"][0]} == {"train", "test"}
    assert found["formats"] == {"JPEG": 9, "PNG": 6}
    assert found["largest_px"] == [80, 64]
    assert sum(found["skipped"].values()) == 1


def test_scan_prints_the_same_findings_as_text(flawed: Path, shell: Shell) -> None:
    done = shell("scan", flawed)
    assert done.status == 0
    assert f"{flawed}: 16 images, 2 classes" in done.out
    assert re.search(r"train 11\b.*test 5\b", done.out)
    assert "JPEG 9, PNG 6" in done.out
    assert "train/dots/broken.jpg" in done.out
    assert re.search(r"train/bars/doubt.jpg.*bars.* = train/dots/000.jpg.*dots", done.out)
    assert re.search(
        r"test/dots/leaked.jpg = train/dots/002.jpg|train/dots/002.jpg = test/dots/leaked.jpg", done.out
    )
    assert re.search(r"\b1 hidden", done.err)


def test_scan_finds_near_duplicates_on_request(shell: Shell) -> None:
    for i in range(4):
        Path(f"photos/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        Path(f"photos/{'ab'[i % 2]}/{i}.png").write_bytes(encode(scene(i), "PNG"))
    Path("photos/b/again.jpg").write_bytes(altered(scene(0))["mirrored"])
    assert shell("scan", "photos", "--json", "--quiet").json["near_duplicates"] == []
    found = shell("scan", "photos", "--near-duplicates", "--json", "--quiet").json
    for name in ("near_duplicates", "conflicts"):
        assert [{member["path"] for member in members} for members in found[name]] == [
            {"a/0.png", "b/again.jpg"}
        ]
    shown = shell("scan", "photos", "--near-duplicates", "--quiet").out
    assert "a/0.png = b/again.jpg" in shown
    assert "--near-duplicates" not in shown
    assert "--near-duplicates" in shell("scan", "photos", "--quiet").out  # was not searched
    refused = shell("scan", "photos", "--near-duplicates", "--names-only")
    assert (refused.status, refused.err.count("\n")) == (1, 1)
    assert all(flag in refused.err for flag in ("--near-duplicates", "--names-only"))


def test_near_duplicates_stay_in_one_split(drawn_classes: Path, tiny_train: list[str], shell: Shell) -> None:
    duplicates = {}
    for i in range(6):
        (drawn_classes / f"bars/scene{i}.png").write_bytes(encode(scene(i), "PNG"))
        (drawn_classes / f"dots/again{i}.jpg").write_bytes(altered(scene(i))["resized"])
        duplicates[f"bars/scene{i}.png"] = f"dots/again{i}.jpg"
    with_near_duplicates = [word for word in tiny_train if word != "--no-near-duplicates"]
    done = shell("train", drawn_classes, "--out", "run", *with_near_duplicates)
    assert done.status == 0
    found = json.loads(Path("run/metrics.json").read_text())["data"]
    pairs = {frozenset(member["path"] for member in members) for members in found["near_duplicates"]}
    assert {frozenset(pair) for pair in duplicates.items()} <= pairs
    split = json.loads(Path("run/split.json").read_text())
    split_of = {path: name for name in ("train", "test") for path in split[name]}
    assert all(split_of[first] == split_of[second] for first, second in duplicates.items())
    notes = [line for line in done.err.splitlines() if "bars/scene" in line and "dots/again" in line]
    assert notes  # examples of near-duplicates and of conflicting labels


def test_scan_names_expected_classes_with_few_images(drawn_classes: Path, shell: Shell) -> None:
    Path("classes.csv").write_text("class,count\nbars,60\nrings,30\nspirals,10\n")
    scan = ["scan", drawn_classes, "--classes", "classes.csv", "--quiet"]
    found = shell(*scan, "--json").json
    assert found["expected_with_few_images"] == {"rings": 9}
    assert found["test_share_with_few_images"] == pytest.approx(0.3)
    shown = shell(*scan).out
    assert re.search(r"\brings\b.*\b9\b.*30(\.0)?\s?%", shown)


def test_scan_names_only_still_finds_duplicates(flawed: Path, shell: Shell) -> None:
    found = shell("scan", flawed, "--names-only", "--json", "--quiet").json
    assert [len(found[name]) for name in ("duplicates", "conflicts", "leaks", "unreadable")] == [3, 1, 1, 1]
    assert found["formats"] == {}


def test_scan_shows_the_reachable_accuracy_without_a_class(drawn_images: Path, shell: Shell) -> None:
    Path("expected.csv").write_text("class,count\nbars,30\ndots,20\nrings,10\nspirals,40\n")
    done = shell("scan", drawn_images, "--classes", "expected.csv")
    assert "spirals" in done.out
    assert re.search(r"60(\.0)?\s?%", done.out)
    found = shell("scan", drawn_images, "--classes", "expected.csv", "--json").json
    assert found["expected_without_images"] == ["spirals"]
    assert found["reachable_accuracy"] == pytest.approx(0.6)


def test_scan_changes_no_file(flawed: Path, shell: Shell) -> None:
    before = _hash_tree(flawed)
    assert shell("scan", flawed).status == 0
    assert _hash_tree(flawed) == before


def test_invalid_utf8_file_name_is_scanned_and_classified(
    drawn_images: Path, tiny_run: Path, tmp_path: Path, shell: Shell
) -> None:
    folder = os.fsencode(tmp_path / "photos/a")
    os.makedirs(folder)
    try:
        shutil.copy(drawn_images / "bars/000.jpg", os.path.join(folder, b"caf\xe9.jpg"))
    except OSError:
        pytest.skip("this file system takes only valid names")
    shutil.copy(drawn_images / "bars/000.jpg", os.path.join(folder, b"copy.jpg"))
    assert shell("scan", tmp_path / "photos").status == 0
    assert shell("predict", tiny_run, tmp_path / "photos", "--out", "p.csv").status == 0
    assert b"caf\xe9.jpg,ok" in Path("p.csv").read_bytes()


# --- train ---


def test_train_writes_a_run_and_prints_its_headline(
    drawn_images: Path, tiny_train: list[str], shell: Shell
) -> None:
    before = _hash_tree(drawn_images)
    done = shell("train", drawn_images, "--out", "runs/first", *tiny_train)
    assert done.status == 0
    assert set(os.listdir("runs")) == {"first"}
    assert set(os.listdir("runs/first")) == RECORDS
    assert set(os.listdir("runs/first/model")) == BUNDLE
    metrics = json.loads(Path("runs/first/metrics.json").read_text())
    headline = metrics["headline"]
    assert headline["metric"] == "accuracy"
    assert headline["measured_on"] == "test"
    (shown,) = [line for line in done.out.splitlines() if re.search(r"^\s*accuracy\b", line)]
    assert f"{headline['value']:.3f}" in shown
    assert f"{headline['low']:.3f}–{headline['high']:.3f}" in shown
    assert "'bars'" in done.out  # the majority class
    assert "pixelplay predict runs/first " in done.out
    assert len(done.out.splitlines()) <= 24  # fits on one screen
    assert _hash_tree(drawn_images) == before


def test_train_json_equals_metrics_json(drawn_images: Path, tiny_train: list[str], shell: Shell) -> None:
    done = shell("train", drawn_images, "--out", "run", *tiny_train, "--json", "--quiet")
    assert (done.status, done.err) == (0, "")
    assert done.json == json.loads(Path("run/metrics.json").read_text())
    test, oof = done.json["test"], done.json["oof"]
    split = json.loads(Path("run/split.json").read_text())
    assert test["n"] == len(split["test"]) == pytest.approx(0.2 * 48, abs=1)
    assert oof["n"] == len(split["train"]) == 48 - test["n"]
    assert {"chosen_on", "measured_on"} <= set(test) & set(oof) & set(done.json["headline"])


def test_same_seed_gives_the_same_run(drawn_images: Path, tiny_train: list[str], shell: Shell) -> None:
    for name, options in {"a": ["--seed", "7"], "b": ["--seed", "7", "--num-workers", "1"], "c": []}.items():
        out = ["--out", name, "--cache-dir", f"cache_{name}"]
        assert shell("train", drawn_images, *out, *options, *tiny_train, "--quiet").status == 0
    for path in ("metrics.json", "split.json", "model/head.safetensors", "oof.csv", "predictions.csv"):
        assert Path("a", path).read_bytes() == Path("b", path).read_bytes(), path
    assert Path("a/split.json").read_bytes() != Path("c/split.json").read_bytes()


def test_bundle_has_no_paths_or_host_names(drawn_images: Path, tiny_run: Path, tiny_weights: Path) -> None:
    text = (tiny_run / "model/bundle.json").read_text()
    assert str(drawn_images) not in text
    assert str(tiny_weights.parent) not in text
    assert os.uname().nodename not in json.loads(text)["made_by"].values()


def test_force_replaces_a_run(drawn_images: Path, tiny_train: list[str], shell: Shell) -> None:
    train = ["train", drawn_images, "--out", "run", *tiny_train, "--quiet"]
    assert shell(*train).status == 0
    before = Path("run/split.json").read_bytes()
    assert shell(*train, "--seed", "3", "--force").status == 0
    assert Path("run/split.json").read_bytes() != before
    assert os.listdir() == ["run"]


def test_failed_force_keeps_the_old_run(drawn_images: Path, tiny_run: Path, shell: Shell) -> None:
    shutil.copytree(tiny_run, "run")
    before = _hash_tree(Path("run"))
    assert shell("train", drawn_images, "--out", "run", "--force", "--backbone", "nonsense").status == 1
    assert _hash_tree(Path("run")) == before
    assert os.listdir() == ["run"]


def test_groups_of_a_table_stay_in_one_split(drawn_images: Path, tiny_train: list[str], shell: Shell) -> None:
    photos = sorted(drawn_images.rglob("*.*"))
    rows = [
        [p.relative_to(drawn_images), p.parent.name, f"{p.parent.name}{i // 3}"] for i, p in enumerate(photos)
    ]
    with open("labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["filename", "species", "camera"], *rows])
    done = shell("train", "labels.csv", "--images-dir", drawn_images, "--out", "run", *tiny_train)
    assert done.status == 0
    assert "'camera'" in done.err
    group = {str(path): name for path, _, name in rows}
    split = json.loads(Path("run/split.json").read_text())
    assert not {group[path] for path in split["train"]} & {group[path] for path in split["test"]}
    fold_of: dict[str, set[str]] = {}
    for row in read_rows("run/oof.csv"):
        fold_of.setdefault(group[row["path"]], set()).add(row["fold"])
    assert all(len(folds) == 1 for folds in fold_of.values())


def test_predefined_splits_are_kept_and_training_duplicates_of_test_images_removed(
    flawed: Path, tiny_train: list[str], shell: Shell
) -> None:
    done = shell("train", flawed, "--out", "run", *tiny_train)
    assert done.status == 0
    split = json.loads(Path("run/split.json").read_text())
    assert all(path.startswith("test/") for path in split["test"])
    assert split["removed"] == ["train/dots/002.jpg"]
    assert "train/dots/002.jpg" not in split["train"]
    assert "train/dots/broken.jpg" in done.err
    assert "train/dots/002.jpg" in done.err
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["test"]["n"] == 5
    fair = metrics["test_without_duplicates"]
    assert fair["n"] == 4
    assert f"accuracy {fair['accuracy']['value']:.3f}" in done.out


def test_unlabelled_test_folder_is_not_evaluated(
    drawn_images: Path, tiny_train: list[str], tmp_path: Path, shell: Shell
) -> None:
    root = tmp_path / "competition"
    shutil.copytree(drawn_images, root / "train")
    (root / "test").mkdir()
    for i in range(3):
        (root / "test" / f"{i}.png").write_bytes(encode(draw(i), "PNG"))
    done = shell("train", root, "--out", "run", *tiny_train)
    assert done.status == 0
    split = json.loads(Path("run/split.json").read_text())
    assert all(path.startswith("train/") for paths in split.values() for path in paths)
    assert len(split["train"] + split["test"]) == 48
    assert shell("scan", root, "--json", "--quiet").json["n_unlabelled"] == 3
    assert shell("predict", "run", root / "test", "--out", "p.csv", "--quiet").status == 0
    assert [row["path"] for row in read_rows("p.csv")] == [str(root / "test" / f"{i}.png") for i in range(3)]


@pytest.mark.parametrize("form", ["--classes", "sample submission"])
def test_absent_classes_are_named_with_the_reachable_accuracy(
    form: str, drawn_classes: Path, tiny_train: list[str], shell: Shell
) -> None:
    options: list[object] = []
    if form == "--classes":
        Path("classes.csv").write_text("class,count\nbars,10\ndots,10\nrings,40\nspirals,30\nstars,10\n")
        options = ["--classes", "classes.csv"]
    else:
        (drawn_classes / "sample_submission.csv").write_text(
            "id,bars,dots,rings,spirals,stars\n1,0,0,0,0,0\n"
        )
    done = shell("train", drawn_classes, "--out", "run", *tiny_train, *options)
    assert done.status == 0
    notes = [line for line in done.err.splitlines() if "spirals" in line and "stars" in line]
    assert len(notes) == 1
    has_bound = re.search(r"60(\.0)?\s?%", notes[0]) is not None
    assert has_bound == (form == "--classes")  # a sample submission has no counts
    assert notes[0].removeprefix("note: ") in json.loads(Path("run/metrics.json").read_text())["notes"]


def test_classes_without_training_images_limit_the_accuracy(
    drawn_images: Path, tiny_train: list[str], tmp_path: Path, shell: Shell
) -> None:
    root = tmp_path / "splits"
    shutil.copytree(drawn_images, root / "train")
    draw_folder(root / "test", {"bars": 3}, first_seed=50)
    (root / "test/spirals").mkdir()
    (root / "test/spirals/1.png").write_bytes(encode(draw(1), "PNG"))
    done = shell("train", root, "--out", "run", *tiny_train)
    assert done.status == 0
    assert re.search(r"spirals.*75(\.0)?\s?%", done.err)
    test = json.loads(Path("run/metrics.json").read_text())["test"]
    assert test["n"] == 4
    assert test["accuracy"]["value"] <= 0.75


def test_headline_without_test_split_is_out_of_fold(
    drawn_images: Path, tiny_train: list[str], shell: Shell
) -> None:
    done = shell("train", drawn_images, "--out", "run", *tiny_train, "--test-frac", "0")
    assert done.status == 0
    assert "out of fold" in done.out.lower()
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["headline"]["measured_on"] == "oof"
    assert "test" not in metrics
    assert not Path("run/predictions.csv").exists()


# --- evaluate ---


def test_evaluate_json_has_every_metric(drawn_images: Path, tiny_run: Path, shell: Shell) -> None:
    done = shell("evaluate", tiny_run, drawn_images, "--json", "--quiet")
    assert (done.status, done.err) == (0, "")
    found = done.json
    assert found["n"] == 48
    for name in (
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
        "log_loss",
        "brier",
        "roc_auc",
        "average_precision",
    ):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"], name
    assert 0 <= found["ece"]["value"] <= 1
    rows = {row["class"]: row for row in found["per_class"]}
    assert {name: row["n"] for name, row in rows.items()} == TINY_COUNTS
    assert {"precision", "recall", "f1", "roc_auc", "average_precision"} <= set(rows["bars"])
    assert found["confusion"]["classes"] == list(TINY_COUNTS)
    assert [sum(row) for row in found["confusion"]["matrix"]] == list(TINY_COUNTS.values())


def test_evaluate_warns_of_training_images(
    drawn_images: Path, tiny_run: Path, tmp_path: Path, shell: Shell
) -> None:
    done = shell("evaluate", tiny_run, drawn_images)
    n_trained_on = len(json.loads((tiny_run / "split.json").read_text())["train"])
    assert re.search(
        rf"trained on.*\b{n_trained_on}\b.*\b48\b|\b{n_trained_on}\b.*\b48\b.*trained on", done.err
    )
    assert "not trained on" in done.out
    found = shell("evaluate", tiny_run, drawn_images, "--json").json
    assert (found["n_trained_on"], found["unseen"]["n"]) == (n_trained_on, 48 - n_trained_on)
    fresh = draw_folder(tmp_path / "fresh", {"bars": 2, "dots": 2}, first_seed=200)
    done = shell("evaluate", tiny_run, fresh)
    assert done.status == 0
    assert "trained on" not in done.err + done.out


def test_evaluate_counts_images_without_label(tiny_run: Path, tmp_path: Path, shell: Shell) -> None:
    draw_folder(tmp_path / "photos", {"bars": 3, "rings": 3}, first_seed=300)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*g"))
    rows = [f"{name},{name.split('/')[1] if i else ''}" for i, name in enumerate(names)]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    done = shell("evaluate", tiny_run, tmp_path / "table.csv", "--json")
    assert done.json["n"] == 5
    assert re.search(r"\b1 of 6\b.*label", done.err)


def test_threshold_is_chosen_without_training_images(
    two_class_run: Path, drawn_images: Path, tmp_path: Path, shell: Shell
) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 6, "dots": 6}, first_seed=400)
    ask = ["evaluate", two_class_run, photos, "--at-precision", "0.5"]
    (fresh,) = [line for line in shell(*ask).out.splitlines() if "probability ≥" in line]
    for name in ("bars", "dots"):
        for photo in (drawn_images / name).iterdir():
            shutil.copy(photo, photos / name / f"trained_on-{photo.name}")
    (mixed,) = [line for line in shell(*ask).out.splitlines() if "probability ≥" in line]
    assert "trained on" in mixed
    assert "trained on" not in fresh
    assert shell(*ask, "--json").json["n_trained_on"] > 0
    unseen = shell(*ask, "--json").json["unseen"]["operating_point"]
    assert f"{unseen['threshold']:.4f}: precision {unseen['precision']['value']:.3f}" in mixed
    assert f"recall {unseen['recall']['value']:.3f}" in mixed


def test_evaluate_table_marks_training_images(
    drawn_images: Path, tiny_run: Path, tmp_path: Path, shell: Shell
) -> None:
    found = shell("evaluate", tiny_run, drawn_images, "--out", tmp_path / "evaluated.csv", "--json").json
    trained_on = [row["trained_on"] for row in read_rows(tmp_path / "evaluated.csv")]
    assert trained_on.count("true") == found["n_trained_on"] > 0
    assert trained_on.count("false") == len(trained_on) - found["n_trained_on"] > 0


def test_evaluate_says_over_how_many_classes_macro_averages_run(
    two_class_run: Path, drawn_images: Path, tmp_path: Path, shell: Shell
) -> None:
    shutil.copytree(drawn_images / "bars", tmp_path / "one/bars")
    done = shell("evaluate", two_class_run, tmp_path / "one")
    assert done.status == 0
    for name in ("balanced accuracy", "macro F1"):
        assert f"{name} (over 1 of 2 classes)" in done.out
    assert "accuracy (over" not in done.out.replace("balanced accuracy (over", "")
    record = shell("evaluate", two_class_run, tmp_path / "one", "--json").json
    assert record["balanced_accuracy"]["n_classes"] == 1
    shutil.copytree(drawn_images / "dots", tmp_path / "one/dots")
    assert "(over" not in shell("evaluate", two_class_run, tmp_path / "one").out


def test_evaluate_counts_unreadable_images_and_unknown_classes(
    tiny_run: Path, tmp_path: Path, shell: Shell
) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 3, "rings": 3}, first_seed=300)
    (photos / "bars/broken.jpg").write_bytes(b"")
    (photos / "spirals").mkdir()
    (photos / "spirals/1.png").write_bytes(encode(draw(1), "PNG"))
    done = shell("evaluate", tiny_run, photos, "--json")
    assert done.status == 0
    assert (done.json["n"], done.json["n_unreadable"]) == (7, 1)
    assert re.search(r"\b1 .*bars/broken.jpg: ", done.err)
    assert [bad["status"] for bad in done.json["unreadable"]] == ["unreadable"]
    assert "spirals" in done.err
    assert done.json["known_only"]["n"] == 6


def test_two_classes_have_an_operating_point(two_class_run: Path, tmp_path: Path, shell: Shell) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 6, "dots": 6}, first_seed=400)
    found = shell("evaluate", two_class_run, photos, "--at-precision", "0.5", "--json").json[
        "operating_point"
    ]
    assert found["positive"] == "dots"
    assert found["target_precision"] == 0.5
    assert found["recall"]["low"] <= found["recall"]["value"] <= found["recall"]["high"]
    other = shell("evaluate", two_class_run, photos, "--at-precision", "0.5", "--positive", "bars")
    assert "'bars'" in other.out
    assert "recall" in other.out


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_evaluate_table_has_label_and_prediction(
    ending: str, tiny_run: Path, tmp_path: Path, shell: Shell
) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 3, "rings": 2}, first_seed=300)
    (photos / "bars/zz.jpg").write_bytes(b"")
    (photos / "spirals").mkdir()  # which the model does not know
    (photos / "spirals/1.png").write_bytes(encode(draw(1), "PNG"))
    out = tmp_path / f"evaluated.{ending}"
    done = shell("evaluate", tiny_run, photos, "--out", out, "--json")
    rows = read_rows(out) if ending == "csv" else pq.read_table(out).to_pylist()
    assert [row["label"] for row in rows] == ["bars"] * 4 + ["rings"] * 2 + ["spirals"]
    assert {row["trained_on"] for row in rows} == {"false"}
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["unreadable"] + ["ok"] * 3
    n_right = sum(row["label"] == row["prediction"] for row in rows)
    assert n_right / 6 == pytest.approx(done.json["accuracy"]["value"])
    again = shell("evaluate", tiny_run, photos, "--out", out)
    assert (again.status, again.err.count("--force")) == (1, 1)
    assert shell("evaluate", tiny_run, photos, "--out", out, "--force").status == 0
    unwritten = shell("evaluate", tiny_run, photos, "--force")
    assert unwritten.status == 1
    assert all(flag in unwritten.err for flag in ("--force", "--out"))


def test_evaluate_uses_the_chosen_split_or_the_test_split(
    drawn_images: Path, tiny_run: Path, tmp_path: Path, shell: Shell
) -> None:
    root = draw_folder(tmp_path / "splits/test", {"bars": 2, "dots": 2}, first_seed=500).parent
    shutil.copytree(drawn_images, root / "train")
    assert shell("evaluate", tiny_run, root, "--json").json["n"] == 4
    assert shell("evaluate", tiny_run, root, "--json", "--split", "train").json["n"] == 48


def test_evaluate_against_another_run_shows_the_paired_difference(
    drawn_images: Path, tiny_run: Path, two_class_run: Path, shell: Shell
) -> None:
    done = shell("evaluate", tiny_run, drawn_images, "--against", two_class_run)
    assert done.status == 0
    assert all(str(run) in done.out for run in (tiny_run, two_class_run))
    assert re.search(rf"{two_class_run}.*rings", done.err)  # a class that only one of them knows
    found = shell("evaluate", tiny_run, drawn_images, "--against", two_class_run, "--json").json
    against = found["against"]
    assert against["runs"] == [str(tiny_run), str(two_class_run)]
    values, difference = against["accuracy"]["values"], against["accuracy"]["difference"]
    assert values[0] == pytest.approx(found["accuracy"]["value"])
    assert difference["value"] == pytest.approx(values[0] - values[1])
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert against["n"] - against["n_trained_on"] == against["unseen"]["n"]
    swapped = shell("evaluate", two_class_run, drawn_images, "--against", tiny_run, "--json").json
    assert swapped["against"]["accuracy"]["difference"]["value"] == pytest.approx(-difference["value"])
    assert swapped["against"]["n_only_first_right"] == against["n_only_second_right"]


def test_comparison_on_training_images_warns(
    drawn_images: Path, tiny_run: Path, two_class_run: Path, tmp_path: Path, shell: Shell
) -> None:
    trained_on = json.loads((tiny_run / "split.json").read_text())["train"]
    for path in trained_on[:12]:
        (tmp_path / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn_images / path, tmp_path / "photos" / path)
    done = shell("evaluate", two_class_run, tmp_path / "photos", "--against", tiny_run)
    assert re.search(rf"\b12\b.*{tiny_run}.* 12\b", done.err)
    assert re.search(r"\b12 images", done.out)


def test_comparison_of_a_run_with_itself_has_no_difference(
    tiny_run: Path, tmp_path: Path, shell: Shell
) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 12, "dots": 12}, first_seed=600)
    done = shell("evaluate", tiny_run, photos, "--against", tiny_run)
    assert "p = 1" in done.out
    assert done.out.count("+0.000") >= 4
    assert not re.search(r"better\b(?!\))", done.out)  # but for "lower is better"


# --- predict ---


def test_predict_with_ensemble_and_test_time_augmentation(
    drawn_images: Path, tiny_run: Path, tiny_train: list[str], shell: Shell
) -> None:
    folder = drawn_images / "rings"
    command = ("train", drawn_images, "--out", "other", *tiny_train, "--seed", "5", "--quiet")
    assert shell(*command).status == 0
    ways = {"alone": (tiny_run,), "other": ("other",), "both": (tiny_run, "--ensemble-with", "other")}
    probs = {}
    for name, (run, *others) in ways.items():
        options = ("--out", f"{name}.csv", "--tta", "flip", *others)
        assert shell("predict", run, folder, *options).status == 0
        rows = read_rows(f"{name}.csv")
        probs[name] = np.array([[float(row[f"prob_{k}"]) for k in TINY_COUNTS] for row in rows])
    assert np.abs(probs["alone"] - probs["other"]).max() > 0.01
    np.testing.assert_allclose(probs["both"], (probs["alone"] + probs["other"]) / 2, atol=2e-6)
    assert shell("predict", tiny_run, folder, "--out", "views.csv", "--tta", "none").status == 0
    assert Path("views.csv").read_bytes() != Path("alone.csv").read_bytes()


def test_predict_writes_one_row_per_image_in_order(drawn_images: Path, tiny_run: Path, shell: Shell) -> None:
    done = shell("predict", tiny_run, drawn_images, "--out", "p.csv")
    assert done.status == 0
    assert all(words in done.out for words in ("p.csv", "48 images", "bars 24, dots 15, rings 9"))
    rows = read_rows("p.csv")
    assert list(rows[0]) == [
        "path", "status", "error", "prediction", "probability", "prob_bars", "prob_dots", "prob_rings",
        "novelty",
    ]  # fmt: skip
    assert [row["path"] for row in rows] == sorted(map(str, drawn_images.rglob("*.*")))
    for row in rows:
        probs = {name: float(row[f"prob_{name}"]) for name in TINY_COUNTS}
        assert sum(probs.values()) == pytest.approx(1, abs=1e-5)
        assert float(row["probability"]) == probs[row["prediction"]]


@pytest.mark.parametrize("form", ["files", "table", "zip", "stdin", "all together"])
def test_predict_takes_every_form_of_input(
    form: str, drawn_images: Path, tiny_run: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = sorted(drawn_images.rglob("*.*"))[20:28]
    names = [p.relative_to(drawn_images).as_posix() for p in photos]
    Path("t.csv").write_text("\n".join(["image", *names]) + "\n")
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for path, name in zip(photos, names, strict=True):
            archive.write(path, name)
    lines = "\r\n".join(map(str, photos)) + "\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    sources: dict[str, list[object]] = {
        "files": [*photos],
        "table": ["t.csv", "--images-dir", drawn_images],
        "zip": ["photos.zip"],
        "stdin": ["-"],
        "all together": [photos[0], "photos.zip", "-", photos[1], photos[2]],
    }
    assert shell("predict", tiny_run, *sources[form], "--out", "p.csv", "--quiet").status == 0
    rows = read_rows("p.csv")
    expected = {
        "table": [str(p) for p in photos],
        "zip": [f"photos.zip/{name}" for name in names],
        "all together": [
            str(photos[0]), *(f"photos.zip/{name}" for name in names), *map(str, [*photos, *photos[1:3]])
        ],
    }.get(form, [str(p) for p in photos])  # fmt: skip
    assert [row["path"] for row in rows] == expected
    # the same image has the same row, whichever way it came
    by_name = {row["path"][-12:]: row | {"path": ""} for row in rows}
    assert all(by_name[row["path"][-12:]] == row | {"path": ""} for row in rows)


def test_unreadable_images_keep_their_rows_and_are_counted(
    drawn_images: Path, tiny_run: Path, tmp_path: Path, shell: Shell
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    shutil.copy(drawn_images / "bars/000.jpg", folder / "1.jpg")
    (folder / "2.jpg").write_bytes(b"")
    shutil.copy(drawn_images / "dots/000.jpg", folder / "10.jpg")
    sources = [folder, folder / "gone.jpg"]
    done = shell("predict", tiny_run, *sources, "--out", "p.csv")
    assert done.status == 0
    assert re.search(r"\b2 of 4\b", done.err)
    rows = read_rows("p.csv")
    assert [Path(row["path"]).name for row in rows] == ["1.jpg", "2.jpg", "10.jpg", "gone.jpg"]
    assert [row["status"] for row in rows] == ["ok", "unreadable", "ok", "missing"]
    assert all(
        row["prediction"] == row["prob_bars"] == "" and row["error"] for row in rows if row["status"] != "ok"
    )

    strict = shell("predict", tiny_run, *sources, "--out", "strict.csv", "--strict", "--quiet")
    assert strict.status == 1
    assert strict.err.count("\n") == 1
    assert all(words in strict.err for words in ("2 images", "--strict", "2.jpg: "))
    assert Path("strict.csv").read_bytes() == Path("p.csv").read_bytes()


def test_parquet_equals_csv(drawn_images: Path, tiny_run: Path, shell: Shell) -> None:
    import pyarrow.parquet as pq

    for name in ("p.csv", "p.parquet"):
        assert shell("predict", tiny_run, drawn_images / "rings", "--out", name, "--quiet").status == 0
    table, rows = pq.read_table("p.parquet").to_pylist(), read_rows("p.csv")
    assert [row["path"] for row in table] == [row["path"] for row in rows]
    assert [row["prediction"] for row in table] == [row["prediction"] for row in rows]
    assert [row["prob_dots"] for row in table] == pytest.approx(
        [float(r["prob_dots"]) for r in rows], abs=1e-6
    )
    assert set(os.listdir()) == {"p.csv", "p.parquet"}


def test_submission_has_header_ids_and_order_of_the_sample(
    drawn_images: Path, tiny_run: Path, shell: Shell
) -> None:
    names = ["003", "missing", "000", "008"]
    Path("probs.csv").write_text(
        "image_id,rings,bars,spirals\n" + "".join(f"{n},0.5,0.25,0.25\n" for n in names)
    )
    Path("labels.csv").write_text("id,label\n" + "".join(f"{n},unknown\n" for n in names))
    predict = ["predict", tiny_run, drawn_images / "rings"]
    done = shell(*predict, "--out", "a.csv", "--submission", "probs.csv")
    assert done.status == 0
    rows = read_rows("a.csv")
    assert list(rows[0]) == ["image_id", "rings", "bars", "spirals"]
    assert [row["image_id"] for row in rows] == names
    assert list(rows[1].values())[1:] == ["0.5", "0.25", "0.25"]
    assert "missing" in done.err
    assert "spirals" in done.err
    shell(*predict, "--out", "p.csv", "--quiet")
    direct = {Path(row["path"]).stem: row for row in read_rows("p.csv")}
    assert float(rows[0]["rings"]) == pytest.approx(float(direct["003"]["prob_rings"]), abs=1e-6)

    assert shell(*predict, "--out", "b.csv", "--submission", "labels.csv").status == 0
    expected = [direct[name]["prediction"] if name in direct else "unknown" for name in names]
    assert Path("b.csv").read_text() == "id,label\n" + "".join(
        f"{name},{label}\n" for name, label in zip(names, expected, strict=True)
    )


def test_model_works_without_its_training_images(
    tiny_train: list[str], drawn_classes: Path, drawn_images: Path, shell: Shell
) -> None:
    assert shell("train", drawn_classes, "--out", "run", *tiny_train, "--quiet").status == 0
    shutil.rmtree(drawn_classes)
    os.rename("run/model", "elsewhere")
    shutil.rmtree("run")
    assert shell("predict", "elsewhere", drawn_images / "dots", "--out", "p.csv", "--quiet").status == 0
    assert len(read_rows("p.csv")) == 15


# --- stderr, stdout, signals ---


def test_quiet_prints_nothing(flawed: Path, tiny_train: list[str], shell: Shell) -> None:
    done = shell("train", flawed, "--out", "run", *tiny_train, "--quiet")
    assert done.err == ""
    assert json.loads(Path("run/metrics.json").read_text())["notes"]  # unsaid, but kept


def test_piped_stderr_gets_one_line_per_stage(
    drawn_images: Path, tiny_train: list[str], shell: Shell
) -> None:
    err = shell("train", drawn_images, "--out", "run", *tiny_train).err
    assert "\r" not in err
    reading, fitting = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert re.match(r"reading: 48 images in \d", reading)
    assert re.match(r".*: \d+ .* in \d", fitting)


def _start(*argv: object, **options: Any) -> "subprocess.Popen[str]":
    env = os.environ | {"PYTHONPATH": str(Path(pixelplay.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pixelplay", *map(str, argv)]
    return subprocess.Popen(command, env=env, text=True, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes of this kind")
def test_closed_stdout_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with _start("cache", "--cache-dir", tmp_path, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_full_disk_behind_stdout_is_a_one_line_error(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = _start("cache", "--cache-dir", tmp_path, stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("error: No space left on device; ")
    assert err.count("\n") == 1


def test_control_characters_in_names_are_escaped(tmp_path: Path, shell: Shell) -> None:
    try:
        photos = draw_folder(tmp_path / "photos", {"bars": 2, "dots": 2})
        (photos / "bars").rename(photos / "b\x1b[31m\nars")
    except OSError:
        pytest.skip("this file system takes only plain names")
    done = shell("scan", photos)
    assert done.status == 0
    assert "\x1b" not in done.out + done.err
    assert "b\\x1b[31m\\nars" in done.out


def _read_until(terminal: int, pattern: bytes) -> bytes:
    """Return the output of a terminal until a pattern appears, the program ends or a minute has passed."""
    shown, deadline = b"", time.monotonic() + 60
    with suppress(OSError):  # EIO: nobody is left on the other side
        while not re.search(pattern, shown) and (left := deadline - time.monotonic()) > 0:
            if select([terminal], [], [], left)[0]:
                if not (piece := os.read(terminal, 4096)):
                    break
                shown += piece
    return shown


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_ctrl_c_exits_130_and_keeps_the_cache(tiny_train: list[str], tmp_path: Path) -> None:
    photos, cache = tmp_path / "photos", tmp_path / "cache"
    for name in ("bars", "dots"):
        (photos / name).mkdir(parents=True)
        jpeg = encode(draw_of_class(name, 1), "JPEG")
        for i in range(1000):  # decoders ignore bytes after the end of a JPEG, so each file differs
            (photos / name / f"{i:04}.jpg").write_bytes(jpeg + i.to_bytes(4))
    terminal, stderr = os.openpty()
    process = _start(
        "train", photos, "--out", tmp_path / "run", *tiny_train, "--cache-dir", cache,
        stdout=subprocess.PIPE, stderr=stderr, start_new_session=True,
        # a shell's background jobs ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(stderr)
    shown = _read_until(terminal, rb" [1-9][0-9]* of 2000, .* images/s, .* left")
    process.send_signal(signal.SIGINT)
    shown += _read_until(terminal, rb"interrupted before training had started.*\n")
    out, _ = process.communicate(timeout=60)
    # Python may also end by the signal itself, which a shell shows as 130 as well
    assert process.returncode in (130, -signal.SIGINT), shown.decode()
    assert out == ""
    assert b"reading: " in shown
    last = re.split(rb"[\r\n]+", shown.rstrip())[-1]
    assert last.startswith(b"interrupted before training had started")
    assert b"Traceback" not in shown
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "cache"}
    assert measure_cache(str(cache)).n_bytes > 0


def test_second_run_reads_features_from_the_cache(
    drawn_images: Path, tiny_train: list[str], shell: Shell
) -> None:
    train = ["train", drawn_images, *tiny_train, "--quiet", "--cache-dir", "cache"]
    n_seen = []  # images of each forward pass

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, Backbone):
            n_seen.append(len(inputs[0]))

    with register_module_forward_pre_hook(watch):
        assert shell(*train, "--out", "a").status == 0
        assert sum(n_seen) > sum(TINY_COUNTS.values())
        sizes = {path: content for path, (content, _) in _hash_tree(Path("cache")).items()}
        n_seen.clear()
        assert shell(*train, "--out", "b").status == 0
    assert set(n_seen) <= {1}  # how many features there are
    assert {path: content for path, (content, _) in _hash_tree(Path("cache")).items()} == sizes
    done = shell("cache", "--cache-dir", "cache")
    assert (
        done.out
        == f"cache: {sum(Path(p).stat().st_size for p in sizes) / 1e6:,.1f} MB in {len(sizes)} files\n"
    )
    assert "cleared" in shell("cache", "--cache-dir", "cache", "--clear").out
    assert measure_cache("cache").n_files == 0


@pytest.mark.parametrize("command", ["train", "predict"])
def test_interrupt_mentions_resume_only_if_something_was_kept(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupt(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pixelplay.cli.main._run_command", interrupt)
    out = str(tmp_path / "run")
    assert main([command, "--out", out]) == 130
    assert ("before training had started" in capsys.readouterr().err) == (command == "train")
    (tmp_path / "run.partial").mkdir()
    assert main([command, f"--out={out}"]) == 130
    assert ("; add --resume" in capsys.readouterr().err) == (command == "train")
    assert main([command, "--out", out, "--force"]) == 130
    assert ("; replace --force by --resume" in capsys.readouterr().err) == (command == "train")


def test_unseen_images_may_lack_the_positive_class(two_class_run: Path, tmp_path: Path, shell: Shell) -> None:
    trained_on = json.loads((two_class_run / "split.json").read_text())["train"]
    source = Path(json.loads((two_class_run / "config.json").read_text())["source"])
    photos = draw_folder(tmp_path / "photos", {"bars": 6}, first_seed=900)
    (photos / "dots").mkdir()
    for path in [path for path in trained_on if path.startswith("dots/")]:
        shutil.copy(source / path, photos / path)
    found = shell("evaluate", two_class_run, photos, "--at-precision", "0.5", "--json")
    assert found.status == 0, found.err
    assert found.json["operating_point"] is not None
    assert found.json["unseen"]["n"] == 6


def test_predict_prints_a_summary(tiny_run: Path, tmp_path: Path, shell: Shell) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 3, "dots": 2}, first_seed=700)
    (photos / "bars/broken.jpg").write_bytes(b"")
    printed = shell("predict", tiny_run, photos, "--out", "p.csv", "--min-confidence", "0.5").out
    rows = read_rows("p.csv")
    n_abstained = sum(row["status"] == "ok" and row["abstained"] == "true" for row in rows)
    for words in ("p.csv", "6 images", "1 unreadable", f"{n_abstained} abstained"):
        assert words in printed
    for name in {row["prediction"] for row in rows} - {""}:
        assert f"{name} {sum(row['prediction'] == name for row in rows)}" in printed


@pytest.mark.parametrize("command", ["train", "crossval"])
def test_resume_of_a_finished_run_does_nothing(
    command: str, drawn_classes: Path, tiny_settings: list[str], shell: Shell
) -> None:
    words = [
        command,
        str(drawn_classes),
        "--out",
        "run",
        "--finetune",
        "none",
        "--n-folds",
        "2",
        *tiny_settings,
    ]
    assert shell(*words).status == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    for free in ([], ["--cache-gb", "3"]):  # decides nothing
        again = shell(*words, *free, "--resume")
        assert again.status == 0
        assert again.out.startswith("run is finished")
    assert shell(*words, "--resume", "--json").json == json.loads(Path("run/metrics.json").read_text())
    other = shell(*words, "--resume", "--seed", "5")
    assert other.status == 1
    assert re.match(r"error: run .*\bseed\b.* 0\b.* 5\b.*--force", other.err)
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_linear_probe_ignores_time_budget_and_val_frac(
    drawn_classes: Path, tiny_settings: list[str], shell: Shell
) -> None:
    words = ["train", str(drawn_classes), "--out", "run", "--finetune", "none", *tiny_settings]
    done = shell(*words, "--time-budget", "5m", "--val-frac", "0.3")
    for setting in ("--time-budget", "--val-frac"):
        assert re.search(rf"note: .*{setting}\b.*probe|note: .*{setting}\b.*--finetune none", done.err)
    oof = json.loads(Path("run/metrics.json").read_text())["oof"]
    assert re.search(rf"out of fold.*{oof['accuracy']['value']:.3f}", done.out)


def test_scan_without_problems(drawn_images: Path, shell: Shell) -> None:
    assert re.search(r"^No problems", shell("scan", drawn_images).out, re.MULTILINE)


# --- closed streams ---


def run_closed(*argv: object, closed: tuple[int, ...]) -> tuple[int, str]:
    """Run a command in a shell that closes file descriptors; return its status and all output."""
    redirections = " ".join(f"{fd}{'<' if fd == 0 else '>'}&-" for fd in closed)
    command = shlex.join([sys.executable, "-m", "pixelplay", *map(str, argv)])
    done = subprocess.run(
        f"{command} {redirections}", shell=True, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_closed_streams_are_no_error(closed: tuple[int, ...], drawn_images: Path) -> None:
    status, shown = run_closed("scan", drawn_images, "--names-only", closed=closed)
    assert status == 0
    assert "Traceback" not in shown
    if 1 in closed:
        assert "classes" not in shown
    if 2 in closed:
        assert "note:" not in shown
    status, shown = run_closed("scan", "nowhere", closed=closed)
    assert (status, "nowhere does not exist" in shown) == (1, 2 not in closed)


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_list_of_files_from_a_closed_stdin_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    status, shown = run_closed("predict", tiny_run, "-", "--out", tmp_path / "p.csv", closed=(0,))
    assert (status, shown.count("\n")) == (1, 1)
    assert "stdin, which is closed" in shown


# --- predictions without a table ---


def test_predict_without_out_prints_a_line_per_image(
    tiny_run: Path, drawn_images: Path, shell: Shell
) -> None:
    Path("broken.jpg").write_bytes(b"x")
    image = next((drawn_images / "bars").iterdir())
    done = shell("predict", tiny_run, image, "broken.jpg", "--quiet", "--coverage", "0.9")
    assert (done.status, done.err) == (0, "")
    first, second = done.out.splitlines()
    assert re.fullmatch(rf"{re.escape(str(image))}: \w+ \([01]\.\d{{3}}\), prediction set: .+", first)
    assert second.startswith("broken.jpg: unreadable: ")
    assert os.listdir() == ["broken.jpg"]


def test_predictions_on_stdout_are_those_of_the_table(
    tiny_run: Path, drawn_images: Path, shell: Shell
) -> None:
    assert shell("predict", tiny_run, drawn_images, "--out", "p.csv", "--quiet").status == 0
    done = shell("predict", tiny_run, drawn_images, "--out", "-", "--quiet")
    assert done.out == Path("p.csv").read_text()
    rows = shell("predict", tiny_run, drawn_images, "--json", "--quiet").json
    table = read_rows(Path("p.csv"))
    assert [row["path"] for row in rows] == [row["path"] for row in table]
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in table]
    assert list(rows[0]) == list(table[0])


def test_predict_json_with_a_table_prints_counts(tiny_run: Path, drawn_images: Path, shell: Shell) -> None:
    done = shell("predict", tiny_run, drawn_images, "--out", "p.csv", "--json", "--quiet")
    assert done.json["n"] == sum(done.json["counts"].values()) == 48


def test_submission_without_out_is_refused(tiny_run: Path, drawn_images: Path, shell: Shell) -> None:
    Path("sample.csv").write_text("id,label\n0,x\n")
    done = shell("predict", tiny_run, drawn_images, "--submission", "sample.csv")
    assert (done.status, done.err) == (1, "error: --submission needs --out FILE.csv\n")
