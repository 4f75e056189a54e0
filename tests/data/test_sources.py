"""Folders, tables, archives and files are recognised, and a table in an archive gives the labels."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dataset_files import BOTH, Maker, assert_refused, assert_words, make_folder, make_zip, pack, rows
from pixelplay.config import DataConfig
from pixelplay.data.sources import list_images, open_dataset
from pixelplay.errors import ConfigError, ImageError


def test_missing_sources_and_unknown_files_are_refused(tmp_path: Path) -> None:
    assert_refused("nowhere", "nowhere does not exist", "folder, table or zip archive")
    other = tmp_path / "a.jpg"
    other.write_bytes(b"x")
    assert_refused(str(other), str(other), "not a folder, table (.csv, .tsv, .parquet) or zip archive")


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    source = make_zip(tmp_path, ["cat/1", "dog/1"])
    intact = Path(source).read_bytes()
    for damaged, why in (
        (intact.replace(b"PK\x01\x02", b"PK\0\0"), "Bad magic number for central directory"),
        (intact[:-30], "File is not a zip file"),
    ):
        Path(source).write_bytes(damaged)
        assert_refused(source, source, why)


@pytest.mark.parametrize(
    "setting", ["path_column", "label_column", "split_column", "group_column", "images_dir"]
)
def test_table_settings_are_refused_for_a_folder(setting: str, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match=f"not a table, so --{setting.replace('_', '-')} "):
        open_dataset(str(tmp_path), DataConfig(**{setting: "patient"}))


def test_reading_names_does_not_import_heavy_libraries() -> None:
    code = "import sys, pixelplay.data.audit, pixelplay.data.splits, pixelplay.data.sources; "
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}print([m for m in ('torch', 'sklearn', 'pyarrow') if m in sys.modules])",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


# Tables in archives


@pytest.mark.parametrize("folder", ["", "kaggle/"])
def test_a_table_in_an_archive_gives_the_labels(folder: str, tmp_path: Path) -> None:
    table = b"id,label\n1,dog\n2,cat\n"
    sample = b"id,label\n3,cat\n"
    source = pack(
        tmp_path,
        {
            f"{folder}images/1.jpg": b"1",
            f"{folder}images/2.jpg": b"2",
            f"{folder}sample_submission.csv": sample,
            f"{folder}train.csv": table,
            f"{folder}test.csv": b"id\n3\n",
        },
    )
    dataset = open_dataset(source)
    assert rows(dataset) == [(f"{folder}images/1.jpg", "dog", None), (f"{folder}images/2.jpg", "cat", None)]
    assert dataset.expected == {"cat": None}


def test_paths_of_a_table_in_an_archive_start_at_its_folder(tmp_path: Path) -> None:
    table = b"path,label\nx.jpg,k\ny.jpg,m\n"
    members = {"in/x.jpg": b"1", "in/deep/x.jpg": b"2", "in/y.jpg": b"3", "in/t.csv": table}
    assert open_dataset(pack(tmp_path, members)).paths == ("in/x.jpg", "in/y.jpg")


def test_images_dir_is_a_folder_of_the_archive(tmp_path: Path) -> None:
    members = {"train/1.jpg": b"1", "test/1.jpg": b"2", "t.csv": b"id,label\n1,k\n"}
    source = pack(tmp_path, members)
    assert_refused(source, f"{source}/t.csv", "'1'", "test/1.jpg, train/1.jpg", "--images-dir")
    assert open_dataset(source, DataConfig(images_dir="train/")).paths == ("train/1.jpg",)


def test_several_label_tables_in_an_archive_are_refused(tmp_path: Path) -> None:
    table = b"id,label\n1,dog\n"
    source = pack(tmp_path, {"images/1.jpg": b"1", "a.csv": table, "b.csv": table})
    assert_refused(source, source, "a.csv, b.csv")


def test_a_damaged_table_in_an_archive_does_not_hide_the_others(tmp_path: Path) -> None:
    tables = {"a.csv": b"id,label\n1,dog\n2,cat\n", "notes.csv": b"", "z.csv": b"a,b\n1\n"}
    dataset = open_dataset(pack(tmp_path, {"images/1.jpg": b"1", "images/2.jpg": b"2", **tables}))
    assert dataset.paths == ("images/1.jpg", "images/2.jpg")
    first, second = [note for note in dataset.notes if note.startswith("skipped a table")]
    assert_words(first, f"{tmp_path}/data.zip/notes.csv", "no rows")
    assert_words(second, f"{tmp_path}/data.zip/z.csv, line 2 has 1 cells", "header has 2")


def test_an_archive_with_only_a_damaged_label_table_is_refused(tmp_path: Path) -> None:
    tables = {"test.csv": b"id\n1\n", "train.csv": b"id,label\n1\n"}
    source = pack(tmp_path, {"1.jpg": b"1", **tables})
    assert_refused(source, f"{source}/train.csv, line 2 has 1 cells", "header has 2")


def test_an_archive_whose_table_has_no_label_column_is_refused(tmp_path: Path) -> None:
    source = pack(tmp_path, {"1.jpg": b"1", "a.csv": b"id,n\n1,2\n"})
    assert_refused(source, f"{source}/a.csv", "no label column", "id, n", "--label-column")


def test_predictions_in_an_archive_are_refused_as_labels(tmp_path: Path) -> None:
    table = b"path,status,error,prediction,probability,prob_cat,prob_dog\n1.jpg,ok,,cat,0.9,0.9,0.1\n"
    source = pack(tmp_path, {"1.jpg": b"1", "predictions.csv": table})
    assert_refused(source, f"{source}/predictions.csv holds model predictions", "no 'label' column")


# Images without labels


@BOTH
def test_list_images_ignores_the_layout(make: Maker, tmp_path: Path) -> None:
    dataset = list_images(make(tmp_path, ["10.jpg", "2.jpg", "a/b/c.jpg", "a/.x", "t.txt"]))
    assert dataset.paths == ("2.jpg", "10.jpg", "a/b/c.jpg")
    assert (dataset.labels == -1).all()
    assert dataset.skipped == {"hidden": 1, ".txt files": 1}


def test_list_images_keeps_a_missing_file() -> None:
    dataset = list_images("nowhere/1.jpg")
    assert dataset.paths == ("nowhere/1.jpg",)
    with pytest.raises(ImageError, match="no such file") as caught:
        dataset.storage.read(dataset.paths[0])
    assert caught.value.status == "missing"


def test_list_images_of_a_table_keeps_order_repeats_and_missing_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ["b/1.jpg", "b/2.jpg"])
    table = Path(folder) / "ids.csv"
    table.write_text("id\n2\n9\n2\n1\n")
    assert list_images(str(table)).paths == ("b/2.jpg", "9", "b/2.jpg", "b/1.jpg")


def test_an_image_with_an_archive_appended_is_an_image(tmp_path: Path) -> None:
    archive = Path(make_zip(tmp_path, ["a.jpg", "b.jpg"])).read_bytes()
    both = tmp_path / "photo.jpg"
    both.write_bytes(b"\xff\xd8\xff\xe0" + bytes(2000) + archive)
    assert list_images(str(both)).paths == (str(both),)


# --- a table beside folders of images, as in a competition ---

COMPETITION = {
    "train.csv": b"id,label\n1,cat\n2,dog\n3,cat\n",
    "sample_submission.csv": b"id,label\n1,cat\n9,cat\n",
    "train_images/1.jpg": b"a",
    "train_images/2.jpg": b"b",
    "train_images/3.jpg": b"c",
    "test_images/1.jpg": b"d",
    "test_images/9.jpg": b"e",
}


def unpack(root: Path, members: Mapping[str, bytes]) -> str:
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def test_image_folders_beside_a_table_of_labels_are_no_classes(tmp_path: Path) -> None:
    source = unpack(tmp_path / "kaggle", COMPETITION)
    command = f"{source}/train.csv --images-dir {source}/train_images"
    assert_refused(source, "no classes", "train.csv labels their images", f"pass {command}")
    config = DataConfig(images_dir=f"{source}/train_images")
    dataset = open_dataset(f"{source}/train.csv", config)
    assert rows(dataset) == [("1.jpg", "cat", None), ("2.jpg", "dog", None), ("3.jpg", "cat", None)]


@pytest.mark.parametrize("folder", ["", "competition/"])
def test_archive_of_a_competition_is_read_with_its_table(folder: str, tmp_path: Path) -> None:
    dataset = open_dataset(pack(tmp_path, {f"{folder}{name}": x for name, x in COMPETITION.items()}))
    labels = [dataset.classes[label] for label in dataset.labels]
    assert dataset.paths == tuple(f"{folder}train_images/{i}.jpg" for i in (1, 2, 3))
    assert labels == ["cat", "dog", "cat"]


@pytest.mark.parametrize(
    "table",
    [
        b"path,label\ncat/1.jpg,cat\ndog/2.jpg,dog\n",  # as the folders
        b"path,label\nother/7.jpg,x\nother/8.jpg,y\n",  # of other images
        b"path,camera\ncat/1.jpg,A\ndog/2.jpg,B\n",  # without labels
        b"broken\n1,2,3\n",
    ],
)
def test_class_folders_beside_another_table_are_classes(table: bytes, tmp_path: Path) -> None:
    members = {"cat/1.jpg": b"a", "dog/2.jpg": b"b", "list.csv": table}
    assert open_dataset(unpack(tmp_path / "data", members)).classes == ("cat", "dog")
