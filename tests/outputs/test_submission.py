import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pixelplay.data.tables import Table, read_table
from pixelplay.errors import ConfigError, DataError
from pixelplay.inference.predictor import Predictions
from pixelplay.outputs.submission import check_submission, write_submission

CLASSES = ("cat", "dog", "owl")


def make_predictions(*names: str, broken: tuple[str, ...] = ()) -> Predictions:
    """Image i has probability i/10 of cat and mostly dog otherwise; broken images have no prediction."""
    probs = np.array([[i / 10, 0.9 - i / 10, 0.1] for i in range(len(names))])
    is_ok = np.array([name not in broken for name in names])
    probs[~is_ok] = np.nan
    return Predictions(
        paths=names,
        status=tuple("ok" if ok else "unreadable" for ok in is_ok),
        errors=tuple("" if ok else "cut short" for ok in is_ok),
        probs=probs,
        pred=np.where(is_ok, np.where(is_ok, probs[:, 0] > 0.45, False) == 0, -1).astype(np.int64),
        classes=CLASSES,
        digests=(b"",) * len(names),
    )


def submit(
    sample: str, predictions: Predictions, folder: Path, probability_of: str | None = None
) -> tuple[str, list[str]]:
    (folder / "sample.csv").write_text(sample, "utf-8", errors="surrogateescape")
    out = folder / "out.csv"
    table = read_table(str(folder / "sample.csv"))
    filling, *gaps = write_submission(predictions, table, str(out), probability_of=probability_of)
    assert filling.startswith("column ") or "columns: probabilities" in filling
    assert sorted(os.listdir(folder)) == ["out.csv", "sample.csv"]
    return out.read_bytes().decode("utf-8", "surrogateescape"), gaps


def test_submission_keeps_header_ids_and_order_of_the_sample(tmp_path: Path) -> None:
    predictions = make_predictions("test/1.jpg", "test/2.jpg", "test/10.jpg")
    text, notes = submit("Image Id,Answer\n10,x\n1,x\n2,x\n", predictions, tmp_path)
    assert text == "Image Id,Answer\n10,dog\n1,dog\n2,dog\n"
    assert notes == []


def test_submission_fills_class_columns_with_probabilities(tmp_path: Path) -> None:
    predictions = make_predictions("test/a.jpg", "test/b.jpg")
    text, notes = submit("id,owl,cat,dog\nb,0.3,0.3,0.4\na,0,0,1\n", predictions, tmp_path)
    assert text == "id,owl,cat,dog\nb,0.1,0.1,0.8\na,0.1,0,0.9\n"
    assert notes == []


def test_submission_probabilities_have_nine_digits(tmp_path: Path) -> None:
    predictions = make_predictions("a.jpg", "b.jpg")
    predictions.probs[0] = [1 / 3, 1e-7, 2 / 3 - 1e-7]
    text, _ = submit("id,cat,dog,owl\na,0,0,0\n", predictions, tmp_path)
    assert text.splitlines()[1] == "a,0.333333333,1e-07,0.666666567"


def test_submission_fills_a_single_class_column_with_its_probability(tmp_path: Path) -> None:
    text, notes = submit("id,cat\na,0.5\n", make_predictions("a.jpg"), tmp_path)
    assert text == "id,cat\na,0\n"
    assert notes == ["the rows do not sum to 1, as the sample lacks 2 classes of the model: dog, owl"]


def test_probability_of_fills_a_single_column_of_any_name(tmp_path: Path) -> None:
    predictions = make_predictions("a.jpg", "b.jpg", broken=())
    text, notes = submit("id,target\nb,0.5\na,0.5\n", predictions, tmp_path, "dog")
    assert text == "id,target\nb,0.8\na,0.9\n"
    assert notes == []


def test_column_of_fractions_is_not_filled_with_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sample\.csv .*'0\.5' .*'target'.* --probability-of owl$"):
        submit("id,target\na,0.5\n", make_predictions("a.jpg"), tmp_path)
    assert os.listdir(tmp_path) == ["sample.csv"]


@pytest.mark.parametrize("cell", ["x", "0", "", "1.0", "nan", "inf", "3"])
def test_placeholder_labels_are_replaced(cell: str, tmp_path: Path) -> None:
    text, _ = submit(f"id,target\na,{cell}\n", make_predictions("a.jpg"), tmp_path)
    assert text == "id,target\na,dog\n"


def test_ids_match_in_any_unicode_normalization(tmp_path: Path) -> None:
    text, notes = submit("id,label\nCaf\u00e9,x\n", make_predictions("Cafe\u0301.jpg"), tmp_path)
    assert (text, notes) == ("id,label\nCaf\u00e9,dog\n", [])


def test_submission_header_keeps_its_spaces(tmp_path: Path) -> None:
    text, _ = submit("Id, Expected \na,x\n", make_predictions("a.jpg"), tmp_path)
    assert text == "Id, Expected \na,dog\n"


PLACEHOLDERS = "names of the predicted classes; the sample's "


@pytest.mark.parametrize(
    ("header", "cells", "probability_of", "note"),
    [
        ("label", "xy", None, f"column 'label': {PLACEHOLDERS}values are no class of the model: x, y"),
        ("label", "00", None, f"column 'label': {PLACEHOLDERS}only value is no class of the model: 0"),
        ("label", ("x", "dog"), None, "column 'label': predicted classes, as in the sample"),
        ("p", "00", "dog", "column 'p': probability of class 'dog'"),
        ("dog", "00", None, "column 'dog': probabilities of the classes that the header names"),
        ("dog,cat", ("0,0", "0,0"), None, "2 columns: probabilities of the classes that the header names"),
    ],
)
def test_submission_says_what_was_written_and_why(
    header: str, cells: Sequence[str], probability_of: str | None, note: str, tmp_path: Path
) -> None:
    table = tmp_path / "sample.csv"
    table.write_text(f"id,{header}\na,{cells[0]}\nb,{cells[1]}\n")
    predictions = make_predictions("a.jpg", "b.jpg")
    notes = write_submission(
        predictions, read_table(str(table)), str(tmp_path / "o.csv"), probability_of=probability_of
    )
    assert notes[0] == note


def test_class_named_like_a_fraction_is_a_label(tmp_path: Path) -> None:
    predictions = replace(make_predictions("a.jpg"), classes=("0.25", "0.5", "0.75"))
    text, _ = submit("id,grade\na,0.5\n", predictions, tmp_path)
    assert text == "id,grade\na,0.5\n"


@pytest.mark.parametrize(
    ("sample", "label", "match"),
    [
        ("id,p\na,0.5\n", "dgo", "'dgo'; did you mean 'dog'"),
        ("id,p\na,0.5\n", "yes", "'yes'; .*cat, dog, owl$"),
        ("id,cat,dog\na,0.5,0.5\n", "dog", r"probability_of='dog' .*one column .*sample\.csv has 2$"),
        ("id,cat\na,0.5\n", "dog", r"probability_of='dog' .*sample\.csv.* 'cat'$"),
    ],
)
def test_probability_of_without_a_matching_column_is_an_error(
    sample: str, label: str, match: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=match):
        submit(sample, make_predictions("a.jpg"), tmp_path, label)


def test_probability_of_without_a_sample_is_an_error() -> None:
    with pytest.raises(ConfigError, match="probability_of='dog' has no effect without --submission"):
        check_submission(None, CLASSES, "out.csv", probability_of="dog")


def test_columns_of_unknown_classes_are_zero_and_noted(tmp_path: Path) -> None:
    text, notes = submit("id,fox,cat,dog,owl\na,1,0,0,0\n", make_predictions("a.jpg"), tmp_path)
    assert text == "id,fox,cat,dog,owl\na,0,0,0.9,0.1\n"
    assert notes == ["filled 1 column with 0, as the model has no such class: fox"]


@pytest.mark.parametrize("name", ["x.y", "x.y.png", "test/x.y.png", "test/x.y", "in/test/x.y"])
def test_ids_match_with_and_without_extension_and_folder(name: str, tmp_path: Path) -> None:
    predictions = make_predictions("/data/in/test/x.y.png", "/data/in/test/z.png")
    text, notes = submit(f"id,label\n{name},x\n/data/in/test/z.png,x\n", predictions, tmp_path)
    assert text == f"id,label\n{name},dog\n/data/in/test/z.png,dog\n"
    assert notes == []


def test_id_does_not_match_part_of_a_file_name(tmp_path: Path) -> None:
    text, notes = submit("id,label\n1,x\n11,x\n", make_predictions("b/11.jpg"), tmp_path)
    assert text == "id,label\n1,x\n11,dog\n"
    assert notes == ["1 id without a readable image kept the sample's value: 1"]


def test_id_that_matches_two_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("id,label\n1,x\n")
    predictions = make_predictions("train/1.jpg", "test/1.jpg")
    with pytest.raises(DataError, match=r"id '1' .* 2 images: train/1\.jpg, test/1\.jpg"):
        write_submission(predictions, read_table(str(tmp_path / "s.csv")), str(tmp_path / "o.csv"))
    assert os.listdir(tmp_path) == ["s.csv"]
    # the folder in the id decides between them
    text, _ = submit_in(tmp_path / "new", "id,label\ntest/1,x\n", predictions)
    assert text == "id,label\ntest/1,dog\n"


def submit_in(folder: Path, sample: str, predictions: Predictions) -> tuple[str, list[str]]:
    folder.mkdir()
    return submit(sample, predictions, folder)


def test_ids_without_a_readable_image_keep_the_sample_value_and_are_noted(tmp_path: Path) -> None:
    predictions = make_predictions("a.jpg", "b.jpg", broken=("b.jpg",))
    text, notes = submit("id,label\nghost,keep1\nb,keep2\na,x\n", predictions, tmp_path)
    assert text == "id,label\nghost,keep1\nb,keep2\na,dog\n"
    assert notes[0] == "2 ids without a readable image kept the sample's value: ghost, b"
    text, _ = submit_in(tmp_path / "p", "id,owl,dog,cat\nghost,7,8,9\na,1,2,3\n", predictions)
    assert text == "id,owl,dog,cat\nghost,7,8,9\na,0.1,0.9,0\n"


def test_images_not_in_the_sample_are_noted(tmp_path: Path) -> None:
    _, notes = submit("id,label\na,x\n", make_predictions("a.jpg", "extra.jpg"), tmp_path)
    assert notes == ["skipped 1 image (unreadable or without an id in the sample): extra.jpg"]


def test_sample_submission_of_other_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("id,label\n900,x\n901,x\n")
    predictions = make_predictions("test/1.jpg", "test/2.jpg")
    with pytest.raises(DataError, match=r"no id of .*s\.csv .*'900'.*'test/1\.jpg'"):
        write_submission(predictions, read_table(str(tmp_path / "s.csv")), str(tmp_path / "o.csv"))
    assert os.listdir(tmp_path) == ["s.csv"]


def test_sample_submission_of_unreadable_images_is_an_error_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("id,label\nb,x\n")
    predictions = make_predictions("a.jpg", "b.jpg", broken=("b.jpg",))
    with pytest.raises(DataError, match=r"s\.csv can be read; first: b\.jpg: cut short$"):
        write_submission(predictions, read_table(str(tmp_path / "s.csv")), str(tmp_path / "o.csv"))


def test_column_of_classes_gets_labels_even_if_named_like_a_class(tmp_path: Path) -> None:
    text, notes = submit("id,cat\na,dog\nb,owl\n", make_predictions("a.jpg", "b.jpg"), tmp_path)
    assert (text, notes) == ("id,cat\na,dog\nb,dog\n", [])
    digits = replace(make_predictions("a.jpg"), classes=("0", "1", "2"))
    text, _ = submit_in(tmp_path / "digits", "id,1\na,0\n", digits)  # a placeholder
    assert text == "id,1\na,0.9\n"


def test_classes_match_in_any_unicode_normalization(tmp_path: Path) -> None:
    predictions = replace(make_predictions("a.jpg"), classes=("cat", "E\u0301pagneul", "owl"))
    text, notes = submit("id,cat,\u00c9pagneul,owl\na,0,0,0\n", predictions, tmp_path)
    assert (text.splitlines()[1], notes) == ("a,0,0.9,0.1", [])
    text, notes = submit_in(tmp_path / "labels", "id,label\na,\u00c9pagneul\n", predictions)
    assert (text.splitlines()[1], notes) == ("a,\u00c9pagneul", [])


def test_repeated_id_is_filled_in_each_time(tmp_path: Path) -> None:
    text, _ = submit("id,label\na,x\na,y\n", make_predictions("a.jpg"), tmp_path)
    assert text == "id,label\na,dog\na,dog\n"


def test_ids_and_labels_are_not_escaped_for_spreadsheets(tmp_path: Path) -> None:
    sample = '=id,label\n=a,x\n"b,""\nb",x\nc\udcff,x\n'
    text, _ = submit(sample, make_predictions("=a.jpg", 'b,"\nb.jpg', "c\udcff.jpg"), tmp_path)
    assert text == '=id,label\n=a,dog\n"b,""\nb",dog\nc\udcff,dog\n'


@pytest.mark.parametrize(
    ("sample", "match"),
    [
        (
            "id,fox,bear\n1,0,1\n",
            r"sample\.csv .*fox, bear, .*class of the model: cat, dog, owl$",
        ),
        ("id\n1\n", r"sample\.csv .*only the column 'id'"),
    ],
)
def test_sample_submission_without_a_column_to_fill_in_is_an_error(
    sample: str, match: str, tmp_path: Path
) -> None:
    path = tmp_path / "sample.csv"
    path.write_text(sample)
    table = read_table(str(path))
    with pytest.raises(DataError, match=match):
        check_submission(table, CLASSES, "out.csv")
    with pytest.raises(DataError, match=match):
        write_submission(make_predictions("1.jpg"), table, str(tmp_path / "out.csv"))
    assert os.listdir(tmp_path) == ["sample.csv"]


def test_submission_must_be_a_csv_file(tmp_path: Path) -> None:
    sample = Table(name="s.csv", columns={"id": ("a",), "label": ("x",)})
    with pytest.raises(ConfigError, match=r"--out out\.parquet .*\.csv"):
        check_submission(sample, CLASSES, "out.parquet")


def test_submission_keeps_the_delimiter_of_the_sample(tmp_path: Path) -> None:
    text, _ = submit("id;label\n1;x\n", make_predictions("1.jpg"), tmp_path)
    assert text == "id;label\n1;dog\n"
