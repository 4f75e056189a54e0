import csv
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from conftest import TINY, draw_folder, draw_of_class
from images import FORMATS, damaged_files, encode
from pixelplay.api import train
from pixelplay.cli.main import main
from pixelplay.config import ComputeConfig, DataConfig, Precision, TrainConfig
from pixelplay.data.dataset import natural_key
from pixelplay.data.sources import list_images
from pixelplay.errors import BundleError, ConfigError, DataError
from pixelplay.inference.predictor import EnsemblePredictor, Predictions, Predictor, join_predictions
from pixelplay.model.features import CHUNK
from pixelplay.model.weights import file_sha256
from pixelplay.run_log import RunLog


def make_predictor(
    run: Path, precision: Precision = "auto", batch_size: int = 4, num_workers: int | None = None
) -> Predictor:
    return Predictor(
        run, ComputeConfig(device="cpu", precision=precision, batch_size=batch_size, num_workers=num_workers)
    )


@pytest.fixture(scope="module")
def predictor(tiny_run: Path) -> Predictor:
    return make_predictor(tiny_run)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Write every kind of damaged file among good ones of every format; return name → status."""
    folder = tmp_path_factory.mktemp("mixed")
    status: dict[str, str] = {}
    for i, (name, (data, what)) in enumerate(damaged_files().items()):
        name = f"{3 * i:03}_{name.removesuffix('.mp4')}"  # folders skip videos by their extension
        status[name] = what
        (folder / name).write_bytes(data)
    for i, (format, options) in enumerate(FORMATS.items()):
        for j in range(3):
            name = f"{9 * i + 3 * j + 1:03}_good_{format}.jpg"  # the content decides, not the extension
            (folder / name).write_bytes(encode(draw_of_class("dots", 500 + 9 * i + j), format, **options))
            status[name] = "ok"
    return folder, status


def assert_equal(found: Predictions, expected: Predictions, rows: Sequence[int] | None = None) -> None:
    """Compare everything but the paths bit by bit."""
    rows = list(range(len(expected))) if rows is None else rows
    np.testing.assert_array_equal(found.probs, expected.probs[rows])
    np.testing.assert_array_equal(found.pred, expected.pred[rows])
    assert found.status == tuple(expected.status[i] for i in rows)
    assert found.errors == tuple(expected.errors[i] for i in rows)


def test_predictions_have_one_row_per_input_in_order(
    predictor: Predictor, mixed: tuple[Path, dict[str, str]]
) -> None:
    folder, status = mixed
    names = sorted(status, key=natural_key)
    found = predictor.predict(folder)
    assert found.paths == tuple(str(folder / name) for name in names)
    assert found.status == tuple(status[name] for name in names)
    is_ok = np.array([status[name] == "ok" for name in names])
    assert is_ok.sum() == 3 * len(FORMATS)
    np.testing.assert_array_equal(np.isnan(found.probs), np.repeat(~is_ok[:, None], 3, axis=1))
    np.testing.assert_array_equal(found.pred >= 0, is_ok)
    assert [bool(error) for error in found.errors] == (~is_ok).tolist()
    assert [label is None for label in found.prediction] == (~is_ok).tolist()


def test_each_prediction_belongs_to_its_image(
    predictor: Predictor, mixed: tuple[Path, dict[str, str]]
) -> None:
    found = predictor.predict(mixed[0])
    for i in np.flatnonzero(found.pred >= 0):
        assert_equal(predictor.predict([found.paths[i]]), found, [int(i)])
    good = found.probs[found.pred >= 0]
    assert len(np.unique(good, axis=0)) == len(good)  # all images differ


def test_error_of_an_unreadable_file_is_one_line(
    predictor: Predictor, mixed: tuple[Path, dict[str, str]]
) -> None:
    found = predictor.predict(mixed[0])
    assert not [error for error in found.errors if "\n" in error]
    # the row already contains the path
    assert not [e for e, path in zip(found.errors, found.paths, strict=True) if path in e]


def test_a_missing_file_is_a_row(predictor: Predictor, tmp_path: Path, drawn_images: Path) -> None:
    good = str(drawn_images / "bars" / "000.jpg")
    found = predictor.predict([tmp_path / "nowhere.jpg", good, tmp_path, "a\0b.jpg"])
    assert found.status == ("missing", "ok", "unreadable", "unreadable")
    assert found.paths == (str(tmp_path / "nowhere.jpg"), good, str(tmp_path), "a\0b.jpg")


def test_probabilities_sum_to_one(predictor: Predictor, drawn_images: Path) -> None:
    found = predictor.predict(drawn_images)
    assert found.probs.dtype == np.float64
    np.testing.assert_allclose(found.probs.sum(1), 1, atol=1e-12)
    assert (found.probs >= 0).all()
    assert found.classes == predictor.classes == ("bars", "dots", "rings")
    assert found.prediction == tuple(found.classes[k] for k in found.pred)


def test_paths_images_arrays_and_bytes_have_equal_predictions(predictor: Predictor, tmp_path: Path) -> None:
    image = draw_of_class("rings", 77)
    data = encode(image, "PNG")
    (tmp_path / "p.png").write_bytes(data)
    ways = [tmp_path / "p.png", str(tmp_path / "p.png"), image, np.asarray(image), data]
    found = predictor.predict(ways)
    for i in range(1, len(ways)):
        np.testing.assert_array_equal(found.probs[i], found.probs[0])
    assert found.paths == (str(tmp_path / "p.png"), str(tmp_path / "p.png"), "[2]", "[3]", "[4]")
    assert found.status == ("ok",) * 5


def test_damaged_images_in_memory_are_error_rows(predictor: Predictor) -> None:
    images = [np.zeros((4, 4, 3)), b"", np.zeros((0, 4, 3), np.uint8), draw_of_class("bars", 1)]
    found = predictor.predict(images)
    assert [status == "ok" for status in found.status] == [False] * 3 + [True]
    assert found.paths == tuple(f"[{i}]" for i in range(4))


@pytest.mark.parametrize(
    "pack", [bytes, bytearray, memoryview, io.BytesIO, lambda data: io.BufferedReader(io.BytesIO(data))]
)
def test_encoded_image_is_read_from_bytes_and_streams(
    predictor: Predictor, pack: Any, tmp_path: Path
) -> None:
    data = encode(draw_of_class("rings", 77), "PNG")
    (tmp_path / "p.png").write_bytes(data)
    expected = predictor.predict([tmp_path / "p.png"]).probs
    for images in (pack(data), [pack(data)], iter([pack(data)])):
        found = predictor.predict(images)
        assert (found.paths, found.status) == (("[0]",), ("ok",))
        np.testing.assert_array_equal(found.probs, expected)


def test_single_image_in_memory_needs_no_list(predictor: Predictor) -> None:
    image = draw_of_class("bars", 1)
    expected = predictor.predict([image]).probs
    for single in (image, np.asarray(image)):
        np.testing.assert_array_equal(predictor.predict(single).probs, expected)
    batch = np.stack([np.asarray(image)] * 2)
    np.testing.assert_array_equal(predictor.predict(batch).probs, np.concatenate([expected] * 2))


@pytest.mark.parametrize(
    "images",
    [
        None,
        3,
        {"a": 1},
        {"a"},
        io.StringIO("photo.jpg\n"),
        torch.zeros(3, 8, 8),
        [3],
        ["photo.jpg", None],
        [[]],
    ],
)
def test_anything_else_than_images_is_refused_in_one_line(predictor: Predictor, images: Any) -> None:
    with pytest.raises(DataError, match=r"^images(\[\d\])? is a \w+; pass a path, PIL image"):
        predictor.predict(images)


def test_data_frame_is_refused_instead_of_its_column_names(predictor: Predictor) -> None:
    class DataFrame(list[str]):
        columns = ("path",)

    with pytest.raises(DataError, match="images is a DataFrame"):
        predictor.predict(DataFrame(["path"]))


def test_no_images_give_no_predictions(predictor: Predictor, tmp_path: Path) -> None:
    for nothing in ([], tmp_path):
        found = predictor.predict(nothing)  # type: ignore[arg-type]
        assert len(found) == 0
        assert found.probs.shape == (0, 3)
        assert found.pred.shape == (0,)


def test_predictions_do_not_depend_on_order_workers_and_neighbours(
    tiny_run: Path, predictor: Predictor, mixed: tuple[Path, dict[str, str]]
) -> None:
    reference = predictor.predict(mixed[0])
    order = np.random.default_rng(0).permutation(len(reference))
    shuffled = [reference.paths[i] for i in order]
    for num_workers in (1, 5):
        found = make_predictor(tiny_run, num_workers=num_workers).predict(shuffled)
        assert_equal(found, reference, order.tolist())


@pytest.mark.parametrize("batch_size", [1, 32])
def test_batch_size_changes_only_the_last_digits(
    batch_size: int, tiny_run: Path, mixed: tuple[Path, dict[str, str]]
) -> None:
    reference = make_predictor(tiny_run, "fp32").predict(mixed[0])
    found = make_predictor(tiny_run, "fp32", batch_size).predict(mixed[0])
    np.testing.assert_allclose(found.probs, reference.probs, atol=1e-4)
    assert found.status == reference.status


def test_bf16_predictions_are_close_to_fp32(tiny_run: Path, drawn_images: Path) -> None:
    exact, coarse = (make_predictor(tiny_run, p).predict(drawn_images) for p in ("fp32", "bf16"))
    np.testing.assert_allclose(coarse.probs, exact.probs, atol=0.02)


def test_model_trained_in_fp32_predicts_in_fp32(
    drawn_images: Path, tiny_probe: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_probe, compute=ComputeConfig(precision="fp32", device="cpu"))
    train(drawn_images, tmp_path / "run", config, log=RunLog(quiet=True))
    files = sorted(str(path) for path in drawn_images.rglob("*.jpg"))[:9]
    found = Predictor(tmp_path / "run", ComputeConfig(device="cpu")).predict(files)
    assert_equal(found, make_predictor(tmp_path / "run", "fp32").predict(files))


def test_predictions_of_the_test_split_are_reproduced(tiny_run: Path, drawn_images: Path) -> None:
    predictor = Predictor(tiny_run)  # with the settings of the run
    rows = list(csv.DictReader(io.StringIO((tiny_run / "predictions.csv").read_text("utf-8"))))
    split = json.loads((tiny_run / "split.json").read_text("utf-8"))
    assert [row["path"] for row in rows] == split["test"]
    found = predictor.predict([drawn_images / row["path"] for row in rows])
    written = [[row[f"prob_{name}"] for name in found.classes] for row in rows]
    assert [[f"{p:.6f}" for p in probs] for probs in found.probs] == written
    assert [row["prediction"] for row in rows] == list(found.prediction)


def test_model_folder_is_self_contained(tiny_weights: Path, tmp_path: Path) -> None:
    photos = draw_folder(tmp_path / "photos", {"bars": 8, "dots": 8})
    weights = shutil.copy(tiny_weights, tmp_path / "weights.safetensors")
    config = TrainConfig(finetune="none", backbone=TINY, weights=str(weights))
    train(photos, tmp_path / "run", config, log=RunLog(quiet=True))
    images = [draw_of_class("bars", i) for i in range(3)]
    before = make_predictor(tmp_path / "run").predict(images)
    shutil.rmtree(photos)
    Path(weights).unlink()
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "run" / "model", tmp_path / "elsewhere" / "m")
    shutil.rmtree(tmp_path / "run")
    assert_equal(make_predictor(tmp_path / "elsewhere" / "m").predict(images), before)


def test_folder_table_archive_and_list_have_equal_predictions(
    predictor: Predictor, drawn_images: Path, tmp_path: Path
) -> None:
    reference = predictor.predict(drawn_images)
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", drawn_images)
    table = tmp_path / "photos.csv"
    names = [str(Path(path).relative_to(drawn_images)) for path in reference.paths]
    table.write_text("\n".join(["path", *names, ""]), "utf-8")
    dataset = list_images(str(table), DataConfig(images_dir=str(drawn_images)))
    assert_equal(predictor.predict(archive), reference)
    assert_equal(predictor.predict(dataset), reference)
    assert_equal(predictor.predict([Path(path) for path in reference.paths]), reference)
    assert predictor.predict(archive).paths == tuple(f"{archive}/{name}" for name in names)


def test_predict_stream_reads_a_bounded_number_of_images_ahead(tiny_run: Path, tmp_path: Path) -> None:
    # memory is constant: files that were not read ahead may still change
    for i in range(400):
        (tmp_path / f"{i}.png").write_bytes(encode(Image.new("RGB", (16, 16), (i % 256, 0, 0)), "PNG"))
    stream = make_predictor(tiny_run, num_workers=2).predict_stream(tmp_path)
    chunks = [next(stream)]
    for i in range(200, 400):
        (tmp_path / f"{i}.png").unlink()
    chunks += stream
    found = join_predictions(chunks, ("bars", "dots", "rings"))
    assert len(chunks[0]) == CHUNK
    assert found.status == ("ok",) * 200 + ("missing",) * 200


def test_joined_chunks_equal_predict(
    tiny_run: Path, mixed: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixelplay.model.features.CHUNK", 4)
    predictor = make_predictor(tiny_run, batch_size=4)
    chunks = list(predictor.predict_stream(mixed[0]))
    whole = predictor.predict(mixed[0])
    assert len(chunks) > 3
    assert sum(len(chunk) for chunk in chunks) == len(whole)
    assert_equal(join_predictions(chunks, predictor.classes), whole)
    assert tuple(path for chunk in chunks for path in chunk.paths) == whole.paths


def test_mirror_images_have_equal_predictions(predictor: Predictor) -> None:
    image = draw_of_class("bars", 3, (160, 160))
    found = predictor.predict([image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    np.testing.assert_allclose(found.probs[0], found.probs[1], atol=1e-2)


def test_predictions_of_drawn_classes_are_accurate(predictor: Predictor) -> None:
    names = ["bars", "dots", "rings"] * 5
    found = predictor.predict([draw_of_class(name, 800 + i) for i, name in enumerate(names)])
    assert np.mean([a == b for a, b in zip(found.prediction, names, strict=True)]) >= 0.8


def test_folder_without_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a model; pass a run of pixelplay train"):
        Predictor(tmp_path)


def test_iterator_of_images_gives_one_row_each(tiny_run: Path, drawn_images: Path) -> None:
    files = sorted(drawn_images.rglob("*.jpg"))[:3]
    predictions = Predictor(tiny_run).predict(path for path in files)
    assert predictions.paths == tuple(map(str, files))


def test_tta_flip_averages_image_and_mirror_image(drawn_images: Path, tiny_run: Path) -> None:
    photos = drawn_images / "rings"
    plain, flipped = (Predictor(tiny_run, tta=tta).predict(photos) for tta in ("none", "flip"))
    default = Predictor(tiny_run).predict(photos)  # trained with mirror images
    np.testing.assert_array_equal(default.probs, flipped.probs)
    assert not np.allclose(plain.probs, flipped.probs)
    np.testing.assert_allclose(flipped.probs.sum(axis=1), 1)


@pytest.fixture(scope="module")
def two_runs(
    drawn_images: Path, small_settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Train two runs and reverse the class order of the second, which adjusts its logits."""
    root = tmp_path_factory.mktemp("two")
    renamed = Path(shutil.copytree(drawn_images, root / "photos"))
    (renamed / "bars").rename(renamed / "10")
    (renamed / "dots").rename(renamed / "9")
    (renamed / "rings").rename(renamed / "x")
    tiny = ["--finetune", "none", *small_settings, "--quiet"]
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


def test_ensemble_averages_probabilities(two_runs: list[Path], drawn_images: Path) -> None:
    first, second = (Predictor(run).predict(drawn_images) for run in two_runs)
    joint = EnsemblePredictor(two_runs).predict(drawn_images)
    assert joint.classes == first.classes == second.classes[::-1]
    np.testing.assert_allclose(joint.probs, (first.probs + second.probs[:, ::-1]) / 2)
    np.testing.assert_array_equal(joint.novelty, first.novelty)  # novelty is not averaged
    agreed = np.array([a == b for a, b in zip(first.prediction, second.prediction, strict=True)])
    assert [a for a, ok in zip(joint.prediction, agreed, strict=True) if ok] == [
        a for a, ok in zip(first.prediction, agreed, strict=True) if ok
    ]


def test_ensemble_of_different_input_sizes(
    tiny_run: Path, tmp_path: Path, drawn_images: Path, small_settings: list[str]
) -> None:
    """Batch sizes depend on the input size, but chunks must stay aligned."""
    settings = ["--finetune", "none", *small_settings, "--quiet"]
    assert main(["train", str(drawn_images), "--out", str(tmp_path / "small"), *settings]) == 0
    for i in range(80):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    runs = [tiny_run, tmp_path / "small"]
    files = sorted(tmp_path.glob("*.png"))
    first, second = (Predictor(run).predict(files) for run in runs)
    joint = EnsemblePredictor(runs).predict(files)
    np.testing.assert_allclose(joint.probs, (first.probs + second.probs) / 2)


def test_unreadable_image_is_an_error_row_of_an_ensemble(two_runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"")
    found = EnsemblePredictor(two_runs).predict([tmp_path / "broken.jpg", tmp_path / "nowhere.jpg"])
    assert found.status == ("unreadable", "missing")
    assert found.prediction == (None, None)
    assert np.isnan(found.probs).all()
    assert found.novelty is not None
    assert np.isnan(found.novelty).all()


def test_ensemble_with_different_classes_is_refused(two_runs: list[Path], tiny_run: Path) -> None:
    with pytest.raises(ConfigError, match="cannot form an ensemble: only one of them knows 10, 9"):
        EnsemblePredictor([two_runs[0], tiny_run])


def test_tta_flip_is_refused_after_training_without_hflip(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    content = json.loads((run / "model/bundle.json").read_text())
    (run / "model/bundle.json").write_text(json.dumps(content | {"hflip": False}))
    with pytest.raises(ConfigError, match=r"tta='flip' .* --no-hflip; use --tta none"):
        Predictor(run, tta="flip")


def test_ensemble_reads_a_stream_once(tiny_run: Path) -> None:
    data = encode(draw_of_class("rings", 77), "PNG")
    ensemble = EnsemblePredictor([tiny_run, tiny_run], ComputeConfig(device="cpu"))
    found = ensemble.predict(io.BytesIO(data))
    np.testing.assert_allclose(found.probs, ensemble.predict([data]).probs)
