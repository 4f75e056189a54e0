"""What tables.py and table_index.py promise: rows become images with labels, parts and groups."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pixelplay.config import SPLITS, DataConfig
from pixelplay.data.audit import audit_images
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sources import scan_source
from pixelplay.data.tables import read_table
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


def message(source: str, config: DataConfig | None = None) -> str:
    with pytest.raises(DataError) as caught:
        scan_source(source, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Columns


@pytest.mark.parametrize(
    "header",
    ["path,label", "filepath,class", "FileName,Category", "image_id,target", "label_x,id,species", "img, y "],
)
def test_usual_column_names_are_found(header: str, folder: Path) -> None:
    cells = {"path": "1.jpg", "label": "cat"}
    n_other = len(header.split(",")) - 2
    row = ",".join([*["other"] * n_other, cells["path"], cells["label"]])
    dataset = scan_source(write(folder, f"{header}\n{row}\n"))
    assert (dataset.paths, labels(dataset)) == (("1.jpg",), ["cat"])


def test_the_most_telling_name_wins(folder: Path) -> None:
    dataset = scan_source(write(folder, "id,name,path,y,label\n9,x,1.jpg,0,cat\n"))
    assert (dataset.paths, labels(dataset)) == (("1.jpg",), ["cat"])
    assert dataset.notes == (f"{folder}/t.csv: images from column 'path', classes from 'label'",)


def test_asked_columns_win_over_usual_ones(folder: Path) -> None:
    table = write(folder, "path,label,shot,kind,when,who\n1.jpg,a,2.jpg,b,test,p\n2.jpg,a,3.jpg,c,train,p\n")
    config = DataConfig(path_column="shot", label_column="kind", split_column="when", group_column="who")
    dataset = scan_source(table, config)
    assert (dataset.paths, labels(dataset)) == (("2.jpg", "3.jpg"), ["b", "c"])
    assert [SPLITS[part] for part in dataset.splits] == ["test", "train"]
    assert dataset.groups is not None
    np.testing.assert_array_equal(dataset.groups, [0, 0])


@pytest.mark.parametrize("role", ["path", "label", "split", "group"])
def test_an_asked_column_that_is_missing_gets_the_columns_and_the_nearest(role: str, folder: Path) -> None:
    table = write(folder, "path,label,extra\n1.jpg,cat,x\n")
    config = DataConfig(**{f"{role}_column": "ekstra"})
    assert message(table, config) == (
        f"{table} has no column 'ekstra'; it has path, label, extra; did you mean 'extra'?"
    )


@pytest.mark.parametrize(("header", "role"), [("a,label", "path"), ("path,b", "label")])
def test_a_column_that_cannot_be_found_is_asked_for(header: str, role: str, folder: Path) -> None:
    table = write(folder, f"{header}\n1.jpg,cat\n")
    assert message(table) == (
        f"{table} has no column that looks like a {role} among {', '.join(header.split(','))}; "
        f"name it with --{role}-column"
    )


def test_a_column_without_any_label_is_named(folder: Path) -> None:
    table = write(folder, "path,label\n1.jpg,\n2.jpg, \n")
    assert message(table) == (
        f"{table} has no label in column 'label'; fill it in or name another with --label-column"
    )


def test_rows_keep_their_order_and_an_empty_label_is_none(folder: Path) -> None:
    dataset = scan_source(write(folder, "path,label\n3.jpg,10\n1.jpg,\n2.jpg, 2 \n"))
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
def test_every_kind_of_text_table_is_read_alike(name: str, content: str | bytes, folder: Path) -> None:
    dataset = scan_source(write(folder, content, name))
    assert (dataset.paths, labels(dataset)) == (("1.jpg", "2.jpg"), ["cat", "dog"])


def test_parquet_cells_read_like_those_of_a_csv(folder: Path) -> None:
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
    dataset = scan_source(table)
    assert (dataset.paths, labels(dataset)) == (("1.jpg", "2.jpg", "3.jpg"), ["0", None, None])


def test_a_parquet_file_in_a_folder_named_like_a_key_gains_no_column(folder: Path) -> None:
    (folder / "year=2024").mkdir()
    table = write_parquet(folder, {"path": ["../1.jpg"], "label": ["cat"]}, "year=2024/t.pq")
    assert list(read_table(table).columns) == ["path", "label"]
    assert len(scan_source(table)) == 1


def test_names_that_are_not_utf8_are_found(folder: Path) -> None:
    table = write(folder, b"path,label\ncaf\xe9.jpg,cat\n")
    (folder / "caf\udce9.jpg").write_bytes(b"x")
    dataset = scan_source(table)
    assert dataset.storage.read(dataset.paths[0]) == b"x"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no rows; a table needs a header and at least one row"),
        ("path,label\n", "has no rows; a table needs a header and at least one row"),
        ("path,label\n1.jpg,a\n\n2.jpg\n", "line 4 has 1 cells where the header has 2; mend the line"),
        ("path,label\n1.jpg,a,b\n", "line 2 has 3 cells where the header has 2; mend the line"),
        ('path,label\n"1.jpg,a\n', "line 2 cannot be read as a table: unexpected end of data"),
        ("path,path\n1.jpg,a\n", "has the column 'path' more than once; rename one of them"),
    ],
)
def test_a_text_table_that_cannot_be_read_says_where(content: str, said: str, folder: Path) -> None:
    table = write(folder, content)
    where = ", " if said.startswith("line") else " "
    assert message(table) == f"{table}{where}{said}"


def test_a_parquet_file_that_cannot_be_read_says_why(folder: Path) -> None:
    table = write(folder, b"PAR1 and no more", "t.parquet")
    assert message(table).startswith(f"{table} cannot be read as Parquet: ")
    empty = write_parquet(folder, {"path": [], "label": []})
    assert message(empty) == f"{empty} has no rows; a table needs a header and at least one row"
    twice = folder / "twice.parquet"
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([pa.array(["1"]), pa.array(["2"])], names=["id", "id"]), twice)
    assert message(str(twice)) == f"{twice} has the column 'id' more than once; rename one of them"


def test_a_table_that_is_a_folder_is_no_table(folder: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_table(str(folder))


# Rows → files


@pytest.mark.parametrize(
    "reference", ["deep/er/5.png", "deep/er/5", "er/5", "5", "5.png", "./deep/er/5.png", "er\\5"]
)
def test_a_photograph_is_found_by_any_ending_of_its_path_without_extension_too(
    reference: str, folder: Path
) -> None:
    dataset = scan_source(write(folder, f"id,label\n{reference},cat\n"))
    assert dataset.storage.read(dataset.paths[0]) == b"deep/er/5.png"


def test_an_absolute_path_is_taken_as_it_is(folder: Path) -> None:
    (folder / "tables").mkdir()
    table = write(folder, f"path,label\n{folder}/1.jpg,cat\n", "tables/t.csv")
    dataset = scan_source(table)
    assert dataset.storage.read(dataset.paths[0]) == b"1.jpg"


def test_an_id_that_is_also_a_folder_means_the_photograph(folder: Path) -> None:
    (folder / "5").mkdir()
    assert scan_source(write(folder, "id,label\n5,cat\n")).paths == ("deep/er/5.png",)


def test_images_dir_is_where_ids_are_looked_up(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other/1.png").write_bytes(b"other")
    table = write(folder, "id,label\n1,cat\n")
    dataset = scan_source(table, DataConfig(images_dir=str(folder / "other")))
    assert dataset.paths == ("1.png",)
    assert dataset.storage.read("1.png") == b"other"


def test_an_images_dir_that_is_not_there_is_named(folder: Path) -> None:
    table = write(folder, "id,label\n1,cat\n")
    assert message(table, DataConfig(images_dir="nowhere")) == (
        f"--images-dir nowhere is no folder; give the one with the images of {table}"
    )


def test_an_ambiguous_id_names_its_candidates(folder: Path) -> None:
    (folder / "deep/1.png").write_bytes(b"x")
    table = write(folder, "id,label\n1,cat\n")
    assert message(table) == (
        f"{table} names '1', which could be 1.jpg, deep/1.png; "
        "write the path out, or say which folder is meant with --images-dir"
    )


def test_missing_files_are_named_and_counted(folder: Path) -> None:
    gone = [f"gone{i}.jpg" for i in range(12)]
    table = write(folder, "path,label\n1.jpg,cat\n" + "".join(f"{name},cat\n" for name in gone))
    assert message(table) == (
        f"{table} names 12 files not to be found in {folder}: {', '.join(gone[:10])} and 2 more; "
        "mend the table or say where they are with --images-dir"
    )


@pytest.mark.parametrize("again", ["2.jpg", "2", "./2.jpg", "deep/../2.jpg"])
def test_a_photograph_listed_twice_is_refused_however_it_is_written(again: str, folder: Path) -> None:
    table = write(folder, f"path,label\n1.jpg,cat\n2.jpg,dog\n{again},dog\n")
    assert message(table) == (f"{table}, row 4 repeats the image of row 3, {again!r}; list each once")


def test_a_row_without_a_path_is_named(folder: Path) -> None:
    table = write(folder, "path,label\n1.jpg,cat\n ,dog\n")
    assert message(table) == f"{table}, row 3 names no image; fill in the path or drop the row"


# Parts and groups


def test_parts_are_read_in_any_spelling_and_may_be_empty(folder: Path) -> None:
    rows = "1.jpg,a,Train\n2.jpg,a,VALID\n3.jpg,a,\ndeep/4.jpg,b,validation\ndeep/er/5.png,b, test\n"
    dataset = scan_source(write(folder, f"path,label,split\n{rows}"))
    np.testing.assert_array_equal(dataset.splits, [0, 1, -1, 1, 2])
    assert dataset.notes[1] == f"{folder}/t.csv: parts from column 'split'"


@pytest.mark.parametrize(("cell", "hint"), [("tset", "; did you mean 'test'?"), ("17", ", or an empty cell")])
def test_an_unknown_part_gets_the_row_and_a_suggestion(cell: str, hint: str, folder: Path) -> None:
    table = write(folder, f"path,label,part\n1.jpg,a,train\n2.jpg,a,{cell}\n")
    assert message(table) == (
        f"{table}, row 3 has the part {cell!r} in column 'part'; expected train, val, test{hint}"
    )


def test_a_part_column_that_is_about_something_else_is_left_alone_and_that_is_said(folder: Path) -> None:
    table = write(folder, "path,label,part\n1.jpg,a,head\n2.jpg,b,arm\n")
    dataset = scan_source(table)
    np.testing.assert_array_equal(dataset.splits, [-1, -1])
    assert (
        dataset.notes[1] == f"{table}: column 'part' names no part such as train, val, test and is not read"
    )
    assert message(table, DataConfig(split_column="split")) == (
        f"{table}, row 2 has the part 'head' in column 'part'; expected train, val, test, or an empty cell"
    )


def test_a_group_column_is_found_and_an_empty_cell_stands_alone(folder: Path) -> None:
    rows = "1.jpg,a,p1\n2.jpg,a,\n3.jpg,b,p1 \ndeep/4.jpg,b,\ndeep/er/5.png,b,p2\n"
    dataset = scan_source(write(folder, f"path,label,Patient_ID\n{rows}"))
    assert dataset.groups is not None
    np.testing.assert_array_equal(dataset.groups, [0, 1, 0, 2, 3])
    assert dataset.notes[1:] == (
        f"{folder}/t.csv: column 'Patient_ID' groups what stays on one side of a split",
        "2 images in no group: each stands alone",
    )


def test_folders_and_patterns_group_the_rows_of_a_table(folder: Path) -> None:
    rows = "".join(f"{name},a\n" for name in FILES)
    table = write(folder, f"path,label\n{rows}")
    by_folder = scan_source(table, DataConfig(group_by_folder=True)).groups
    by_regex = scan_source(table, DataConfig(group_regex="deep|[12]")).groups
    assert by_folder is not None
    assert by_regex is not None
    np.testing.assert_array_equal(by_folder, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(by_regex, [0, 1, 2, 3, 3])


def test_a_few_missing_files_are_rows_that_cannot_be_read(folder: Path) -> None:
    table = write(folder, "path,label\n1.jpg,cat\n2.jpg,dog\ngone.jpg,cat\n")
    dataset = scan_source(table)
    assert dataset.paths == ("1.jpg", "2.jpg", "gone.jpg")
    assert f"{table}: 1 file of 3 not to be found: gone.jpg" in dataset.notes
    assert audit_images(dataset, is_decoded=False).errors[2].status == "missing"


def test_a_table_of_predictions_is_told_from_labels(folder: Path) -> None:
    header = "path,status,error,label,probability,prob_a,prob_b"
    rows = "1.jpg,ok,,a,0.9,0.9,0.1\n2.jpg,ok,,b,0.8,0.2,0.8\n"
    said = f"{folder}/t.csv holds predictions: its labels are a model's answers"
    assert said in scan_source(write(folder, f"{header}\n{rows}")).notes
    reviewed = "1.jpg,ok,,a,1,1,0,b\n2.jpg,ok,,b,1,0,1,b\n"
    assert said not in scan_source(write(folder, f"{header},given\n{reviewed}")).notes
