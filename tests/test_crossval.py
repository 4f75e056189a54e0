"""Cross-validation from the command line: each image is predicted by who has not seen it."""

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
from pixelplay.evaluation.calibration import fit_temperature, natural_probs, nll_of
from pixelplay.inference.predictor import Predictor
from pixelplay.model.bundle import read_bundle
from tables import read_json, read_rows

N = sum(TINY_COUNTS.values())
PARTIAL = [
    "--finetune",
    "partial",
    "--epochs",
    "4",
    "--seed",
    "1",  # tuning is clearly better than the probe in every fold
    "--unfreeze-stages",
    "1",
    "--n-folds",
    "3",
    "--train-batch-size",
    "8",
]


@pytest.fixture(scope="module")
def tiny(tiny_settings: list[str]) -> list[str]:
    return [
        *tiny_settings,
        "--quiet",
    ]


@pytest.fixture(scope="module")
def probes(drawn_images: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: five folds of probes, with one image that cannot be read and one class of one."""
    root = tmp_path_factory.mktemp("crossval")
    photos = Path(shutil.copytree(drawn_images, root / "photos"))
    (photos / "bars/broken.jpg").write_bytes(b"")
    draw_folder(photos, {"spirals": 0})
    shutil.copy(photos / "dots/000.jpg", photos / "spirals/alone.jpg")
    (photos / "spirals/alone.jpg").write_bytes((photos / "dots/001.png").read_bytes() + b"\0")
    assert main(["crossval", str(photos), "--out", str(root / "run"), "--finetune", "none", *tiny]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def tuned(drawn_images: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: three tuned folds."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    assert main(["crossval", str(drawn_images), "--out", str(run), *PARTIAL, *tiny]) == 0
    return run


def _classes(run: Path) -> list[str]:
    return [name.removeprefix("prob_") for name in read_rows(run / "oof.csv")[0] if name.startswith("prob_")]


def _once(command: list[str], run: Path, tiny: list[str]) -> Path:
    """The same command into another folder, without repeats."""
    again = [str(run) if word == command[command.index("--out") + 1] else word for word in command]
    assert main([*again, *tiny]) == 0
    return run


# --- the table ---


def test_every_photograph_has_one_row_with_the_fold_that_held_it_out(probes: Path) -> None:
    rows = read_rows(probes / "oof.csv")
    assert Counter(row["given"] for row in rows) == {**TINY_COUNTS, "bars": 25, "spirals": 1}
    assert len({row["path"] for row in rows}) == len(rows) == N + 2
    states = {row["path"]: (row["status"], row["error"]) for row in rows if row["status"] != "ok"}
    assert states == {
        "bars/broken.jpg": ("unreadable", "empty file"),
        "spirals/alone.jpg": (
            "not_held_out",
            "without it, or its group, nothing would be left to learn a class from",
        ),
    }
    held_out = [row for row in rows if row["status"] == "ok"]
    assert Counter(row["fold"] for row in held_out).keys() == set("01234")
    for row in held_out:
        assert sum(float(row[f"prob_{name}"]) for name in _classes(probes)) == pytest.approx(1, abs=1e-5)
    assert all(row["label"] == row["fold"] == "" for row in rows if row["status"] != "ok")


def test_folds_are_stratified(probes: Path) -> None:
    rows = [row for row in read_rows(probes / "oof.csv") if row["status"] == "ok"]
    for name, n in TINY_COUNTS.items():
        sizes = Counter(row["fold"] for row in rows if row["given"] == name).values()
        assert max(sizes) - min(sizes) <= 1, name
        assert sum(sizes) == n


def test_logits_stand_in_the_order_of_the_table(probes: Path) -> None:
    rows = read_rows(probes / "oof.csv")
    logits = load_file(probes / "oof.safetensors")["logits"]
    assert logits.shape == (len(rows), len(_classes(probes)))
    temperatures = {
        str(fold["fold"]): fold["chosen"]["temperature"]["value"]
        for fold in read_json(probes / "metrics.json")["folds"]
    }
    for row, logit in zip(rows, logits, strict=True):
        if row["status"] != "ok":
            assert np.isnan(logit).all()
            continue
        probs = natural_probs(logit[None], temperatures[row["fold"]])[0]
        np.testing.assert_allclose(probs, [float(row[f"prob_{c}"]) for c in _classes(probes)], atol=2e-6)


def test_a_fold_is_predicted_as_by_a_model_that_never_had_it(
    probes: Path, drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    held_out = [row for row in read_rows(probes / "oof.csv") if row["fold"] == "0"]
    rest = Path(shutil.copytree(probes.parent / "photos", tmp_path / "rest"))
    for row in held_out:
        (rest / row["path"]).unlink()
    command = ["train", str(rest), "--out", str(tmp_path / "run"), "--finetune", "none", "--test-frac", "0"]
    assert main([*command, *tiny]) == 0
    predictor = Predictor(tmp_path / "run")
    found = predictor.predict([probes.parent / "photos" / row["path"] for row in held_out])
    logits = load_file(probes / "oof.safetensors")["logits"]
    rows = [i for i, row in enumerate(read_rows(probes / "oof.csv")) if row["fold"] == "0"]
    expected = natural_probs(logits[rows], predictor.bundle.temperature)
    # both heads end where the objective hardly falls any more, from different starts
    np.testing.assert_allclose(found.probs, expected, atol=2e-3)


# --- figures ---


def test_headline_is_what_the_table_says(probes: Path) -> None:
    metrics = read_json(probes / "metrics.json")
    rows = [row for row in read_rows(probes / "oof.csv") if row["status"] == "ok"]
    right = np.mean([row["label"] == row["given"] for row in rows])
    headline = metrics["headline"]
    assert headline["value"] == pytest.approx(right)
    assert (headline["n"], headline["measured_on"], headline["chosen_on"]) == (N, "oof", "the other folds")
    by_fold = [
        np.mean([row["label"] == row["given"] for row in rows if row["fold"] == str(fold)])
        for fold in range(5)
    ]
    np.testing.assert_allclose(metrics["by_fold"]["values"], by_fold)
    assert "test" not in metrics
    assert metrics["finetune"] == {"none": 5}


def test_t_and_tau_of_a_fold_come_from_the_others(probes: Path) -> None:
    found = read_json(probes / "metrics.json")
    for fold in found["folds"]:
        for name in ("temperature", "tau"):
            assert fold["chosen"][name]["n"] == N - fold["n"]
            assert fold["chosen"][name]["chosen_on"] == "the other folds"
    assert found["chosen"]["tau"]["n"] == N


def test_calibration_is_measured_on_folds_that_did_not_choose_it(probes: Path) -> None:
    found = read_json(probes / "metrics.json")["calibration"]
    assert found["measured_on"] == "oof"
    assert found["before"]["n"] == found["after"]["n"] == N
    assert sum(b["n"] for b in found["after"]["bins"]) == N
    metrics, classes = read_json(probes / "metrics.json"), read_bundle(str(probes)).classes
    chosen = [fold["chosen"]["temperature"]["value"] for fold in metrics["folds"]]
    rows, logits = read_rows(probes / "oof.csv"), load_file(probes / "oof.safetensors")["logits"]
    held_out = [i for i, row in enumerate(rows) if row["fold"].isdigit()]
    labels = np.array([classes.index(rows[i]["given"]) for i in held_out])
    temperatures = np.array([chosen[int(rows[i]["fold"])] for i in held_out])
    cooled = logits[held_out].astype(np.float64) / temperatures[:, None]
    assert found["after"]["log_loss"] == pytest.approx(nll_of(cooled, labels))
    # one temperature that all of them had chosen would do better
    assert fit_temperature(logits[held_out], labels)[1]["nll_after"] < found["after"]["log_loss"]


# --- what is deployed ---


def test_the_probes_of_all_folds_are_one_head(probes: Path, drawn_images: Path) -> None:
    assert {path.name for path in (probes / "model").iterdir()} == {
        "bundle.json",
        "backbone.safetensors",
        "calibration.safetensors",
        "head.safetensors",
        "novelty.safetensors",
    }
    assert pixelplay.evaluate(probes, drawn_images).n_trained_on == N


def test_tuned_folds_answer_together(tuned: Path, drawn_images: Path) -> None:
    tails = sorted(path.name for path in (tuned / "model").glob("tuned.*"))
    assert tails == [f"tuned.{i:02}.safetensors" for i in range(3)]
    bundle = read_bundle(str(tuned))
    assert bundle.head.fits(bundle.backbone.n_features, 3)
    accuracy = pixelplay.evaluate(tuned, drawn_images).evaluation.accuracy.value
    assert accuracy > 0.9  # it has learned from them
    history = read_rows(tuned / "history.csv")
    assert {(row["repeat"], row["fold"]) for row in history} == {("0", "0"), ("0", "1"), ("0", "2")}
    assert (tuned / "plan.json").exists()


@pytest.mark.parametrize(
    "method", [["--finetune", "none", "--n-folds", "3"], PARTIAL], ids=["probe", "partial"]
)
def test_single_deploys_one_classifier_of_the_folds_kind(
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
        assert [row["fold"] for row in read_rows(run / "history.csv")].count("") > 2  # its own epochs
    else:
        assert metrics["chosen"]["C"]["value"] > 0
    assert pixelplay.evaluate(run, drawn_images).n_trained_on == N
    assert read_bundle(str(run)).temperature == pytest.approx(metrics["chosen"]["temperature"]["value"])


def test_repeats_deal_anew_and_count_a_photograph_once(
    drawn_images: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["crossval", str(drawn_images), "--out", str(run), "--finetune", "none", "--n-folds", "3"]
    assert main([*command, "--repeats", "2", *tiny]) == 0
    assert "48 images, each 2 times" in capsys.readouterr().out
    rows = read_rows(run / "oof.csv")
    assert Counter(row["repeat"] for row in rows) == {"0": N, "1": N}
    folds = [[row["fold"] for row in rows if row["repeat"] == repeat] for repeat in "01"]
    assert folds[0] != folds[1]
    metrics = read_json(run / "metrics.json")
    assert len(metrics["folds"]) == len(metrics["by_fold"]["values"]) == 6
    assert metrics["oof"]["n"] == N  # measured twice, and no more evidence for it
    widths = [metrics["oof"]["accuracy"][end] for end in ("low", "high")]
    once = read_json(_once(command, tmp_path / "once", tiny) / "metrics.json")["oof"]["accuracy"]
    assert widths[1] - widths[0] > 0.8 * (once["high"] - once["low"])
    assert [metrics["chosen"][name]["n"] for name in ("temperature", "tau")] == [N, N]
    assert metrics["calibration"]["after"]["n"] == N
    assert read_bundle(str(run)).held_out.lac.shape == (N,)
    assert load_file(run / "oof.safetensors")["logits"].shape == (2 * N, 3)


def test_a_given_test_part_is_measured_and_not_dealt(
    drawn_images: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(drawn_images, photos / "train")
    draw_folder(photos / "test", {"bars": 5, "dots": 5, "rings": 5}, first_seed=700)
    shutil.copy(photos / "train/bars/002.jpg", photos / "test/bars/copy.jpg")
    command = ["crossval", str(photos), "--out", str(tmp_path / "run"), "--finetune", "none", *tiny]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "on the given test part, 16 images: accuracy" in said
    assert "without test images that had a copy in training: accuracy" in said
    rows = {row["path"]: row for row in read_rows(tmp_path / "run/oof.csv")}
    assert len(rows) == N
    assert rows["train/bars/002.jpg"]["error"] == "a copy of a test image, not learned from"
    metrics = read_json(tmp_path / "run/metrics.json")
    assert metrics["headline"]["n"] == N - 1
    assert metrics["test"]["n"] == 16
    assert metrics["test_without_copies"]["n"] == 15
    again = pixelplay.evaluate(tmp_path / "run", photos).evaluation.accuracy.value
    assert metrics["test"]["accuracy"]["value"] == pytest.approx(again)


def test_a_corrected_test_part_is_measured_on_both_labels(
    drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(drawn_images, photos / "train")
    draw_folder(photos / "test", {"bars": 5, "dots": 5}, first_seed=700)
    (tmp_path / "mended.csv").write_text("path,label\ntest/bars/000.jpg,\n")
    command = ["crossval", str(photos), "--out", str(tmp_path / "run"), "--finetune", "none", *tiny]
    assert main([*command, "--relabel", str(tmp_path / "mended.csv")]) == 0
    metrics = read_json(tmp_path / "run/metrics.json")
    assert (metrics["test"]["n"], metrics["test_corrected"]["n"]) == (10, 9)


def test_each_block_of_figures_names_who_chose_and_who_measured(probes: Path, tiny_run: Path) -> None:
    for run in (probes, tiny_run):
        metrics = read_json(run / "metrics.json")
        blocks = {name: block for name, block in metrics.items() if "measured_on" in str(block)}
        assert {"headline", "baseline", "oof", "calibration"} <= set(blocks)
        unnamed = [name for name, block in blocks.items() if not {"chosen_on", "measured_on"} <= set(block)]
        assert unnamed == []


def test_the_same_command_gives_the_same_model(
    tuned: Path, drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    assert main(["crossval", str(drawn_images), "--out", str(again), *PARTIAL, *tiny]) == 0
    for name in ("oof.csv", "oof.safetensors", *(f"model/{p.name}" for p in (tuned / "model").iterdir())):
        assert (again / name).read_bytes() == (tuned / name).read_bytes(), name


def test_asking_for_a_test_part_is_said_not_to_count(
    drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    command = ["crossval", str(drawn_images), "--out", str(tmp_path / "run"), "--finetune", "none"]
    assert main([*command, "--test-frac", "0.5", *tiny]) == 0
    metrics = read_json(tmp_path / "run/metrics.json")
    assert metrics["headline"]["n"] == N
    assert any(note.startswith("--test-frac 0.5 does not count") for note in metrics["notes"])


def test_split_json_names_the_photographs_of_each_fold(probes: Path) -> None:
    split = read_json(probes / "split.json")
    rows = read_rows(probes / "oof.csv")
    for fold in range(5):
        expected = [row["path"] for row in rows if row["fold"] == str(fold)]
        assert split[f"repeat 0, fold {fold}"] == expected
    assert split["never_held_out"] == ["spirals/alone.jpg"]
    assert read_json(probes / "config.json")["test_frac"] == 0


def test_bursts_stay_in_one_fold(drawn_images: Path, tiny: list[str], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for path in drawn_images.rglob("*.*"):  # three images of each class a burst
        burst = photos / path.parent.name / f"burst{int(path.stem) // 3}_{path.name}"
        burst.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, burst)
    command = [
        "crossval",
        str(photos),
        "--out",
        str(tmp_path / "run"),
        "--finetune",
        "none",
        "--n-folds",
        "3",
    ]
    assert main([*command, "--group-regex", r"\w+/burst", *tiny]) == 1  # one burst of each class
    assert main([*command, "--group-regex", r"\w+/burst\d", *tiny]) == 0
    folds = defaultdict(set)
    for row in read_rows(tmp_path / "run/oof.csv"):
        folds[row["path"].split("_")[0]].add(row["fold"])
    assert len(folds) == N / 3
    assert {len(found) for found in folds.values()} == {1}


def test_auto_takes_the_probe_where_too_few_are_held_out_to_choose_a_depth(
    drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ["crossval", str(drawn_images), "--out", str(run), "--n-folds", "3"]
    assert main([*command, "--oversample-to", "5", "--single", *tiny]) == 0
    metrics = read_json(run / "metrics.json")
    assert metrics["finetune"] == {"none": 3}
    assert metrics["chosen"]["C"]["value"] > 0


def test_a_given_val_part_is_dealt_and_that_is_said(
    drawn_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(drawn_images, photos / "train")
    draw_folder(photos / "val", {"bars": 4, "dots": 4, "rings": 4}, first_seed=800)
    command = [
        "crossval",
        str(photos),
        "--out",
        str(tmp_path / "run"),
        "--finetune",
        "partial",
        "--epochs",
        "1",
    ]
    bursts = ["--group-regex", r"\d\d\."]  # some lie in both parts
    assert (
        main([*command, "--n-folds", "2", "--unfreeze-stages", "1", "--val-frac", "0.3", *bursts, *tiny]) == 0
    )
    metrics = read_json(tmp_path / "run/metrics.json")
    assert metrics["headline"]["n"] == N + 12
    notes = " ".join(metrics["notes"])
    assert "the given val part is dealt into the folds like train" in notes
    assert "does not count" not in notes
    assert "optimistic" not in notes


def test_python_takes_the_same_settings(
    drawn_images: Path, tiny_probe: pixelplay.TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_probe, n_folds=3)
    report = pixelplay.cross_validate(drawn_images, tmp_path / "run", config)
    assert report.to_json() == read_json(tmp_path / "run/metrics.json")
    assert report.headline.low <= report.headline.value <= report.headline.high
    assert len(report.fold_values) == 3
