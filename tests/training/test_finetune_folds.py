"""Tests of fine-tuning without a validation split: one network per fold, weights averaged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import draw_folder
from pixelplay.cli.main import main
from pixelplay.config import FinetuneConfig, TrainConfig
from pixelplay.evaluation.decision_rule import compare_nll
from pixelplay.model.bundle import read_bundle
from pixelplay.model.split_backbone import BranchedBackbone
from pixelplay.training import finetune_folds
from pixelplay.training.finetune_folds import N_FOLDS, SHARES, _choose_share
from tables import read_json, read_rows

Train = Callable[..., Path]
COUNTS = {"bars": 30, "dots": 24, "rings": 12}
TWO_EPOCHS = ["--epochs", "2", "--train-batch-size", "8", "--unfreeze-stages", "1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("folds") / "images", COUNTS)


@pytest.fixture(scope="module")
def train(images: Path, tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train on the drawn images into a new folder."""

    def run(*argv: str) -> Path:
        out = tmp_path_factory.mktemp("run") / "run"
        assert main(["train", str(images), "--out", str(out), *tiny_settings, "--quiet", *argv]) == 0
        return out

    return run


@pytest.fixture(scope="module")
def run(train: Train) -> Path:
    """Read-only: a run with two epochs per network."""
    return train("--finetune", "partial", *TWO_EPOCHS)


# --- records ---


def test_without_a_validation_split_out_of_fold_predictions_select(run: Path) -> None:
    assert (run / "oof.csv").is_file()
    assert not (run / "val.csv").exists()
    split, metrics = read_json(run / "split.json"), read_json(run / "metrics.json")
    assert not split.get("val")
    assert metrics["finetune"] == "partial"
    for name in ("temperature", "tau", "network_share"):
        assert metrics["chosen"][name]["chosen_on"] == "train+val, out of fold"
        assert metrics["chosen"][name]["n"] in (len(split["train"]), None, metrics["oof"]["n"])


def test_every_training_image_has_an_out_of_fold_prediction(run: Path) -> None:
    rows = read_rows(run / "oof.csv")
    assert sorted(row["path"] for row in rows) == sorted(read_json(run / "split.json")["train"])
    assert {row["fold"] for row in rows} == {str(fold) for fold in range(N_FOLDS)}


def test_history_has_the_epochs_of_each_network(run: Path) -> None:
    rows = read_rows(run / "history.csv")
    epochs = [(int(row["fold"]), int(row["epoch"])) for row in rows if int(row["epoch"])]
    assert epochs == [(fold, epoch) for fold in range(N_FOLDS) for epoch in (1, 2)]


def test_predict_repeats_the_predictions_of_the_averaged_network(
    run: Path, images: Path, tmp_path: Path
) -> None:
    rows = read_rows(run / "predictions.csv")
    table = tmp_path / "predictions.csv"
    paths = [str(images / row["path"]) for row in rows]
    assert main(["predict", str(run), *paths, "--out", str(table), "--quiet"]) == 0
    for ours, theirs in zip(rows, read_rows(table), strict=True):
        for name in COUNTS:
            assert float(ours[f"prob_{name}"]) == pytest.approx(float(theirs[f"prob_{name}"]), abs=2e-6)


def test_same_seed_makes_the_same_model(run: Path, train: Train) -> None:
    again = train("--finetune", "partial", *TWO_EPOCHS)
    for path in (run / "model").iterdir():
        assert path.read_bytes() == (again / "model" / path.name).read_bytes()


def test_resume_after_an_interruption_makes_the_same_model(
    run: Path, images: Path, tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    command = ["train", str(images), "--out", str(out), *tiny_settings, "--quiet", "--finetune", "partial"]
    command += TWO_EPOCHS
    n_trained = 0
    copy_weights = finetune_folds.copy_weights

    def interrupt_second(network: nn.Module) -> dict[str, torch.Tensor]:
        nonlocal n_trained
        n_trained += 1
        if n_trained == 2:
            raise KeyboardInterrupt
        return copy_weights(network)

    monkeypatch.setattr(finetune_folds, "copy_weights", interrupt_second)
    assert main(command) == 130
    assert not out.exists()
    monkeypatch.setattr(finetune_folds, "copy_weights", copy_weights)
    assert main([*command, "--resume"]) == 0
    for path in (run / "model").iterdir():
        assert path.read_bytes() == (out / "model" / path.name).read_bytes()


def test_refit_epochs_without_a_validation_split_are_noted(train: Train) -> None:
    out = train("--finetune", "partial", *TWO_EPOCHS, "--refit-epochs", "1")
    notes = read_json(out / "metrics.json")["notes"]
    assert any("--refit-epochs has no effect without a validation split" in note for note in notes)


# --- averaging ---


def test_deployed_weights_are_the_mean_of_all_networks(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[dict[str, torch.Tensor]] = []
    copy_weights = finetune_folds.copy_weights

    def keep(network: nn.Module) -> dict[str, torch.Tensor]:
        trained.append(copy_weights(network))
        return trained[-1]

    monkeypatch.setattr(finetune_folds, "copy_weights", keep)
    out = train("--finetune", "partial", *TWO_EPOCHS, "--ensemble-probe", "on", "--lr", "1e-3")
    assert len(trained) == N_FOLDS
    backbone = read_bundle(str(out)).backbone
    assert isinstance(backbone, BranchedBackbone)
    deployed = dict(backbone.branches[0].network.named_parameters())
    names = [name for name in trained[0] if name.startswith("stages.network.")]
    assert names
    for name in names:
        mean = torch.stack([weights[name] for weights in trained]).mean(0)
        torch.testing.assert_close(deployed[name.removeprefix("stages.network.")].data, mean)
        assert not torch.equal(trained[0][name], trained[1][name])


# --- choice ---


def test_failed_training_keeps_the_linear_probe(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixelplay.training.schedule.LR_DOWN", 1.0)  # rates are not limited by the loss
    runaway = ["--lr", "10", "--head-lr", "10", "--weight-decay", "10", "--train-batch-size", "2"]
    runaway += ["--warmup-frac", "0"]
    out = train("--finetune", "partial", "--epochs", "9", "--clip-grad-norm", "1e6", *runaway)
    metrics = read_json(out / "metrics.json")
    assert metrics["finetune"] == "none"
    assert any("loss is" in note for note in metrics["notes"])
    assert any("fine-tuning failed" in note for note in metrics["notes"])
    assert metrics["oof"]["accuracy"]["value"] > 0.5


def test_auto_stops_after_the_first_network_if_it_is_worse(
    images: Path, tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("pixelplay.training.probe_or_finetune.ENOUGH_ERRORS", 0)
    command = ["train", str(images), "--out", str(tmp_path / "run"), *tiny_settings]
    assert main([*command, *TWO_EPOCHS, "--lr", "0.5", "--head-lr", "0.5", "--ensemble-probe", "off"]) == 0
    metrics = read_json(tmp_path / "run/metrics.json")
    assert metrics["finetune"] == metrics["chosen"]["finetune"]["value"] == "none"
    assert {row["fold"] for row in read_rows(tmp_path / "run/history.csv")} == {"0"}
    assert "selected the linear probe after" in capsys.readouterr().err


def test_network_worse_than_the_probe_is_noted(train: Train) -> None:
    options = ["--finetune", "partial", *TWO_EPOCHS, "--lr", "0.5", "--head-lr", "0.5"]
    out = train(*options, "--ensemble-probe", "off")
    metrics = read_json(out / "metrics.json")
    assert metrics["finetune"] == "partial"
    assert metrics["chosen"]["finetune"]["auto_selects"] == "none"
    note = next(note for note in metrics["notes"] if note.startswith("selected the fine-tuned network"))
    assert note.endswith("; --finetune auto would select the probe")


def test_auto_does_not_fine_tune_when_the_probe_makes_no_errors(
    images: Path, tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("pixelplay.training.probe_or_finetune.ENOUGH_ERRORS", 1000)
    command = ["train", str(images), "--out", str(tmp_path / "run"), *tiny_settings, *TWO_EPOCHS]
    assert main(command) == 0
    assert read_json(tmp_path / "run/metrics.json")["finetune"] == "none"
    assert "out of fold, too few to show" in capsys.readouterr().err


def draw_logits(n: int, margin: float, seed: int = 0) -> tuple[Any, Any]:
    """Logits (n, 3) with a noisy margin for the label; labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    return (rng.normal(size=(n, 3)) + margin * np.eye(3)[labels]).astype(np.float32), labels


def test_share_is_one_for_a_useless_probe_and_small_for_a_useless_network() -> None:
    good, labels = draw_logits(600, margin=3.0)
    useless, _ = draw_logits(600, margin=0.0, seed=1)
    priors, config = np.full(3, 1 / 3), TrainConfig()
    assert _choose_share(useless, good, labels, priors, config)[0] == 1.0
    assert _choose_share(good, useless, labels, priors, config)[0] == SHARES[0]


def test_equally_good_models_are_averaged() -> None:
    first, labels = draw_logits(600, margin=2.0)
    second, _ = draw_logits(600, margin=2.0, seed=1)
    share, mixed = _choose_share(first, second, labels, np.full(3, 1 / 3), TrainConfig())
    assert share == 0.5
    np.testing.assert_allclose(mixed, (first + second) / 2, rtol=1e-5)


@pytest.mark.parametrize(("ensemble_probe", "share"), [("on", 0.5), ("off", 1.0)])
def test_ensemble_probe_fixes_the_share(ensemble_probe: Any, share: float) -> None:
    first, labels = draw_logits(60, margin=2.0)
    config = TrainConfig(finetuning=FinetuneConfig(ensemble_probe=ensemble_probe))
    assert _choose_share(first, first, labels, np.full(3, 1 / 3), config)[0] == share


def test_nll_gain_is_paired_and_groups_widen_its_error() -> None:
    worse, labels = draw_logits(300, margin=1.0)
    better = worse + np.eye(3, dtype=np.float32)[labels]
    priors = np.full(3, 1 / 3)
    single = compare_nll((worse, better), labels, np.arange(300), priors, metric="accuracy", seed=0)
    assert single["nll_gain"] > 3 * single["standard_error"] > 0
    assert single["metric_gain"] > 0
    doubled = [np.concatenate([each, each]) for each in (worse, better)]
    groups = np.tile(np.arange(300), 2)
    twice = compare_nll(
        (doubled[0], doubled[1]), np.tile(labels, 2), groups, priors, metric="accuracy", seed=0
    )
    assert twice["standard_error"] == pytest.approx(single["standard_error"], rel=0.02)  # no new evidence


def test_balanced_metric_weighs_a_rare_class_like_the_others() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    worse = np.zeros((100, 2), np.float32)
    worse[np.arange(100), labels] = 1.0
    worse[90:95] = worse[90:95, ::-1]  # half of the rare class is wrong
    better = worse.copy()
    better[90:95] = better[90:95, ::-1]
    gains = [
        compare_nll((worse, better), labels, np.arange(100), np.array([0.9, 0.1]), metric=metric, seed=0)
        for metric in ("accuracy", "balanced_accuracy")
    ]
    assert gains[1]["metric_gain"] > 4 * gains[0]["metric_gain"] > 0
