import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import draw_folder, draw_of_class
from images import damaged_files, encode
from pixelplay.config import TrainConfig
from pixelplay.data.audit import digest_bytes
from pixelplay.data.sources import scan_source
from pixelplay.errors import DataError, ImageError
from pixelplay.model.features import PhotographFeatures
from pixelplay.training.training_data import Material, sort_out


def read(root: Path, config: TrainConfig | None = None, broken: frozenset[str] = frozenset()) -> Material:
    """Sort out a folder whose features are each photograph's own number, without a network."""
    index = scan_source(str(root))
    errors = {
        i: ImageError(path, "unreadable", "cut short")
        for i, path in enumerate(index.paths)
        if path.rsplit("/", 1)[-1] in broken
    }
    values = np.arange(len(index), dtype=np.float32)[:, None].repeat(2, axis=1)
    values[list(errors)] = np.nan
    digests = [b"" if i in errors else digest_bytes(index.store.read(p)) for i, p in enumerate(index.paths)]
    photographs = PhotographFeatures(values=values, digests=digests, errors=errors)
    return sort_out(index, photographs, config or TrainConfig(tune="probe"))


def test_unreadable_photographs_are_left_out_and_the_rest_keeps_its_rows(drawn_classes: Path) -> None:
    index = scan_source(str(drawn_classes))
    (drawn_classes / "dots" / "cut.jpg").write_bytes(damaged_files()["cut.jpg"][0])
    material = read(drawn_classes, broken=frozenset({"cut.jpg"}))
    everything = scan_source(str(drawn_classes)).paths
    assert material.index.paths == index.paths
    assert [everything[int(row[0])] for row in material.features] == list(index.paths)
    assert material.digests == tuple(digest_bytes(index.store.read(path)) for path in index.paths)
    names = [path.split("/")[0] for path in material.index.paths]
    assert [material.classes[k] for k in material.labels] == names
    assert np.isfinite(material.features).all()


def test_learned_and_tested_photographs_are_disjoint_and_complete(drawn_classes: Path) -> None:
    material = read(drawn_classes)
    both = np.concatenate([material.learn, material.parts.split.test])
    np.testing.assert_array_equal(np.sort(both), np.arange(48))
    np.testing.assert_array_equal(material.learn, np.sort(material.learn))
    assert material.known_classes == material.classes == ("bars", "dots", "rings")
    np.testing.assert_array_equal(
        material.learn_counts, np.bincount(material.labels[material.learn], minlength=3)
    )


def test_train_and_val_are_learned_from_together(tmp_path: Path) -> None:
    for part, n in (("train", 6), ("val", 3), ("test", 2)):
        draw_folder(tmp_path / part, {"bars": n, "dots": n}, first_seed=100 * n)
    material = read(tmp_path)
    parts = np.array([path.split("/")[0] for path in material.index.paths])
    assert sorted(parts[material.learn]) == ["train"] * 12 + ["val"] * 6
    assert set(parts[material.parts.split.test]) == {"test"}
    np.testing.assert_array_equal(material.learn_counts, [9, 9])


def test_classes_that_only_the_test_part_knows_come_last(tmp_path: Path) -> None:
    draw_folder(tmp_path / "train", {"bars": 4, "rings": 4})
    draw_folder(tmp_path / "test", {"bars": 2, "dots": 2, "rings": 2}, first_seed=50)
    material = read(tmp_path)
    assert material.classes == ("bars", "rings", "dots")
    assert material.known_classes == ("bars", "rings")
    assert material.n_known == 2
    names = [path.split("/")[1] for path in material.index.paths]
    assert [material.classes[k] for k in material.labels] == names
    assert (material.labels[material.learn] < 2).all()
    np.testing.assert_array_equal(material.learn_counts, [4, 4])


def test_training_copies_of_test_photographs_are_not_learned_from(tmp_path: Path) -> None:
    draw_folder(tmp_path / "train", {"bars": 4, "dots": 4})
    draw_folder(tmp_path / "test", {"bars": 2, "dots": 2}, first_seed=50)
    shutil.copy(tmp_path / "test" / "bars" / "000.jpg", tmp_path / "train" / "bars" / "copy.jpg")
    material = read(tmp_path)
    paths = np.array(material.index.paths)
    assert paths[material.parts.removed].tolist() == ["train/bars/copy.jpg"]
    assert paths[material.parts.copied].tolist() == ["test/bars/000.jpg"]
    assert "train/bars/copy.jpg" not in paths[material.learn]
    np.testing.assert_array_equal(material.learn_counts, [4, 4])


@pytest.mark.parametrize("seed", range(5))
def test_exact_copies_stay_on_one_side(seed: int, tmp_path: Path) -> None:
    draw_folder(tmp_path, {"bars": 8, "dots": 8})
    for i in range(6):
        data = encode(draw_of_class("bars", 900 + i // 3), "PNG")
        (tmp_path / "bars" / f"same{i}.png").write_bytes(data)
    material = read(tmp_path, TrainConfig(tune="probe", seed=seed, test_frac=0.4))
    on_test = np.isin(np.arange(len(material.index)), material.parts.split.test)
    assert len(material.duplicates.sets) == 2
    for members in material.duplicates.sets:
        assert len({bool(on_test[i]) for i in members}) == 1


def test_a_class_without_a_readable_photograph_is_named(tmp_path: Path) -> None:
    draw_folder(tmp_path, {"bars": 4, "dots": 4})
    (tmp_path / "rings").mkdir()
    (tmp_path / "rings" / "cut.jpg").write_bytes(damaged_files()["cut.jpg"][0])
    with pytest.raises(DataError, match=r"class 'rings' has 1 photograph .*none can be read; replace"):
        read(tmp_path, broken=frozenset({"cut.jpg"}))
