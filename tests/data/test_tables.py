"""Rows of a table become images with labels, splits and groups; written cells are safe in a spreadsheet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_files import assert_notes, assert_refused, assert_words, make_folder
from pixelplay.config import SPLITS, DataConfig
from pixelplay.data.audit import audit_images
from pixelplay.data.dataset import ImageDataset, natural_key
from pixelplay.data.sources import list_images, open_dataset
from pixelplay.data.tables import escape_label, escape_path, read_table, unescape_label, unescape_path
from pixelplay.errors import DataError

FILES = ("1.jpg", "2.jpg", "3.jpg", "deep/4.jpg", "deep/er/5.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of five files, named as in FILES."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def write(folder: Path, content: str | bytes, name: str = "t.csv") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_parquet(folder: Path, columns: dict[str, Sequence[object]], name: str = "t.parquet") -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / name
    pq.write_table(pa.table({key: pa.array(values) for key, values in columns.items()}), path)
    return str(path)


def labels(dataset: ImageDataset) -> list[str | None]:
    return [dataset.classes[k] if k >= 0 else None for k in dataset.labels]


# Columns


@pytest.mark.parametrize(
    "header",
    ["path,label", "filepath,class", "FileName,Category", "image_id,target", "label_x,id,species", "img, y "],
)
def test_usual_column_names_are_found(header: str, folder: Path) -> None:
    cells = {"path": "1.jpg", "label": "cat"}
    n_other = len(header.split(",")) - 2
    row = ",".join([*["other"] * n_other, cells["path"], cells["label"]])
    dataset = open_dataset(write(folder, f"{header}\n{row}\n"))
    assert (dataset.paths, labels(dataset)) == (("1.jpg",), ["cat"])


def test_preferred_column_names_win(folder: Path) -> None:
    dataset = open_dataset(write(folder, "id,name,path,y,label\n9,x,1.jpg,0,cat\n"))
    assert (dataset.paths, labels(dataset)) == (("1.jpg",), ["cat"])
    assert_notes(
        dataset,
        (f"{folder}/t.csv", "'path'", "'label'"),
        (f"{folder}/t.csv", "3 unused columns", "'id'", "'name'", "'y'"),
    )


def test_column_options_win_over_usual_names(folder: Path) -> None:
    table = write(folder, "path,label,shot,kind,when,who\n1.jpg,a,2.jpg,b,test,p\n2.jpg,a,3.jpg,c,train,p\n")
    config = DataConfig(path_column="shot", label_column="kind", split_column="when", group_column="who")
    dataset = open_dataset(table, config)
    assert (dataset.paths, labels(dataset)) == (("2.jpg", "3.jpg"), ["b", "c"])
    assert [SPLITS[split] for split in dataset.splits] == ["test", "train"]
    assert dataset.groups is not None
    np.testing.assert_array_equal(dataset.groups, [0, 0])


@pytest.mark.parametrize("role", ["path", "label", "split", "group"])
def test_a_column_option_that_is_not_there_gets_a_suggestion(role: str, folder: Path) -> None:
    table = write(folder, "path,label,extra\n1.jpg,cat,x\n")
    config = DataConfig(**{f"{role}_column": "ekstra"})
    assert_refused(table, table, "'ekstra'", "path, label, extra", "did you mean 'extra'?", config=config)


@pytest.mark.parametrize(("header", "role"), [("a,label", "path"), ("path,b", "label")])
def test_a_required_column_that_is_not_found_names_its_option(header: str, role: str, folder: Path) -> None:
    table = write(folder, f"{header}\n1.jpg,cat\n")
    assert_refused(table, table, f"no {role} column", ", ".join(header.split(",")), f"--{role}-column")


def test_a_label_column_without_labels_is_refused(folder: Path) -> None:
    table = write(folder, "path,label\n1.jpg,\n2.jpg, \n")
    assert_refused(table, table, "no label in column 'label'", "--label-column")


def test_rows_keep_their_order_and_an_empty_label_is_unlabelled(folder: Path) -> None:
    dataset = open_dataset(write(folder, "path,label\n3.jpg,10\n1.jpg,\n2.jpg, 2 \n"))
    assert dataset.paths == ("3.jpg", "1.jpg", "2.jpg")
    assert dataset.classes == ("2", "10")
    np.testing.assert_array_equal(dataset.labels, [1, -1, 0])


# Formats


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "path,label\n1.jpg,cat\n2.jpg,dog\n"),
        ("t.csv", "path,label\r\n1.jpg,cat\r\n\r\n2.jpg,dog"),
        ("t.csv", "\n\npath;label\n1.jpg;cat\n2.jpg;dog\n"),
        ("t.csv", "path\tlabel\n1.jpg\tcat\n2.jpg\tdog\n"),
        ("t.tsv", "path\tlabel\tnote, or, two;\n1.jpg\tcat\t\n2.jpg\tdog\t\n"),
        ("T.CSV", "\ufeffpath,label\n1.jpg,cat\n2.jpg,dog\n"),
        ("t.csv", '"path","label","say ""a, b""\nand c"\n"1.jpg","cat",x\n"2.jpg","dog",y\n'),
        ("t.csv", "path,label\n1.jpg,cat\n2.jpg,dog\n".encode("utf-16")),
    ],
    ids=["comma", "crlf", "semicolon", "tab", "tsv", "bom", "quotes", "utf-16"],
)
def test_all_text_formats_are_read_alike(name: str, content: str | bytes, folder: Path) -> None:
    dataset = open_dataset(write(folder, content, name))
    assert (dataset.paths, labels(dataset)) == (("1.jpg", "2.jpg"), ["cat", "dog"])


def test_parquet_cells_equal_csv_cells(folder: Path) -> None:
    nan = float("nan")
    table = write_parquet(
        folder,
        {
            "id": [1, 2, 3],
            "label": [0.0, nan, None],
            "x": [1.5, nan, None],
            "yes": [True, None, False],
            "picture": [b"\xff\xd8", None, b""],
            "image": [{"bytes": b"\xff", "path": "p"}, None, None],
        },
    )
    read = read_table(table)
    assert dict(read.columns) == {
        "id": ("1", "2", "3"),
        "label": ("0", "", ""),
        "x": ("1.5", "", ""),
        "yes": ("True", "", "False"),
    }
    dataset = open_dataset(table)
    assert (dataset.paths, labels(dataset)) == (("1.jpg", "2.jpg", "3.jpg"), ["0", None, None])


def test_a_parquet_file_in_a_partition_folder_gains_no_column(folder: Path) -> None:
    (folder / "year=2024").mkdir()
    table = write_parquet(folder, {"path": ["../1.jpg"], "label": ["cat"]}, "year=2024/t.pq")
    assert list(read_table(table).columns) == ["path", "label"]
    assert len(open_dataset(table)) == 1


def test_paths_that_are_not_utf8_are_found(folder: Path) -> None:
    table = write(folder, b"path,label\ncaf\xe9.jpg,cat\n")
    (folder / "caf\udce9.jpg").write_bytes(b"x")
    dataset = open_dataset(table)
    assert dataset.storage.read(dataset.paths[0]) == b"x"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["no rows"]),
        ("path,label\n", ["no rows"]),
        ("path,label\n1.jpg,a\n\n2.jpg\n", ["line 4", "1 cells", "header has 2"]),
        ("path,label\n1.jpg,a,b\n", ["line 2", "3 cells", "header has 2"]),
        ('path,label\n"1.jpg,a\n', ["line 2", "unexpected end of data"]),
        ("path,path\n1.jpg,a\n", ["'path'", "more than once"]),
    ],
)
def test_a_damaged_text_table_is_refused_with_the_line(content: str, words: list[str], folder: Path) -> None:
    table = write(folder, content)
    assert_refused(table, table, *words)


def test_a_damaged_parquet_file_is_refused(folder: Path) -> None:
    table = write(folder, b"PAR1 and no more", "t.parquet")
    assert_refused(table, table, "Parquet")
    empty = write_parquet(folder, {"path": [], "label": []})
    assert_refused(empty, empty, "no rows")
    twice = folder / "twice.parquet"
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([pa.array(["1"]), pa.array(["2"])], names=["id", "id"]), twice)
    assert_refused(str(twice), str(twice), "'id'", "more than once")


def test_a_folder_is_not_a_table(folder: Path) -> None:
    with pytest.raises(DataError, match="Is a directory"):
        read_table(str(folder))


# Rows → files


@pytest.mark.parametrize(
    "reference", ["deep/er/5.png", "deep/er/5", "er/5", "5", "5.png", "./deep/er/5.png", "er\\5"]
)
def test_an_image_is_found_by_any_ending_of_its_path_without_extension_too(
    reference: str, folder: Path
) -> None:
    dataset = open_dataset(write(folder, f"id,label\n{reference},cat\n"))
    assert dataset.storage.read(dataset.paths[0]) == b"deep/er/5.png"


def test_an_absolute_path_is_used_as_it_is(folder: Path) -> None:
    (folder / "tables").mkdir()
    table = write(folder, f"path,label\n{folder}/1.jpg,cat\n", "tables/t.csv")
    dataset = open_dataset(table)
    assert dataset.storage.read(dataset.paths[0]) == b"1.jpg"


def test_an_id_that_is_also_a_folder_means_the_image(folder: Path) -> None:
    (folder / "5").mkdir()
    assert open_dataset(write(folder, "id,label\n5,cat\n")).paths == ("deep/er/5.png",)


def test_ids_are_looked_up_in_images_dir(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other/1.png").write_bytes(b"other")
    table = write(folder, "id,label\n1,cat\n")
    dataset = open_dataset(table, DataConfig(images_dir=str(folder / "other")))
    assert dataset.paths == ("1.png",)
    assert dataset.storage.read("1.png") == b"other"


def test_a_missing_images_dir_is_refused(folder: Path) -> None:
    table = write(folder, "id,label\n1,cat\n")
    assert_refused(table, "--images-dir nowhere", table, config=DataConfig(images_dir="nowhere"))


def test_an_ambiguous_id_is_refused_with_its_matches(folder: Path) -> None:
    (folder / "deep/1.png").write_bytes(b"x")
    table = write(folder, "id,label\n1,cat\n")
    assert_refused(table, table, "'1'", "1.jpg, deep/1.png", "--images-dir")


def test_a_table_with_mostly_missing_files_is_refused(folder: Path) -> None:
    gone = [f"gone{i}.jpg" for i in range(12)]
    table = write(folder, "path,label\n1.jpg,cat\n" + "".join(f"{name},cat\n" for name in gone))
    assert_refused(table, table, "12 files", str(folder), ", ".join(gone[:3]), "more", "--images-dir")


@pytest.mark.parametrize("again", ["2.jpg", "2", "./2.jpg", "deep/../2.jpg"])
def test_a_repeated_row_is_kept_once_in_any_spelling(again: str, folder: Path) -> None:
    dataset = open_dataset(write(folder, f"path,label\n1.jpg,cat\n2.jpg,dog\n{again},dog\n"))
    assert (dataset.paths, labels(dataset)) == (("1.jpg", "2.jpg"), ["cat", "dog"])
    assert "1 repeated row skipped" in dataset.notes[-1]


@pytest.mark.parametrize(
    ("again", "problem"),
    [
        ("cat,train,x", "another label: 'cat' instead of 'dog'"),
        (",train,x", "another label: None instead of 'dog'"),
        ("dog,test,x", "another split: 'test' instead of 'train'"),
        ("dog,train,y", "another group: 'y' instead of 'x'"),
    ],
)
def test_rows_that_contradict_each_other_are_refused(again: str, problem: str, folder: Path) -> None:
    rows = f"1.jpg,cat,train,x\n2.jpg,dog,train,x\n2,{again}\n"
    table = write(folder, f"path,label,split,group\n{rows}")
    assert_refused(table, f"{table}, row 4 repeats row 3", problem)


def test_a_row_without_a_path_is_refused(folder: Path) -> None:
    table = write(folder, "path,label\n1.jpg,cat\n ,dog\n")
    assert_refused(table, f"{table}, row 3", "no path")


def test_a_label_that_is_not_utf8_is_refused(folder: Path) -> None:
    table = write(folder, b"path,label\n1.jpg,a\n2.jpg,caf\xe9\n")
    assert_refused(table, f"{table}, row 3", "'caf\u00e9'", "UTF-8")


def test_paths_with_other_accent_encoding_are_found(tmp_path: Path) -> None:
    make_folder(tmp_path, ["in/Cafe\u0301.jpg", "in/dog.jpg"])
    (tmp_path / "data/t.csv").write_text("path,label\nCaf\u00e9,cup\ndog,dog\n")
    assert open_dataset(str(tmp_path / "data/t.csv")).paths == ("in/Cafe\u0301.jpg", "in/dog.jpg")


def test_a_few_missing_files_stay_as_unreadable_images(folder: Path) -> None:
    table = write(folder, "path,label\n1.jpg,cat\n2.jpg,dog\ngone.jpg,cat\n")
    dataset = open_dataset(table)
    assert dataset.paths == ("1.jpg", "2.jpg", "gone.jpg")
    assert_words(dataset.notes[1], table, "1 file of 3", "gone.jpg")
    assert audit_images(dataset, decode=False).errors[2].status == "missing"


# Splits and groups


@pytest.mark.parametrize("header", ["split", "Part", "subset"])
def test_splits_are_read_in_any_spelling_and_may_be_empty(header: str, folder: Path) -> None:
    rows = "1.jpg,a,Train\n2.jpg,a,VALID\n3.jpg,a,\ndeep/4.jpg,b,validation\ndeep/er/5.png,b, test\n"
    dataset = open_dataset(write(folder, f"path,label,{header}\n{rows}"))
    np.testing.assert_array_equal(dataset.splits, [0, 1, -1, 1, 2])
    assert_words(dataset.notes[1], f"{folder}/t.csv", "splits", f"'{header}'")


@pytest.mark.parametrize(("cell", "hint"), [("tset", "did you mean 'test'?"), ("17", "an empty cell")])
def test_an_unknown_split_is_refused_with_a_suggestion(cell: str, hint: str, folder: Path) -> None:
    table = write(folder, f"path,label,part\n1.jpg,a,train\n2.jpg,a,{cell}\n")
    assert_refused(table, f"{table}, row 3", repr(cell), "'part'", "train, val, test", hint)


def test_a_split_column_about_something_else_is_ignored_and_noted(folder: Path) -> None:
    table = write(folder, "path,label,part\n1.jpg,a,head\n2.jpg,b,arm\n")
    dataset = open_dataset(table)
    np.testing.assert_array_equal(dataset.splits, [-1, -1])
    assert_words(dataset.notes[1], table, "'part'", "train, val, test")
    words = (f"{table}, row 2", "'head'", "'part'", "train, val, test", "an empty cell")
    assert_refused(table, *words, config=DataConfig(split_column="part"))


def test_a_group_column_is_found_and_an_empty_cell_is_its_own_group(folder: Path) -> None:
    rows = "1.jpg,a,p1\n2.jpg,a,\n3.jpg,b,p1 \ndeep/4.jpg,b,\ndeep/er/5.png,b,p2\n"
    dataset = open_dataset(write(folder, f"path,label,Patient_ID\n{rows}"))
    assert dataset.groups is not None
    np.testing.assert_array_equal(dataset.groups, [0, 1, 0, 2, 3])
    assert_notes(dataset, ("'path'",), (f"{folder}/t.csv", "'Patient_ID'"), ("2 images", "own group"))


def test_a_group_column_with_one_value_is_ignored_and_noted(folder: Path) -> None:
    dataset = open_dataset(write(folder, "path,label,site\n1.jpg,a,x\n2.jpg,b,x\n"))
    assert dataset.groups is None
    assert_words(dataset.notes[1], f"{folder}/t.csv", "'site'", "ignored")


def test_group_options_apply_to_the_paths_of_a_table(folder: Path) -> None:
    rows = "".join(f"{name},a\n" for name in FILES)
    table = write(folder, f"path,label\n{rows}")
    by_folder = open_dataset(table, DataConfig(group_by_folder=True)).groups
    by_regex = open_dataset(table, DataConfig(group_regex="deep|[12]")).groups
    assert by_folder is not None
    assert by_regex is not None
    np.testing.assert_array_equal(by_folder, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(by_regex, [0, 1, 2, 3, 3])


# Tables that PixelPlay writes


@pytest.mark.parametrize("columns", ["prediction,probability", "prediction,prob_a,prob_b"])
def test_predictions_without_labels_are_refused(columns: str, folder: Path) -> None:
    n_probs = columns.count("prob")
    rows = "".join(f"{i}.jpg,ok,,a{',0.5' * n_probs}\n" for i in (1, 2))
    table = write(folder, f"path,status,error,{columns}\n{rows}", "predictions.csv")
    assert_refused(table, f"{table} holds model predictions", "no 'label' column", "labelled images")
    # naming the column is a deliberate choice
    dataset = open_dataset(table, DataConfig(label_column="prediction"))
    assert labels(dataset) == ["a", "a"]


def test_the_label_of_a_table_with_predictions_is_the_truth(folder: Path) -> None:
    header = "path,status,error,repeat,fold,label,prediction,probability,prob_+1,prob_-1,novelty"
    rows = "1.jpg,ok,,0,1,'-1,'+1,0.9,0.9,0.1,0.5\n2.jpg,ok,,0,2,'+1,'+1,0.8,0.8,0.2,0.5\n"
    dataset = open_dataset(write(folder, f"{header}\n{rows}", "oof.csv"))
    assert labels(dataset) == ["-1", "+1"]  # without the escapes of the file


def test_predictions_can_be_predicted_again(folder: Path) -> None:
    table = write(folder, "path,prediction,probability\n1.jpg,a,0.9\n", "predictions.csv")
    assert list_images(table).paths == ("1.jpg",)


CELLS = st.text(alphabet="'=+-@./ab\t", max_size=6)


@given(CELLS)
def test_safe_labels_are_not_formulas_and_can_be_undone(label: str) -> None:
    assert unescape_label(escape_label(label)) == label
    assert not escape_label(label).startswith(("=", "+", "-", "@", "\t", "\r"))


@given(CELLS)
def test_safe_paths_are_not_formulas_and_can_be_undone(path: str) -> None:
    assert not escape_path(path).startswith(("=", "+", "-", "@", "\t", "\r"))
    if not path.startswith("./"):
        assert unescape_path(escape_path(path)) == path


# Splits under other names


@pytest.mark.parametrize(
    ("column", "cells", "splits"),
    [
        ("set", ("train", "Test", "valid"), ["train", "test", "val"]),
        ("partition", ("training", "", "testing"), ["train", None, "test"]),
        ("is_valid", ("True", "FALSE", ""), ["val", "train", None]),
        ("is_test", ("0", "1", "1"), ["train", "test", "test"]),
    ],
)
def test_splits_are_read_from_columns_with_other_usual_names(
    column: str, cells: tuple[str, str, str], splits: list[str | None], folder: Path
) -> None:
    rows = "".join(f"{i}.jpg,{'ab'[i % 2]},{cell}\n" for i, cell in enumerate(cells, start=1))
    dataset = open_dataset(write(folder, f"path,label,{column}\n{rows}"))
    assert [None if split < 0 else SPLITS[split] for split in dataset.splits] == splits
    assert any(f"splits from column '{column}'" in note for note in dataset.notes)


def test_an_unused_fold_column_is_named(folder: Path) -> None:
    dataset = open_dataset(write(folder, "path,label,fold\n1.jpg,a,0\n2.jpg,b,1\n"))
    assert (dataset.splits == -1).all()
    assert any("1 unused column: 'fold'" in note for note in dataset.notes)


# Words for missing labels


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "NA", "null", "-", "N/A"])
def test_words_for_missing_labels_are_no_classes(word: str, folder: Path) -> None:
    table = write(folder, f"path,label\n1.jpg,a\n2.jpg,{word}\n3.jpg,b\ndeep/4.jpg,{word}\n")
    dataset = open_dataset(table)
    assert dataset.classes == ("a", "b")
    assert labels(dataset) == ["a", None, "b", None]
    assert f"2 labels read as missing: {word!r}; --missing-label '' keeps" in dataset.notes[1]
    kept = open_dataset(table, DataConfig(missing_label=""))
    assert kept.classes == tuple(sorted(("a", "b", word), key=natural_key))
    assert not any("read as missing" in note for note in kept.notes)


def test_missing_label_names_the_only_word_for_a_missing_label(folder: Path) -> None:
    table = write(folder, "path,label\n1.jpg,a\n2.jpg,nan\n3.jpg,unknown\n")
    dataset = open_dataset(table, DataConfig(missing_label="unknown"))
    assert labels(dataset) == ["a", "nan", None]


def test_empty_cells_are_missing_without_a_note(folder: Path) -> None:
    dataset = open_dataset(write(folder, "path,label\n1.jpg,a\n2.jpg,\n3.jpg,b\n"))
    assert labels(dataset) == ["a", None, "b"]
    assert not any("read as missing" in note for note in dataset.notes)


# Other kinds of tables


@pytest.mark.parametrize("line", ["sep=;\n", "sep=;\r\n", '"sep=;"\n', "\ufeffsep=;\n"])
def test_excels_separator_line_is_not_a_header(line: str, folder: Path) -> None:
    dataset = open_dataset(write(folder, f"{line}path;label\n1.jpg;a, b\n2.jpg;c\n"))
    assert labels(dataset) == ["a, b", "c"]


def test_a_table_with_a_column_per_class_names_the_cause(folder: Path) -> None:
    table = write(folder, "path,healthy,rust\n1.jpg,1,0\n2.jpg,0,1\n")
    assert_refused(table, "one column per class (healthy, rust)", "column 'label'")


@pytest.mark.parametrize(
    ("column", "label", "is_noted"),
    [("label", "a;b", True), ("label", "a|b", True), ("labels", "a b", True), ("label", "red fox", False)],
)
def test_cells_that_may_hold_several_labels_are_noted(
    column: str, label: str, is_noted: bool, folder: Path
) -> None:
    dataset = open_dataset(write(folder, f"path,{column}\n1.jpg,x\n2.jpg,{label}\n"))
    assert label in dataset.classes
    assert any(f"one class: {label!r}" in note for note in dataset.notes) == is_noted
