"""Tests of resuming: settings, images and plans are compared with those of the interrupted run."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from conftest import draw_of_class
from contexts import PLAN, featureless, training_data_of
from images import encode
from pixelplay.config import AugmentConfig, ComputeConfig, DataConfig, FinetuneConfig, TrainConfig
from pixelplay.data.sources import open_dataset
from pixelplay.errors import ConfigError, DataError
from pixelplay.model.device import Device
from pixelplay.model.features import ImageFeatures
from pixelplay.run_log import RunLog
from pixelplay.training.checkpoint import CHECKPOINT
from pixelplay.training.plan_file import write_plan
from pixelplay.training.resume import check_images, check_settings, load_plan
from pixelplay.training.training_data import TrainingData, build_training_data

QUIET = RunLog(quiet=True)
CPU = Device(name="cpu", precision="bf16")
CONFIG = TrainConfig(finetune="partial", finetuning=FinetuneConfig(lr=0.002, epochs=3))


def read(root: Path, config: TrainConfig = CONFIG) -> TrainingData:
    """Build the training data of a folder without a network."""
    return training_data_of(root, config)


def interrupt(folder: Path) -> None:
    """Leave a checkpoint, so that there is something to resume."""
    (folder / CHECKPOINT).touch()


def settings_error(folder: Path, config: TrainConfig) -> str:
    with pytest.raises(ConfigError, match=r"--force .*--resume") as caught:
        check_settings(str(folder), config, CPU, None, QUIET)
    line = str(caught.value)
    assert "\n" not in line
    return line


def images_error(folder: Path, data: TrainingData) -> str:
    with pytest.raises(DataError, match=r"--force .*--resume") as caught:
        check_images(str(folder), data, "weights")
    line = str(caught.value)
    assert "\n" not in line
    return line.partition(": ")[2]


# --- plans ---


def notes_of_loading(config: TrainConfig, kept: object, folder: Path) -> list[str]:
    write_plan(PLAN, str(folder / "plan.json"))
    (folder / "config.json").write_text(json.dumps(kept))
    log = RunLog(quiet=True)
    plan, followed = load_plan(str(folder / "plan.json"), config, log)
    assert plan == PLAN
    assert followed == replace(config, finetune=PLAN.finetune)
    return log.notes


def test_plan_of_a_run_with_other_settings_is_noted(tmp_path: Path) -> None:
    kept = {"pixelplay": "train", "source": "photos", **asdict(replace(CONFIG, seed=4, cache_gb=1.0))}
    config = replace(CONFIG, finetune="auto", finetuning=FinetuneConfig(lr=0.001))
    (note,) = notes_of_loading(config, kept, tmp_path)
    assert note.endswith(": seed was 4, is 0, finetuning.lr was 0.002, is 0.001")


@pytest.mark.parametrize(
    "kept",
    [
        {
            "pixelplay": "train",
            **asdict(replace(CONFIG, finetuning=FinetuneConfig(lr=0.002, unfreeze_stages=2))),
        },
        {"pixelplay": "train", "seed": 0},  # of a version with fewer settings
        {"seed": 4},  # of another program
        ["seed"],
    ],
    ids=["settings in the plan", "fewer settings", "not a run", "no settings"],
)
def test_plan_of_a_run_with_the_same_settings_is_not_noted(kept: object, tmp_path: Path) -> None:
    assert notes_of_loading(replace(CONFIG, finetuning=FinetuneConfig(lr=0.002)), kept, tmp_path) == []


# --- settings ---


def test_resume_records_settings_without_a_checkpoint(tmp_path: Path) -> None:
    check_settings(str(tmp_path / "checkpoint"), CONFIG, CPU, None, QUIET)
    kept = json.loads((tmp_path / "checkpoint/settings.json").read_text())
    assert (kept["finetune"], kept["finetuning.lr"], kept["augmenting.augment"]) == (
        "partial",
        0.002,
        ["crop"],
    )
    # there is still nothing to resume
    check_settings(str(tmp_path / "checkpoint"), replace(CONFIG, seed=5), CPU, None, QUIET)
    assert json.loads((tmp_path / "checkpoint/settings.json").read_text())["seed"] == 5


def test_resume_accepts_the_same_settings(tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    same = TrainConfig(finetune="partial", finetuning=FinetuneConfig(lr=2e-3, epochs=3))
    check_settings(str(tmp_path), same, CPU, None, QUIET)


def test_resume_names_a_changed_setting_with_both_values(tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    line = settings_error(tmp_path, replace(CONFIG, finetuning=replace(CONFIG.finetuning, lr=0.01)))
    assert "finetuning.lr was 0.002, is 0.01;" in line


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (replace(CONFIG, seed=1), "seed was 0, is 1"),
        (replace(CONFIG, finetune="full"), "finetune was 'partial', is 'full'"),
        (replace(CONFIG, weights="other.pth"), "weights was None, is 'other.pth'"),
        (replace(CONFIG, hflip=False), "hflip was True, is False"),
        (
            replace(CONFIG, augmenting=AugmentConfig(augment=("crop", "mixup"))),
            "augmenting.augment was ['crop'], is ['crop', 'mixup']",
        ),
        (replace(CONFIG, compute=ComputeConfig(batch_size=8)), "compute.batch_size was None, is 8"),
        (replace(CONFIG, finetuning=FinetuneConfig(lr=0.002)), "finetuning.epochs was 3, is None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resume_compares_settings_that_affect_weights(
    changed: TrainConfig, words: str, tmp_path: Path
) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    assert words in settings_error(tmp_path, changed)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (Device(name="cuda", precision="bf16"), "compute.device was 'cpu', is 'cuda'"),
        (Device(name="cpu", precision="fp32"), "compute.precision was 'bf16', is 'fp32'"),
    ],
)
def test_resume_compares_resolved_device_and_precision(device: Device, words: str, tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    with pytest.raises(ConfigError, match=words):
        check_settings(str(tmp_path), CONFIG, device, None, QUIET)


def test_resume_notes_another_number_of_threads(tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    kept = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**kept, "threads": 77}))
    log = RunLog(quiet=True)
    check_settings(str(tmp_path), CONFIG, CPU, None, log)
    (note,) = log.notes
    assert re.search(r"\b1 threads .*\b77\b", note)


def test_resume_compares_the_plan_but_not_its_time_estimates(tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, PLAN, QUIET)
    interrupt(tmp_path)
    check_settings(str(tmp_path), CONFIG, CPU, replace(PLAN, seconds={}), QUIET)
    with pytest.raises(ConfigError, match=r"plan\.cached_views was 4, is 5;"):
        check_settings(str(tmp_path), CONFIG, CPU, replace(PLAN, cached_views=5), QUIET)
    with pytest.raises(ConfigError, match=r"plan\.finetune was 'partial', is None"):
        check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)


def test_resume_names_all_changed_settings(tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    line = settings_error(tmp_path, replace(CONFIG, seed=4, finetuning=FinetuneConfig(lr=0.5, epochs=9)))
    assert "seed was 0, is 4" in line
    assert "finetuning.lr was 0.002, is 0.5" in line
    assert "finetuning.epochs was 3, is 9" in line


def test_resume_accepts_changed_settings_that_do_not_affect_weights(tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    free = replace(
        CONFIG,
        cache_gb=0.0,
        cache_dir=str(tmp_path / "elsewhere"),
        offline=True,
        time_budget="2h",  # ignored, since the number of epochs is set
        compute=ComputeConfig(num_workers=3),
    )
    check_settings(str(tmp_path), free, CPU, None, QUIET)


def test_resume_compares_the_time_budget_that_epochs_depend_on(tmp_path: Path) -> None:
    by_time = replace(CONFIG, finetuning=FinetuneConfig(lr=0.002))
    check_settings(str(tmp_path), by_time, CPU, None, QUIET)
    interrupt(tmp_path)
    line = settings_error(tmp_path, replace(by_time, time_budget="2h"))
    assert "time_budget was '10m', is '2h'" in line


@pytest.mark.parametrize("name", ["pixelplay", "torch"])
def test_resume_names_another_version(name: str, tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    kept = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**kept, name: "0.0.1"}))
    assert f"{name} was '0.0.1', is {kept[name]!r}" in settings_error(tmp_path, CONFIG)


@pytest.mark.parametrize("content", [None, "{", ""])
def test_resume_names_unreadable_settings(content: str | None, tmp_path: Path) -> None:
    interrupt(tmp_path)
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    with pytest.raises(DataError, match=r"settings\.json \(.*\); .*--force"):
        check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)


# --- images ---


def test_resume_accepts_the_same_images(drawn_images: Path, tmp_path: Path) -> None:
    check_images(str(tmp_path), read(drawn_images), "weights")
    interrupt(tmp_path)
    check_images(str(tmp_path), read(drawn_images), "weights")


def test_resume_counts_and_names_other_images(drawn_classes: Path, tmp_path: Path) -> None:
    # predefined splits, so that an additional image moves no other
    for split, names in (("test", ("000", "001")), ("val", ("002", "003"))):
        for path in [path for path in drawn_classes.glob("*/*") if path.stem in names]:
            moved = drawn_classes / split / path.parent.name / path.name
            moved.parent.mkdir(parents=True, exist_ok=True)
            path.rename(moved)
    (drawn_classes / "train").mkdir()
    for name in ("bars", "dots", "rings"):
        (drawn_classes / name).rename(drawn_classes / "train" / name)
    check_images(str(tmp_path), read(drawn_classes), "weights")
    interrupt(tmp_path)

    train = drawn_classes / "train"
    (train / "bars/004.jpg").write_bytes(encode(draw_of_class("bars", 99), "JPEG"))
    assert images_error(tmp_path, read(drawn_classes)).startswith("1 changed (train/bars/004.jpg);")
    for i in range(5):
        (train / f"dots/new{i}.jpg").write_bytes(encode(draw_of_class("dots", 200 + i), "JPEG"))
    for name in ("006.jpg", "008.jpg"):
        (train / "rings" / name).unlink()
    assert images_error(tmp_path, read(drawn_classes)).startswith(
        "5 new (train/dots/new0.jpg, train/dots/new1.jpg, train/dots/new2.jpg), "
        "2 missing (train/rings/006.jpg, train/rings/008.jpg), "
        "1 changed (train/bars/004.jpg);"
    )


def test_resume_names_images_with_another_class_split_or_group(drawn_images: Path, tmp_path: Path) -> None:
    names = sorted(path.relative_to(drawn_images).as_posix() for path in drawn_images.rglob("*.*"))
    splits = {name: ("train", "train", "val", "test")[i % 4] for i, name in enumerate(names)}
    classes = {name: name.split("/")[0] for name in names}

    groups = {name: name for name in names}

    def read_table() -> TrainingData:
        rows = (f"{name},{classes[name]},{splits[name]},{groups[name]}" for name in names)
        lines = ["path,label,split,group", *rows]
        (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
        dataset = open_dataset(
            str(tmp_path / "labels.csv"), replace(CONFIG.reading, images_dir=str(drawn_images))
        )
        return build_training_data(dataset, featureless(dataset), CONFIG)

    folder = tmp_path / "checkpoint"
    check_images(str(folder), read_table(), "weights")
    interrupt(folder)
    classes["bars/004.jpg"] = "dots"
    assert images_error(folder, read_table()).startswith("1 changed (bars/004.jpg);")
    classes["bars/004.jpg"] = "bars"
    was = splits["dots/000.jpg"]
    splits["dots/000.jpg"] = "val" if was == "train" else "train"
    assert images_error(folder, read_table()).startswith("1 changed (dots/000.jpg);")
    splits["dots/000.jpg"] = was
    groups[names[1]] = groups[names[0]]
    assert images_error(folder, read_table()).startswith(f"1 changed ({names[1]});")


def test_resume_does_not_report_groups_that_lost_an_image(drawn_classes: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, test_frac=0.0)
    dataset = open_dataset(str(drawn_classes), DataConfig(group_regex=r"\d\d(?=\d\.)"))  # groups of ten
    digests = [path.encode() for path in dataset.paths]

    def read_all_but(n_first: int) -> TrainingData:
        kept = dataset.select(np.arange(len(dataset)) >= n_first)
        values = np.zeros((len(kept), 2), np.float32)
        images = ImageFeatures(values=values, digests=digests[n_first:], errors={})
        data = build_training_data(kept, images, config)
        only_train = replace(data.split, train=data.fit_rows, val=data.fit_rows[:0])
        return replace(data, split=only_train)

    check_images(str(tmp_path), read_all_but(0), "weights")
    interrupt(tmp_path)
    line = images_error(tmp_path, read_all_but(1))
    assert line.startswith(f"1 missing ({dataset.paths[0]});")


def test_resume_rejects_other_backbone_weights(drawn_images: Path, tmp_path: Path) -> None:
    data = read(drawn_images)
    check_images(str(tmp_path), data, "weights")
    interrupt(tmp_path)
    with pytest.raises(ConfigError, match=r"weights; .*--force .*--resume"):
        check_images(str(tmp_path), data, "others")


@pytest.mark.parametrize("content", ["{", ""])
def test_resume_names_an_unreadable_record_of_images(
    content: str, drawn_images: Path, tmp_path: Path
) -> None:
    interrupt(tmp_path)
    (tmp_path / "images.json").write_text(content)
    with pytest.raises(DataError, match=r"images\.json \(.*\); .*--force"):
        check_images(str(tmp_path), read(drawn_images), "weights")
