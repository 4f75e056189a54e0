"""Several views of an image, and several models, answer as one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from pixelplay.cli.main import main
from pixelplay.errors import ConfigError
from pixelplay.inference.predictor import EnsemblePredictor, Predictor
from pixelplay.model.weights import file_sha256


def test_views_are_averaged_before_they_are_decided(drawn_images: Path, tiny_run: Path) -> None:
    photos = drawn_images / "rings"
    plain, flipped, both = (
        Predictor(tiny_run, tta=tta).predict(photos) for tta in ("none", "flip", "multicrop")
    )
    default = Predictor(tiny_run).predict(photos)  # learned with mirror images
    np.testing.assert_array_equal(default.probs, flipped.probs)
    assert not np.allclose(plain.probs, flipped.probs)
    assert not np.allclose(both.probs, flipped.probs)
    np.testing.assert_allclose(both.probs.sum(axis=1), 1)


def test_corners_of_an_even_picture_change_nothing(tiny_run: Path) -> None:
    grey = np.full((90, 120, 3), 77, np.uint8)
    plain, corners = (Predictor(tiny_run, tta=tta).predict([grey]).probs for tta in ("flip", "multicrop"))
    np.testing.assert_allclose(plain, corners, atol=1e-5)


@pytest.fixture(scope="module")
def two_runs(
    drawn_images: Path, tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Two runs whose classes stand in another order, one of which leans towards rare classes."""
    root = tmp_path_factory.mktemp("two")
    renamed = Path(shutil.copytree(drawn_images, root / "photos"))
    (renamed / "bars").rename(renamed / "10")
    (renamed / "dots").rename(renamed / "9")
    (renamed / "rings").rename(renamed / "x")
    tiny = [
        "--finetune",
        "none",
        *tiny_settings,
        "--quiet",
    ]
    for name, extra in (("a", []), ("b", ["--seed", "1", "--metric", "macro_f1"])):
        assert main(["train", str(renamed), "--out", str(root / name), *tiny, *extra]) == 0
    content = json.loads((root / "b/model/bundle.json").read_text())
    head = load_file(root / "b/model/head.safetensors")
    turned = {"weight": head["weight"][::-1].copy(), "bias": head["bias"][::-1].copy()}
    save_file(turned, root / "b/model/head.safetensors")
    content["classes"], content["priors"] = content["classes"][::-1], content["priors"][::-1]
    content["sha256"]["head.safetensors"] = file_sha256(str(root / "b/model/head.safetensors"))
    (root / "b/model/bundle.json").write_text(json.dumps(content))
    return [root / "a", root / "b"]


def test_two_runs_answer_by_the_mean_of_their_probabilities(two_runs: list[Path], drawn_images: Path) -> None:
    first, second = (Predictor(run).predict(drawn_images) for run in two_runs)
    joint = EnsemblePredictor(two_runs).predict(drawn_images)
    assert joint.classes == first.classes == second.classes[::-1]
    np.testing.assert_allclose(joint.probs, (first.probs + second.probs[:, ::-1]) / 2)
    np.testing.assert_array_equal(joint.novelty, first.novelty)  # the mean of two shares would be none
    agreed = np.array([a == b for a, b in zip(first.labels, second.labels, strict=True)])
    assert [a for a, ok in zip(joint.labels, agreed, strict=True) if ok] == [
        a for a, ok in zip(first.labels, agreed, strict=True) if ok
    ]


def test_networks_of_different_image_sizes_answer_together(
    tiny_run: Path, tmp_path: Path, drawn_images: Path, tiny_settings: list[str]
) -> None:
    """A batch of larger images is smaller: rows must keep step all the same."""
    settings = ["--finetune", "none", "--input-size", "96", *tiny_settings, "--quiet"]
    assert main(["train", str(drawn_images), "--out", str(tmp_path / "small"), *settings]) == 0
    for i in range(80):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    runs = [tiny_run, tmp_path / "small"]
    files = sorted(tmp_path.glob("*.png"))
    first, second = (Predictor(run).predict(files) for run in runs)
    joint = EnsemblePredictor(runs).predict(files)
    np.testing.assert_allclose(joint.probs, (first.probs + second.probs) / 2)


def test_an_unreadable_photograph_stays_a_row(two_runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"")
    found = EnsemblePredictor(two_runs).predict([tmp_path / "broken.jpg", tmp_path / "nowhere.jpg"])
    assert found.status == ("unreadable", "missing")
    assert found.labels == (None, None)
    assert np.isnan(found.probs).all()
    assert found.novelty is not None
    assert np.isnan(found.novelty).all()


def test_runs_that_know_other_classes_cannot_answer_together(two_runs: list[Path], tiny_run: Path) -> None:
    with pytest.raises(ConfigError, match="cannot answer together, for only one of them knows 10, 9"):
        EnsemblePredictor([two_runs[0], tiny_run])


def test_mirror_images_are_refused_where_they_mean_something_else(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    content = json.loads((run / "model/bundle.json").read_text())
    (run / "model/bundle.json").write_text(json.dumps(content | {"hflip": False}))
    with pytest.raises(ConfigError, match="was trained with --no-hflip; use none or multicrop"):
        Predictor(run, tta="flip")
