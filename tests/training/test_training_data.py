import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import draw_folder, draw_of_class
from images import damaged_files, encode
from pixelplay.config import TrainConfig
from pixelplay.data.audit import digest_bytes
from pixelplay.data.sources import open_dataset
from pixelplay.errors import DataError, ImageError
from pixelplay.model.features import ImageFeatures
from pixelplay.training.training_data import TrainingData, build_training_data


def read(root: Path, config: TrainConfig | None = None, broken: frozenset[str] = frozenset()) -> TrainingData:
    """Build the training data of a folder; the features of an image are its position, without a network."""
    dataset = open_dataset(str(root))
    errors = {
        i: ImageError(path, "unreadable", "cut short")
        for i, path in enumerate(dataset.paths)
        if path.rsplit("/", 1)[-1] in broken
    }
    values = np.arange(len(dataset), dtype=np.float32)[:, None].repeat(2, axis=1)
    values[list(errors)] = np.nan
    digests = [
        b"" if i in errors else digest_bytes(dataset.storage.read(p)) for i, p in enumerate(dataset.paths)
    ]
    images = ImageFeatures(values=values, digests=digests, errors=errors)
    return build_training_data(dataset, images, config or TrainConfig(finetune="none"))


def test_unreadable_images_are_left_out_and_other_rows_stay_aligned(drawn_classes: Path) -> None:
    dataset = open_dataset(str(drawn_classes))
    (drawn_classes / "dots" / "cut.jpg").write_bytes(damaged_files()["cut.jpg"][0])
    data = read(drawn_classes, broken=frozenset({"cut.jpg"}))
    everything = open_dataset(str(drawn_classes)).paths
    assert data.dataset.paths == dataset.paths
    assert [everything[int(row[0])] for row in data.features] == list(dataset.paths)
    assert data.digests == tuple(digest_bytes(dataset.storage.read(path)) for path in dataset.paths)
    names = [path.split("/")[0] for path in data.dataset.paths]
    assert [data.classes[k] for k in data.labels] == names
    assert np.isfinite(data.features).all()


def test_fit_rows_and_test_split_are_disjoint_and_complete(drawn_classes: Path) -> None:
    data = read(drawn_classes)
    both = np.concatenate([data.fit_rows, data.split.test])
    np.testing.assert_array_equal(np.sort(both), np.arange(48))
    np.testing.assert_array_equal(data.fit_rows, np.sort(data.fit_rows))
    assert data.known_classes == data.classes == ("bars", "dots", "rings")
    np.testing.assert_array_equal(data.fit_counts, np.bincount(data.labels[data.fit_rows], minlength=3))


def test_fit_rows_are_train_and_val(tmp_path: Path) -> None:
    for split, n in (("train", 6), ("val", 3), ("test", 2)):
        draw_folder(tmp_path / split, {"bars": n, "dots": n}, first_seed=100 * n)
    data = read(tmp_path)
    splits = np.array([path.split("/")[0] for path in data.dataset.paths])
    assert sorted(splits[data.fit_rows]) == ["train"] * 12 + ["val"] * 6
    assert set(splits[data.split.test]) == {"test"}
    np.testing.assert_array_equal(data.fit_counts, [9, 9])


def test_classes_only_in_test_split_come_last(tmp_path: Path) -> None:
    draw_folder(tmp_path / "train", {"bars": 4, "rings": 4})
    draw_folder(tmp_path / "test", {"bars": 2, "dots": 2, "rings": 2}, first_seed=50)
    data = read(tmp_path)
    assert data.classes == ("bars", "rings", "dots")
    assert data.known_classes == ("bars", "rings")
    assert data.n_known == 2
    names = [path.split("/")[1] for path in data.dataset.paths]
    assert [data.classes[k] for k in data.labels] == names
    assert (data.labels[data.fit_rows] < 2).all()
    np.testing.assert_array_equal(data.fit_counts, [4, 4])


def test_training_duplicates_of_test_images_are_removed(tmp_path: Path) -> None:
    draw_folder(tmp_path / "train", {"bars": 4, "dots": 4})
    draw_folder(tmp_path / "test", {"bars": 2, "dots": 2}, first_seed=50)
    shutil.copy(tmp_path / "test" / "bars" / "000.jpg", tmp_path / "train" / "bars" / "duplicate.jpg")
    data = read(tmp_path)
    paths = np.array(data.dataset.paths)
    assert paths[data.split.removed].tolist() == ["train/bars/duplicate.jpg"]
    assert paths[data.split.duplicated].tolist() == ["test/bars/000.jpg"]
    assert "train/bars/duplicate.jpg" not in paths[data.fit_rows]
    np.testing.assert_array_equal(data.fit_counts, [4, 4])


@pytest.mark.parametrize("seed", range(5))
def test_exact_duplicates_stay_in_one_split(seed: int, tmp_path: Path) -> None:
    draw_folder(tmp_path, {"bars": 8, "dots": 8})
    for i in range(6):
        content = encode(draw_of_class("bars", 900 + i // 3), "PNG")
        (tmp_path / "bars" / f"same{i}.png").write_bytes(content)
    data = read(tmp_path, TrainConfig(finetune="none", seed=seed, test_frac=0.4))
    is_test = np.isin(np.arange(len(data.dataset)), data.split.test)
    assert len(data.duplicates.sets) == 2
    for members in data.duplicates.sets:
        assert len({bool(is_test[i]) for i in members}) == 1


def test_class_without_readable_images_is_an_error(tmp_path: Path) -> None:
    draw_folder(tmp_path, {"bars": 4, "dots": 4})
    (tmp_path / "rings").mkdir()
    (tmp_path / "rings" / "cut.jpg").write_bytes(damaged_files()["cut.jpg"][0])
    with pytest.raises(DataError, match=r"class 'rings' has 1 "):
        read(tmp_path, broken=frozenset({"cut.jpg"}))
