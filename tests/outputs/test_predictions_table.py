import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pixelplay.data.tables import escape_label, escape_path
from pixelplay.errors import ConfigError, DataError, PixelPlayError
from pixelplay.inference.predictor import Predictions
from pixelplay.outputs import predictions_table as table_module
from pixelplay.outputs.predictions_table import (
    PredictionSummary,
    check_new_file,
    write_predictions,
)
from pixelplay.run_log import RunLog

CLASSES = ("cat", "dog")


def make_predictions(
    paths: Sequence[str], probs: Sequence[float | None], classes: tuple[str, ...] = CLASSES
) -> Predictions:
    """Make rows of two classes; None is an unreadable image."""
    rows = np.array([[np.nan, np.nan] if p is None else [p, 1 - p] for p in probs])
    return Predictions(
        paths=tuple(paths),
        status=tuple("ok" if p is not None else "unreadable" for p in probs),
        errors=tuple("" if p is not None else "cut short" for p in probs),
        probs=rows.reshape(-1, 2),
        pred=np.array([-1 if p is None else int(p < 0.5) for p in probs], dtype=np.int64),
        classes=classes,
        digests=(b"",) * len(paths),
    )


def read_csv(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


def test_csv_has_exactly_these_bytes(tmp_path: Path) -> None:
    chunks = [make_predictions(["a.jpg", "b.jpg"], [0.25, None]), make_predictions(["c.jpg"], [1.0])]
    write_predictions(chunks, CLASSES, str(tmp_path / "p.csv"))
    assert (tmp_path / "p.csv").read_bytes() == (
        b"path,status,error,prediction,probability,prob_cat,prob_dog\n"
        b"a.jpg,ok,,dog,0.750000,0.250000,0.750000\n"
        b"b.jpg,unreadable,cut short,,,,\n"
        b"c.jpg,ok,,cat,1.000000,1.000000,0.000000\n"
    )
    assert os.listdir(tmp_path) == ["p.csv"]


def test_parquet_has_exactly_these_values(tmp_path: Path) -> None:
    third = 1 / 3
    chunks = [make_predictions(["=a.jpg", "b.jpg"], [third, None]), make_predictions(["c.jpg"], [0.9])]
    write_predictions(chunks, CLASSES, str(tmp_path / "p.parquet"))
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.to_pydict() == {
        "path": ["=a.jpg", "b.jpg", "c.jpg"],
        "status": ["ok", "unreadable", "ok"],
        "error": [None, "cut short", None],
        "prediction": ["dog", None, "cat"],
        "probability": [1 - third, None, 0.9],
        "prob_cat": [third, None, 0.9],
        "prob_dog": [1 - third, None, 1 - 0.9],
    }
    assert [str(kind) for kind in table.schema.types] == ["string"] * 4 + ["double"] * 3
    assert os.listdir(tmp_path) == ["p.parquet"]
    assert pq.ParquetFile(tmp_path / "p.parquet").num_row_groups == 1  # few large ones are read fast


def test_probability_is_that_of_the_prediction_even_if_another_is_larger(tmp_path: Path) -> None:
    # with tau > 0 a rare class may be predicted although another is more probable
    chosen = make_predictions(["a.jpg"], [0.6])
    chosen.pred[0] = 1
    write_predictions([chosen], CLASSES, str(tmp_path / "p.csv"))
    assert read_csv(tmp_path / "p.csv")[1] == ["a.jpg", "ok", "", "dog", "0.400000", "0.600000", "0.400000"]


def test_csv_cells_are_not_formulas(tmp_path: Path) -> None:
    names = ["=cmd|' /C calc'!A0.jpg", "+1.jpg", "-1.jpg", "@x.jpg", "\tx.jpg", "\rx.jpg", "ok.jpg"]
    classes = ("=2+3", "+plus")
    write_predictions(
        [replace(make_predictions(names, [0.9, 0.1] * 3 + [0.9], classes), label=("@label",) * 7)],
        classes,
        str(tmp_path / "p.csv"),
        {"fold": ["@fold"] * 7},
    )
    header, *rows = read_csv(tmp_path / "p.csv")
    assert header == [
        "path", "status", "error", "fold", "label", "prediction", "probability", "prob_=2+3", "prob_+plus",
    ]  # fmt: skip
    assert [row[0] for row in rows] == [f"./{name}" for name in names[:6]] + ["ok.jpg"]
    assert [row[5] for row in rows] == ["'=2+3", "'+plus"] * 3 + ["'=2+3"]
    assert {(row[3], row[4]) for row in rows} == {("'@fold", "'@label")}
    assert not [cell for row in [header, *rows] for cell in row if cell.startswith(("=", "+", "-", "@"))]


def test_safe_path_opens_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("=x.jpg").write_bytes(b"1")
    assert Path(escape_path("=x.jpg")).read_bytes() == b"1"
    assert escape_path("/data/=x.jpg") == "/data/=x.jpg"
    assert escape_label("plain") == "plain"


ODD_NAMES = [
    'say "cheese".jpg', "a,b.jpg", "two\nlines.jpg", "a\rb.jpg", "a\r\nb.jpg", " space .jpg",
    "köln 東京 🐈.jpg", "'quote'.jpg", "semi;colon.jpg", "bad\udcff.jpg",
]  # fmt: skip


def test_odd_names_round_trip_through_csv(tmp_path: Path) -> None:
    classes = ("a\rb", 'x"\n,\udcff')
    chunk = replace(make_predictions(ODD_NAMES, [0.9, 0.1] * 5, classes), label=tuple(ODD_NAMES))
    write_predictions([chunk], classes, str(tmp_path / "p.csv"))
    header, *rows = read_csv(tmp_path / "p.csv")
    assert header[-2:] == [f"prob_{name}" for name in classes]
    assert [row[0] for row in rows] == ODD_NAMES
    assert [row[3] for row in rows] == ODD_NAMES
    assert [row[4] for row in rows] == [*classes] * 5
    assert b"bad\xff.jpg" in (tmp_path / "p.csv").read_bytes()


def test_odd_names_are_valid_text_in_parquet(tmp_path: Path) -> None:
    classes = ("plain", "bad\udcff")
    write_predictions(
        [make_predictions(ODD_NAMES, [0.1] * 10, classes)], classes, str(tmp_path / "p.parquet")
    )
    table = pq.read_table(tmp_path / "p.parquet").to_pydict()
    assert table["path"] == [*ODD_NAMES[:-1], "bad\\xff.jpg"]
    assert table["prediction"] == ["bad\\xff"] * 10
    assert list(table)[-2:] == ["prob_plain", "prob_bad\\xff"]


def test_names_that_are_not_unicode_stay_distinct_in_parquet(tmp_path: Path) -> None:
    classes = ("bad\udce4", "bad\udcfc")
    write_predictions([make_predictions(["a"], [0.9], classes)], classes, str(tmp_path / "p.parquet"))
    (row,) = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert (row["prob_bad\\xe4"], row["prob_bad\\xfc"]) == (0.9, pytest.approx(0.1))


def test_extra_columns_and_labels_follow_their_rows_over_chunks(tmp_path: Path) -> None:
    chunks = [
        replace(make_predictions(["a", "b"], [0.9, 0.9]), label=("x", "y")),
        replace(make_predictions(["c"], [0.9]), label=("z",)),
    ]
    write_predictions(chunks, CLASSES, str(tmp_path / "p.csv"), {"fold": ["0", "", "2"]})
    rows = read_csv(tmp_path / "p.csv")
    assert [row[3:5] for row in rows] == [["fold", "label"], ["0", "x"], ["", "y"], ["2", "z"]]


def test_extra_columns_and_labels_follow_their_rows_over_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "GROUP_CELLS", 1)  # a row group per chunk
    chunks = [
        replace(make_predictions(["a", "b"], [0.9, 0.9]), label=("x", "y")),
        replace(make_predictions(["c"], [0.9]), label=("z",)),
    ]
    write_predictions(chunks, CLASSES, str(tmp_path / "p.parquet"), {"fold": ["x", "", "bad\udcff"]})
    found = pq.ParquetFile(tmp_path / "p.parquet")
    assert found.num_row_groups == 2
    assert found.schema_arrow.names[:6] == ["path", "status", "error", "fold", "label", "prediction"]
    assert (table := found.read().to_pydict())["fold"] == ["x", "", "bad\\xff"]
    assert table["label"] == ["x", "y", "z"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_no_predictions_give_a_table_without_rows(ending: str, tmp_path: Path) -> None:
    write_predictions([], CLASSES, str(tmp_path / f"p.{ending}"))
    if ending == "csv":
        assert len(read_csv(tmp_path / "p.csv")) == 1
    else:
        assert pq.read_table(tmp_path / "p.parquet").num_rows == 0


def fail_after_one(error: BaseException) -> Iterator[Predictions]:
    yield make_predictions(["a.jpg"], [0.25])
    raise error


def test_interrupt_keeps_finished_rows_in_a_partial_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_predictions(fail_after_one(KeyboardInterrupt()), CLASSES, str(tmp_path / "p.csv"))
    assert os.listdir(tmp_path) == ["p.csv.partial"]
    assert read_csv(tmp_path / "p.csv.partial")[1:] == [
        ["a.jpg", "ok", "", "dog", "0.750000", "0.250000", "0.750000"]
    ]
    with pytest.raises(KeyboardInterrupt):
        write_predictions(fail_after_one(KeyboardInterrupt()), CLASSES, str(tmp_path / "p.parquet"))
    assert sorted(os.listdir(tmp_path)) == ["p.csv.partial", "p.parquet.partial"]
    assert pq.read_table(tmp_path / "p.parquet.partial").column("path").to_pylist() == ["a.jpg"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_error_keeps_only_finished_rows(ending: str, tmp_path: Path) -> None:
    def fail_at_once() -> Iterator[Predictions]:
        raise DataError("none readable")
        yield

    with pytest.raises(DataError):
        write_predictions(fail_at_once(), CLASSES, str(tmp_path / f"p.{ending}"))
    assert os.listdir(tmp_path) == []
    with pytest.raises(PixelPlayError) as caught:
        write_predictions(fail_after_one(DataError("gone")), CLASSES, str(tmp_path / f"p.{ending}"))
    assert str(caught.value) == f"gone; 1 finished row in {tmp_path}/p.{ending}.partial"
    assert os.listdir(tmp_path) == [f"p.{ending}.partial"]


@pytest.mark.parametrize("name", ["predictions.csv", "oof.csv", "OOF.csv"])
def test_records_of_a_run_are_never_overwritten(name: str, tiny_run: Path, tmp_path: Path) -> None:
    for force in (False, True):
        with pytest.raises(ConfigError, match="a record of the run; choose another --out"):
            check_new_file(str(tiny_run / name), force=force)
    check_new_file(str(tiny_run / "mine.csv"), force=False)
    check_new_file(str(tmp_path / name), force=False)
    (tmp_path / "config.json").write_text('{"of": "another program"}')
    check_new_file(str(tmp_path / name), force=False)


def test_old_table_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    old = tmp_path / "p.csv"
    old.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_predictions(fail_after_one(KeyboardInterrupt()), CLASSES, str(old))
    assert old.read_text() == "old"
    write_predictions([make_predictions(["a.jpg"], [0.25])], CLASSES, str(old))
    assert read_csv(old)[1][0] == "a.jpg"
    assert os.listdir(tmp_path) == ["p.csv"]


def test_existing_table_is_refused_without_force(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"p\.csv already exists; choose another --out or use --force"):
        check_new_file(str(path), force=False)
    check_new_file(str(path), force=True)
    os.symlink(tmp_path / "nowhere", tmp_path / "link.csv")
    with pytest.raises(ConfigError, match="exists"):
        check_new_file(str(tmp_path / "link.csv"), force=False)


def test_folder_is_never_replaced_by_a_table(tmp_path: Path) -> None:
    (tmp_path / "p.csv").mkdir()
    for force in (False, True):
        with pytest.raises(ConfigError, match=r"p\.csv is a folder; choose another --out$"):
            check_new_file(str(tmp_path / "p.csv"), force=force)


def test_unwritable_table_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"p\.txt must end in \.csv or \.parquet"):
        check_new_file(str(tmp_path / "p.txt"), force=False)
    with pytest.raises(ConfigError, match="deep of --out does not exist; create it first"):
        check_new_file(str(tmp_path / "deep" / "p.csv"), force=False)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o555)
        with pytest.raises(ConfigError, match="closed of --out is not writable; choose another"):
            check_new_file(str(tmp_path / "closed" / "p.csv"), force=False)
    check_new_file(str(tmp_path / "P.CSV"), force=False)


def test_numbers_are_plain_decimals(tmp_path: Path) -> None:
    write_predictions([make_predictions(["a"], [1e-9])], CLASSES, str(tmp_path / "p.csv"))
    cells = read_csv(tmp_path / "p.csv")[1][4:]
    assert cells == ["1.000000", "0.000000", "1.000000"]
    assert all(math.isfinite(float(cell)) for cell in cells)


def test_csv_rows_are_flushed_after_each_chunk(tmp_path: Path) -> None:
    partial = tmp_path / "p.csv.partial"
    line_counts: list[int] = []

    def chunks() -> Iterator[Predictions]:
        for name in "abc":
            line_counts.append(len(io.StringIO(partial.read_text("utf-8")).readlines()))
            yield make_predictions([name], [0.5])

    write_predictions(chunks(), CLASSES, str(tmp_path / "p.csv"))
    assert line_counts[1:] == [2, 3]


LETTERS = tuple("abcdefghij")


def chunk(*pred: int, novelty: float | None = None) -> Predictions:
    n = len(pred)
    return Predictions(
        paths=tuple(f"{i}.jpg" for i in range(n)),
        status=tuple("ok" if k >= 0 else "missing" for k in pred),
        errors=tuple("" if k >= 0 else "no such file" for k in pred),
        probs=np.full((n, len(LETTERS)), 0.1),
        pred=np.array(pred),
        classes=LETTERS,
        digests=(b"",) * n,
        novelty=None if novelty is None else np.full(n, novelty),
    )


def test_prediction_summary_adds_up_chunks() -> None:
    summary = PredictionSummary()
    for each in (chunk(0, 0, 1, novelty=0.5), chunk(0, -1, novelty=0.96)):
        summary.add(each)
    assert (summary.n, summary.n_unreadable, summary.n_unusual, summary.n_abstained) == (5, 1, 1, None)
    assert summary.errors == ["1.jpg: no such file"]
    assert summary.describe("p.csv") == (
        "5 images → p.csv (a 3, b 1)\n1 unreadable (see the error column) · 1 unusual (novelty ≥ 0.95)"
    )
    assert summary.describe("p.csv", submission=True).endswith("\n1 unreadable · 1 unusual (novelty ≥ 0.95)")


def test_prediction_summary_names_the_most_frequent_classes() -> None:
    summary = PredictionSummary()
    summary.add(chunk(*range(len(LETTERS)), 9))
    assert summary.describe("p.csv") == "11 images → p.csv (j 2, a 1, b 1, 7 more classes)"


def test_unreadable_images_are_noted_or_refused_if_all_are() -> None:
    summary, log = PredictionSummary(), RunLog(quiet=True)
    summary.add(chunk(0, -1))
    summary.log_unreadable("out.csv", log)
    assert log.notes == ["could not read 1 of 2 images; see the error column"]
    nothing = PredictionSummary()
    nothing.add(chunk(-1))
    with pytest.raises(DataError) as caught:
        nothing.log_unreadable("out.csv", log)
    assert str(caught.value) == (
        "could not read any of 1 image; see the error column of out.csv; first: 0.jpg: no such file"
    )
