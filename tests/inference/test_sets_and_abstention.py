"""Prediction sets and abstention from the held-out scores in the bundle."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import pixelplay
from pixelplay.cli.main import main
from pixelplay.config import UncertaintyConfig
from pixelplay.errors import ConfigError, DataError
from pixelplay.evaluation.conformal import HeldOutScores, score_held_out
from pixelplay.inference.predictor import Predictions
from pixelplay.inference.sets_and_abstention import Uncertainty
from tables import read_rows


def _held_out(n: int = 400, seed: int = 0) -> HeldOutScores:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet((0.3, 0.3, 0.3), n)
    labels = (probs.cumsum(1) > rng.random((n, 1))).argmax(1)
    return score_held_out(probs, probs.argmax(1), labels, np.arange(n), "oof")


def _predictions(probs: np.ndarray) -> Predictions:
    n = len(probs)
    known = ~np.isnan(probs).any(axis=1)
    return Predictions(
        paths=tuple(f"{i}.jpg" for i in range(n)),
        status=tuple("ok" if ok else "unreadable" for ok in known),
        errors=("",) * n,
        probs=probs,
        pred=np.where(known, np.nan_to_num(probs).argmax(1), -1),
        classes=("a", "b", "c"),
        digests=(b"",) * n,
    )


def test_model_abstains_below_min_confidence() -> None:
    probs = np.array([[0.9, 0.1, 0.0], [0.5, 0.4, 0.1], [np.nan] * 3])
    found = Uncertainty(UncertaintyConfig(min_confidence=0.5), _held_out()).apply(_predictions(probs))
    assert found.abstained is not None
    assert found.abstained.tolist() == [False, False, True]
    found = Uncertainty(UncertaintyConfig(min_confidence=0.51), _held_out()).apply(_predictions(probs))
    assert found.abstained is not None
    assert found.abstained.tolist() == [False, True, True]


def test_target_accuracy_sets_the_abstention_threshold() -> None:
    uncertainty = Uncertainty(UncertaintyConfig(target_accuracy=0.8), _held_out(2000))
    assert len(uncertainty.notes) == 1
    assert "2,000 held-out images" in uncertainty.notes[0]
    rng = np.random.default_rng(1)
    fresh = rng.dirichlet((0.3, 0.3, 0.3), 5000)
    found = uncertainty.apply(_predictions(fresh))
    assert found.abstained is not None
    assert 0 < found.abstained.mean() < 0.8
    assert fresh.max(axis=1)[~found.abstained].mean() >= 0.8


@pytest.mark.parametrize("method", ["lac", "aps"])
def test_conformal_prediction_sets_have_the_requested_coverage(method: str) -> None:
    uncertainty = Uncertainty(UncertaintyConfig(coverage=0.9, conformal_score=method), _held_out(2000))  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    fresh = rng.dirichlet((0.3, 0.3, 0.3), 5000)
    labels = (fresh.cumsum(1) > rng.random((5000, 1))).argmax(1)
    sets = uncertainty.apply(_predictions(fresh)).sets
    assert sets is not None
    assert sets.any(axis=1).all()
    assert sets[np.arange(5000), labels].mean() >= 0.885
    assert "2,000 held-out images" in uncertainty.notes[0]


def test_no_uncertainty_settings_add_no_columns() -> None:
    predictions = _predictions(np.array([[0.9, 0.1, 0.0]]))
    uncertainty = Uncertainty(UncertaintyConfig(), _held_out())
    assert uncertainty.notes == []
    same = uncertainty.apply(predictions)
    assert (same.abstained, same.sets) == (None, None)


def test_conformal_coverage_without_enough_held_out_images_is_refused() -> None:
    with pytest.raises(DataError, match=r"coverage=0\.95 .*19 .*10"):
        Uncertainty(UncertaintyConfig(coverage=0.95), _held_out(10))
    with pytest.raises(DataError, match=r"coverage needs .*--ensemble-with and --tta"):
        Uncertainty(UncertaintyConfig(coverage=0.9), None)
    assert Uncertainty(UncertaintyConfig(min_confidence=0.9), None).notes == []


def test_contradictory_uncertainty_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_confidence.*target_accuracy"):
        UncertaintyConfig(min_confidence=0.5, target_accuracy=0.9)
    with pytest.raises(ConfigError, match="conformal_score='aps'"):
        UncertaintyConfig(conformal_score="aps")
    with pytest.raises(ConfigError, match=r"coverage=1\.0"):
        UncertaintyConfig(coverage=1.0)


def test_held_out_scores_are_sorted_and_skip_missing_rows() -> None:
    probs = np.array([[0.6, 0.4], [np.nan, np.nan], [0.1, 0.9]])
    found = score_held_out(probs, np.array([0, -1, 1]), np.array([1, 0, 1]), np.arange(3), "oof")
    np.testing.assert_allclose(found.lac, [0.1, 0.6])
    np.testing.assert_allclose(found.confidence, [0.9, 0.6])
    assert found.is_right.tolist() == [True, False]


def test_held_out_scores_use_one_image_per_group() -> None:
    probs = np.array([[0.6, 0.4], [0.1, 0.9], [0.2, 0.8]])
    found = score_held_out(probs, probs.argmax(1), np.array([0, 1, 1]), np.array([7, 3, 7]), "oof")
    np.testing.assert_allclose(found.lac, [0.1, 0.4])


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_predict_writes_abstained_and_prediction_set(
    ending: str, drawn_images: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = Path(shutil.copytree(drawn_images / "rings", tmp_path / "photos"))
    (photos / "broken.jpg").write_bytes(b"")
    out = tmp_path / f"p.{ending}"
    command = ["predict", str(tiny_run), str(photos), "--out", str(out)]
    assert main([*command, "--coverage", "0.8", "--min-confidence", "0.9"]) == 0
    assert "prediction sets are based on 38 held-out images" in capsys.readouterr().err
    if ending == "csv":
        rows = read_rows(out)
        assert list(rows[0])[-3:] == ["abstained", "prediction_set", "novelty"]
        broken = next(row for row in rows if row["status"] != "ok")
        assert (broken["abstained"], broken["novelty"], broken["prediction_set"]) == ("", "", "")
        assert all(0 < float(row["novelty"]) < 1 for row in rows if row is not broken)
        read = [
            (json.loads(row["abstained"]), json.loads(row["prediction_set"]), row)
            for row in rows
            if row is not broken
        ]
    else:
        rows = pq.read_table(out).to_pylist()
        broken = next(row for row in rows if row["status"] != "ok")
        assert broken["abstained"] is broken["novelty"] is broken["prediction_set"] is None
        assert all(0 < row["novelty"] < 1 for row in rows if row is not broken)
        read = [(row["abstained"], row["prediction_set"], row) for row in rows if row is not broken]
    for abstained, classes, row in read:
        assert abstained == (float(row["probability"]) < 0.9)
        assert row["prediction"] in classes


def test_python_api_accepts_uncertainty_settings(drawn_images: Path, tiny_run: Path, tmp_path: Path) -> None:
    uncertainty = pixelplay.UncertaintyConfig(min_confidence=0.5)
    pixelplay.predict(tiny_run, [drawn_images], tmp_path / "p.csv", uncertainty=uncertainty)
    assert (tmp_path / "p.csv").read_text().splitlines()[0].endswith(",abstained,novelty")
