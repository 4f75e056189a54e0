"""Tests of the choice between linear probe and fine-tuning."""

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import save_file

from conftest import SMALL_PX, draw_folder
from contexts import training_data_of
from networks import shared_backbone
from pixelplay.api import train
from pixelplay.config import AugmentConfig, ComputeConfig, FinetuneConfig, FinetuneMethod, TrainConfig
from pixelplay.errors import ConfigError, DataError
from pixelplay.run_log import RunLog
from pixelplay.training.probe_or_finetune import ENOUGH_VAL, compare_methods
from pixelplay.training.training_data import TrainingData
from tables import read_rows

CONFIG = TrainConfig(finetune="auto", val_frac=0.5)


@pytest.fixture(scope="module")
def data(drawn_images: Path) -> TrainingData:
    """Nineteen validation images; their features are not used."""
    return training_data_of(drawn_images, CONFIG)


def logits_with(n_wrong: int, data: TrainingData, scale: float = 2.0) -> NDArray[np.float32]:
    """Logits (n, K) that misclassify the first n_wrong validation images."""
    labels = data.labels[data.split.val].copy()
    labels[:n_wrong] = (labels[:n_wrong] + 1) % data.n_known
    return (scale * np.eye(data.n_known, dtype=np.float32))[labels]


def confident_except(n: int, data: TrainingData) -> NDArray[np.float32]:
    """As `logits_with(1, …)`, with a small margin for the next n correct predictions."""
    logits = logits_with(1, data)
    logits[1 : 1 + n] /= 20
    return logits


# --- comparison ---


def test_clear_gain_selects_fine_tuning(data: TrainingData) -> None:
    n = len(data.split.val)
    is_better, evidence = compare_methods(logits_with(9, data), logits_with(1, data), data, CONFIG)
    assert is_better
    assert evidence["probe_accuracy"] == pytest.approx(1 - 9 / n)
    assert evidence["finetuned_accuracy"] == pytest.approx(1 - 1 / n)
    # eight of n images differ, all in the same direction
    expected = np.std([1] * 8 + [0] * (n - 8), ddof=1) / np.sqrt(n)
    assert evidence["standard_error"] == pytest.approx(expected, rel=0.1)


def test_clear_loss_selects_the_linear_probe(data: TrainingData) -> None:
    is_better, _ = compare_methods(logits_with(1, data), logits_with(9, data), data, CONFIG)
    assert not is_better


def test_clear_gain_outweighs_worse_likelihood(data: TrainingData) -> None:
    probe, finetuned = logits_with(6, data), logits_with(2, data)
    finetuned[2:] /= 50  # correct with a tiny margin
    is_better, evidence = compare_methods(probe, finetuned, data, CONFIG)
    assert evidence["finetuned_loss"] > evidence["probe_loss"]
    assert is_better


@pytest.mark.parametrize("is_finetuned_confident", [True, False])
def test_likelihood_decides_within_noise(is_finetuned_confident: bool, data: TrainingData) -> None:
    confident, unsure = logits_with(1, data), confident_except(6, data)
    probe, finetuned = (unsure, confident) if is_finetuned_confident else (confident, unsure)
    is_better, evidence = compare_methods(probe, finetuned, data, CONFIG)
    assert evidence["probe_accuracy"] == evidence["finetuned_accuracy"]
    assert (evidence["finetuned_loss"] < evidence["probe_loss"]) == is_finetuned_confident
    assert is_better == is_finetuned_confident


def test_one_image_is_within_noise(data: TrainingData) -> None:
    probe, finetuned = logits_with(2, data), confident_except(8, data)
    is_better, evidence = compare_methods(probe, finetuned, data, CONFIG)
    assert evidence["finetuned_accuracy"] > evidence["probe_accuracy"]
    assert not is_better


def test_equal_logits_keep_the_linear_probe(data: TrainingData) -> None:
    logits = logits_with(3, data)
    is_better, _ = compare_methods(logits, logits.copy(), data, CONFIG)
    assert not is_better


def test_overconfidence_is_corrected_by_temperature(data: TrainingData) -> None:
    _, evidence = compare_methods(logits_with(2, data), logits_with(2, data, scale=20.0), data, CONFIG)
    assert evidence["finetuned_loss"] == pytest.approx(evidence["probe_loss"], rel=1e-3)


def test_comparison_uses_the_declared_metric(data: TrainingData) -> None:
    """The probe is correct for the largest class only; fine-tuning loses some of it and gains the others."""
    labels = data.labels[data.split.val]
    probe = np.tile(np.float32([2, 0, 0]), (len(labels), 1))
    wrong = np.flatnonzero(labels == 0)[:4]
    guesses = labels.copy()
    guesses[wrong] = 1
    finetuned = (2 * np.eye(3, dtype=np.float32))[guesses]
    is_better, evidence = compare_methods(probe, finetuned, data, replace(CONFIG, metric="balanced_accuracy"))
    assert evidence["probe_balanced_accuracy"] == pytest.approx(1 / 3)
    assert evidence["finetuned_balanced_accuracy"] > 0.7
    assert is_better


# --- fallback to the linear probe ---


@pytest.fixture(scope="module")
def tiny(tiny_probe: TrainConfig) -> TrainConfig:
    return replace(
        tiny_probe,
        finetune="auto",
        input_size=str(SMALL_PX),
        val_frac=0.9,
        time_budget="0.1s",
        finetuning=FinetuneConfig(train_batch_size=8),  # also the batch size that is measured
        compute=ComputeConfig(batch_size=8),
    )


def test_auto_uses_linear_probe_when_time_budget_is_too_short(
    drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    log = RunLog(quiet=True)
    report = train(drawn_images, tmp_path / "run", tiny, log=log)
    assert report.finetune == "none"
    assert report.held_out_split == "oof"
    note = next(note for note in log.notes if "--time-budget 0.1s" in note)
    assert "--finetune partial" in note
    assert any("train_batch_size=8" in note for note in log.notes)
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert files == [
        "config.json",
        "environment.json",
        "label_issues.csv",
        "metrics.json",
        "model",
        "oof.csv",
        "predictions.csv",
        "split.json",
    ]
    assert note in json.loads((tmp_path / "run/metrics.json").read_text())["notes"]
    # the validation images join training
    split = json.loads((tmp_path / "run/split.json").read_text())
    assert len(split["val"]) >= ENOUGH_VAL
    assert sum(report.train_counts.values()) == len(split["train"]) + len(split["val"])


@pytest.mark.parametrize("method", ["partial", "full"])
def test_explicit_method_with_short_time_budget_names_the_time_needed(
    method: str, drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    config = TrainConfig(**{**vars(tiny), "finetune": method, "val_frac": 0.15})
    with pytest.raises(
        ConfigError,
        match=rf"--time-budget 0\.1s .*--finetune {method} on 32 images; .* \d+[0sm]+ .*--finetune none",
    ):
        train(drawn_images, tmp_path / "run", config, log=RunLog(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_auto_uses_linear_probe_with_few_validation_images(
    drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    log = RunLog(quiet=True)
    config = replace(tiny, val_frac=0.15, time_budget="2h")
    report = train(drawn_images, tmp_path / "run", config, log=log)
    assert report.finetune == "none"
    assert any("6 validation images" in note and "--finetune partial" in note for note in log.notes)
    assert not any("--val-frac" in note for note in log.notes)  # it is the reason for so few
    assert any("--time-budget" in note for note in log.notes)
    assert any("train_batch_size=8" in note for note in log.notes)


def test_auto_keeps_linear_probe_when_no_epoch_improves(
    drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    diverging = FinetuneConfig(epochs=1, lr=10.0, head_lr=10.0, weight_decay=10.0, train_batch_size=2)
    config = replace(tiny, finetuning=diverging, oversample_to=8)
    log = RunLog(quiet=True)
    report = train(drawn_images, tmp_path / "run", config, log=log)
    assert report.finetune == "none"
    assert any("linear probe" in note and "no epoch" in note for note in log.notes)
    assert any("--oversample-to" in note for note in log.notes)
    # the records of the fine-tuning are kept
    assert (tmp_path / "run/plan.json").is_file()
    assert (tmp_path / "run/history.csv").is_file()
    assert not (tmp_path / "run/val.csv").exists()
    assert report.chosen["finetune"]["value"] == "none"
    assert report.chosen["finetune"]["chosen_on"] == "val"
    split = json.loads((tmp_path / "run/split.json").read_text())
    assert sum(report.train_counts.values()) == len(split["train"]) + len(split["val"])


def test_kept_linear_probe_note_has_both_selection_losses(
    drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    settings = FinetuneConfig(epochs=2, lr=1, head_lr=1, unfreeze_stages=1)
    log = RunLog(quiet=True)
    train(drawn_images, tmp_path / "run", replace(tiny, finetuning=settings), log=log)
    before, *after = [float(row["val_selection_loss"]) for row in read_rows(tmp_path / "run/history.csv")]
    assert min(after) >= before
    assert any(f"{min(after):.3f}" in note and f"{before:.3f}" in note for note in log.notes)


def test_auto_notes_settings_without_effect(drawn_images: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, finetuning=FinetuneConfig(epochs=1, cached_views=1, initial_size_frac=0.5))
    log = RunLog(quiet=True)
    train(drawn_images, tmp_path / "run", config, log=log)
    assert any("partial" in note and "initial_size_frac=0.5" in note for note in log.notes)


@pytest.mark.parametrize("augment", [("crop",), ("crop", "mixup")])
def test_hard_example_frac_is_ignored_with_mixup(
    augment: tuple[str, ...], drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    settings = FinetuneConfig(epochs=1, unfreeze_stages=1)
    config = replace(tiny, finetune="partial", finetuning=settings, augmenting=AugmentConfig(augment=augment))
    log = RunLog(quiet=True)
    train(drawn_images, tmp_path / "run", config, log=log)
    assert any("--hard-example-frac" in note for note in log.notes) == ("mixup" in augment)


@pytest.mark.parametrize("method", ["auto", "partial"])
def test_full_disk_prevents_caching_views(
    method: FinetuneMethod,
    drawn_images: Path,
    tiny: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace_file = os.replace

    def fill_up(source: str, target: str) -> None:
        if "views-" in os.path.dirname(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", fill_up)
    new, settings = str(tmp_path / "cache"), FinetuneConfig(epochs=1, unfreeze_stages=1)
    config = replace(tiny, finetune=method, cache_dir=new, finetuning=settings)
    reason = r"views.*: No space left on device"
    log = RunLog(quiet=True)
    if method == "auto":
        assert train(drawn_images, tmp_path / "run", config, log=log).finetune == "none"
        assert any(re.search(reason, note) and "linear probe" in note for note in log.notes)
        assert list(Path(new).glob("views-*")) == []  # their space is free for the probe
        return
    with pytest.raises(ConfigError, match=reason):
        train(drawn_images, tmp_path / "run", config, log=log)


@pytest.mark.parametrize("grad_accum_steps", [1, 1000])
def test_grad_accum_steps_beyond_an_epoch_are_noted(
    grad_accum_steps: int, drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    settings = FinetuneConfig(
        epochs=1, unfreeze_stages=1, grad_accum_steps=grad_accum_steps, train_batch_size=8
    )
    log = RunLog(quiet=True)
    train(drawn_images, tmp_path / "run", replace(tiny, finetune="partial", finetuning=settings), log=log)
    notes = [note for note in log.notes if note.startswith("--grad-accum-steps ")]
    assert len(notes) == (grad_accum_steps == 1000)


@pytest.mark.parametrize(
    ("method", "settings", "more", "words"),
    [
        ("partial", {"train_batch_size": 900}, {}, "--train-batch-size 900 "),
        ("partial", {"layer_decay": 0.5}, {}, "--layer-decay 0.5 "),
        ("partial", {}, {"oversample_to": 60}, "with 1 views; raise --cached-views"),
        (
            "full",
            {},
            {"oversample_to": 60, "hflip": False, "augmenting": AugmentConfig(augment=())},
            "with 1 views; use --augment",
        ),
        ("full", {"initial_size_frac": 0.5}, {}, "--initial-size-frac 0.5 "),
        (
            "full",
            {},
            {"cache_gb": 1e-6},
            "every epoch decodes",
        ),
    ],
)
def test_settings_without_effect_are_noted(
    method: FinetuneMethod,
    settings: dict[str, Any],
    more: dict[str, Any],
    words: str,
    drawn_images: Path,
    tiny: TrainConfig,
    tmp_path: Path,
) -> None:
    stages = {"unfreeze_stages": 1, "cached_views": 1} if method == "partial" else {}
    finetuning = FinetuneConfig(epochs=1, refit_epochs=0, **stages, **settings)
    log = RunLog(quiet=True)
    train(
        drawn_images,
        tmp_path / "run",
        replace(tiny, finetune=method, finetuning=finetuning, **more),
        log=log,
    )
    assert [words in note for note in log.notes].count(True) == 1, log.notes


def test_auto_uses_linear_probe_when_backbone_cannot_be_split(
    drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    weights = tmp_path / "vit.safetensors"
    save_file(shared_backbone("test_vit").network.state_dict(), weights)
    config = replace(tiny, backbone="test_vit", weights=str(weights), time_budget="2h")
    log = RunLog(quiet=True)
    assert train(drawn_images, tmp_path / "run", config, log=log).finetune == "none"
    assert any("test_vit" in note and "linear probe" in note for note in log.notes)
    with pytest.raises(ConfigError, match="test_vit"):
        train(
            drawn_images,
            tmp_path / "other",
            replace(config, finetune="partial"),
            log=RunLog(quiet=True),
        )


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images of which none can be held out: one group per class."""
    root = tmp_path_factory.mktemp("lonely")
    draw_folder(root / "train", {"bars": 4, "dots": 4})
    draw_folder(root / "test", {"bars": 2, "dots": 2}, first_seed=50)
    return root


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three groups per class, one for each split."""
    root = tmp_path_factory.mktemp("few")
    for n, place in enumerate(("oak", "pond", "road")):
        for name in ("bars", "dots"):
            draw_folder(root / "drawn", {name: 20}, first_seed=100 * n)
            (root / "photos" / name).mkdir(parents=True, exist_ok=True)
            (root / "drawn" / name).rename(root / "photos" / name / place)
    return root / "photos"


def test_auto_uses_linear_probe_when_one_group_per_class_is_left(
    few: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    data = replace(tiny.reading, group_by_folder=True)
    config = replace(tiny, val_frac=0.4, time_budget="2h", reading=data)
    log = RunLog(quiet=True)
    assert train(few, tmp_path / "run", config, log=log).finetune == "none"
    assert any("2 training images or groups" in note for note in log.notes)
    with pytest.raises(DataError, match=r"2 training images or groups.*--finetune none"):
        train(few, tmp_path / "other", replace(config, finetune="partial"), log=RunLog(quiet=True))


def test_fine_tuning_without_validation_images_is_refused(
    lonely: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    data = replace(tiny.reading, group_regex="train/[^/]+|[^/]+$")
    config = replace(tiny, finetune="partial", reading=data)
    with pytest.raises(DataError, match="at least one needs 2"):
        train(lonely, tmp_path / "run", config, log=RunLog(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_class_only_in_val_prevents_fine_tuning(tiny: TrainConfig, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    draw_folder(root / "train", {"bars": 4, "dots": 4})
    draw_folder(root / "val", {"bars": 10, "dots": 10, "rings": 10}, first_seed=50)
    config = replace(tiny, test_frac=0.0, time_budget="2h")
    log = RunLog(quiet=True)
    reason = "only val has rings"
    assert train(root, tmp_path / "run", config, log=log).finetune == "none"
    assert any(reason in note for note in log.notes)
    with pytest.raises(DataError, match=reason):
        train(root, tmp_path / "other", replace(config, finetune="partial"), log=RunLog(quiet=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "run"]
