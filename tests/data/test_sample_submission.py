"""Expected classes come from a sample submission, a list or counts."""

from pathlib import Path

import pytest

from dataset_files import assert_notes, assert_refused, assert_words, make_folder
from pixelplay.data.sources import open_dataset


@pytest.mark.parametrize("place", ["data", "."])
def test_sample_submission_in_or_next_to_the_data_gives_expected_classes(place: str, tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    path = tmp_path / place / "Sample_Submission.csv"
    path.write_text("id,cat,dog,emu\n1,0.1,0.2,0.7\n")
    dataset = open_dataset(source)
    assert dataset.expected == {"cat": None, "dog": None, "emu": None}
    assert_notes(dataset, ("expected classes", str(path)))


def test_sample_submission_of_another_task_or_a_damaged_one_is_ignored(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    sample = Path(source) / "sample_submission.csv"
    sample.write_text("id,price\n1,0.5\n")
    assert open_dataset(source).expected == {}
    sample.write_text("id,label\n1\n")
    dataset = open_dataset(source)
    assert dataset.expected == {}
    assert_words(dataset.notes[0], str(sample), "line 2 has 1 cells", "header has 2")


def test_only_the_header_of_a_wide_sample_submission_is_read(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    (tmp_path / "data/sample_submission.csv").write_text("id,cat,dog\n1,0.5,0.5\n2,a line that is cut\n")
    assert open_dataset(source).expected == {"cat": None, "dog": None}


def test_sample_submission_with_one_label_gives_no_expected_classes(tmp_path: Path) -> None:
    folder = Path(make_folder(tmp_path, ["a/1.jpg", "b/2.jpg"]))
    sample = folder / "sample_submission.csv"
    sample.write_text("id,label\n1,a\n2,a\n")
    assert open_dataset(str(folder)).expected == {}
    sample.write_text("id,label\n1,a\n2,c\n")
    assert set(open_dataset(str(folder)).expected) == {"a", "c"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("c.txt", "cat\n\n dog \nemu\ncat\n", {"cat": None, "dog": None, "emu": None}),
        ("c.csv", "class\ncat\ndog\n", {"cat": None, "dog": None}),
        ("c.csv", "cat\ndog\n", {"cat": None, "dog": None}),
        ("c.csv", "class,count\ncat,3\ndog, 40\n", {"cat": 3, "dog": 40}),
        ("c.csv", "class,comment,count\ncat,x,3\ndog,y,40\n", {"cat": 3, "dog": 40}),
        ("c.tsv", "Class\tN\ncat\t3\n", {"cat": 3}),
        ("c.csv", "id,label\n1,cat\n2,cat\n3,emu\n", {"cat": None, "emu": None}),
        ("c.csv", "id,cat,n\n1,0.5,0.5\n", {"cat": None, "n": None}),
    ],
)
def test_classes_file_is_a_list_or_counts_or_a_sample_submission(
    name: str, content: str, expected: dict[str, int | None], tmp_path: Path
) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    path = tmp_path / name
    path.write_text(content)
    assert open_dataset(source, classes=str(path)).expected == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("class,count\ncat,many\n", ["'many'", "'cat'", "whole number"]),
        ("class,count\ncat,1\ncat,2\n", ["two counts", "'cat'"]),
        ("cat,3\ndog,4\n", ["no header", "`class,count`"]),
        ("class\n", ["no rows"]),
        ("id,label\n1,\n", ["no class"]),
    ],
)
def test_unusable_classes_file_is_refused(content: str, words: list[str], tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    path = tmp_path / "classes.csv"
    path.write_text(content)
    assert_refused(source, str(path), *words, classes=str(path))


def test_missing_empty_and_binary_classes_files_are_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path, ["cat/1", "dog/1"])
    path = tmp_path / "classes.txt"
    assert_refused(source, str(path), "No such file or directory", classes=str(path))
    path.write_text("\n")
    assert_refused(source, str(path), "names no class", classes=str(path))
    path.write_bytes(b"\xff\xfe\0")
    assert_refused(source, str(path), "not a text file", classes=str(path))
