"""Whether an interrupted training may go on: what is compared, and what is said of a difference."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import draw_of_class
from contexts import featureless, training_data_of
from images import encode
from pixelplay.config import AugmentConfig, ComputeConfig, DataConfig, FinetuneConfig, TrainConfig, to_json
from pixelplay.data.sources import scan_source
from pixelplay.errors import ConfigError, DataError
from pixelplay.model.device import Device
from pixelplay.model.features import ImageFeatures
from pixelplay.run_log import RunLog
from pixelplay.training.checkpoint import CHECKPOINT
from pixelplay.training.finetune_plan import write_plan
from pixelplay.training.resume import check_images, check_settings, load_plan
from pixelplay.training.training_data import TrainingData, build_training_data
from trainers import PLAN

QUIET = RunLog(quiet=True)
CPU = Device(name="cpu", precision="bf16")
CONFIG = TrainConfig(finetune="partial", finetuning=FinetuneConfig(lr=0.002, epochs=3))


def read(root: Path, config: TrainConfig = CONFIG) -> TrainingData:
    """Sort out a folder without a network."""
    return training_data_of(root, config)


def interrupt(folder: Path) -> None:
    """From here on there is something to go on with."""
    (folder / CHECKPOINT).touch()


def refusal_of_settings(folder: Path, config: TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_settings(str(folder), config, CPU, None, QUIET)
    line = str(caught.value)
    assert "\n" not in line
    assert line.endswith("give the same, or start anew with --force instead of --resume")
    return line


def refusal_of_photographs(folder: Path, data: TrainingData) -> str:
    with pytest.raises(DataError) as caught:
        check_images(str(folder), data, "weights")
    line = str(caught.value)
    assert "\n" not in line
    assert line.endswith("bring them back, or start anew with --force instead of --resume")
    return line.removeprefix("the images are not those of the interrupted run: ")


# --- plans ---


def notes_of_repeating(config: TrainConfig, kept: object, folder: Path) -> list[str]:
    write_plan(PLAN, str(folder / "plan.json"))
    (folder / "config.json").write_text(json.dumps(kept))
    log = RunLog(quiet=True)
    plan, followed = load_plan(str(folder / "plan.json"), config, log)
    assert plan == PLAN
    assert followed == replace(config, finetune=PLAN.finetune)
    return log.notes


def test_a_plan_repeated_with_other_settings_names_them(tmp_path: Path) -> None:
    kept = {"pixelplay": "train", "source": "photos", **to_json(replace(CONFIG, seed=4, cache_gb=1.0))}
    config = replace(CONFIG, finetune="auto", finetuning=FinetuneConfig(lr=0.001))
    assert notes_of_repeating(config, kept, tmp_path) == [
        "the plan's run had other settings, which a plan does not hold: seed was 4, is 0, "
        "finetune.lr was 0.002, is 0.001"
    ]


@pytest.mark.parametrize(
    "kept",
    [
        {
            "pixelplay": "train",
            **to_json(replace(CONFIG, finetuning=FinetuneConfig(lr=0.002, unfreeze_stages=2))),
        },
        {"pixelplay": "train", "seed": 0},  # of a version with fewer settings
        {"seed": 4},  # of another program
        ["seed"],
    ],
    ids=["what the plan holds", "fewer", "no run", "no settings"],
)
def test_a_plan_repeated_alike_says_nothing(kept: object, tmp_path: Path) -> None:
    assert notes_of_repeating(replace(CONFIG, finetuning=FinetuneConfig(lr=0.002)), kept, tmp_path) == []


# --- settings ---


def test_without_a_checkpoint_settings_are_written_down(tmp_path: Path) -> None:
    check_settings(str(tmp_path / "checkpoint"), CONFIG, CPU, None, QUIET)
    kept = json.loads((tmp_path / "checkpoint/settings.json").read_text())
    assert (kept["finetune"], kept["finetune.lr"], kept["augmenting.augment"]) == ("partial", 0.002, ["crop"])
    # still nothing to go on with
    check_settings(str(tmp_path / "checkpoint"), replace(CONFIG, seed=5), CPU, None, QUIET)
    assert json.loads((tmp_path / "checkpoint/settings.json").read_text())["seed"] == 5


def test_the_same_settings_may_go_on(tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    same = TrainConfig(finetune="partial", finetuning=FinetuneConfig(lr=2e-3, epochs=3))
    check_settings(str(tmp_path), same, CPU, None, QUIET)


def test_a_changed_setting_is_named_with_both_values(tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    line = refusal_of_settings(tmp_path, replace(CONFIG, finetuning=replace(CONFIG.finetuning, lr=0.01)))
    assert "finetune.lr was 0.002, is 0.01;" in line


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (replace(CONFIG, seed=1), "seed was 0, is 1"),
        (replace(CONFIG, finetune="full"), "tune was 'partial', is 'full'"),
        (replace(CONFIG, weights="other.pth"), "weights was None, is 'other.pth'"),
        (replace(CONFIG, hflip=False), "hflip was True, is False"),
        (
            replace(CONFIG, augmenting=AugmentConfig(augment=("crop", "mixup"))),
            "augmenting.augment was ['crop'], is ['crop', 'mixup']",
        ),
        (replace(CONFIG, compute=ComputeConfig(batch_size=8)), "compute.batch_size was None, is 8"),
        (replace(CONFIG, finetuning=FinetuneConfig(lr=0.002)), "finetune.epochs was 3, is None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whatever_the_weights_depend_on_is_compared(changed: TrainConfig, words: str, tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    assert words in refusal_of_settings(tmp_path, changed)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (Device(name="cuda", precision="bf16"), "compute.device was 'cpu', is 'cuda'"),
        (Device(name="cpu", precision="fp32"), "compute.precision was 'bf16', is 'fp32'"),
    ],
)
def test_what_auto_stands_for_is_compared(device: Device, words: str, tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    with pytest.raises(ConfigError, match=words):
        check_settings(str(tmp_path), CONFIG, device, None, QUIET)


def test_another_number_of_threads_is_said_and_taken(tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    kept = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**kept, "threads": 77}))
    log = RunLog(quiet=True)
    check_settings(str(tmp_path), CONFIG, CPU, None, log)
    assert log.notes[0].startswith("the interrupted run had 77 threads, this one has 1: the weights")


def test_a_repeated_plan_is_compared_but_for_its_estimates(tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, PLAN, QUIET)
    interrupt(tmp_path)
    check_settings(str(tmp_path), CONFIG, CPU, replace(PLAN, seconds={}), QUIET)
    with pytest.raises(ConfigError, match=r"plan\.n_views was 4, is 5;"):
        check_settings(str(tmp_path), CONFIG, CPU, replace(PLAN, cached_views=5), QUIET)
    with pytest.raises(ConfigError, match=r"plan\.depth was 'partial', is None"):
        check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)


def test_all_changed_settings_are_named(tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    line = refusal_of_settings(tmp_path, replace(CONFIG, seed=4, finetuning=FinetuneConfig(lr=0.5, epochs=9)))
    assert "seed was 0, is 4" in line
    assert "finetune.lr was 0.002, is 0.5" in line
    assert "finetune.epochs was 3, is 9" in line


def test_what_changes_no_weight_may_be_changed(tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    free = replace(
        CONFIG,
        cache_gb=0.0,
        cache_dir=str(tmp_path / "elsewhere"),
        offline=True,
        time_budget="2h",  # does not count, as epochs are given
        compute=ComputeConfig(num_workers=3),
    )
    check_settings(str(tmp_path), free, CPU, None, QUIET)


def test_a_time_budget_is_kept_as_the_last_epochs_depend_on_it(tmp_path: Path) -> None:
    by_time = replace(CONFIG, finetuning=FinetuneConfig(lr=0.002))
    check_settings(str(tmp_path), by_time, CPU, None, QUIET)
    interrupt(tmp_path)
    line = refusal_of_settings(tmp_path, replace(by_time, time_budget="2h"))
    assert "time_budget was '10m', is '2h'" in line


@pytest.mark.parametrize("name", ["pixelplay", "torch"])
def test_another_version_is_named(name: str, tmp_path: Path) -> None:
    check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)
    interrupt(tmp_path)
    kept = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**kept, name: "0.0.1"}))
    assert f"{name} was '0.0.1', is {kept[name]!r}" in refusal_of_settings(tmp_path, CONFIG)


@pytest.mark.parametrize("content", [None, "{", ""])
def test_settings_that_cannot_be_read_are_named(content: str | None, tmp_path: Path) -> None:
    interrupt(tmp_path)
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    with pytest.raises(DataError, match=r"settings\.json cannot be read \(.*\); start anew with --force"):
        check_settings(str(tmp_path), CONFIG, CPU, None, QUIET)


# --- images ---


def test_the_same_photographs_may_go_on(drawn_images: Path, tmp_path: Path) -> None:
    check_images(str(tmp_path), read(drawn_images), "weights")
    interrupt(tmp_path)
    check_images(str(tmp_path), read(drawn_images), "weights")


def test_other_photographs_are_counted_and_named(drawn_classes: Path, tmp_path: Path) -> None:
    # given parts, so that one image more moves no other
    for part, names in (("test", ("000", "001")), ("val", ("002", "003"))):
        for path in [path for path in drawn_classes.glob("*/*") if path.stem in names]:
            moved = drawn_classes / part / path.parent.name / path.name
            moved.parent.mkdir(parents=True, exist_ok=True)
            path.rename(moved)
    (drawn_classes / "train").mkdir()
    for name in ("bars", "dots", "rings"):
        (drawn_classes / name).rename(drawn_classes / "train" / name)
    check_images(str(tmp_path), read(drawn_classes), "weights")
    interrupt(tmp_path)

    train = drawn_classes / "train"
    (train / "bars/004.jpg").write_bytes(encode(draw_of_class("bars", 99), "JPEG"))
    assert refusal_of_photographs(tmp_path, read(drawn_classes)).startswith(
        "1 changed (train/bars/004.jpg); bring"
    )
    for i in range(5):
        (train / f"dots/new{i}.jpg").write_bytes(encode(draw_of_class("dots", 200 + i), "JPEG"))
    for name in ("006.jpg", "008.jpg"):
        (train / "rings" / name).unlink()
    assert refusal_of_photographs(tmp_path, read(drawn_classes)).startswith(
        "5 new (train/dots/new0.jpg, train/dots/new1.jpg, train/dots/new2.jpg), "
        "2 missing (train/rings/006.jpg, train/rings/008.jpg), "
        "1 changed (train/bars/004.jpg); bring"
    )


def test_a_photograph_of_another_class_part_or_group_is_named(drawn_images: Path, tmp_path: Path) -> None:
    names = sorted(path.relative_to(drawn_images).as_posix() for path in drawn_images.rglob("*.*"))
    parts = {name: ("train", "train", "val", "test")[i % 4] for i, name in enumerate(names)}
    classes = {name: name.split("/")[0] for name in names}

    groups = {name: name for name in names}

    def read_table() -> TrainingData:
        rows = (f"{name},{classes[name]},{parts[name]},{groups[name]}" for name in names)
        lines = ["path,label,part,group", *rows]
        (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
        dataset = scan_source(
            str(tmp_path / "labels.csv"), replace(CONFIG.data, images_dir=str(drawn_images))
        )
        return build_training_data(dataset, featureless(dataset), CONFIG)

    folder = tmp_path / "checkpoint"
    check_images(str(folder), read_table(), "weights")
    interrupt(folder)
    classes["bars/004.jpg"] = "dots"
    assert refusal_of_photographs(folder, read_table()).startswith("1 changed (bars/004.jpg); bring")
    classes["bars/004.jpg"] = "bars"
    was = parts["dots/000.jpg"]
    parts["dots/000.jpg"] = "val" if was == "train" else "train"
    assert refusal_of_photographs(folder, read_table()).startswith("1 changed (dots/000.jpg); bring")
    parts["dots/000.jpg"] = was
    groups[names[1]] = groups[names[0]]
    assert refusal_of_photographs(folder, read_table()).startswith(f"1 changed ({names[1]}); bring")


def test_a_photograph_less_changes_no_group(drawn_classes: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, test_frac=0.0)
    dataset = scan_source(str(drawn_classes), DataConfig(group_regex=r"\d\d(?=\d\.)"))  # of ten each
    digests = [path.encode() for path in dataset.paths]

    def read_all_but(n_first: int) -> TrainingData:
        kept = dataset.select(np.arange(len(dataset)) >= n_first)
        values = np.zeros((len(kept), 2), np.float32)
        images = ImageFeatures(values=values, digests=digests[n_first:], errors={})
        data = build_training_data(kept, images, config)
        one_part = replace(data.split, train=data.fit_rows, val=data.fit_rows[:0])
        return replace(data, split=one_part)

    check_images(str(tmp_path), read_all_but(0), "weights")
    interrupt(tmp_path)
    line = refusal_of_photographs(tmp_path, read_all_but(1))
    assert line.startswith(f"1 missing ({dataset.paths[0]}); bring")


def test_other_weights_are_refused(drawn_images: Path, tmp_path: Path) -> None:
    data = read(drawn_images)
    check_images(str(tmp_path), data, "weights")
    interrupt(tmp_path)
    with pytest.raises(ConfigError, match=r"had other backbone weights; give the same, or .* --force"):
        check_images(str(tmp_path), data, "others")


@pytest.mark.parametrize("content", ["{", ""])
def test_photographs_that_cannot_be_read_are_named(content: str, drawn_images: Path, tmp_path: Path) -> None:
    interrupt(tmp_path)
    (tmp_path / "images.json").write_text(content)
    with pytest.raises(DataError, match=r"images\.json cannot be read \(.*\); start anew with --force"):
        check_images(str(tmp_path), read(drawn_images), "weights")
