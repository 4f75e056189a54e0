"""Tests of cross-validation from the command line: folds predict images they were not trained on."""

import re
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import pixelplay
from conftest import TINY_COUNTS, draw_folder
from pixelplay.cli.main import main
from pixelplay.evaluation.calibration import fit_temperature, mean_nll, temperature_softmax
from pixelplay.inference.predictor import Predictor
from pixelplay.model.bundle import read_bundle
from tables import read_json, read_rows

N = sum(TINY_COUNTS.values())
PARTIAL = ["--finetune", "partial", "--epochs", "4", "--unfreeze-stages", "1", "--n-folds", "3"]
PARTIAL += ["--val-frac", "0.15"]
PARTIAL += ["--train-batch-size", "8", "--seed", "4"]  # fine-tuning is clearly better in every fold


@pytest.fixture(scope="module")
def tiny(small_settings: list[str]) -> list[str]:
    return [*small_settings, "--quiet"]


@pytest.fixture(scope="module")
def probe_run(drawn_images: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: five folds of linear probes, with one unreadable image and a class of one image."""
    root = tmp_path_factory.mktemp("crossval")
    photos = Path(shutil.copytree(drawn_images, root / "photos"))
    (photos / "bars/broken.jpg").write_bytes(b"")
    draw_folder(photos, {"spirals": 0})
    shutil.copy(photos / "dots/000.jpg", photos / "spirals/alone.jpg")
    (photos / "spirals/alone.jpg").write_bytes((photos / "dots/001.png").read_bytes() + b"\0")
    assert main(["crossval", str(photos), "--out", str(root / "run"), "--finetune", "none", *tiny]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def finetuned_run(drawn_images: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: three fine-tuned folds."""
    run = tmp_path_factory.mktemp("finetuned") / "run"
    assert main(["crossval", str(drawn_images), "--out", str(run), *PARTIAL, *tiny]) == 0
    return run


def _classes(run: Path) -> list[str]:
    return [name.removeprefix("prob_") for name in read_rows(run / "oof.csv")[0] if name.startswith("prob_")]


def _run_again(command: list[str], run: Path, tiny: list[str]) -> Path:
    """Run the command with another output folder."""
    again = [str(run) if arg == command[command.index("--out") + 1] else arg for arg in command]
    assert main([*again, *tiny]) == 0
    return run


# --- oof.csv ---


def test_oof_table_has_one_row_per_image_with_its_fold(probe_run: Path) -> None:
    rows = read_rows(probe_run / "oof.csv")
    assert Counter(row["label"] for row in rows) == {**TINY_COUNTS, "bars": 25, "spirals": 1}
    assert len({row["path"] for row in rows}) == len(rows) == N + 2
    others = {row["path"]: row for row in rows if row["status"] != "ok"}
    states = {path: row["status"] for path, row in others.items()}
    assert states == {"bars/broken.jpg": "unreadable", "spirals/alone.jpg": "not_held_out"}
    assert others["bars/broken.jpg"]["error"] == "empty file"
    assert others["spirals/alone.jpg"]["error"]
    held_out = [row for row in rows if row["status"] == "ok"]
    assert Counter(row["fold"] for row in held_out).keys() == set("01234")
    for row in held_out:
        assert sum(float(row[f"prob_{name}"]) for name in _classes(probe_run)) == pytest.approx(1, abs=1e-5)
    assert all(row["prediction"] == row["fold"] == "" for row in rows if row["status"] != "ok")


def test_folds_are_stratified(probe_run: Path) -> None:
    rows = [row for row in read_rows(probe_run / "oof.csv") if row["status"] == "ok"]
    for name, n in TINY_COUNTS.items():
        sizes = Counter(row["fold"] for row in rows if row["label"] == name).values()
        assert max(sizes) - min(sizes) <= 1, name
        assert sum(sizes) == n


def test_oof_logits_are_in_the_order_of_the_table(probe_run: Path) -> None:
    rows = read_rows(probe_run / "oof.csv")
    logits = load_file(probe_run / "oof.safetensors")["logits"]
    assert logits.shape == (len(rows), len(_classes(probe_run)))
    temperatures = {
        str(fold["fold"]): fold["chosen"]["temperature"]["value"]
        for fold in read_json(probe_run / "metrics.json")["folds"]
    }
    for row, logit in zip(rows, logits, strict=True):
        if row["status"] != "ok":
            assert np.isnan(logit).all()
            continue
        probs = temperature_softmax(logit[None], temperatures[row["fold"]])[0]
        np.testing.assert_allclose(probs, [float(row[f"prob_{c}"]) for c in _classes(probe_run)], atol=2e-6)


def test_fold_predictions_equal_those_of_a_model_trained_without_it(
    probe_run: Path, drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    held_out = [row for row in read_rows(probe_run / "oof.csv") if row["fold"] == "0"]
    rest = Path(shutil.copytree(probe_run.parent / "photos", tmp_path / "rest"))
    for row in held_out:
        (rest / row["path"]).unlink()
    command = ["train", str(rest), "--out", str(tmp_path / "run"), "--finetune", "none", "--test-frac", "0"]
    assert main([*command, *tiny]) == 0
    predictor = Predictor(tmp_path / "run")
    found = predictor.predict([probe_run.parent / "photos" / row["path"] for row in held_out])
    logits = load_file(probe_run / "oof.safetensors")["logits"]
    rows = [i for i, row in enumerate(read_rows(probe_run / "oof.csv")) if row["fold"] == "0"]
    expected = temperature_softmax(logits[rows], predictor.bundle.temperature)
    # both fits stop at a tolerance, from different starts
    np.testing.assert_allclose(found.probs, expected, atol=2e-3)


# --- metrics ---


def test_headline_equals_accuracy_of_the_oof_table(probe_run: Path) -> None:
    metrics = read_json(probe_run / "metrics.json")
    rows = [row for row in read_rows(probe_run / "oof.csv") if row["status"] == "ok"]
    accuracy = np.mean([row["prediction"] == row["label"] for row in rows])
    headline = metrics["headline"]
    assert headline["value"] == pytest.approx(accuracy)
    assert (headline["n"], headline["measured_on"], headline["chosen_on"]) == (N, "oof", "the other folds")
    by_fold = [
        np.mean([row["prediction"] == row["label"] for row in rows if row["fold"] == str(fold)])
        for fold in range(5)
    ]
    np.testing.assert_allclose(metrics["by_fold"]["values"], by_fold)
    assert "test" not in metrics
    assert metrics["finetune"] == {"none": 5}


def test_temperature_and_tau_of_a_fold_are_fitted_on_the_others(probe_run: Path) -> None:
    found = read_json(probe_run / "metrics.json")
    for fold in found["folds"]:
        for name in ("temperature", "tau"):
            assert fold["chosen"][name]["n"] == N - fold["n"]
            assert fold["chosen"][name]["chosen_on"] == "the other folds"
    assert found["chosen"]["tau"]["n"] == N


def test_calibration_is_measured_with_temperature_of_other_folds(probe_run: Path) -> None:
    found = read_json(probe_run / "metrics.json")["calibration"]
    assert found["measured_on"] == "oof"
    assert found["before"]["n"] == found["after"]["n"] == N
    assert sum(b["n"] for b in found["after"]["bins"]) == N
    metrics, classes = read_json(probe_run / "metrics.json"), read_bundle(str(probe_run)).classes
    chosen = [fold["chosen"]["temperature"]["value"] for fold in metrics["folds"]]
    rows, logits = read_rows(probe_run / "oof.csv"), load_file(probe_run / "oof.safetensors")["logits"]
    held_out = [i for i, row in enumerate(rows) if row["fold"].isdigit()]
    labels = np.array([classes.index(rows[i]["label"]) for i in held_out])
    temperatures = np.array([chosen[int(rows[i]["fold"])] for i in held_out])
    scaled = logits[held_out].astype(np.float64) / temperatures[:, None]
    assert found["after"]["log_loss"] == pytest.approx(mean_nll(scaled, labels))
    # one temperature fitted on all folds would be better
    assert fit_temperature(logits[held_out], labels)[1]["nll_after"] < found["after"]["log_loss"]


# --- deployed model ---


def test_linear_probes_of_all_folds_are_averaged_into_one_head(probe_run: Path, drawn_images: Path) -> None:
    assert {path.name for path in (probe_run / "model").iterdir()} == {
        "README.md",
        "bundle.json",
        "backbone.safetensors",
        "calibration.safetensors",
        "head.safetensors",
        "novelty.safetensors",
    }
    assert pixelplay.evaluate(probe_run, drawn_images).n_trained_on == N


def test_fine_tuned_folds_predict_as_an_ensemble(finetuned_run: Path, drawn_images: Path) -> None:
    tails = sorted(path.name for path in (finetuned_run / "model").glob("finetuned.*"))
    assert tails == [f"finetuned.{i:02}.safetensors" for i in range(3)]
    bundle = read_bundle(str(finetuned_run))
    assert bundle.head.fits(bundle.backbone.n_features, 3)
    accuracy = pixelplay.evaluate(finetuned_run, drawn_images).evaluation.accuracy.value
    assert accuracy > 0.9  # it was trained on them
    history = read_rows(finetuned_run / "history.csv")
    assert {(row["repeat"], row["fold"]) for row in history} == {("0", "0"), ("0", "1"), ("0", "2")}
    assert (finetuned_run / "plan.json").exists()


@pytest.mark.parametrize(
    "method", [["--finetune", "none", "--n-folds", "3"], PARTIAL], ids=["probe", "partial"]
)
def test_single_deploys_one_classifier_with_the_method_of_the_folds(
    method: list[str], drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ["crossval", str(drawn_images), "--out", str(run), "--single", *method, *tiny]
    assert main(command) == 0
    metrics = read_json(run / "metrics.json")
    assert metrics["deployed"] == "single"
    assert metrics["headline"]["n"] == N
    if method == PARTIAL:
        assert metrics["chosen"]["finetune"]["value"] == "partial"
        assert metrics["chosen"]["epoch"]["value"] > 0
        folds = [row["fold"] for row in read_rows(run / "history.csv")]
        assert folds.count("") > 2  # epochs of the single classifier
    else:
        assert metrics["chosen"]["C"]["value"] > 0
    assert pixelplay.evaluate(run, drawn_images).n_trained_on == N
    assert read_bundle(str(run)).temperature == pytest.approx(metrics["chosen"]["temperature"]["value"])


def test_repeats_assign_new_folds_and_count_each_image_once(
    drawn_images: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["crossval", str(drawn_images), "--out", str(run), "--finetune", "none", "--n-folds", "3"]
    assert main([*command, "--repeats", "2", *tiny]) == 0
    assert re.search(r"\b2 times .*\b48 images", capsys.readouterr().out)
    rows = read_rows(run / "oof.csv")
    assert Counter(row["repeat"] for row in rows) == {"0": N, "1": N}
    folds = [[row["fold"] for row in rows if row["repeat"] == repeat] for repeat in "01"]
    assert folds[0] != folds[1]
    metrics = read_json(run / "metrics.json")
    assert len(metrics["folds"]) == len(metrics["by_fold"]["values"]) == 6
    assert metrics["oof"]["n"] == N  # measured twice, which is no more evidence
    widths = [metrics["oof"]["accuracy"][end] for end in ("low", "high")]
    once = read_json(_run_again(command, tmp_path / "once", tiny) / "metrics.json")["oof"]["accuracy"]
    assert widths[1] - widths[0] > 0.8 * (once["high"] - once["low"])
    assert [metrics["chosen"][name]["n"] for name in ("temperature", "tau")] == [N, N]
    assert metrics["calibration"]["after"]["n"] == N
    assert read_bundle(str(run)).held_out.lac.shape == (N,)
    assert load_file(run / "oof.safetensors")["logits"].shape == (2 * N, 3)


def test_predefined_test_split_is_evaluated_and_in_no_fold(
    drawn_images: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(drawn_images, photos / "train")
    draw_folder(photos / "test", {"bars": 5, "dots": 5, "rings": 5}, first_seed=700)
    shutil.copy(photos / "train/bars/002.jpg", photos / "test/bars/duplicate.jpg")
    command = ["crossval", str(photos), "--out", str(tmp_path / "run"), "--finetune", "none", *tiny]
    assert main(command) == 0
    out = capsys.readouterr().out
    rows = {row["path"]: row for row in read_rows(tmp_path / "run/oof.csv")}
    assert len(rows) == N
    assert rows["train/bars/002.jpg"]["status"] == "not_held_out"
    assert "test image" in rows["train/bars/002.jpg"]["error"]
    metrics = read_json(tmp_path / "run/metrics.json")
    assert metrics["headline"]["n"] == N - 1
    assert metrics["test"]["n"] == 16
    assert metrics["test_without_duplicates"]["n"] == 15
    for name in ("test", "test_without_duplicates"):
        assert f"{metrics[name]['accuracy']['value']:.3f}" in out
    again = pixelplay.evaluate(tmp_path / "run", photos).evaluation.accuracy.value
    assert metrics["test"]["accuracy"]["value"] == pytest.approx(again)


def test_relabelled_test_split_is_measured_on_both_labels(
    drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(drawn_images, photos / "train")
    draw_folder(photos / "test", {"bars": 5, "dots": 5}, first_seed=700)
    (tmp_path / "corrected.csv").write_text("path,label\ntest/bars/000.jpg,\n")
    command = ["crossval", str(photos), "--out", str(tmp_path / "run"), "--finetune", "none", *tiny]
    assert main([*command, "--relabel", str(tmp_path / "corrected.csv")]) == 0
    metrics = read_json(tmp_path / "run/metrics.json")
    assert (metrics["test"]["n"], metrics["test_corrected"]["n"]) == (10, 9)


def test_metrics_name_the_splits_that_selected_and_measured(probe_run: Path, tiny_run: Path) -> None:
    for run in (probe_run, tiny_run):
        metrics = read_json(run / "metrics.json")
        blocks = {name: block for name, block in metrics.items() if "measured_on" in str(block)}
        assert {"headline", "baseline", "oof", "calibration"} <= set(blocks)
        unnamed = [name for name, block in blocks.items() if not {"chosen_on", "measured_on"} <= set(block)]
        assert unnamed == []


def test_cross_validation_is_reproducible(
    finetuned_run: Path, drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    assert main(["crossval", str(drawn_images), "--out", str(again), *PARTIAL, *tiny]) == 0
    for name in (
        "oof.csv",
        "oof.safetensors",
        *(f"model/{p.name}" for p in (finetuned_run / "model").iterdir()),
    ):
        assert (again / name).read_bytes() == (finetuned_run / name).read_bytes(), name


def test_test_frac_is_ignored_in_cross_validation(
    drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    command = ["crossval", str(drawn_images), "--out", str(tmp_path / "run"), "--finetune", "none"]
    assert main([*command, "--test-frac", "0.5", *tiny]) == 0
    metrics = read_json(tmp_path / "run/metrics.json")
    assert metrics["headline"]["n"] == N
    assert any(note.startswith("--test-frac ") for note in metrics["notes"])


def test_split_json_lists_the_images_of_each_fold(probe_run: Path) -> None:
    split = read_json(probe_run / "split.json")
    rows = read_rows(probe_run / "oof.csv")
    for fold in range(5):
        expected = [row["path"] for row in rows if row["fold"] == str(fold)]
        assert split[f"repeat 0, fold {fold}"] == expected
    assert split["never_held_out"] == ["spirals/alone.jpg"]
    assert read_json(probe_run / "config.json")["test_frac"] == 0


def test_groups_stay_in_one_fold(drawn_images: Path, tiny: list[str], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for path in drawn_images.rglob("*.*"):  # three images of a class per group
        target = photos / path.parent.name / f"burst{int(path.stem) // 3}_{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    command = ["crossval", str(photos), "--out", str(tmp_path / "run"), "--finetune", "none"]
    command += ["--n-folds", "3"]
    assert main([*command, "--group-regex", r"\w+/burst", *tiny]) == 1  # one group per class
    assert main([*command, "--group-regex", r"\w+/burst\d", *tiny]) == 0
    folds = defaultdict(set)
    for row in read_rows(tmp_path / "run/oof.csv"):
        folds[row["path"].split("_")[0]].add(row["fold"])
    assert len(folds) == N / 3
    assert {len(found) for found in folds.values()} == {1}


def test_auto_uses_linear_probe_with_few_validation_images_per_fold(
    drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ["crossval", str(drawn_images), "--out", str(run), "--n-folds", "3"]
    assert main([*command, "--oversample-to", "5", "--single", *tiny]) == 0
    metrics = read_json(run / "metrics.json")
    assert metrics["finetune"] == {"none": 3}
    assert metrics["chosen"]["C"]["value"] > 0


def test_predefined_val_split_joins_the_folds_and_is_noted(
    drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(drawn_images, photos / "train")
    draw_folder(photos / "val", {"bars": 4, "dots": 4, "rings": 4}, first_seed=800)
    command = ["crossval", str(photos), "--out", str(tmp_path / "run"), "--n-folds", "2"]
    command += ["--finetune", "partial", "--epochs", "1", "--unfreeze-stages", "1", "--val-frac", "0.3"]
    command += ["--group-regex", r"\d\d\."]  # some groups are in both splits
    assert main([*command, *tiny]) == 0
    metrics = read_json(tmp_path / "run/metrics.json")
    assert metrics["headline"]["n"] == N + 12
    assert any("val" in note and "folds" in note for note in metrics["notes"])
    assert not any("--val-frac" in note or "optimistic" in note for note in metrics["notes"])


def test_cross_validate_equals_metrics_json(
    drawn_images: Path, tiny_probe: pixelplay.TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_probe, n_folds=3)
    report = pixelplay.cross_validate(drawn_images, tmp_path / "run", config)
    assert report.to_json() == read_json(tmp_path / "run/metrics.json")
    assert report.headline.low <= report.headline.value <= report.headline.high
    assert report.by_fold is not None
    assert len(report.by_fold.values) == 3
