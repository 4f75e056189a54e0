from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import pixelplay
from conftest import TINY, draw_of_class
from images import altered, damaged_files, encode, scene
from pixelplay.config import DataConfig, Precision, TrainConfig
from pixelplay.data.audit import Duplicates
from pixelplay.data.cache import ArrayCache
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sources import list_files, open_dataset
from pixelplay.errors import ConfigError, ImageError
from pixelplay.model.backbone import PretrainedBackbone, load_backbone
from pixelplay.model.device import resolve_device, resolve_device_name, resolve_precision
from pixelplay.model.features import (
    FeatureExtractor,
    ImageFeatures,
    LoadedImage,
    extract_cached_features,
    extract_features,
    find_near_duplicates,
    resolve_batch_size,
    stream_features,
)
from pixelplay.run_log import RunLog

MakeExtractor = Callable[..., FeatureExtractor]


@pytest.fixture(scope="module")
def loaded(tiny_weights: Path) -> PretrainedBackbone:
    return load_backbone(TINY, str(tiny_weights), offline=True)


@pytest.fixture(scope="module")
def make_extractor(loaded: PretrainedBackbone) -> MakeExtractor:
    def make(
        batch_size: int = 4,
        *,
        hflip: bool = False,
        precision: Precision = "fp32",
        training_precision: Precision | None = None,
    ) -> FeatureExtractor:
        return FeatureExtractor(
            loaded.backbone,
            loaded.preprocessing,
            hflip=hflip,
            device="cpu",
            precision=precision,
            batch_size=batch_size,
            training_precision=training_precision,
        )

    return make


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    names = ("bars", "dots", "rings", "bars", "dots", "rings", "bars")
    images = [draw_of_class(name, i, (160, 160)) for i, name in enumerate(names)]
    return np.stack([np.asarray(image) for image in images])  # (7, 160, 160, 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write nine files, of which those at positions 2 and 5 are damaged."""
    folder = tmp_path_factory.mktemp("files")
    damaged = damaged_files()
    content = {f"{i}.png": encode(draw_of_class("dots", i), "PNG") for i in range(9)}
    content |= {"2.png": damaged["cut.png"][0], "5.png": damaged["bomb.png"][0]}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return [str(folder / name) for name in content]


def read(
    files: Sequence[str],
    extractor: FeatureExtractor,
    cache_dir: Path | None = None,
    num_workers: int | None = None,
) -> ImageFeatures:
    cache = ArrayCache(str(cache_dir or ""), "features", "key", max_bytes=0 if cache_dir is None else 10**9)
    return extract_cached_features(list_files(files), extractor, cache, num_workers=num_workers)


def test_features_do_not_depend_on_the_position_in_a_batch(
    make_extractor: MakeExtractor, pixels: NDArray[np.uint8]
) -> None:
    extractor = make_extractor(batch_size=7)
    together = extractor(pixels)
    backwards = extractor(np.ascontiguousarray(pixels[::-1]))
    np.testing.assert_array_equal(backwards[::-1], together)
    alone = np.concatenate([extractor(pixels[i : i + 1]) for i in range(7)])
    np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batch_size_changes_only_the_last_digits(
    batch_size: int, make_extractor: MakeExtractor, files: list[str]
) -> None:
    reference = read(files, make_extractor(batch_size=4)).values
    np.testing.assert_allclose(read(files, make_extractor(batch_size)).values, reference, atol=1e-4)


def test_features_do_not_depend_on_order_and_workers(make_extractor: MakeExtractor, files: list[str]) -> None:
    reference = read(files, make_extractor(), num_workers=1)
    np.testing.assert_array_equal(read(files, make_extractor(), num_workers=7).values, reference.values)
    backwards = read(files[::-1], make_extractor(), num_workers=3)
    np.testing.assert_array_equal(backwards.values[::-1], reference.values)
    assert backwards.digests[::-1] == reference.digests


@pytest.mark.usefixtures("four_threads")
def test_features_do_not_depend_on_the_number_of_cores(
    make_extractor: MakeExtractor, files: list[str]
) -> None:
    on_four = read(files, make_extractor(batch_size=2)).values
    torch.set_num_threads(1)
    np.testing.assert_array_equal(on_four, read(files, make_extractor(batch_size=2)).values)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_chunk_length_does_not_depend_on_the_batch_size(
    batch_size: int, make_extractor: MakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixelplay.model.features.CHUNK", 4)
    pixels = np.zeros((160, 160, 3), np.uint8)

    def load(i: int) -> LoadedImage:
        return LoadedImage(
            pixels=None if i in (2, 3) else pixels,
            error=ImageError("a", "missing", "gone") if i in (2, 3) else None,
        )

    chunks = list(stream_features(make_extractor(batch_size), load, 11))
    assert [len(chunk) for chunk, _ in chunks] == [4, 4, 3]
    assert [len(features) for _, features in chunks] == [4, 4, 3]
    found = np.concatenate([features for _, features in chunks])
    np.testing.assert_array_equal(np.isnan(found).all(1), np.isin(np.arange(11), (2, 3)))


def test_cpu_batch_size_shrinks_with_the_image_size() -> None:
    assert [resolve_batch_size(None, "cpu", (px, px)) for px in (64, 224, 448, 4096)] == [98, 8, 2, 1]
    assert resolve_batch_size(None, "cuda", (224, 224)) == resolve_batch_size(None, "cuda", (448, 448)) == 32
    assert resolve_batch_size(5, "cpu", (448, 224)) == 5


def test_unreadable_image_is_a_nan_row_with_its_error(
    make_extractor: MakeExtractor, files: list[str]
) -> None:
    found = read(files, make_extractor(batch_size=2))
    is_nan = np.isnan(found.values)
    assert list(found.errors) == [2, 5]
    assert [found.errors[i].status for i in (2, 5)] == ["unreadable", "too_large"]
    np.testing.assert_array_equal(is_nan.all(1), [i in (2, 5) for i in range(9)])
    np.testing.assert_array_equal(is_nan.any(1), is_nan.all(1))
    assert found.values.dtype == np.float32


def test_features_do_not_depend_on_unreadable_neighbours(
    make_extractor: MakeExtractor, files: list[str]
) -> None:
    together = read(files, make_extractor()).values
    for i in range(9):
        np.testing.assert_array_equal(read(files[i : i + 1], make_extractor()).values[0], together[i])


def test_cached_features_are_bit_identical(
    make_extractor: MakeExtractor, files: list[str], tmp_path: Path
) -> None:
    fresh = read(files, make_extractor(), tmp_path)
    again = read(files, make_extractor(), tmp_path)
    some = read([*files[4:], *files[:2]], make_extractor(), tmp_path)
    np.testing.assert_array_equal(again.values, fresh.values)
    np.testing.assert_array_equal(some.values, fresh.values[[4, 5, 6, 7, 8, 0, 1]])
    assert again.digests == fresh.digests
    assert list(again.errors) == [2, 5]  # errors are never cached


def test_partly_filled_cache_keeps_the_order(
    make_extractor: MakeExtractor, files: list[str], tmp_path: Path
) -> None:
    read(files[1::2], make_extractor(), tmp_path)
    mixed = read(files, make_extractor(), tmp_path)
    np.testing.assert_array_equal(mixed.values, read(files, make_extractor()).values)


def test_duplicate_images_have_equal_features(
    make_extractor: MakeExtractor, files: list[str], tmp_path: Path
) -> None:
    values = read([*files, *files], make_extractor(), tmp_path).values
    np.testing.assert_array_equal(values[:9], values[9:])


def test_interrupt_keeps_computed_features_in_the_cache(
    make_extractor: MakeExtractor, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(n: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pixelplay.model.features.CHUNK", 2)
    cache = ArrayCache(str(tmp_path), "features", "key", max_bytes=10**9)
    with pytest.raises(KeyboardInterrupt):
        extract_cached_features(list_files(files), make_extractor(batch_size=2), cache, on_progress=interrupt)
    kept = ArrayCache(str(tmp_path), "features", "key", max_bytes=10**9)
    digests = read(files, make_extractor()).digests
    assert [digest in kept for digest in digests] == [True, True, *[False] * 7]


def test_hflip_averages_image_and_mirror_image(
    make_extractor: MakeExtractor, pixels: NDArray[np.uint8]
) -> None:
    plain = make_extractor(batch_size=7)
    mean = (plain(pixels) + plain(np.ascontiguousarray(pixels[:, :, ::-1]))) / 2
    found = make_extractor(batch_size=7, hflip=True)(pixels)
    np.testing.assert_allclose(found, mean, atol=1e-6)
    assert np.abs(found - plain(pixels)).max() > 1e-3


def test_mirror_images_have_equal_features_with_hflip(
    make_extractor: MakeExtractor, pixels: NDArray[np.uint8]
) -> None:
    extractor = make_extractor(batch_size=7, hflip=True)
    mirrored = extractor(np.ascontiguousarray(pixels[:, :, ::-1]))
    np.testing.assert_allclose(mirrored, extractor(pixels), atol=1e-6)


def test_bf16_is_close_to_fp32(make_extractor: MakeExtractor, pixels: NDArray[np.uint8]) -> None:
    exact = make_extractor(batch_size=7)(pixels)
    coarse = make_extractor(batch_size=7, precision="bf16")(pixels)
    assert coarse.dtype == np.float32
    assert np.abs(coarse - exact).max() < 0.02 * np.abs(exact).max()


def test_fp32_prediction_rounds_weights_of_a_bf16_model(
    loaded: PretrainedBackbone, make_extractor: MakeExtractor, pixels: NDArray[np.uint8]
) -> None:
    before = {key: value.clone() for key, value in loaded.backbone.state_dict().items()}
    trained = make_extractor(batch_size=7, precision="bf16")(pixels)
    plain = make_extractor(batch_size=7)(pixels)
    following = make_extractor(batch_size=7, training_precision="bf16")(pixels)
    assert np.square(following - trained).mean() < 0.5 * np.square(plain - trained).mean()
    assert all(torch.equal(value, before[key]) for key, value in loaded.backbone.state_dict().items())
    same = make_extractor(batch_size=7, precision="bf16", training_precision="bf16")(pixels)
    np.testing.assert_array_equal(same, trained)


def test_normalization_equals_timm(
    loaded: PretrainedBackbone, make_extractor: MakeExtractor, pixels: NDArray[np.uint8]
) -> None:
    mean, std = (
        torch.tensor(x).view(1, 3, 1, 1) for x in (loaded.preprocessing.mean, loaded.preprocessing.std)
    )
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        expected = loaded.backbone.eval()(images).numpy()
    np.testing.assert_allclose(make_extractor(batch_size=7)(pixels), expected, atol=1e-4)


def test_cache_key_depends_on_everything_features_depend_on(make_extractor: MakeExtractor) -> None:
    extractors = [make_extractor(), make_extractor(hflip=True), make_extractor(precision="bf16")]
    keys = [extractor.cache_key(weights) for extractor in extractors for weights in ("a", "b")]
    assert len(set(keys)) == len(keys)
    assert make_extractor(batch_size=9).cache_key("a") == keys[0]


def test_unavailable_device_is_refused() -> None:
    assert resolve_device_name("cpu") == "cpu"
    if not torch.backends.mps.is_available():
        with pytest.raises(ConfigError, match="device 'mps' is not available; use --device auto"):
            resolve_device_name("mps")
    assert resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("fp32", "cuda") == "fp32"
    assert resolve_precision("auto", "mps") == "fp32"
    assert resolve_precision("auto", "cpu") in ("fp32", "bf16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eight scenes in two classes, and altered copies in the other class and in the test split."""
    root = tmp_path_factory.mktemp("copies")
    for name in ("train/a", "train/b", "test/a"):
        (root / name).mkdir(parents=True)
    for i in range(8):
        (root / f"train/{'ab'[i % 2]}/{i}.png").write_bytes(encode(scene(i), "PNG"))
    for kind, data in altered(scene(0)).items():
        (root / f"train/b/{kind}.jpg").write_bytes(data)
    (root / "test/a/cut.jpg").write_bytes(altered(scene(2))["cut"])
    (root / "test/a/broken.jpg").write_bytes(b"broken")
    return root


def scan(folder: Path) -> tuple[ImageDataset, Duplicates]:
    dataset, audit = pixelplay.scan(folder, near_duplicates=True, log=RunLog(quiet=True))
    assert [dataset.paths[i] for i in audit.errors] == ["test/a/broken.jpg"]
    return dataset, audit.duplicates


def test_near_duplicates_are_found_with_conflicts_and_leaks(folder: Path) -> None:
    dataset, duplicates = scan(folder)
    sets = [{dataset.paths[i] for i in members} for members in duplicates.near]
    with_copies = {f"train/b/{kind}.jpg" for kind in altered(scene(0))} | {"train/a/0.png"}
    together = set().union(*(members for members in sets if members & with_copies))
    assert together == with_copies
    assert {"train/a/2.png", "test/a/cut.jpg"} in sets
    assert len(duplicates.sets) == len(duplicates.large) == 0
    assert any("train/a/0.png" in {dataset.paths[i] for i in members} for members in duplicates.conflicts)
    leaks = [{dataset.paths[i] for i in members} for members in duplicates.leaks]
    assert leaks == [{"train/a/2.png", "test/a/cut.jpg"}]


def test_near_duplicates_from_the_cache_are_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = scan(folder)[1]
    _, audit = pixelplay.scan(folder, near_duplicates=True, log=RunLog())
    assert audit.duplicates == first
    assert "searching near-duplicates" not in capsys.readouterr().err  # not searched again


def test_near_duplicates_missed_by_a_failed_read_are_not_cached(tmp_path: Path) -> None:
    data = altered(scene(0))["re-encoded"]
    files = {"a/0.png": encode(scene(0), "PNG"), "b/0.jpg": data, "b/1.png": encode(scene(1), "PNG")}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    dataset, log = open_dataset(str(tmp_path), DataConfig()), RunLog(quiet=True)
    config = TrainConfig(finetune="none")
    backbone = load_backbone("lite0", None, offline=True)
    images = extract_features(dataset, backbone, config, resolve_device(config.compute), log)
    (tmp_path / "b/0.jpg").unlink()
    assert find_near_duplicates(dataset, images, config, log) == []
    (tmp_path / "b/0.jpg").write_bytes(data)
    assert [pair.members for pair in find_near_duplicates(dataset, images, config, log)] == [(0, 1)]


def test_unreadable_files_are_not_near_duplicates(tmp_path: Path) -> None:
    for name, i in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "good.png").write_bytes(encode(scene(i), "PNG"))
        (tmp_path / name / "broken.jpg").write_bytes(b"")
    _, audit = pixelplay.scan(tmp_path, near_duplicates=True, log=RunLog(quiet=True))
    assert len(audit.errors) == 2
    assert len(audit.duplicates.sets) == len(audit.duplicates.conflicts) == 0
