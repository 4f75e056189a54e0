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
    """Image i is i/10 cat, and the rest mostly dog; the broken ones have no answer."""
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
    notes = write_submission(predictions, table, str(out), probability_of=probability_of)
    assert sorted(os.listdir(folder)) == ["out.csv", "sample.csv"]
    return out.read_bytes().decode("utf-8", "surrogateescape"), notes


def test_labels_have_the_samples_header_ids_and_order(tmp_path: Path) -> None:
    predictions = make_predictions("test/1.jpg", "test/2.jpg", "test/10.jpg")
    text, notes = submit("Image Id,Answer\n10,x\n1,x\n2,x\n", predictions, tmp_path)
    assert text == "Image Id,Answer\n10,dog\n1,dog\n2,dog\n"
    assert notes == []


def test_probabilities_stand_in_the_columns_of_the_sample(tmp_path: Path) -> None:
    predictions = make_predictions("test/a.jpg", "test/b.jpg")
    text, notes = submit("id,owl,cat,dog\nb,0.3,0.3,0.4\na,0,0,1\n", predictions, tmp_path)
    assert text == "id,owl,cat,dog\nb,0.1,0.1,0.8\na,0.1,0,0.9\n"
    assert notes == []


def test_probabilities_are_exact_to_nine_digits(tmp_path: Path) -> None:
    predictions = make_predictions("a.jpg", "b.jpg")
    predictions.probs[0] = [1 / 3, 1e-7, 2 / 3 - 1e-7]
    text, _ = submit("id,cat,dog,owl\na,0,0,0\n", predictions, tmp_path)
    assert text.splitlines()[1] == "a,0.333333333,1e-07,0.666666567"


def test_one_column_named_like_a_class_is_its_probability(tmp_path: Path) -> None:
    text, notes = submit("id,cat\na,0.5\n", make_predictions("a.jpg"), tmp_path)
    assert text == "id,cat\na,0\n"
    assert notes == [
        "the sample has no column for 2 classes of the model, so its rows do not add up to 1: dog, owl"
    ]


def test_one_column_of_another_name_takes_the_probability_that_is_asked_for(tmp_path: Path) -> None:
    predictions = make_predictions("a.jpg", "b.jpg", broken=())
    text, notes = submit("id,target\nb,0.5\na,0.5\n", predictions, tmp_path, "dog")
    assert text == "id,target\nb,0.8\na,0.9\n"
    assert notes == []


def test_a_column_that_plainly_wants_a_probability_is_not_filled_with_labels(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"sample\.csv has '0\.5' in its column 'target', a probability and no class; say of "
        "which class, as with --probability-of owl$",
    ):
        submit("id,target\na,0.5\n", make_predictions("a.jpg"), tmp_path)
    assert os.listdir(tmp_path) == ["sample.csv"]


@pytest.mark.parametrize("cell", ["x", "0", "", "1.0", "nan", "inf", "3"])
def test_what_may_stand_for_a_label_is_replaced_by_one(cell: str, tmp_path: Path) -> None:
    text, _ = submit(f"id,target\na,{cell}\n", make_predictions("a.jpg"), tmp_path)
    assert text == "id,target\na,dog\n"


def test_ids_are_found_however_accents_are_stored(tmp_path: Path) -> None:
    text, notes = submit("id,label\nCaf\u00e9,x\n", make_predictions("Cafe\u0301.jpg"), tmp_path)
    assert (text, notes) == ("id,label\nCaf\u00e9,dog\n", [])


def test_a_header_is_written_as_it_is(tmp_path: Path) -> None:
    text, _ = submit("Id, Expected \na,x\n", make_predictions("a.jpg"), tmp_path)
    assert text == "Id, Expected \na,dog\n"


@pytest.mark.parametrize(("labels", "n_notes"), [("xy", 1), ("xx", 0), (("x", "dog"), 0), (("x", ""), 0)])
def test_labels_of_other_classes_than_the_samples_are_said(
    labels: Sequence[str], n_notes: int, tmp_path: Path
) -> None:
    sample = f"id,label\na,{labels[0]}\nb,{labels[1]}\n"
    _, notes = submit(sample, make_predictions("a.jpg", "b.jpg"), tmp_path)
    assert notes == ["no label of the sample (x, y) is a class of the model (cat, dog, owl)"] * n_notes


def test_a_class_whose_name_is_a_fraction_is_a_label(tmp_path: Path) -> None:
    predictions = replace(make_predictions("a.jpg"), classes=("0.25", "0.5", "0.75"))
    text, _ = submit("id,grade\na,0.5\n", predictions, tmp_path)
    assert text == "id,grade\na,0.5\n"


@pytest.mark.parametrize(
    ("sample", "label", "line"),
    [
        ("id,p\na,0.5\n", "dgo", "the model has no class 'dgo'; did you mean 'dog'?"),
        ("id,p\na,0.5\n", "yes", "the model has no class 'yes'; it knows cat, dog, owl"),
        (
            "id,cat,dog\na,0.5,0.5\n",
            "dog",
            "probability_of='dog' is for a sample with one column besides the id, and {} has 2",
        ),
        (
            "id,cat\na,0.5\n",
            "dog",
            "probability_of='dog' does not go into {}, which asks for 'cat'",
        ),
    ],
)
def test_a_probability_that_has_no_column_is_refused(
    sample: str, label: str, line: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        submit(sample, make_predictions("a.jpg"), tmp_path, label)
    assert str(caught.value) == line.format(tmp_path / "sample.csv")


def test_a_probability_without_a_sample_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="probability_of='dog' says nothing without --submission; give both"
    ):
        check_submission(None, CLASSES, "out.csv", probability_of="dog")


def test_columns_that_the_model_does_not_know_are_zero_and_named(tmp_path: Path) -> None:
    text, notes = submit("id,fox,cat,dog,owl\na,1,0,0,0\n", make_predictions("a.jpg"), tmp_path)
    assert text == "id,fox,cat,dog,owl\na,0,0,0.9,0.1\n"
    assert notes == ["the model does not know 1 columns of the sample, they are 0: fox"]


@pytest.mark.parametrize("name", ["x.y", "x.y.png", "test/x.y.png", "test/x.y", "in/test/x.y"])
def test_ids_with_and_without_extension_and_folder_are_matched(name: str, tmp_path: Path) -> None:
    predictions = make_predictions("/data/in/test/x.y.png", "/data/in/test/z.png")
    text, notes = submit(f"id,label\n{name},x\n/data/in/test/z.png,x\n", predictions, tmp_path)
    assert text == f"id,label\n{name},dog\n/data/in/test/z.png,dog\n"
    assert notes == []


def test_part_of_a_name_is_no_match(tmp_path: Path) -> None:
    text, notes = submit("id,label\n1,x\n11,x\n", make_predictions("b/11.jpg"), tmp_path)
    assert text == "id,label\n1,x\n11,dog\n"
    assert notes == ["the sample's value stays for 1 id without a readable image: 1"]


def test_an_id_that_fits_two_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("id,label\n1,x\n")
    predictions = make_predictions("train/1.jpg", "test/1.jpg")
    with pytest.raises(
        DataError, match=r"id '1' of the sample fits 2 images: train/1\.jpg, test/1\.jpg; give only the right"
    ):
        write_submission(predictions, read_table(str(tmp_path / "s.csv")), str(tmp_path / "o.csv"))
    assert os.listdir(tmp_path) == ["s.csv"]
    # the folder in the id decides between them
    text, _ = submit_in(tmp_path / "new", "id,label\ntest/1,x\n", predictions)
    assert text == "id,label\ntest/1,dog\n"


def submit_in(folder: Path, sample: str, predictions: Predictions) -> tuple[str, list[str]]:
    folder.mkdir()
    return submit(sample, predictions, folder)


def test_ids_without_a_readable_image_keep_the_samples_value_and_are_listed(tmp_path: Path) -> None:
    predictions = make_predictions("a.jpg", "b.jpg", broken=("b.jpg",))
    text, notes = submit("id,label\nghost,keep1\nb,keep2\na,x\n", predictions, tmp_path)
    assert text == "id,label\nghost,keep1\nb,keep2\na,dog\n"
    assert notes[0] == "the sample's value stays for 2 ids without a readable image: ghost, b"
    text, _ = submit_in(tmp_path / "p", "id,owl,dog,cat\nghost,7,8,9\na,1,2,3\n", predictions)
    assert text == "id,owl,dog,cat\nghost,7,8,9\na,0.1,0.9,0\n"


def test_photographs_that_no_id_names_are_listed(tmp_path: Path) -> None:
    _, notes = submit("id,label\na,x\n", make_predictions("a.jpg", "extra.jpg"), tmp_path)
    assert len(notes) == 1
    assert notes[0].startswith("the submission leaves out 1 image that no id names")
    assert notes[0].endswith("extra.jpg")


def test_a_sample_of_other_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("id,label\n900,x\n901,x\n")
    predictions = make_predictions("test/1.jpg", "test/2.jpg")
    with pytest.raises(DataError, match=r"no id of .*s\.csv names an image: .*'900'.*'test/1\.jpg'"):
        write_submission(predictions, read_table(str(tmp_path / "s.csv")), str(tmp_path / "o.csv"))
    assert os.listdir(tmp_path) == ["s.csv"]


def test_where_nothing_that_is_asked_for_can_be_read_the_reason_is_said(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("id,label\nb,x\n")
    predictions = make_predictions("a.jpg", "b.jpg", broken=("b.jpg",))
    with pytest.raises(DataError, match=r"s\.csv names can be read; first: b\.jpg: cut short$"):
        write_submission(predictions, read_table(str(tmp_path / "s.csv")), str(tmp_path / "o.csv"))


def test_a_column_of_classes_takes_labels_even_if_it_is_named_like_a_class(tmp_path: Path) -> None:
    text, notes = submit("id,cat\na,dog\nb,owl\n", make_predictions("a.jpg", "b.jpg"), tmp_path)
    assert (text, notes) == ("id,cat\na,dog\nb,dog\n", [])
    digits = replace(make_predictions("a.jpg"), classes=("0", "1", "2"))
    text, _ = submit_in(tmp_path / "digits", "id,1\na,0\n", digits)  # a place holder
    assert text == "id,1\na,0.9\n"


def test_classes_are_found_however_accents_are_stored(tmp_path: Path) -> None:
    predictions = replace(make_predictions("a.jpg"), classes=("cat", "E\u0301pagneul", "owl"))
    text, notes = submit("id,cat,\u00c9pagneul,owl\na,0,0,0\n", predictions, tmp_path)
    assert (text.splitlines()[1], notes) == ("a,0,0.9,0.1", [])
    text, notes = submit_in(tmp_path / "labels", "id,label\na,\u00c9pagneul\n", predictions)
    assert (text.splitlines()[1], notes) == ("a,\u00c9pagneul", [])


def test_a_repeated_id_is_answered_each_time(tmp_path: Path) -> None:
    text, _ = submit("id,label\na,x\na,y\n", make_predictions("a.jpg"), tmp_path)
    assert text == "id,label\na,dog\na,dog\n"


def test_ids_and_labels_are_exact_not_spreadsheet_safe(tmp_path: Path) -> None:
    sample = '=id,label\n=a,x\n"b,""\nb",x\nc\udcff,x\n'
    text, _ = submit(sample, make_predictions("=a.jpg", 'b,"\nb.jpg', "c\udcff.jpg"), tmp_path)
    assert text == '=id,label\n=a,dog\n"b,""\nb",dog\nc\udcff,dog\n'


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            "id,fox,bear\n1,0,1\n",
            "has the columns fox, bear, none of which is a class of the model: cat, dog, owl",
        ),
        ("id\n1\n", "has the one column 'id'; a sample submission has an id column and one or more"),
    ],
)
def test_a_sample_that_cannot_be_filled_in_is_refused(sample: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sample.csv"
    path.write_text(sample)
    table = read_table(str(path))
    with pytest.raises(DataError, match=message):
        check_submission(table, CLASSES, "out.csv")
    with pytest.raises(DataError, match=message):
        write_submission(make_predictions("1.jpg"), table, str(tmp_path / "out.csv"))
    assert os.listdir(tmp_path) == ["sample.csv"]


def test_a_submission_is_a_csv_file(tmp_path: Path) -> None:
    sample = Table(name="s.csv", columns={"id": ("a",), "label": ("x",)})
    with pytest.raises(ConfigError, match=r"out\.parquet does not end in \.csv; a submission is a CSV file"):
        check_submission(sample, CLASSES, "out.parquet")


def test_the_samples_delimiter_is_kept(tmp_path: Path) -> None:
    text, _ = submit("id;label\n1;x\n", make_predictions("1.jpg"), tmp_path)
    assert text == "id;label\n1;dog\n"
