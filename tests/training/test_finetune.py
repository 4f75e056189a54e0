"""Fine-tuning from the command line: its records, reproducibility, refit and learning."""

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import pixelplay
from conftest import SMALL_PX, TINY, draw_folder, draw_of_class
from contexts import PLAN
from images import encode
from pixelplay.cli.main import main
from pixelplay.config import AugmentConfig, FinetuneConfig, Imbalance
from pixelplay.inference.predictor import Predictor
from pixelplay.model.bundle import read_bundle, write_bundle
from pixelplay.model.split_backbone import split_backbone
from pixelplay.training.cpu_parallel import _ShardedForward
from pixelplay.training.finetune import REFIT_LR_FRAC, Finetuned, _refit_trainer
from pixelplay.training.plan_file import read_plan
from pixelplay.training.time_budget import MAX_EPOCHS, MIN_EPOCHS
from tables import read_json, read_rows
from trainers import make_task

RECORDS = {"config.json", "environment.json", "plan.json", "split.json", "metrics.json", "model"}
RECORDS |= {"history.csv", "val.csv", "predictions.csv", "label_issues.csv"}
METRICS = ["loss", "accuracy", "balanced_accuracy", "macro_f1"]
VAL = ["--val-frac", "0.15"]
KINDS = {
    "partial": ["--finetune", "partial", *VAL],
    "full": ["--finetune", "full", *VAL],
    "mlp": ["--finetune", "partial", "--head", "mlp", "--dropout", "0.2"],
    "no_refit": ["--finetune", "partial", "--refit-epochs", "0", *VAL],
}

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def tiny(small_settings: list[str]) -> list[str]:
    return [*small_settings, "--quiet"]


@pytest.fixture
def train(drawn_images: Path, tiny: list[str], tmp_path: Path) -> Train:
    """Train on the drawn images, or others, into a folder with a name."""

    def run(name: str, *argv: object, data: Path = drawn_images) -> Path:
        argv = argv if "--val-frac" in argv else (*argv, *VAL)
        assert main(["train", str(data), "--out", str(tmp_path / name), *tiny, *map(str, argv)]) == 0
        return tmp_path / name

    return run


@pytest.fixture(scope="module", params=KINDS)
def finetuned(
    request: pytest.FixtureRequest,
    drawn_images: Path,
    tiny: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Read-only: a run of each kind with two epochs; its folder is named after the kind."""
    run = tmp_path_factory.mktemp("finetuned") / str(request.param)
    command = ["train", str(drawn_images), "--out", str(run), *tiny, *KINDS[request.param]]
    assert main([*command, "--epochs", "2", "--train-batch-size", "8"]) == 0
    return run


def _model(run: Path) -> dict[str, bytes]:
    """Read the files of the bundle, without the model card."""
    return {path.name: path.read_bytes() for path in (run / "model").iterdir() if path.suffix != ".md"}


def _is_finetuned(run: Path) -> bool:
    """Whether any epoch was better than the start, so that the model is fine-tuned."""
    best: int = read_json(run / "metrics.json")["chosen"]["epoch"]["value"]
    return best > 0


def _is_refitted(run: Path) -> bool:
    """Whether the model was refitted on train and val."""
    epochs: int = read_json(run / "metrics.json")["chosen"]["refit_epochs"]["value"]
    return epochs > 0


def test_refit_trains_on_val_once_an_epoch_is_selected(finetuned: Path) -> None:
    assert _is_refitted(finetuned) == (_is_finetuned(finetuned) and finetuned.name != "no_refit")


# --- records ---


def test_run_dir_has_the_records_and_nothing_else(finetuned: Path) -> None:
    assert {path.name for path in finetuned.iterdir()} == RECORDS
    assert {path.name for path in finetuned.parent.iterdir()} == {finetuned.name}


def test_plan_records_what_was_done(finetuned: Path) -> None:
    plan = read_plan(str(finetuned / "plan.json"))
    assert plan.finetune == ("full" if finetuned.name == "full" else "partial")
    assert (plan.epochs, plan.batch_size) == (2, 8)
    assert (plan.cached_views, plan.unfreeze_stages) == ((None, None) if plan.finetune == "full" else (1, 3))
    assert plan.seconds == {}  # epochs are set, so nothing was measured


def test_history_has_the_metrics_of_each_epoch(finetuned: Path) -> None:
    rows = read_rows(finetuned / "history.csv")
    train, val = ([f"{split}_{name}" for name in METRICS] for split in ("train", "val"))
    assert list(rows[0]) == [
        "epoch",
        "step",
        "lr",
        *train,
        *val,
        "val_selection_loss",
        "img_per_s",
        "seconds",
    ]
    # 32 training images, then a refit on 38
    steps = [("0", "0"), ("1", "4"), ("2", "8")] + [("3", "13"), ("4", "18")] * _is_refitted(finetuned)
    assert [(row["epoch"], row["step"]) for row in rows] == steps
    # before the first epoch there is a training loss only; there are no validation metrics in the refit
    assert [name for name in train if rows[0][name]] == ["train_loss"]
    assert {row[name] for row in rows[3:] for name in val} <= {""}
    rows = rows[:3]
    values = [{name: float(value) for name, value in row.items() if value} for row in rows]
    assert all(np.isfinite(list(row.values())).all() for row in values)
    assert all(0 <= row[name] <= 1 for row in values for name in val[1:])
    assert all(0 <= row[name] <= 1 for row in values[1:] for name in train[1:])
    assert [row["lr"] > 0 for row in values] == [False, True, True]
    assert all(row["img_per_s"] * row["seconds"] == pytest.approx(32, rel=0.01) for row in values[1:])


def test_every_metric_records_what_selected_and_what_measured(finetuned: Path) -> None:
    metrics = read_json(finetuned / "metrics.json")
    assert metrics["finetune"] == ("full" if finetuned.name == "full" else "partial")
    by = {name: (metrics[name]["chosen_on"], metrics[name]["measured_on"]) for name in ("test", "val")}
    assert by == {"test": ("val", "test"), "val": ("val", "val")}
    assert (metrics["headline"]["chosen_on"], metrics["headline"]["measured_on"]) == ("val", "test")
    trained_on = "train+val" if _is_refitted(finetuned) else "train"
    assert (metrics["baseline"]["chosen_on"], metrics["baseline"]["measured_on"]) == (trained_on, "test")
    assert metrics["val_is_before_refit"] == _is_refitted(finetuned)
    assert "oof" not in metrics
    split = read_json(finetuned / "split.json")
    sizes = {part: len(split[part]) for part in ("train", "val", "test")}
    assert (metrics["val"]["n"], metrics["test"]["n"]) == (sizes["val"], sizes["test"])
    assert sum(metrics["train_counts"].values()) == sizes["train"] + sizes["val"] * _is_refitted(finetuned)
    chosen = metrics["chosen"]
    assert {name: value["chosen_on"] for name, value in chosen.items()} == {
        "finetune": None,  # set by the user
        "epoch": "val",
        "ensemble_probe": None if finetuned.name == "mlp" else "val",  # only linear heads are averaged
        "refit_epochs": None,
        "imbalance": None,  # set by the user, or balanced
        "temperature": "val",
        "tau": "val",
    }
    assert chosen["imbalance"]["value"] == "none"
    by_val = [value["n"] for value in chosen.values() if value["chosen_on"] == "val" and "n" in value]
    assert by_val
    assert set(by_val) == {sizes["val"]}
    assert {"probe_accuracy", "finetuned_accuracy", "probe_loss", "finetuned_loss"} <= set(chosen["finetune"])


def test_selected_epoch_has_the_best_validation_score(finetuned: Path) -> None:
    scores = [
        float(row["val_selection_loss"])
        for row in read_rows(finetuned / "history.csv")
        if row["val_selection_loss"]
    ]
    assert read_json(finetuned / "metrics.json")["chosen"]["epoch"]["value"] == int(np.argmin(scores))


def test_each_epoch_is_logged_with_a_star_at_the_best_loss(
    drawn_images: Path, tiny_settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", drawn_images, "--out", tmp_path / "run", *tiny_settings, "--finetune", "partial", *VAL]
    assert main([*map(str, argv), "--epochs", "4", "--refit-epochs", "0"]) == 0
    rows = read_rows(tmp_path / "run/history.csv")
    scores, losses = ([float(row[name]) for row in rows] for name in ("val_selection_loss", "val_loss"))
    expected = [
        (str(epoch), f"{losses[epoch]:.3f}", scores[epoch] < min(scores[:epoch]))
        for epoch in range(1, len(scores))
    ]
    shown = capsys.readouterr().err
    assert re.findall(r"^ *epoch 0/4 .*val loss (\S+)", shown, re.M) == [f"{losses[0]:.3f}"]
    lines = re.findall(r"^ *epoch ([1-9])/4 .*train loss .*val loss (\S+) .*val acc \S+(.*★)?$", shown, re.M)
    assert [(epoch, loss, bool(star)) for epoch, loss, star in lines] == expected
    assert len(expected) == 4


def test_tables_of_val_and_test_have_a_row_per_image(finetuned: Path) -> None:
    split = read_json(finetuned / "split.json")
    for name, part in (("val.csv", "val"), ("predictions.csv", "test")):
        rows = read_rows(finetuned / name)
        assert [row["path"] for row in rows] == split[part]
        assert [row["label"] for row in rows] == [path.split("/")[0] for path in split[part]]
    parts = [set(split[part]) for part in ("train", "val", "test")]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_predict_repeats_the_predictions_of_the_run(
    finetuned: Path, drawn_images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.csv"
    assert main(["predict", str(finetuned), str(drawn_images), "--out", str(out), "--quiet"]) == 0
    found = {Path(row["path"]).relative_to(drawn_images).as_posix(): row for row in read_rows(out)}
    # val.csv has the predictions before the refit
    for name in ["predictions.csv"] + ["val.csv"] * (not _is_refitted(finetuned)):
        for row in read_rows(finetuned / name):
            columns = [column for column in row if column not in ("path", "label")]
            assert [found[row["path"]][c] for c in columns] == [row[c] for c in columns]


def test_bundle_of_a_fine_tuned_network_is_read_as_written(
    finetuned: Path, drawn_images: Path, tmp_path: Path
) -> None:
    bundle = read_bundle(str(finetuned))
    assert (bundle.head.hidden_weight is not None) == (finetuned.name == "mlp")
    write_bundle(bundle, str(tmp_path / "model"))
    assert _model(tmp_path) == _model(finetuned)
    images = sorted(drawn_images.rglob("*.*"))[::7]
    np.testing.assert_array_equal(
        Predictor(tmp_path).predict(images).probs, Predictor(finetuned).predict(images).probs
    )


def test_only_unfrozen_stages_have_changed(finetuned: Path, tiny_weights: Path) -> None:
    before = load_file(tiny_weights)
    after = load_file(finetuned / "model/backbone.safetensors")
    if (
        finetuned / "model/finetuned.00.safetensors"
    ).exists():  # averaged with the linear probe on the frozen network
        assert all(np.array_equal(before[name], after[name]) for name in before)
        after |= load_file(finetuned / "model/finetuned.00.safetensors")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    first = {name for name in before if name.startswith(("stem.", "stages.0."))}
    # nothing changes where no epoch was better than the start
    assert bool(changed) == _is_finetuned(finetuned)
    assert not changed or (not changed & first) == (finetuned.name != "full")


@pytest.mark.parametrize("ensemble_probe", ["off", "on"])
def test_ensemble_probe_averages_with_the_linear_probe(ensemble_probe: str, train: Train) -> None:
    options = ["--finetune", "partial", "--epochs", "1", "--cached-views", "1", "--unfreeze-stages", "1"]
    run = train("run", *options, "--lr", "0.0002", "--ensemble-probe", ensemble_probe)
    assert read_json(run / "metrics.json")["chosen"]["ensemble_probe"]["value"] is (ensemble_probe == "on")
    assert (run / "model/finetuned.00.safetensors").exists() == (ensemble_probe == "on")


@pytest.mark.parametrize("method", ["none", "partial", "full"])
def test_input_size_is_used_and_kept_in_the_bundle(
    method: str, drawn_images: Path, train: Train, tiny: list[str], tmp_path: Path
) -> None:
    options = [] if method == "none" else ["--epochs", "1"]
    options += ["--cached-views", "1"] if method == "partial" else []
    run = train("run", "--finetune", method, *options)
    assert read_bundle(str(run)).preprocessing.input_size == (SMALL_PX, SMALL_PX)
    other, at = tmp_path / "other", tiny.index("--input-size")
    native = ["--finetune", method, *options, *tiny[:at], *tiny[at + 2 :]]
    assert main(["train", str(drawn_images), "--out", str(other), *native]) == 0
    assert read_bundle(str(other)).preprocessing.input_size == (160, 160)
    assert (run / "predictions.csv").read_bytes() != (other / "predictions.csv").read_bytes()
    rows = read_rows(run / "predictions.csv")
    images = [drawn_images / row["path"] for row in rows]
    assert [f"{p:.6f}" for p in Predictor(run).predict(images).probs[:, 0]] == [
        row["prob_bars"] for row in rows
    ]


# --- splits ---


@pytest.mark.parametrize("seed", [0, 1])
def test_groups_and_duplicates_stay_in_one_split(seed: int, drawn_classes: Path, train: Train) -> None:
    for path in drawn_classes.glob("*/*"):  # bursts of three
        path.rename(path.with_name(f"{int(path.stem) // 3}_{path.name}"))
    for i in range(3):  # three bursts have a copy of an image of another
        shutil.copy(drawn_classes / "bars/1_003.png", drawn_classes / f"bars/2{i}_copy.png")
    run = train(
        "run", "--finetune", "partial", "--epochs", "1", "--cached-views", "1",
        "--group-regex", r"[^/]+/\d+_", "--val-frac", "0.4", "--seed", seed, data=drawn_classes,
    )  # fmt: skip
    split = read_json(run / "split.json")
    split_of = {path: name for name in ("train", "val", "test") for path in split[name]}
    assert len(split_of) == len(list(drawn_classes.glob("*/*")))
    assert set(split_of.values()) == {"train", "val", "test"}
    bursts: dict[str, set[str]] = {}
    for path, name in split_of.items():
        bursts.setdefault(path.split("_")[0], set()).add(name)
    assert all(len(names) == 1 for names in bursts.values())
    assert len({split_of[f"bars/2{i}_copy.png"] for i in range(3)} | bursts["bars/1"]) == 1


def test_duplicates_of_predefined_val_images_wait_for_the_refit(train: Train, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    seed = 0
    for part, n in (("train", 8), ("val", 4), ("test", 2)):
        for name in ("bars", "dots"):
            (photos / part / name).mkdir(parents=True)
            for i in range(n):
                seed += 1
                (photos / part / name / f"{i}.jpg").write_bytes(encode(draw_of_class(name, seed), "JPEG"))
    for i in range(3):
        shutil.copy(photos / f"val/bars/{i}.jpg", photos / f"train/bars/copy{i}.jpg")
    run = train("run", "--finetune", "partial", "--epochs", "1", "--cached-views", "1", data=photos)
    notes = read_json(run / "metrics.json")["notes"]
    assert any(note.startswith("3 training images ") and "duplicates" in note for note in notes)
    steps = [row["step"] for row in read_rows(run / "history.csv")]
    assert steps[1] == "1"  # 16 images without the copies fill one step
    assert len(read_json(run / "split.json")["train"]) == 19


# --- reproducibility ---


@pytest.mark.usefixtures("four_threads")
def test_shards_of_batches_are_reproducible(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--finetune", "partial", "--epochs", "2", "--train-batch-size", "16", "--precision", "bf16"]
    n_sharded = 0

    def count(self: _ShardedForward, maps: Any, stats: Any) -> Any:
        nonlocal n_sharded
        n_sharded += 1
        return call(self, maps, stats)

    call = _ShardedForward.__call__
    monkeypatch.setattr(_ShardedForward, "__call__", count)
    first, again = train("a", *options), train("b", *options, "--num-workers", "1")
    assert n_sharded > 0
    assert _model(again) == _model(first)
    assert (again / "val.csv").read_bytes() == (first / "val.csv").read_bytes()
    assert _is_finetuned(first)


def test_same_seed_makes_the_same_model(train: Train, tmp_path: Path) -> None:
    options = [
        *("--finetune", "full", "--head-init", "random", "--epochs", "2", "--train-batch-size", "8"),
        *("--head-lr", "0.005", "--dropout", "0.2"),
        *("--drop-path", "0.1", "--augment", "crop", "rotation", "erasing", "cutmix"),
    ]
    first = train("a", *options, "--seed", "7")
    # workers, cache, and --resume without anything to resume change nothing
    again = train(
        "b", *options, "--seed", "7", "--num-workers", "1", "--resume", "--cache-dir", tmp_path / "cache"
    )
    assert _model(again) == _model(first)
    for name in ("split.json", "metrics.json", "val.csv", "predictions.csv", "plan.json"):
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    assert _is_finetuned(first)


def test_cached_views_without_a_cache_make_the_same_model(train: Train) -> None:
    options = ["--finetune", "partial", "--epochs", "2", "--cached-views", "2", "--head-init", "random"]
    cached = train("cached", *options)
    uncached = train("uncached", *options, "--cache-gb", "0")
    assert _model(uncached) == _model(cached)
    assert _is_finetuned(cached)
    assert {path.name for path in uncached.iterdir()} == RECORDS


def test_cached_views_in_an_unwritable_cache_go_to_the_run_with_a_note(train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = ["--finetune", "partial", "--epochs", "1", "--cached-views", "1"]
    cached = train("cached", *options)
    uncached = train("uncached", *options, "--cache-dir", tmp_path / "file")
    assert _model(uncached) == _model(cached)
    notes = read_json(uncached / "metrics.json")["notes"]
    assert any(note.startswith("could not cache views: ") for note in notes)


def test_repeated_plan_ignores_the_time_budget(train: Train) -> None:
    options = ["--finetune", "partial", "--seed", "3", "--head-init", "random", "--ensemble-probe", "off"]
    first = train("first", *options, "--epochs", "2", "--cached-views", "3", "--unfreeze-stages", "1")
    repeat = ["again", *options, "--plan", first / "plan.json", "--time-budget", "0.1s"]
    again = train(*repeat)
    assert _model(again) == _model(first)
    assert _is_finetuned(first)
    assert (again / "plan.json").read_bytes() == (first / "plan.json").read_bytes()
    weights = (again / "model/backbone.safetensors").stat()
    train(*repeat, "--resume")  # it is finished
    assert (again / "model/backbone.safetensors").stat() == weights
    assert len(read_rows(again / "history.csv")) == 3 + 2


def test_time_budget_becomes_a_plan_that_is_followed(train: Train, tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "few", {"bars": 6, "dots": 6})
    options = ["--time-budget", "60s", "--unfreeze-stages", "1", "--cached-views", "1"]
    run = train("run", "--finetune", "partial", *options, data=images)
    plan = read_plan(str(run / "plan.json"))
    assert MIN_EPOCHS <= plan.epochs <= MAX_EPOCHS
    assert 0 < sum(plan.seconds.values()) < 60
    assert plan.seconds["training"] > 0
    assert len(read_rows(run / "history.csv")) == 1 + plan.epochs + 2


def test_random_state_of_the_caller_is_unchanged(
    drawn_images: Path, tiny_probe: pixelplay.TrainConfig, tmp_path: Path
) -> None:
    import torch

    def states() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = states()
    config = replace(
        tiny_probe,
        finetune="partial",
        finetuning=FinetuneConfig(epochs=1, head="mlp", dropout=0.5, drop_path=0.5),
        augmenting=AugmentConfig(augment=("crop", "mixup")),
    )
    for method in ("partial", "full"):
        pixelplay.train(drawn_images, tmp_path / method, replace(config, finetune=method))
    assert states() == before


# --- learning ---


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight common images for each rare one; half of the rare ones look like the common ones."""
    root, seed = tmp_path_factory.mktemp("rare"), 0
    for part, n_rare in (("train", 8), ("val", 3), ("test", 2)):
        for name, n, n_dots in (("common", 8 * n_rare, n_rare), ("rare", n_rare, -(-n_rare // 2))):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                seed += 1
                picture = draw_of_class("dots" if i < n_dots else "bars", seed)
                (root / part / name / f"{i:02}.jpg").write_bytes(encode(picture, "JPEG"))
    return root


@pytest.mark.parametrize("imbalance", get_args(Imbalance))
def test_imbalance_methods_predict_with_natural_priors(imbalance: str, rare: Path, train: Train) -> None:
    is_corrected = imbalance in ("sampler", "class_weights", "balanced_softmax", "logit_adjusted")
    run = train(
        "run", "--finetune", "partial", "--unfreeze-stages", "1", "--cached-views", "1", "--epochs", "3",
        "--train-batch-size", "8", "--head-lr", "0.002", "--lr", "0.00001", "--imbalance", imbalance,
        # a random head shows best how its logits are corrected
        *(["--head-init", "random", "--ensemble-probe", "off"] if is_corrected else []), data=rare,
    )  # fmt: skip
    # where no epoch is better than the linear probe, that is kept
    held_out = "val.csv" if (run / "val.csv").exists() else "oof.csv"
    rows = [row for name in (held_out, "predictions.csv") for row in read_rows(run / name)]
    mean = np.mean([float(row["prob_rare"]) for row in rows])
    assert 0.05 < mean < 0.2  # 1/9 of them are rare; with balanced priors it would be half
    losses = [float(row["val_loss"]) for row in read_rows(run / "history.csv") if row["val_loss"]]
    if is_corrected:  # every prediction equals the natural priors
        assert losses[0] == pytest.approx(-(8 * np.log(8 / 9) + np.log(1 / 9)) / 9, rel=1e-4)
    assert losses[-1] < 0.5  # uniform predictions would cost log 2
    assert read_json(run / "metrics.json")["chosen"]["imbalance"]["requested"] == imbalance


def test_oversampling_uses_the_sampler_where_weights_helped_the_probe(rare: Path, train: Train) -> None:
    run = train(
        "run", "--finetune", "partial", "--unfreeze-stages", "1", "--cached-views", "2", "--epochs", "1",
        "--oversample-to", "largest", "--metric", "balanced_accuracy", data=rare,
    )  # fmt: skip
    assert read_json(run / "metrics.json")["chosen"]["imbalance"]["requested"] == "auto"
    assert read_rows(run / "history.csv")[1]["step"] == "4"  # 64 images of each class, 32 per step


def test_thirty_steps_overfit_eight_images(train: Train, tmp_path: Path) -> None:
    """The classes look alike, so only memorised images are recognised."""
    seed = 0
    for part, n in (("train", 4), ("val", 1), ("test", 1)):
        for name in "ab":
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for i in range(n):
                seed += 1
                picture = encode(draw_of_class("dots", seed), "JPEG")
                (tmp_path / "photos" / part / name / f"{i}.jpg").write_bytes(picture)
    run = train(
        "run", "--finetune", "partial", "--head-init", "random", "--epochs", "30", "--train-batch-size", "8",
        "--unfreeze-stages", "1", "--cached-views", "1", "--refit-epochs", "0",
        "--lr", "2e-3", "--warmup-frac", "0.1", "--augment", data=tmp_path / "photos",
    )  # fmt: skip
    rows = read_rows(run / "history.csv")[1:]
    assert rows[-1]["step"] == "30"
    assert float(rows[0]["train_loss"]) == pytest.approx(np.log(2), abs=1e-4)  # the head starts at zero
    assert [float(row["train_accuracy"]) for row in (rows[0], rows[-1])] == [0.5, 1.0]
    assert float(rows[-1]["train_loss"]) < 0.25


def test_refit_averages_the_weights_before_and_after_it(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(name: str, refit_epochs: int) -> dict[str, NDArray[np.float32]]:
        method = [
            "--finetune",
            "partial",
            "--unfreeze-stages",
            "1",
            "--epochs",
            "2",
            "--train-batch-size",
            "8",
        ]
        run = train(name, *method, "--ensemble-probe", "off", "--refit-epochs", refit_epochs)
        backbone, head = (load_file(run / f"model/{part}.safetensors") for part in ("backbone", "head"))
        return backbone | {f"head.{key}": value for key, value in head.items()}

    before, averaged = weights("before", 0), weights("averaged", 2)
    monkeypatch.setattr("pixelplay.training.finetune.halfway", lambda before, after: after)
    after = weights("after", 2)
    changed = [key for key, value in after.items() if not np.array_equal(value, before[key])]
    assert {"head.weight", "head.bias"} < set(changed)
    for key in changed:
        # the natural-prior offset of the bias is averaged as well
        atol = 0.01 if key == "head.bias" else 1e-6
        np.testing.assert_allclose(averaged[key], (before[key] + after[key]) / 2, atol=atol)


def test_grad_accum_steps_halve_the_optimizer_steps(train: Train) -> None:
    run = train(
        "run", "--finetune", "full", "--epochs", "2", "--initial-size-frac", "0.4", "--train-batch-size", "8",
        "--grad-accum-steps", "2", "--refit-epochs", "0", "--time-budget", "9h",
    )  # fmt: skip
    notes = read_json(run / "metrics.json")["notes"]
    assert any("--time-budget is ignored" in note for note in notes)
    assert [row["step"] for row in read_rows(run / "history.csv")] == ["0", "2", "4"]
    assert read_json(run / "config.json")["finetuning"]["initial_size_frac"] == 0.4


def test_refit_is_short_slow_and_without_mixup(tmp_path: Path, tiny_weights: Path) -> None:
    config = pixelplay.TrainConfig(
        finetune="partial",
        imbalance="none",
        augmenting=AugmentConfig(augment=("crop", "mixup"), mix_prob=1.0),
        finetuning=FinetuneConfig(initial_size_frac=0.5, patience=1),
    )
    task = make_task(config, tmp_path, tiny_weights)
    pretrained, schedule = task.ctx.backbone, task.schedule(PLAN)
    assert schedule.config.augmenting.mix_prob == 1.0
    frozen, trainable = split_backbone(pretrained.backbone, 1, pretrained.preprocessing.input_size)
    finetuned = Finetuned(
        backbone=pretrained.backbone,
        head=task.probe.head,
        logits=np.zeros((12, 2), np.float32),
        history=[],
        best_epoch=1,
        ensemble_probe=False,
        plan=PLAN,
        classifier=task.classifier(frozen, trainable),
        inputs=task.pixels,
        schedule=schedule,
        validation=task.validation(),
    )
    trainer = _refit_trainer(task, finetuned, 2)
    found, settings = trainer.schedule, trainer.schedule.config.finetuning
    assert (found.epochs, found.epochs_before, len(found.rows)) == (2, PLAN.epochs, 27)
    assert len(trainer.validation.rows) == 0
    assert found.config.augmenting.mix_prob == 0.0
    assert (settings.initial_size_frac, settings.patience) == (1.0, None)
    top_lr, _ = settings.rates(full=False)
    lrs = [group["peak_lr"] for group in trainer.state.optimizer.param_groups]
    assert max(lrs) == pytest.approx(REFIT_LR_FRAC * top_lr * (found.images_per_step / 32) ** 0.5)
    assert trainer.ctx.checkpoint_dir != task.ctx.checkpoint_dir


# --- recipes ---


def test_recipe_pixelplay25_changes_backbone_and_settings(train: Train) -> None:
    run = train("run", "--recipe", "pixelplay25", "--epochs", "1", "--patience", "None")
    config = read_json(run / "config.json")
    assert (config["backbone"], config["finetune"], config["oversample_to"]) == (TINY, "full", "largest")
    finetuning = config["finetuning"]
    assert (finetuning["epochs"], finetuning["head"], finetuning["dropout"]) == (1, "mlp", 0.6)
    assert (finetuning["clip_grad_norm"], finetuning["label_smoothing"]) == (None, 0.1)
    assert finetuning["hard_example_frac"] == 0.0  # off
    assert finetuning["patience"] is None  # a recipe can be overridden
    assert read_bundle(str(run)).head.hidden_weight is not None
    assert read_bundle(str(run)).backbone.features == "pooled"


def test_recipe_shows_its_defaults_in_help(capsys: pytest.CaptureFixture[str]) -> None:
    def defaults(*argv: str) -> dict[str, str]:
        assert main(["train", *argv, "--help-all"]) == 0
        shown = re.sub(r"[^\S\n]*│[^\S\n]*|\s+", " ", capsys.readouterr().out)
        found: dict[str, str] = {}
        for entry in re.split(r" (?=--[a-z])", shown):
            matched = re.match(r"--(\S+).* \[([^\]]*)\]", entry)
            if matched:
                found.setdefault(matched[1], matched[2])  # later ones only mention the flag
        return found

    ours, theirs = defaults(), defaults("--recipe", "pixelplay25")
    names = ("finetune", "backbone", "imbalance", "lr", "dropout", "label-smoothing", "crop-scale")
    assert [ours[name] for name in names] == ["auto", "auto", "auto", "1e-3; full: 2e-4", "0.0", "0.0", "0.7"]
    assert [theirs[name] for name in names] == [
        "full", "convnext_tiny.in12k_ft_in1k", "sampler", "0.0001", "0.6", "0.1", "0.5"
    ]  # fmt: skip
    assert (theirs["epochs"], theirs["patience"]) == ("30", "3")
    assert (ours["epochs"], ours["patience"]) == ("as many as it allows", "off")
