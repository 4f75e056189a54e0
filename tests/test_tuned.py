"""Tuned runs from the command line: what they record, that they repeat, and that they learn."""

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
from pixelplay.training.plan import MAX_EPOCHS, MIN_EPOCHS, read_plan
from safetensors.numpy import load_file

import pixelplay
from conftest import TINY, draw_folder, draw_of_class
from images import encode
from pixelplay.cli.main import main
from pixelplay.config import AugmentConfig, FinetuneConfig, Imbalance
from pixelplay.inference.predictor import Predictor
from pixelplay.model.bundle import read_bundle, write_bundle
from pixelplay.training.cpu_parallel import _Shared
from tables import read_json, read_rows

RECORDS = {"config.json", "plan.json", "split.json", "metrics.json", "model"}
RECORDS |= {"history.csv", "val.csv", "predictions.csv", "label_issues.csv"}
FIGURES = ["loss", "accuracy", "balanced_accuracy", "macro_f1"]
KINDS = {
    "partial": ["--finetune", "partial"],
    "full": ["--finetune", "full"],
    "mlp": ["--finetune", "partial", "--head", "mlp", "--dropout", "0.2"],
    "crt": ["--finetune", "partial", "--imbalance", "crt", "--refit-epochs", "0"],
}

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def tiny(tiny_settings: list[str]) -> list[str]:
    return [
        *tiny_settings,
        "--quiet",
    ]


@pytest.fixture
def train(drawn_images: Path, tiny: list[str], tmp_path: Path) -> Train:
    """Train on the drawn images, or others, into a folder of that name."""

    def run(name: str, *argv: object, data: Path = drawn_images) -> Path:
        assert main(["train", str(data), "--out", str(tmp_path / name), *tiny, *map(str, argv)]) == 0
        return tmp_path / name

    return run


@pytest.fixture(scope="module", params=KINDS)
def tuned(
    request: pytest.FixtureRequest,
    drawn_images: Path,
    tiny: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Read-only: a run of each kind, two epochs long; its folder has the name of the kind."""
    run = tmp_path_factory.mktemp("tuned") / str(request.param)
    command = ["train", str(drawn_images), "--out", str(run), *tiny, *KINDS[request.param]]
    assert main([*command, "--epochs", "2", "--train-batch-size", "8"]) == 0
    return run


def _model(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "model").iterdir()}


def _is_tuned(run: Path) -> bool:
    """Whether any epoch was better than the start, so that the model shows what was learned."""
    best: int = read_json(run / "metrics.json")["chosen"]["epoch"]["value"]
    return best > 0


def _is_refitted(run: Path) -> bool:
    """Whether the validation images were learned from in the end."""
    epochs: int = read_json(run / "metrics.json")["chosen"]["refit_epochs"]["value"]
    return epochs > 0


def test_validation_photographs_are_learned_from_once_they_have_chosen(tuned: Path) -> None:
    assert _is_refitted(tuned) == (_is_tuned(tuned) and tuned.name != "crt")


# --- what a run records ---


def test_a_tuned_run_holds_its_records_and_nothing_else(tuned: Path) -> None:
    assert {path.name for path in tuned.iterdir()} == RECORDS
    assert {path.name for path in tuned.parent.iterdir()} == {tuned.name}


def test_the_plan_says_what_was_done(tuned: Path) -> None:
    plan = read_plan(str(tuned / "plan.json"))
    assert plan.finetune == ("full" if tuned.name == "full" else "partial")
    assert (plan.epochs, plan.batch_size, plan.compile) == (2, 8, False)
    assert (plan.cached_views, plan.unfreeze_stages) == ((None, None) if plan.finetune == "full" else (1, 3))
    assert plan.seconds == {}  # epochs were asked for, so nothing was measured


def test_the_history_has_each_epochs_figures(tuned: Path) -> None:
    rows = read_rows(tuned / "history.csv")
    train, val = ([f"{part}_{name}" for name in FIGURES] for part in ("train", "val"))
    assert list(rows[0]) == ["epoch", "step", "lr", *train, *val, "val_score", "img_per_s", "seconds"]
    # 32 images are learned from, then 38 in twice
    steps = [("0", "0"), ("1", "4"), ("2", "8")] + [("3", "13"), ("4", "18")] * _is_refitted(tuned)
    assert [(row["epoch"], row["step"]) for row in rows] == steps
    # before the first epoch nothing was learned from, in the last ones nothing is held out
    assert {rows[0][name] for name in train} == {""}
    assert {row[name] for row in rows[3:] for name in val} <= {""}
    rows = rows[:3]
    values = [{name: float(value) for name, value in row.items() if value} for row in rows]
    assert all(np.isfinite(list(row.values())).all() for row in values)
    assert all(0 <= row[name] <= 1 for row in values for name in val[1:])
    assert all(0 <= row[name] <= 1 for row in values[1:] for name in train[1:])
    assert [row["lr"] > 0 for row in values] == [False, True, True]
    assert all(row["img_per_s"] * row["seconds"] == pytest.approx(32, rel=0.01) for row in values[1:])


def test_every_figure_says_who_chose_and_who_measured(tuned: Path) -> None:
    metrics = read_json(tuned / "metrics.json")
    assert metrics["finetune"] == ("full" if tuned.name == "full" else "partial")
    by = {name: (metrics[name]["chosen_on"], metrics[name]["measured_on"]) for name in ("test", "val")}
    assert by == {"test": ("val", "test"), "val": ("val", "val")}
    assert (metrics["headline"]["chosen_on"], metrics["headline"]["measured_on"]) == ("val", "test")
    learned = "train+val" if _is_refitted(tuned) else "train"
    assert (metrics["baseline"]["chosen_on"], metrics["baseline"]["measured_on"]) == (learned, "test")
    assert metrics["val_is_before_refit"] == _is_refitted(tuned)
    assert "oof" not in metrics
    split = read_json(tuned / "split.json")
    sizes = {part: len(split[part]) for part in ("train", "val", "test")}
    assert (metrics["val"]["n"], metrics["test"]["n"]) == (sizes["val"], sizes["test"])
    assert sum(metrics["train_counts"].values()) == sizes["train"] + sizes["val"] * _is_refitted(tuned)
    chosen = metrics["chosen"]
    assert {name: value["chosen_on"] for name, value in chosen.items()} == {
        "finetune": None,  # asked for
        "epoch": "val",
        "ensemble_probe": None if tuned.name == "mlp" else "val",  # only linear heads answer together
        "refit_epochs": None,
        "imbalance": None,  # asked for, or classes are even enough
        "temperature": "val",
        "tau": "val",
    }
    assert chosen["imbalance"]["value"] == ("crt" if tuned.name == "crt" else "none")
    by_val = [value["n"] for value in chosen.values() if value["chosen_on"] == "val" and "n" in value]
    assert by_val
    assert set(by_val) == {sizes["val"]}
    assert {"probe_accuracy", "tuned_accuracy", "probe_score", "tuned_score"} <= set(chosen["finetune"])


def test_the_epoch_that_was_best_on_val_is_the_chosen_one(tuned: Path) -> None:
    scores = [float(row["val_score"]) for row in read_rows(tuned / "history.csv") if row["val_score"]]
    assert read_json(tuned / "metrics.json")["chosen"]["epoch"]["value"] == int(np.argmin(scores))


def test_each_epoch_is_told_with_the_score_that_chooses(
    drawn_images: Path, tiny_settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", drawn_images, "--out", tmp_path / "run", *tiny_settings, "--finetune", "partial"]
    assert main([*map(str, argv), "--epochs", "4", "--refit-epochs", "0"]) == 0
    scores = [float(row["val_score"]) for row in read_rows(tmp_path / "run/history.csv")]
    expected = [
        (str(epoch), f"{scores[epoch]:.3f}", scores[epoch] < min(scores[:epoch]))
        for epoch in range(1, len(scores))
    ]
    said = capsys.readouterr().err
    assert re.findall(r"^before the first epoch: .*, score (\S+)$", said, re.M) == [f"{scores[0]:.3f}"]
    lines = re.findall(r"^epoch (\d) of 4: .*, score (\S+?)(, the lowest)?, lr", said, re.M)
    assert [(epoch, score, bool(lowest)) for epoch, score, lowest in lines] == expected
    assert len(expected) == 4


def test_val_and_test_have_a_row_for_each_of_their_photographs(tuned: Path) -> None:
    split = read_json(tuned / "split.json")
    for name, part in (("val.csv", "val"), ("predictions.csv", "test")):
        rows = read_rows(tuned / name)
        assert [row["path"] for row in rows] == split[part]
        assert [row["given"] for row in rows] == [path.split("/")[0] for path in split[part]]
    parts = [set(split[part]) for part in ("train", "val", "test")]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_prediction_repeats_what_the_run_measured(tuned: Path, drawn_images: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    assert main(["predict", str(tuned), str(drawn_images), "--out", str(out), "--quiet"]) == 0
    found = {Path(row["path"]).relative_to(drawn_images).as_posix(): row for row in read_rows(out)}
    # what the validation part said before it was learned from is what chose
    for name in ["predictions.csv"] + ["val.csv"] * (not _is_refitted(tuned)):
        for row in read_rows(tuned / name):
            columns = [column for column in row if column not in ("path", "given")]
            assert [found[row["path"]][c] for c in columns] == [row[c] for c in columns]


def test_a_bundle_is_read_as_it_was_written(tuned: Path, drawn_images: Path, tmp_path: Path) -> None:
    bundle = read_bundle(str(tuned))
    assert (bundle.head.hidden_weight is not None) == (tuned.name == "mlp")
    write_bundle(bundle, str(tmp_path / "model"))
    assert _model(tmp_path) == _model(tuned)
    photos = sorted(drawn_images.rglob("*.*"))[::7]
    np.testing.assert_array_equal(
        Predictor(tmp_path).predict(photos).probs, Predictor(tuned).predict(photos).probs
    )


def test_only_what_was_to_be_trained_has_moved(tuned: Path, tiny_weights: Path) -> None:
    before = load_file(tiny_weights)
    after = load_file(tuned / "model/backbone.safetensors")
    if (tuned / "model/tuned.00.safetensors").exists():  # the probe answers beside it, on the frozen network
        assert all(np.array_equal(before[name], after[name]) for name in before)
        after |= load_file(tuned / "model/tuned.00.safetensors")
    differ = {name for name in before if not np.array_equal(before[name], after[name])}
    first = {name for name in before if name.startswith(("stem.", "stages.0."))}
    # a network is not moved where no epoch was better than the start
    assert bool(differ) == _is_tuned(tuned)
    assert not differ or (not differ & first) == (tuned.name != "full")


@pytest.mark.parametrize("way", ["off", "on"])
def test_the_probe_answers_beside_the_tuned_network_where_asked(way: str, train: Train) -> None:
    options = [
        "--finetune",
        "partial",
        "--epochs",
        "1",
        "--cached-views",
        "1",
        "--unfreeze-stages",
        "1",
        "--lr",
        "0.0002",
    ]
    run = train("run", *options, "--ensemble-probe", way)
    assert read_json(run / "metrics.json")["chosen"]["ensemble_probe"]["value"] is (way == "on")
    assert (run / "model/tuned.00.safetensors").exists() == (way == "on")


@pytest.mark.parametrize("method", ["probe", "partial", "full"])
def test_the_size_that_was_asked_for_is_used_and_kept(method: str, drawn_images: Path, train: Train) -> None:
    options = {"none": [], "partial": ["--epochs", "1", "--cached-views", "1"], "full": ["--epochs", "1"]}[
        method
    ]
    run = train("run", "--finetune", method, "--input-size", "96", *options)
    assert read_bundle(str(run)).preprocessing.input_size == 96
    other = train("other", "--finetune", method, *options)
    assert (run / "predictions.csv").read_bytes() != (other / "predictions.csv").read_bytes()
    rows = read_rows(run / "predictions.csv")
    photos = [drawn_images / row["path"] for row in rows]
    assert [f"{p:.6f}" for p in Predictor(run).predict(photos).probs[:, 0]] == [
        row["prob_bars"] for row in rows
    ]


# --- parts ---


@pytest.mark.parametrize("seed", [0, 1])
def test_kin_stay_on_one_side_of_the_validation_part(seed: int, drawn_classes: Path, train: Train) -> None:
    for path in drawn_classes.glob("*/*"):  # bursts of three
        path.rename(path.with_name(f"{int(path.stem) // 3}_{path.name}"))
    for i in range(3):  # one image of a burst is in three others, too
        shutil.copy(drawn_classes / "bars/1_003.png", drawn_classes / f"bars/2{i}_copy.png")
    run = train(
        "run", "--finetune", "partial", "--epochs", "1", "--cached-views", "1", "--group-regex", r"[^/]+/\d+_",
        "--val-frac", "0.4", "--seed", seed, data=drawn_classes,
    )  # fmt: skip
    split = read_json(run / "split.json")
    side = {path: part for part in ("train", "val", "test") for path in split[part]}
    assert len(side) == len(list(drawn_classes.glob("*/*")))
    assert set(side.values()) == {"train", "val", "test"}
    bursts: dict[str, set[str]] = {}
    for path, part in side.items():
        bursts.setdefault(path.split("_")[0], set()).add(part)
    assert all(len(parts) == 1 for parts in bursts.values())
    assert len({side[f"bars/2{i}_copy.png"] for i in range(3)} | bursts["bars/1"]) == 1


def test_copies_of_given_validation_photographs_do_not_help_to_choose(train: Train, tmp_path: Path) -> None:
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
    said = "3 training images must wait until val has chosen, as copies of val images"
    assert said in read_json(run / "metrics.json")["notes"]
    plan_steps = [row["step"] for row in read_rows(run / "history.csv")]
    assert plan_steps[1] == "1"  # 16 images without the copies fill one step
    assert len(read_json(run / "split.json")["train"]) == 19


# --- the same again ---


@pytest.mark.usefixtures("four_threads")
def test_batches_that_cores_share_make_the_same_model_again(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--finetune", "partial", "--epochs", "2", "--train-batch-size", "16", "--precision", "bf16"]
    n_shared = 0

    def count(self: _Shared, maps: Any, stats: Any) -> Any:
        nonlocal n_shared
        n_shared += 1
        return call(self, maps, stats)

    call = _Shared.__call__
    monkeypatch.setattr(_Shared, "__call__", count)
    first, again = train("a", *options), train("b", *options, "--num-workers", "1")
    assert n_shared > 0
    assert _model(again) == _model(first)
    assert (again / "val.csv").read_bytes() == (first / "val.csv").read_bytes()
    assert _is_tuned(first)


def test_the_same_seed_makes_the_same_model(train: Train, tmp_path: Path) -> None:
    options = [
        *("--finetune", "full", "--head-init", "random", "--epochs", "2", "--train-batch-size", "8"),
        *("--head-lr", "0.005", "--dropout", "0.2"),
        *("--drop-path", "0.1", "--augment", "crop", "rotation", "trivial_augment", "erasing", "cutmix"),
    ]
    first = train("a", *options, "--seed", "7")
    # neither workers nor the cache, nor --resume where there is nothing to resume
    again = train(
        "b", *options, "--seed", "7", "--num-workers", "1", "--resume", "--cache-dir", tmp_path / "cache"
    )
    assert _model(again) == _model(first)
    for name in ("split.json", "metrics.json", "val.csv", "predictions.csv", "plan.json"):
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    assert _is_tuned(first)


def test_views_beside_the_run_make_the_model_that_cached_ones_make(train: Train) -> None:
    options = ["--finetune", "partial", "--epochs", "2", "--cached-views", "2", "--head-init", "random"]
    kept = train("kept", *options)
    unkept = train("unkept", *options, "--cache-gb", "0")
    assert _model(unkept) == _model(kept)
    assert _is_tuned(kept)
    assert {path.name for path in unkept.iterdir()} == RECORDS


def test_a_cache_that_cannot_be_written_costs_a_note_only(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    options = ["--finetune", "partial", "--epochs", "1", "--cached-views", "1"]
    kept, unkept = train("kept", *options), train("unkept", *options, "--cache-dir", tmp_path / "file")
    assert _model(unkept) == _model(kept)
    notes = read_json(unkept / "metrics.json")["notes"]
    assert any(note.startswith("views cannot be kept in the cache: ") for note in notes)


def test_a_plan_is_repeated_whatever_the_clock_says(train: Train) -> None:
    options = ["--finetune", "partial", "--seed", "3", "--head-init", "random", "--ensemble-probe", "off"]
    first = train("first", *options, "--epochs", "2", "--cached-views", "3", "--unfreeze-stages", "1")
    repeat = ["again", *options, "--plan", first / "plan.json", "--time-budget", "0.1s"]
    again = train(*repeat)
    assert _model(again) == _model(first)
    assert _is_tuned(first)
    assert (again / "plan.json").read_bytes() == (first / "plan.json").read_bytes()
    weights = (again / "model/backbone.safetensors").stat()
    train(*repeat, "--resume")  # which is done
    assert (again / "model/backbone.safetensors").stat() == weights
    assert len(read_rows(again / "history.csv")) == 3 + 2


def test_a_time_budget_becomes_a_plan_that_is_carried_out(train: Train, tmp_path: Path) -> None:
    photos = draw_folder(tmp_path / "few", {"bars": 6, "dots": 6})
    options = [
        "--finetune",
        "partial",
        "--time-budget",
        "60s",
        "--unfreeze-stages",
        "1",
        "--cached-views",
        "1",
    ]
    run = train("run", *options, data=photos)
    plan = read_plan(str(run / "plan.json"))
    assert MIN_EPOCHS <= plan.epochs <= MAX_EPOCHS
    assert 0 < sum(plan.seconds.values()) < 60
    assert plan.seconds["training"] > 0
    assert len(read_rows(run / "history.csv")) == 1 + plan.epochs + 2


def test_tuning_leaves_the_users_random_numbers_alone(
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


# --- that it learns ---


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight common images to a rare one; half of the rare ones look like the common ones."""
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
def test_every_way_to_help_rare_classes_answers_with_natural_priors(
    imbalance: str, rare: Path, train: Train
) -> None:
    is_corrected = imbalance in ("sampler", "class_weights", "balanced_softmax", "logit_adjusted")
    run = train(
        "run", "--finetune", "partial", "--unfreeze-stages", "1", "--cached-views", "1", "--epochs", "3",
        "--train-batch-size", "8", "--head-lr", "0.002", "--lr", "0.00001", "--imbalance", imbalance,
        # a head that knows nothing shows best what is made of its answers
        *(["--head-init", "random", "--ensemble-probe", "off"] if is_corrected else []), data=rare,
    )  # fmt: skip
    # where no epoch is better than the probe, it is the probe that answers
    held_out = "val.csv" if (run / "val.csv").exists() else "oof.csv"
    rows = [row for name in (held_out, "predictions.csv") for row in read_rows(run / name)]
    mean = np.mean([float(row["prob_rare"]) for row in rows])
    assert 0.05 < mean < 0.2  # 1/9 of them are; of an evened-out mix half would be
    losses = [float(row["val_loss"]) for row in read_rows(run / "history.csv") if row["val_loss"]]
    if is_corrected:  # every image has the natural mix as its answer
        assert losses[0] == pytest.approx(-(8 * np.log(8 / 9) + np.log(1 / 9)) / 9, rel=1e-4)
    assert losses[-1] < 0.5  # an even answer for all of them would cost log 2
    assert read_json(run / "metrics.json")["chosen"]["imbalance"]["asked"] == imbalance


def test_raised_classes_are_drawn_evenly_where_that_helped_the_probe(rare: Path, train: Train) -> None:
    run = train(
        "run", "--finetune", "partial", "--unfreeze-stages", "1", "--cached-views", "2", "--epochs", "1",
        "--oversample-to", "largest", "--metric", "balanced_accuracy", data=rare,
    )  # fmt: skip
    assert read_json(run / "metrics.json")["chosen"]["imbalance"]["asked"] == "auto"
    assert read_rows(run / "history.csv")[1]["step"] == "4"  # 64 of each class, in steps of 32


def test_thirty_steps_learn_eight_photographs_by_heart(train: Train, tmp_path: Path) -> None:
    """The classes are alike: only the images themselves can be known."""
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
        "--unfreeze-stages", "1", "--cached-views", "1", "--refit-epochs", "0", "--augment", data=tmp_path / "photos",
    )  # fmt: skip
    rows = read_rows(run / "history.csv")[1:]
    assert rows[-1]["step"] == "30"
    assert float(rows[0]["train_loss"]) == pytest.approx(np.log(2), abs=1e-4)  # the head starts at zero
    assert [float(row["train_accuracy"]) for row in (rows[0], rows[-1])] == [0.5, 1.0]
    assert float(rows[-1]["train_loss"]) < 0.25


def test_deployed_weights_lie_halfway_between_those_before_and_after_the_last_epochs(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(name: str, refit_epochs: int) -> dict[str, NDArray[np.float32]]:
        method = (
            "--finetune",
            "partial",
            "--unfreeze-stages",
            "1",
            "--epochs",
            "2",
            "--train-batch-size",
            "8",
        )
        run = train(name, *method, "--ensemble-probe", "off", "--refit-epochs", refit_epochs)
        backbone, head = (load_file(run / f"model/{part}.safetensors") for part in ("backbone", "head"))
        return backbone | {f"head.{key}": value for key, value in head.items()}

    before, deployed = weights("before", 0), weights("deployed", 2)
    monkeypatch.setattr("pixelplay.training.finetune.halfway", lambda before, after: after)
    after = weights("after", 2)
    moved = [key for key, value in after.items() if not np.array_equal(value, before[key])]
    assert {"head.weight", "head.bias"} < set(moved)
    for key in moved:
        # the bias is made natural for both mixes of classes by half
        atol = 0.01 if key == "head.bias" else 1e-6
        np.testing.assert_allclose(deployed[key], (before[key] + after[key]) / 2, atol=atol)


def test_steps_are_of_two_batches_where_that_is_asked_for(train: Train) -> None:
    run = train(
        "run", "--finetune", "full", "--epochs", "2", "--initial-size-frac", "0.4", "--train-batch-size", "8",
        "--grad-accum-steps", "2", "--refit-epochs", "0", "--time-budget", "9h",
    )  # fmt: skip
    notes = read_json(run / "metrics.json")["notes"]
    assert "--time-budget 9h does not count, as the number of epochs is given" in notes
    assert [row["step"] for row in read_rows(run / "history.csv")] == ["0", "2", "4"]
    assert read_json(run / "config.json")["finetune"]["initial_size_frac"] == 0.4


# --- recipes ---


def test_the_original_recipe_trains_another_backbone(train: Train) -> None:
    run = train("run", "--recipe", "pixelplay25", "--epochs", "1", "--patience", "None")
    config = read_json(run / "config.json")
    assert (config["backbone"], config["finetune"], config["oversample_to"]) == (TINY, "full", "largest")
    finetuning = config["finetuning"]
    assert (finetuning["epochs"], finetuning["head"], finetuning["dropout"]) == (1, "mlp", 0.6)
    assert (finetuning["clip_grad_norm"], finetuning["label_smoothing"]) == (None, 0.1)
    assert finetuning["hard_example_frac"] == 0.0  # all images came alike
    assert finetuning["patience"] is None  # what a recipe switches on can be switched off
    assert read_bundle(str(run)).head.hidden_weight is not None
    assert read_bundle(str(run)).backbone.features == "pooled"


def test_help_shows_the_defaults_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    def defaults(*argv: str) -> dict[str, str]:
        assert main(["train", *argv, "--help"]) == 0
        shown = re.sub(r"[^\S\n]*│[^\S\n]*|\s+", " ", capsys.readouterr().out)
        found: dict[str, str] = {}
        for entry in re.split(r" (?=--[a-z])", shown):
            matched = re.match(r"--(\S+).*\(default: ([^)]*)\)", entry)
            if matched:
                found[matched[1]] = matched[2]
        return found

    ours, theirs = defaults(), defaults("--recipe", "pixelplay25")
    names = ("finetune", "backbone", "imbalance", "lr", "dropout", "label-smoothing", "crop-scale")
    assert [ours[name] for name in names] == ["auto", "auto", "auto", "2e-3; full: 2e-4", "0.0", "0.0", "0.7"]
    assert [theirs[name] for name in names] == [
        "full", "convnext_tiny.in12k_ft_in1k", "sampler", "0.0001", "0.6", "0.1", "0.5"
    ]  # fmt: skip
    assert (theirs["epochs"], theirs["patience"]) == ("30", "3")
    assert ours["epochs"] == "by time budget"
    assert ours["patience"] == "never"
