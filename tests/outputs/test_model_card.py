"""Tests of environment.json and the model card."""

import shutil
from pathlib import Path

import pixelplay
from tables import read_json


def test_environment_names_versions_device_weights_and_data(tiny_run: Path) -> None:
    made = read_json(tiny_run / "environment.json")
    assert made["pixelplay"] == pixelplay.__version__
    assert set(made) >= {"python", "torch", "timm", "device", "n_cores", "seed", "weights_licence", "date"}
    assert made["seconds"] > 0
    assert made["backbone"] == "test_convnext"
    assert len(made["data_sha256"]) == 64


def test_fingerprint_of_the_data_ignores_names_but_not_labels(
    drawn_images: Path, tiny_probe: pixelplay.TrainConfig, tiny_run: Path, tmp_path: Path
) -> None:
    def fingerprint(images: Path, name: str) -> object:
        pixelplay.train(images, tmp_path / name, tiny_probe, test_frac=0, force=True)
        return read_json(tmp_path / name / "environment.json")["data_sha256"]

    shutil.copytree(drawn_images, tmp_path / "copy")
    first = fingerprint(drawn_images, "a")
    image = next((tmp_path / "copy/bars").iterdir())
    image.rename(image.with_name(f"renamed{image.suffix}"))
    assert fingerprint(tmp_path / "copy", "b") == first
    image = next((tmp_path / "copy/bars").iterdir())
    image.rename(tmp_path / "copy/dots" / f"moved{image.suffix}")
    assert fingerprint(tmp_path / "copy", "c") != first


def test_model_card_has_classes_metrics_and_licence_but_no_paths(tiny_run: Path, drawn_images: Path) -> None:
    card = (tiny_run / "model/README.md").read_text()
    metrics = read_json(tiny_run / "metrics.json")
    for name, n in metrics["train_counts"].items():
        assert f"| {name} | {n} |" in card
    accuracy = metrics["test"]["accuracy"]
    assert f"| accuracy | {accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f}) |" in card
    assert "licence unknown" in card  # of a local file
    for path in (tiny_run, drawn_images, Path.home()):
        assert str(path) not in card
