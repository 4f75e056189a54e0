"""How deep to train: what the choice rests on, and what is said about it."""

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

from conftest import draw_folder
from materials import sort_out_folder
from networks import shared_backbone
from pixelplay.api import train
from pixelplay.config import AugmentConfig, ComputeConfig, FinetuneConfig, FinetuneMethod, TrainConfig
from pixelplay.errors import ConfigError, DataError
from pixelplay.run_log import RunLog
from pixelplay.training.probe_or_finetune import ENOUGH_VAL, compare_depths
from pixelplay.training.training_data import TrainingData
from tables import read_rows

CONFIG = TrainConfig(finetune="auto", val_frac=0.5)


@pytest.fixture(scope="module")
def data(drawn_images: Path) -> TrainingData:
    """Nineteen validation images; their features are of no interest."""
    return sort_out_folder(drawn_images, CONFIG)


def logits_with(n_wrong: int, data: TrainingData, sureness: float = 2.0) -> NDArray[np.float32]:
    """Logits (n, K) that give the first few validation images the class next to their own."""
    labels = data.labels[data.split.val].copy()
    labels[:n_wrong] = (labels[:n_wrong] + 1) % data.n_known
    return (sureness * np.eye(data.n_known, dtype=np.float32))[labels]


def unsure_about(n: int, data: TrainingData) -> NDArray[np.float32]:
    """As `logits_with(1, …)`, with the next few right answers hanging by a thread."""
    logits = logits_with(1, data)
    logits[1 : 1 + n] /= 20
    return logits


# --- comparing ---


def test_a_clear_gain_is_taken(data: TrainingData) -> None:
    n = len(data.split.val)
    verdict = compare_depths(logits_with(9, data), logits_with(1, data), data, CONFIG)
    assert verdict.is_tuned_better
    assert verdict.evidence["probe_accuracy"] == pytest.approx(1 - 9 / n)
    assert verdict.evidence["tuned_accuracy"] == pytest.approx(1 - 1 / n)
    # eight of n images change sides, all the same way
    expected = np.std([1] * 8 + [0] * (n - 8), ddof=1) / np.sqrt(n)
    assert verdict.evidence["standard_error"] == pytest.approx(expected, rel=0.1)


def test_a_clear_loss_is_not_taken(data: TrainingData) -> None:
    verdict = compare_depths(logits_with(1, data), logits_with(9, data), data, CONFIG)
    assert not verdict.is_tuned_better


def test_a_clear_gain_outweighs_a_worse_likelihood(data: TrainingData) -> None:
    probe, tuned = logits_with(6, data), logits_with(2, data)
    tuned[2:] /= 50  # right by a hair
    verdict = compare_depths(probe, tuned, data, CONFIG)
    assert verdict.evidence["tuned_score"] > verdict.evidence["probe_score"]
    assert verdict.is_tuned_better


@pytest.mark.parametrize("is_tuned_surer", [True, False])
def test_within_noise_the_likelihood_decides(is_tuned_surer: bool, data: TrainingData) -> None:
    sure, unsure = logits_with(1, data), unsure_about(6, data)
    probe, tuned = (unsure, sure) if is_tuned_surer else (sure, unsure)
    verdict = compare_depths(probe, tuned, data, CONFIG)
    assert verdict.evidence["probe_accuracy"] == verdict.evidence["tuned_accuracy"]
    assert (verdict.evidence["tuned_score"] < verdict.evidence["probe_score"]) == is_tuned_surer
    assert verdict.is_tuned_better == is_tuned_surer


def test_one_photograph_is_noise(data: TrainingData) -> None:
    probe, tuned = logits_with(2, data), unsure_about(8, data)
    verdict = compare_depths(probe, tuned, data, CONFIG)
    assert verdict.evidence["tuned_accuracy"] > verdict.evidence["probe_accuracy"]
    assert not verdict.is_tuned_better


def test_equal_depths_stay_with_the_probe(data: TrainingData) -> None:
    logits = logits_with(3, data)
    assert not compare_depths(logits, logits.copy(), data, CONFIG).is_tuned_better


def test_being_too_sure_is_no_fault_for_the_temperature_mends_it(data: TrainingData) -> None:
    verdict = compare_depths(logits_with(2, data), logits_with(2, data, sureness=20.0), data, CONFIG)
    assert verdict.evidence["tuned_score"] == pytest.approx(verdict.evidence["probe_score"], rel=1e-3)


def test_the_declared_metric_is_compared(data: TrainingData) -> None:
    """The probe is right about the largest class only, tuned loses some of it for the others."""
    labels = data.labels[data.split.val]
    probe = np.tile(np.float32([2, 0, 0]), (len(labels), 1))
    wrong = np.flatnonzero(labels == 0)[:4]
    guesses = labels.copy()
    guesses[wrong] = 1
    tuned = (2 * np.eye(3, dtype=np.float32))[guesses]
    verdict = compare_depths(probe, tuned, data, replace(CONFIG, metric="balanced_accuracy"))
    assert verdict.evidence["probe_balanced_accuracy"] == pytest.approx(1 / 3)
    assert verdict.evidence["tuned_balanced_accuracy"] > 0.7
    assert verdict.is_tuned_better


@pytest.mark.parametrize(
    ("asked", "n_wrong", "words"),
    [
        ("auto", 1, "partial is taken"),
        ("auto", 9, "the probe is taken"),
        ("partial", 1, "partial is taken"),
        ("partial", 9, "--finetune auto would take the probe"),
    ],
)
def test_the_sentence_names_both_figures_and_who_is_taken(
    asked: str, n_wrong: int, words: str, data: TrainingData
) -> None:
    n = len(data.split.val)
    config = TrainConfig(**{**vars(CONFIG), "finetune": asked})
    verdict = compare_depths(logits_with(5, data), logits_with(n_wrong, data), data, config)
    evidence = verdict.evidence
    assert verdict.sentence.format(finetune="partial") == (
        f"on {n} held-out images, seen as in prediction, partial has accuracy {1 - n_wrong / n:.3f} "
        f"(loss {evidence['tuned_score']:.3f}), the probe {1 - 5 / n:.3f} "
        f"({evidence['probe_score']:.3f}): {words}"
    )


# --- falling back ---


@pytest.fixture(scope="module")
def tiny(tiny_probe: TrainConfig) -> TrainConfig:
    return replace(
        tiny_probe,
        finetune="auto",
        val_frac=0.9,
        time_budget="0.1s",
        finetuning=FinetuneConfig(train_batch_size=8),  # it is also what is measured
        compute=ComputeConfig(batch_size=8),
    )


def test_auto_fits_a_probe_where_time_is_short_and_says_so(
    drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    log = RunLog(quiet=True)
    report = train(drawn_images, tmp_path / "run", tiny, log=log)
    assert report.finetune == "none"
    assert report.held_out_split == "oof"
    note = next(note for note in log.notes if "too short" in note)
    assert note.startswith("--time-budget 0.1s is too short for partial tuning on ")
    assert note.endswith("; raise --time-budget or use --finetune none; a probe is fitted")
    assert "a probe has no use for train_batch_size=8" in log.notes
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert files == [
        "config.json",
        "metrics.json",
        "model",
        "oof.csv",
        "predictions.csv",
        "split.json",
        "label_issues.csv",
    ]
    assert note in json.loads((tmp_path / "run/metrics.json").read_text())["notes"]
    # who could not choose learns
    split = json.loads((tmp_path / "run/split.json").read_text())
    assert len(split["val"]) >= ENOUGH_VAL
    assert sum(report.train_counts.values()) == len(split["train"]) + len(split["val"])


@pytest.mark.parametrize("method", ["partial", "full"])
def test_an_explicit_depth_is_refused_with_the_time_it_needs(
    method: str, drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    config = TrainConfig(**{**vars(tiny), "finetune": method, "val_frac": 0.15})
    with pytest.raises(
        ConfigError,
        match=rf"--time-budget 0\.1s is too short for {method} tuning on 32 images: "
        r"about \d+[0sm]+ are needed here; raise --time-budget or use --finetune none",
    ):
        train(drawn_images, tmp_path / "run", config, log=RunLog(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_auto_fits_a_probe_where_too_few_can_choose(
    drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    log = RunLog(quiet=True)
    config = replace(tiny, val_frac=0.15, time_budget="2h")
    report = train(drawn_images, tmp_path / "run", config, log=log)
    assert report.finetune == "none"
    said = "6 validation images cannot tell which depth is better, 30 could; a probe is fitted (--finetune "
    assert f"{said}partial trains all the same)" in log.notes
    assert not any("--val-frac" in note for note in log.notes)  # which is why there are so few
    assert "--time-budget 2h does not count: a probe has no use for it" in log.notes
    assert "a probe has no use for train_batch_size=8" in log.notes


def test_auto_fits_a_probe_where_no_epoch_is_better(
    drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    runaway = FinetuneConfig(epochs=1, lr=10.0, head_lr=10.0, weight_decay=10.0, train_batch_size=2)
    config = replace(tiny, finetuning=runaway, oversample_to=8)
    log = RunLog(quiet=True)
    report = train(drawn_images, tmp_path / "run", config, log=log)
    assert report.finetune == "none"
    said = "no epoch of partial tuning was better than the probe on"
    assert [note for note in log.notes if note.startswith(said)]
    assert "oversample_to needs augmented views, and a probe has none: it is left out" in log.notes
    # what was tried is kept
    assert (tmp_path / "run/plan.json").is_file()
    assert (tmp_path / "run/history.csv").is_file()
    assert not (tmp_path / "run/val.csv").exists()
    assert report.chosen["finetune"]["value"] == "none"
    assert report.chosen["finetune"]["chosen_on"] == "val"
    split = json.loads((tmp_path / "run/split.json").read_text())
    assert sum(report.train_counts.values()) == len(split["train"]) + len(split["val"])


def test_a_probe_that_is_taken_shows_the_scores_that_chose_it(
    drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    settings = FinetuneConfig(epochs=2, lr=0.1, head_lr=0.1, unfreeze_stages=1)
    log = RunLog(quiet=True)
    train(drawn_images, tmp_path / "run", replace(tiny, finetuning=settings), log=log)
    before, *after = [float(row["val_score"]) for row in read_rows(tmp_path / "run/history.csv")]
    assert min(after) >= before
    scores = f"(score {min(after):.3f} at best, {before:.3f} before; lower is better); the probe is taken"
    assert [note for note in log.notes if note.endswith(scores)]


def test_auto_says_which_settings_mean_nothing_at_the_depth_it_takes(
    drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny, finetuning=FinetuneConfig(epochs=1, cached_views=1, initial_size_frac=0.5))
    log = RunLog(quiet=True)
    train(drawn_images, tmp_path / "run", config, log=log)
    assert "partial tuning has no use for initial_size_frac=0.5" in log.notes


@pytest.mark.parametrize("augment", [("crop",), ("crop", "mixup")])
def test_a_focus_that_makes_way_is_said(
    augment: tuple[str, ...], drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    settings = FinetuneConfig(epochs=1, unfreeze_stages=1)
    config = replace(tiny, finetune="partial", finetuning=settings, augmenting=AugmentConfig(augment=augment))
    log = RunLog(quiet=True)
    train(drawn_images, tmp_path / "run", config, log=log)
    note = "--hard-example-frac makes way for mixup, cutmix or an mlp head: it does not count"
    assert (note in log.notes) == ("mixup" in augment)


@pytest.mark.parametrize("method", ["auto", "partial"])
def test_where_no_disk_takes_the_views(
    method: FinetuneMethod,
    drawn_images: Path,
    tiny: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replaces = os.replace

    def fill_up(source: str, target: str) -> None:
        if "views-" in os.path.dirname(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replaces(source, target)

    monkeypatch.setattr(os, "replace", fill_up)
    new, settings = str(tmp_path / "cache"), FinetuneConfig(epochs=1, unfreeze_stages=1)
    config = replace(tiny, finetune=method, cache_dir=new, finetuning=settings)
    words = r"views of the images cannot be kept: .*: No space left on device; free some space"
    log = RunLog(quiet=True)
    if method == "auto":
        assert train(drawn_images, tmp_path / "run", config, log=log).finetune == "none"
        assert any(re.fullmatch(f"{words}; a probe is fitted", note) for note in log.notes)
        assert list(Path(new).glob("views-*")) == []  # room for the probe
        return
    with pytest.raises(ConfigError, match=words):
        train(drawn_images, tmp_path / "run", config, log=log)


@pytest.mark.parametrize("grad_accum_steps", [1, 1000])
def test_fewer_batches_than_are_to_be_added_up_are_said(
    grad_accum_steps: int, drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    settings = FinetuneConfig(
        epochs=1, unfreeze_stages=1, grad_accum_steps=grad_accum_steps, train_batch_size=8
    )
    log = RunLog(quiet=True)
    train(drawn_images, tmp_path / "run", replace(tiny, finetune="partial", finetuning=settings), log=log)
    said = [note for note in log.notes if note.startswith("--grad-accum-steps ")]
    assert len(said) == (grad_accum_steps == 1000)


@pytest.mark.parametrize(
    ("method", "settings", "more", "words"),
    [
        ("partial", {"train_batch_size": 900}, {}, "--train-batch-size 900 is "),
        ("partial", {"layer_decay": 0.5}, {}, "--layer-decay 0.5 does not count: one stage is trained"),
        ("partial", {}, {"oversample_to": 60}, "in 1 view of each; --cached-views keeps more"),
        (
            "full",
            {},
            {"oversample_to": 60, "hflip": False, "augmenting": AugmentConfig(augment=())},
            "in 1 view of each; --augment varies them",
        ),
        ("full", {"initial_size_frac": 0.5}, {}, "--initial-size-frac 0.5 does not count: every epoch"),
        (
            "full",
            {},
            {"cache_gb": 1e-6},
            "every epoch decodes images anew: they take 5.8 MB, and 0.0 MB of the cache",
        ),
    ],
)
def test_what_a_plan_leaves_no_room_for_is_said(
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


def test_auto_fits_a_probe_where_the_network_cannot_be_cut(
    drawn_images: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    weights = tmp_path / "vit.safetensors"
    save_file(shared_backbone("test_vit").network.state_dict(), weights)
    config = replace(tiny, backbone="test_vit", weights=str(weights), time_budget="2h")
    log = RunLog(quiet=True)
    assert train(drawn_images, tmp_path / "run", config, log=log).finetune == "none"
    assert any(n.startswith("test_vit cannot be cut") and n.endswith("a probe is fitted") for n in log.notes)
    with pytest.raises(ConfigError, match="test_vit cannot be cut"):
        train(
            drawn_images,
            tmp_path / "other",
            replace(config, finetune="partial"),
            log=RunLog(quiet=True),
        )


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which none can be held out of train: one burst of each class."""
    root = tmp_path_factory.mktemp("lonely")
    draw_folder(root / "train", {"bars": 4, "dots": 4})
    draw_folder(root / "test", {"bars": 2, "dots": 2}, first_seed=50)
    return root


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three bursts of each class: one to test, one to choose and one to learn from."""
    root = tmp_path_factory.mktemp("few")
    for n, place in enumerate(("oak", "pond", "road")):
        for name in ("bars", "dots"):
            draw_folder(root / "drawn", {name: 20}, first_seed=100 * n)
            (root / "photos" / name).mkdir(parents=True, exist_ok=True)
            (root / "drawn" / name).rename(root / "photos" / name / place)
    return root / "photos"


def test_auto_fits_a_probe_where_one_burst_of_each_class_is_left(
    few: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    data = replace(tiny.data, group_by_folder=True)
    config = replace(tiny, val_frac=0.4, time_budget="2h", data=data)
    log = RunLog(quiet=True)
    assert train(few, tmp_path / "run", config, log=log).finetune == "none"
    words = "tuning needs a class with 2 images or groups to learn from beside those that are held out"
    assert f"{words}; a probe is fitted" in log.notes
    with pytest.raises(DataError, match=f"{words}; add some or use --finetune none"):
        train(few, tmp_path / "other", replace(config, finetune="partial"), log=RunLog(quiet=True))


def test_without_a_validation_photograph_an_explicit_depth_is_refused(
    lonely: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    data = replace(tiny.data, group_regex="train/[^/]+|[^/]+$")
    config = replace(tiny, finetune="partial", data=data)
    with pytest.raises(DataError, match="tuning needs validation images, and no class has 2"):
        train(lonely, tmp_path / "run", config, log=RunLog(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_a_class_to_choose_on_that_is_not_learned(tiny: TrainConfig, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    draw_folder(root / "train", {"bars": 4, "dots": 4})
    draw_folder(root / "val", {"bars": 10, "dots": 10, "rings": 10}, first_seed=50)
    config = replace(tiny, test_frac=0.0, time_budget="2h")
    log = RunLog(quiet=True)
    words = "tuning needs training images of every class; only the val part has rings"
    assert train(root, tmp_path / "run", config, log=log).finetune == "none"
    assert f"{words}; a probe is fitted" in log.notes
    with pytest.raises(DataError, match=words):
        train(root, tmp_path / "other", replace(config, finetune="partial"), log=RunLog(quiet=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "run"]
