"""Tests of the public Python functions."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pixelplay
from conftest import TINY_COUNTS, draw_folder
from images import encode
from pixelplay.run_log import RunLog
from tables import read_rows


def test_five_lines_from_images_to_predictions(
    drawn_images: Path, tiny_probe: pixelplay.TrainConfig, tmp_path: Path
) -> None:
    dataset, audit = pixelplay.scan(drawn_images)
    report = pixelplay.train(drawn_images, tmp_path / "run", tiny_probe)
    metrics = pixelplay.evaluate(tmp_path / "run", drawn_images, split=None)
    summary = pixelplay.predict(tmp_path / "run", [drawn_images], tmp_path / "p.csv")
    predictions = pixelplay.Predictor(tmp_path / "run").predict(drawn_images)

    assert dict(zip(dataset.classes, dataset.class_counts(), strict=True)) == TINY_COUNTS
    assert not audit.errors
    assert report.headline.low <= report.headline.value <= report.headline.high
    assert report.to_json() == json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics.evaluation.n == len(predictions) == 48
    assert (summary.n, summary.n_unreadable) == (48, 0)
    rows = read_rows(tmp_path / "p.csv")
    assert [row["path"] for row in rows] == list(predictions.paths)
    assert [row["prediction"] for row in rows] == list(predictions.prediction)
    written = np.array([[float(row[f"prob_{name}"]) for name in predictions.classes] for row in rows])
    np.testing.assert_allclose(written, predictions.probs, atol=1e-6)
    labels = [dataset.classes[k] for k in dataset.labels]
    accuracy = np.mean([a == b for a, b in zip(predictions.prediction, labels, strict=True)])
    assert accuracy == pytest.approx(metrics.evaluation.accuracy.value)


def test_predictor_accepts_paths_images_arrays_and_bytes(drawn_images: Path, tiny_run: Path) -> None:
    path = drawn_images / "dots/001.png"
    image = Image.open(path)
    data = path.read_bytes()
    predictions = pixelplay.Predictor(tiny_run).predict([path, str(path), image, np.asarray(image), data])
    assert predictions.status == ("ok",) * 5
    assert predictions.paths[2:] == ("[2]", "[3]", "[4]")
    np.testing.assert_array_equal(predictions.probs, predictions.probs[[0] * 5])


def test_predictor_returns_one_prediction_per_input_in_order(drawn_images: Path, tiny_run: Path) -> None:
    good = drawn_images / "bars/000.jpg"
    predictions = pixelplay.Predictor(tiny_run).predict([good, "nowhere.jpg", b"no image", good])
    assert predictions.status == ("ok", "missing", "unreadable", "ok")
    assert predictions.prediction[1:3] == (None, None)
    assert np.isnan(predictions.probs[1:3]).all()
    np.testing.assert_allclose(predictions.probs[[0, 3]].sum(1), 1)


def test_predict_counts_unreadable_images(tiny_run: Path, tmp_path: Path) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 2})
    (photos / "bars/broken.jpg").write_bytes(b"")
    assert pixelplay.predict(tiny_run, [photos], tmp_path / "p.csv").n_unreadable == 1


def test_predict_accepts_one_path_without_a_list(drawn_images: Path, tiny_run: Path, tmp_path: Path) -> None:
    folder = drawn_images / "rings"
    pixelplay.predict(tiny_run, str(folder), tmp_path / "one.csv", ensemble_with=str(tiny_run))
    pixelplay.predict(tiny_run, [folder], tmp_path / "list.csv", ensemble_with=[tiny_run])
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "list.csv").read_bytes()


def test_predict_gives_the_same_rows_for_a_folder_and_its_files(
    drawn_images: Path, tiny_run: Path, tmp_path: Path
) -> None:
    folder = drawn_images / "rings"
    pixelplay.predict(tiny_run, [folder], tmp_path / "folder.csv")
    pixelplay.predict(tiny_run, sorted(folder.iterdir()), tmp_path / "files.csv")
    assert (tmp_path / "folder.csv").read_bytes() == (tmp_path / "files.csv").read_bytes()


def test_evaluate_counts_images_that_were_trained_on(
    drawn_images: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = pixelplay.evaluate(tiny_run, drawn_images)
    assert report.unseen is not None
    assert report.n_trained_on + report.unseen.n == 48
    assert f" {report.n_trained_on} of the 48 " in capsys.readouterr().err
    held_out = json.loads((tiny_run / "metrics.json").read_text())["test"]["accuracy"]["value"]
    assert report.unseen.accuracy.value == pytest.approx(held_out)


def test_errors_have_one_base_class_and_a_built_in_one(
    drawn_images: Path, tiny_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(pixelplay.ConfigError, match="test_frac"):
        pixelplay.TrainConfig(test_frac=2)
    with pytest.raises(pixelplay.ConfigError, match="time_budget=180 "):
        pixelplay.TrainConfig(time_budget=180)  # type: ignore[arg-type]
    with pytest.raises(pixelplay.ConfigError, match=r"split='tset' .*train, val, test"):
        pixelplay.evaluate(tiny_run, drawn_images, split="tset")  # type: ignore[arg-type]
    with pytest.raises(pixelplay.DataError, match="nowhere does not exist"):
        pixelplay.scan(tmp_path / "nowhere")
    with pytest.raises(pixelplay.BundleError, match="pixelplay train"):
        pixelplay.Predictor(tmp_path)
    with pytest.raises(pixelplay.ConfigError, match="--out"):
        pixelplay.predict(tiny_run, [drawn_images], tmp_path / "p.txt")
    with pytest.raises(pixelplay.ConfigError, match=r"coverage='0\.9' "):
        pixelplay.UncertaintyConfig(coverage="0.9")  # type: ignore[arg-type]
    with pytest.raises(pixelplay.ConfigError, match=r"at_precision='0\.9'"):
        pixelplay.evaluate(tiny_run, drawn_images, at_precision="0.9")  # type: ignore[arg-type]
    with pytest.raises(pixelplay.DataError, match=r"^no images"):
        pixelplay.predict(tiny_run, [], tmp_path / "p.csv")
    assert issubclass(pixelplay.ConfigError, pixelplay.PixelPlayError)
    assert issubclass(pixelplay.ConfigError, ValueError)
    assert issubclass(pixelplay.DataError, ValueError)
    assert issubclass(pixelplay.ImageError, pixelplay.DataError)
    assert issubclass(pixelplay.BundleError, RuntimeError)
    assert issubclass(pixelplay.MissingExtraError, ImportError)


def test_train_does_not_change_global_random_state(
    drawn_images: Path, tiny_probe: pixelplay.TrainConfig, tmp_path: Path
) -> None:
    import torch

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    pixelplay.train(drawn_images, tmp_path / "run", tiny_probe)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert after == before


def test_scan_keeps_the_order_of_a_table(drawn_images: Path, tmp_path: Path) -> None:
    names = [path.relative_to(drawn_images).as_posix() for path in drawn_images.rglob("*.*")]
    random.Random(0).shuffle(names)
    table = tmp_path / "labels.csv"
    table.write_text(
        "".join(f"{line}\n" for line in ["path,label", *(f"{n},{n.split('/')[0]}" for n in names)])
    )
    data = pixelplay.DataConfig(images_dir=str(drawn_images))
    dataset, _ = pixelplay.scan(table, data)
    assert list(dataset.paths) == names
    assert dataset.classes == tuple(TINY_COUNTS)


def test_exif_orientation_does_not_change_predictions(drawn_images: Path, tiny_run: Path) -> None:
    image = Image.open(drawn_images / "bars/001.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    turned = encode(image.transpose(Image.Transpose.ROTATE_180), "PNG", exif=exif)
    predictions = pixelplay.Predictor(tiny_run).predict([encode(image, "PNG"), turned])
    np.testing.assert_array_equal(predictions.probs[0], predictions.probs[1])


def test_log_without_stderr_keeps_notes_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    log = RunLog()
    log.note("something was assumed")
    with log.progress("reading", 2) as bar:
        bar.update(2)
    assert capsys.readouterr().out == ""
    assert log.notes == ["something was assumed"]


# --- settings as keywords, short representations, tables ---


def test_settings_can_be_keywords(
    drawn_images: Path, tiny_probe: pixelplay.TrainConfig, tmp_path: Path
) -> None:
    pixelplay.train(
        drawn_images,
        tmp_path / "run",
        tiny_probe,
        metric="macro_f1",
        n_folds=3,
        num_workers=1,
        group_by_folder=False,
    )
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["metric"], config["n_folds"], config["compute"]["num_workers"]) == ("macro_f1", 3, 1)
    assert config["backbone"] == tiny_probe.backbone  # kept from the configuration
    pixelplay.cross_validate(drawn_images, tmp_path / "cv", tiny_probe, n_folds=2)
    assert json.loads((tmp_path / "cv/config.json").read_text())["n_folds"] == 2


def test_unknown_setting_suggests_similar_names(drawn_images: Path, tmp_path: Path) -> None:
    for name, meant in (("finetun", "finetune"), ("epoch", "epochs")):
        with pytest.raises(
            pixelplay.ConfigError, match=f"unknown setting '{name}'; did you mean .*'{meant}'"
        ):
            pixelplay.train(drawn_images, tmp_path / "run", **{name: "x"})
    assert not (tmp_path / "run").exists()


def test_representations_of_results_are_short(
    drawn_images: Path, tiny_probe: pixelplay.TrainConfig, tmp_path: Path
) -> None:
    report = pixelplay.train(drawn_images, tmp_path / "run", tiny_probe)
    evaluation = pixelplay.evaluate(tmp_path / "run", drawn_images)
    predictions = pixelplay.Predictor(tmp_path / "run").predict([*drawn_images.rglob("*.png"), "missing.jpg"])
    for result in (report, evaluation, evaluation.evaluation, predictions):
        assert len(repr(result).splitlines()) < 10
    assert f"accuracy          {report.evaluation.accuracy}" in repr(report)
    assert repr(predictions).startswith(f"Predictions of {len(predictions)} image")
    assert "missing.jpg: missing" in repr(predictions) or len(predictions) > 5
    assert repr(pixelplay.Predictor(tmp_path / "run").predict([])).startswith("Predictions of 0 images")


def test_predictions_become_an_arrow_table(tiny_run: Path, drawn_images: Path) -> None:
    predictions = pixelplay.Predictor(tiny_run).predict([*sorted(drawn_images.rglob("*.*")), "missing.jpg"])
    table = predictions.to_arrow()
    assert table.column_names == list(predictions.columns())
    assert table["prediction"].to_pylist() == list(predictions.prediction)
    assert table["status"].to_pylist() == list(predictions.status)
