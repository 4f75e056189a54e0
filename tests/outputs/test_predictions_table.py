import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pixelplay.data.tables import safe_label, safe_path
from pixelplay.errors import ConfigError, DataError, PixelPlayError
from pixelplay.inference.predictor import Predictions
from pixelplay.outputs import predictions_table as table_module
from pixelplay.outputs.predictions_table import check_new_file, write_predictions

CLASSES = ("cat", "dog")


def make_predictions(
    paths: Sequence[str], probs: Sequence[float | None], classes: tuple[str, ...] = CLASSES
) -> Predictions:
    """Rows of two classes; None for one that could not be read."""
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


def test_a_csv_has_exactly_these_bytes(tmp_path: Path) -> None:
    chunks = [make_predictions(["a.jpg", "b.jpg"], [0.25, None]), make_predictions(["c.jpg"], [1.0])]
    write_predictions(chunks, CLASSES, str(tmp_path / "p.csv"))
    assert (tmp_path / "p.csv").read_bytes() == (
        b"path,status,error,label,probability,prob_cat,prob_dog\n"
        b"a.jpg,ok,,dog,0.750000,0.250000,0.750000\n"
        b"b.jpg,unreadable,cut short,,,,\n"
        b"c.jpg,ok,,cat,1.000000,1.000000,0.000000\n"
    )
    assert os.listdir(tmp_path) == ["p.csv"]


def test_a_parquet_file_is_exact(tmp_path: Path) -> None:
    third = 1 / 3
    chunks = [make_predictions(["=a.jpg", "b.jpg"], [third, None]), make_predictions(["c.jpg"], [0.9])]
    write_predictions(chunks, CLASSES, str(tmp_path / "p.parquet"))
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.to_pydict() == {
        "path": ["=a.jpg", "b.jpg", "c.jpg"],
        "status": ["ok", "unreadable", "ok"],
        "error": [None, "cut short", None],
        "label": ["dog", None, "cat"],
        "probability": [1 - third, None, 0.9],
        "prob_cat": [third, None, 0.9],
        "prob_dog": [1 - third, None, 1 - 0.9],
    }
    assert [str(kind) for kind in table.schema.types] == ["string"] * 4 + ["double"] * 3
    assert os.listdir(tmp_path) == ["p.parquet"]
    assert pq.ParquetFile(tmp_path / "p.parquet").num_row_groups == 1  # few large ones are read fast


def test_probability_is_that_of_the_label_even_where_another_is_larger(tmp_path: Path) -> None:
    # with tau > 0 a rare class may be answered although another is more probable
    chosen = make_predictions(["a.jpg"], [0.6])
    chosen.pred[0] = 1
    write_predictions([chosen], CLASSES, str(tmp_path / "p.csv"))
    assert read_csv(tmp_path / "p.csv")[1] == ["a.jpg", "ok", "", "dog", "0.400000", "0.600000", "0.400000"]


def test_a_spreadsheet_runs_no_cell_as_a_formula(tmp_path: Path) -> None:
    names = ["=cmd|' /C calc'!A0.jpg", "+1.jpg", "-1.jpg", "@x.jpg", "\tx.jpg", "\rx.jpg", "ok.jpg"]
    classes = ("=2+3", "+plus")
    write_predictions(
        [make_predictions(names, [0.9, 0.1] * 3 + [0.9], classes)],
        classes,
        str(tmp_path / "p.csv"),
        {"given": ["@given"] * 7},
    )
    header, *rows = read_csv(tmp_path / "p.csv")
    assert header == ["path", "status", "error", "given", "label", "probability", "prob_=2+3", "prob_+plus"]
    assert [row[0] for row in rows] == [f"./{name}" for name in names[:6]] + ["ok.jpg"]
    assert [row[4] for row in rows] == ["'=2+3", "'+plus"] * 3 + ["'=2+3"]
    assert {row[3] for row in rows} == {"'@given"}
    assert not [cell for row in [header, *rows] for cell in row if cell.startswith(("=", "+", "-", "@"))]


def test_a_safe_path_still_opens_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("=x.jpg").write_bytes(b"1")
    assert Path(safe_path("=x.jpg")).read_bytes() == b"1"
    assert safe_path("/data/=x.jpg") == "/data/=x.jpg"
    assert safe_label("plain") == "plain"


ODD_NAMES = [
    'say "cheese".jpg', "a,b.jpg", "two\nlines.jpg", "a\rb.jpg", "a\r\nb.jpg", " space .jpg",
    "köln 東京 🐈.jpg", "'quote'.jpg", "semi;colon.jpg", "bad\udcff.jpg",
]  # fmt: skip


def test_odd_names_come_back_from_csv_as_they_were(tmp_path: Path) -> None:
    classes = ("a\rb", 'x"\n,\udcff')
    chunk = make_predictions(ODD_NAMES, [0.9, 0.1] * 5, classes)
    write_predictions([chunk], classes, str(tmp_path / "p.csv"), {"given": ODD_NAMES})
    header, *rows = read_csv(tmp_path / "p.csv")
    assert header[-2:] == [f"prob_{name}" for name in classes]
    assert [row[0] for row in rows] == ODD_NAMES
    assert [row[3] for row in rows] == ODD_NAMES
    assert [row[4] for row in rows] == [*classes] * 5
    assert b"bad\xff.jpg" in (tmp_path / "p.csv").read_bytes()


def test_odd_names_come_back_from_parquet_as_valid_text(tmp_path: Path) -> None:
    classes = ("plain", "bad\udcff")
    write_predictions(
        [make_predictions(ODD_NAMES, [0.1] * 10, classes)], classes, str(tmp_path / "p.parquet")
    )
    table = pq.read_table(tmp_path / "p.parquet").to_pydict()
    assert table["path"] == [*ODD_NAMES[:-1], "bad\\xff.jpg"]
    assert table["label"] == ["bad\\xff"] * 10
    assert list(table)[-2:] == ["prob_plain", "prob_bad\\xff"]


def test_names_that_are_no_unicode_stay_apart_in_parquet(tmp_path: Path) -> None:
    classes = ("bad\udce4", "bad\udcfc")
    write_predictions([make_predictions(["a"], [0.9], classes)], classes, str(tmp_path / "p.parquet"))
    (row,) = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert (row["prob_bad\\xe4"], row["prob_bad\\xfc"]) == (0.9, pytest.approx(0.1))


def test_further_columns_follow_their_rows_over_chunks(tmp_path: Path) -> None:
    chunks = [make_predictions(["a", "b"], [0.9, 0.9]), make_predictions(["c"], [0.9])]
    write_predictions(
        chunks, CLASSES, str(tmp_path / "p.csv"), {"fold": ["0", "", "2"], "given": list("xyz")}
    )
    rows = read_csv(tmp_path / "p.csv")
    assert [row[3:5] for row in rows] == [["fold", "given"], ["0", "x"], ["", "y"], ["2", "z"]]


def test_further_columns_follow_their_rows_over_groups_of_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "GROUP_CELLS", 1)  # a group for each chunk
    chunks = [make_predictions(["a", "b"], [0.9, 0.9]), make_predictions(["c"], [0.9])]
    write_predictions(chunks, CLASSES, str(tmp_path / "p.parquet"), {"given": ["x", "", "bad\udcff"]})
    found = pq.ParquetFile(tmp_path / "p.parquet")
    assert found.num_row_groups == 2
    assert found.schema_arrow.names[:5] == ["path", "status", "error", "given", "label"]
    assert found.read().to_pydict()["given"] == ["x", "", "bad\\xff"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_no_prediction_is_a_table_without_rows(ending: str, tmp_path: Path) -> None:
    write_predictions([], CLASSES, str(tmp_path / f"p.{ending}"))
    if ending == "csv":
        assert len(read_csv(tmp_path / "p.csv")) == 1
    else:
        assert pq.read_table(tmp_path / "p.parquet").num_rows == 0


def fail_after_one(error: BaseException) -> Iterator[Predictions]:
    yield make_predictions(["a.jpg"], [0.25])
    raise error


def test_interrupted_work_keeps_what_is_finished_and_looks_unfinished(tmp_path: Path) -> None:
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
def test_an_error_of_ours_leaves_nothing_behind_but_what_is_finished(ending: str, tmp_path: Path) -> None:
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
def test_a_run_keeps_its_records(name: str, tiny_run: Path, tmp_path: Path) -> None:
    for force in (False, True):
        with pytest.raises(
            ConfigError, match="is, or would pass for, a record of the run; choose another --out"
        ):
            check_new_file(str(tiny_run / name), force=force)
    check_new_file(str(tiny_run / "mine.csv"), force=False)
    check_new_file(str(tmp_path / name), force=False)
    (tmp_path / "config.json").write_text('{"of": "another program"}')
    check_new_file(str(tmp_path / name), force=False)


def test_an_old_table_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    old = tmp_path / "p.csv"
    old.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_predictions(fail_after_one(KeyboardInterrupt()), CLASSES, str(old))
    assert old.read_text() == "old"
    write_predictions([make_predictions(["a.jpg"], [0.25])], CLASSES, str(old))
    assert read_csv(old)[1][0] == "a.jpg"
    assert os.listdir(tmp_path) == ["p.csv"]


def test_an_existing_file_is_refused_without_force(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"p\.csv exists; choose another --out, or replace it with --force"):
        check_new_file(str(path), force=False)
    check_new_file(str(path), force=True)
    os.symlink(tmp_path / "nowhere", tmp_path / "link.csv")
    with pytest.raises(ConfigError, match="exists"):
        check_new_file(str(tmp_path / "link.csv"), force=False)


def test_a_folder_is_never_replaced_by_a_table(tmp_path: Path) -> None:
    (tmp_path / "p.csv").mkdir()
    for force in (False, True):
        with pytest.raises(ConfigError, match=r"p\.csv exists; choose another --out$"):
            check_new_file(str(tmp_path / "p.csv"), force=force)


def test_a_place_that_cannot_take_a_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"p\.txt ends neither in \.csv nor in \.parquet"):
        check_new_file(str(tmp_path / "p.txt"), force=False)
    with pytest.raises(ConfigError, match="deep of --out does not exist; create it first"):
        check_new_file(str(tmp_path / "deep" / "p.csv"), force=False)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o555)
        with pytest.raises(ConfigError, match="closed of --out cannot be written to; choose another"):
            check_new_file(str(tmp_path / "closed" / "p.csv"), force=False)
    check_new_file(str(tmp_path / "P.CSV"), force=False)


def test_numbers_are_plain_decimals(tmp_path: Path) -> None:
    write_predictions([make_predictions(["a"], [1e-9])], CLASSES, str(tmp_path / "p.csv"))
    cells = read_csv(tmp_path / "p.csv")[1][4:]
    assert cells == ["1.000000", "0.000000", "1.000000"]
    assert all(math.isfinite(float(cell)) for cell in cells)


def test_rows_reach_the_disk_as_chunks_come(tmp_path: Path) -> None:
    partial = tmp_path / "p.csv.partial"
    seen: list[int] = []

    def chunks() -> Iterator[Predictions]:
        for name in "abc":
            seen.append(len(io.StringIO(partial.read_text("utf-8")).readlines()))
            yield make_predictions([name], [0.5])

    write_predictions(chunks(), CLASSES, str(tmp_path / "p.csv"))
    assert seen[1:] == [2, 3]
