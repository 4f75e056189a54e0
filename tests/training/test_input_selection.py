"""Tests of the selection among several backbones, and among the ways to fit images into the input."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixelplay.cli.main import main
from pixelplay.config import TrainConfig
from pixelplay.data.sources import list_labelled_images
from pixelplay.errors import ConfigError
from pixelplay.model.bundle import read_bundle
from pixelplay.run_log import RunLog
from pixelplay.training import input_selection
from pixelplay.training.input_selection import select_input
from pixelplay.training.prepare import prepare
from pixelplay.training.run_context import RunContext
from pixelplay.training.training_data import TrainingData
from tables import read_json, read_rows

SETTINGS = TrainConfig(
    finetune="none", near_duplicates=False, backbone="lite0", input_size="64", cache_gb=0, test_frac=0.25
)
OFFLINE = ["--finetune", "none", "--no-near-duplicates", "--no-report", "--input-size", "64", "--quiet"]


def draw_edges(root: Path, n: int = 20, size: tuple[int, int] = (160, 40)) -> Path:
    """Draw wide images whose class is a mark at the left or the right edge, outside the central square."""
    for name, left in (("left", 4), ("right", size[0] - 16)):
        (root / name).mkdir(parents=True)
        for seed in range(n):
            rng = np.random.default_rng([seed, left])
            pixels = rng.integers(90, 166, (size[1], size[0], 3), np.uint8)
            y = int(rng.integers(2, size[1] - 14))
            pixels[y : y + 12, left : left + 12] = (250, 40, 40)
            Image.fromarray(pixels).save(root / name / f"{seed}.png")
    return root


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_edges(tmp_path_factory.mktemp("wide") / "images")


def prepared(images: Path, out: Path, config: TrainConfig) -> tuple[TrainingData, RunContext, RunLog]:
    log = RunLog(quiet=True)
    with RunContext.open(out, config, log, force=False, resume=False) as ctx:
        data = prepare(list_labelled_images(str(images), config, log), ctx)
        return *select_input(data, ctx), log


def test_one_backbone_and_fit_select_nothing(wide: Path, tmp_path: Path) -> None:
    _, ctx, log = prepared(wide, tmp_path / "run", SETTINGS)
    assert ctx.input_evidence == {}
    assert not [note for note in log.notes if "selected" in note]


def test_fit_auto_does_not_crop_what_tells_the_classes_apart(wide: Path, tmp_path: Path) -> None:
    config = replace(SETTINGS, fit="auto", hflip=False)
    data, ctx, log = prepared(wide, tmp_path / "run", config)
    evidence = ctx.input_evidence["fit"]
    assert set(evidence["nll_by_value"]) == {"squash", "pad", "crop"}
    assert evidence["value"] in ("squash", "pad")
    assert evidence["nll_by_value"]["crop"] > 2 * evidence["nll_by_value"]["squash"]
    assert ctx.backbone.preprocessing.fit == evidence["value"]
    assert evidence["n"] == len(data.fit_rows)
    assert any("selected fit" in note for note in log.notes)


def test_fit_auto_is_squash_for_images_of_the_inputs_aspect_ratio(wide: Path, tmp_path: Path) -> None:
    config = replace(SETTINGS, fit="auto", input_size="32x128")
    _, ctx, log = prepared(wide, tmp_path / "run", config)
    assert ctx.input_evidence == {}
    assert ctx.backbone.preprocessing.fit == "squash"
    assert ctx.backbone.preprocessing.input_size == (32, 128)
    assert any("--fit auto is squash" in note for note in log.notes)


def test_features_of_the_selected_backbone_are_used(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_selection, "CLEAR", -1e9)  # the last one is always taken
    data, ctx, _ = prepared(wide, tmp_path / "run", replace(SETTINGS, backbone="lite0,lite2"))
    assert ctx.backbone.backbone.name == "tf_efficientnet_lite2"
    alone, _, _ = prepared(wide, tmp_path / "alone", replace(SETTINGS, backbone="lite2"))
    np.testing.assert_array_equal(data.features, alone.features)
    assert data.feature_groups == alone.feature_groups


def test_unclear_difference_keeps_the_first_backbone(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_selection, "CLEAR", 1e9)
    config = replace(SETTINGS, backbone="lite2, lite0")
    _, ctx, _ = prepared(wide, tmp_path / "run", config)
    evidence = ctx.input_evidence["backbone"]
    assert evidence["value"] == "lite2"
    assert [each["value"] for each in evidence["comparisons"]] == ["lite0"]


def test_short_time_budget_skips_further_backbones(wide: Path, tmp_path: Path) -> None:
    config = replace(SETTINGS, backbone="lite0,lite2", finetune="auto", time_budget="1s")
    _, ctx, log = prepared(wide, tmp_path / "run", config)
    assert ctx.input_evidence == {}
    assert "backbone lite2 was not tried: --time-budget is too short" in log.notes


def test_selected_backbone_and_fit_predict_as_evaluated(wide: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--backbone", "best", "--fit", "auto", "--no-hflip", *OFFLINE]
    assert main(["train", str(wide), "--out", str(run), *options]) == 0
    chosen: dict[str, Any] = read_json(run / "metrics.json")["chosen"]
    bundle = read_bundle(str(run))
    assert bundle.backbone.name == f"tf_efficientnet_{chosen['backbone']['value']}"
    assert bundle.preprocessing.fit == chosen["fit"]["value"]
    assert bundle.made_by["weights_licence"] == "apache-2.0"
    table = tmp_path / "again.csv"
    assert main(["evaluate", str(run), str(wide), "--out", str(table), "--quiet"]) == 0
    again = {row["path"]: row for row in read_rows(table)}
    for row in read_rows(run / "predictions.csv"):
        same = next(other for path, other in again.items() if path.endswith(row["path"]))
        for name in ("prediction", "probability", "prob_left"):
            assert same[name] == row[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "lite0,"}, "empty or repeated"),
        ({"backbone": "lite0,lite0"}, "empty or repeated"),
        ({"backbone": "lite0,lite9"}, "unknown backbone 'lite9'"),
        ({"backbone": "lite0,lite2", "weights": "x.pth"}, "weights needs one backbone"),
        ({"backbone": "best", "weights": "x.pth"}, "weights needs one backbone"),
        ({"fit": "stretch"}, "fit='stretch' is not one of"),
        ({"input_size": "224×"}, "input_size='224×' is not a size"),
        ({"input_size": "8x224"}, "input_size"),
        ({"input_size": "224x9999"}, "input_size"),
    ],
)
def test_unusable_choice_is_refused_before_images_are_read(
    changes: dict[str, Any], message: str, wide: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(wide, tmp_path / "run", replace(SETTINGS, **changes))
