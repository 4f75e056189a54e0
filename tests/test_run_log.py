"""Run log: notes in order and once, sections as prefix, progress for people and programs."""

import json
import os
import sys
import time
from select import select

import pytest

from pixelplay.run_log import RunLog


def test_note_names_its_section_and_note_on_the_run_is_printed_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = RunLog()
    for fold in (1, 2):
        with log.section(f"fold {fold}"):
            log.note_for_run("--time-budget is ignored")
            log.note("an image is missing")
    assert log.notes == [
        "--time-budget is ignored",
        "fold 1: an image is missing",
        "fold 2: an image is missing",
    ]
    assert capsys.readouterr().err.splitlines() == [f"note: {note}" for note in log.notes]


def test_repeated_note_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog()
    for _ in range(3):
        log.note("skipped 3 images")
    assert capsys.readouterr().err == "note: skipped 3 images\n"
    assert log.notes == ["skipped 3 images"]


def test_replayed_notes_are_recorded_but_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog()
    log.note("a")
    log.replay(["a", "b"])
    assert log.notes == ["a", "b"]
    assert capsys.readouterr().err == "note: a\n"


def test_quiet_log_records_notes(capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(quiet=True)
    log.note("skipped 3 images")
    log.info("epoch 1")
    with log.progress("reading", 2) as bar:
        bar.update(2)
    assert log.notes == ["skipped 3 images"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("n", "unit", "text"), [(1, "images", "1 image"), (1, "batches", "1 batch"), (2, "views", "2 views")]
)
def test_progress_uses_the_singular_for_one(
    n: int, unit: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog().progress("reading", n, unit) as bar:
        bar.update(n)
    assert capsys.readouterr().err == f"reading: {text} in 0 s\n"


def test_json_log_prints_one_object_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(json_progress=True)
    log.note("skipped 3 images")
    log.info("epoch 1")
    with log.progress("reading", 2) as bar:
        bar.update(2)
    note, info, first, last = map(json.loads, capsys.readouterr().err.splitlines())
    assert (note, info) == ({"note": "skipped 3 images"}, {"info": "epoch 1"})
    assert (first["progress"], first["unit"], first["total"]) == ("reading", "images", 2)
    assert (first["n"], first["done"], last["n"], last["done"]) == (0, False, 2, True)


def test_long_progress_prints_a_line_per_minute_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with RunLog().progress("reading", 4000) as bar:
        for _ in range(400):
            clock[0] += 0.5
            bar.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 1,200 images of 4,000, 2:20 min left",
        "reading: 2,400 images of 4,000, 1:20 min left",
        "reading: 3,600 images of 4,000, 20 s left",
        "reading: 4,000 images in 3:20 min",
    ]


def test_progress_counts_to_the_corrected_total(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def halve_the_total(log: RunLog) -> list[str]:
        with log.progress("training", 800, "batches") as bar:
            bar.set_total(400)
            clock[0] += 100
            bar.update(100)
        return capsys.readouterr().err.splitlines()

    assert halve_the_total(RunLog()) == [
        "training: 100 batches of 400, 5:00 min left",
        "training: 100 batches in 1:40 min",
    ]
    printed = [json.loads(line) for line in halve_the_total(RunLog(json_progress=True))]
    assert [(each["n"], each["total"], each["left_s"]) for each in printed[1:]] == [(100, 400, 300.0)] * 2
    assert halve_the_total(RunLog(quiet=True)) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_progress_bar_counts_to_the_corrected_total(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.openpty()
    with open(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with RunLog().progress("training", 800, "batches") as bar:
            bar.set_total(400)
            time.sleep(0.25)  # it moves no more often
            bar.update(100)
        shown = b""
        while b"100 of 400" not in shown and select([reader], [], [], 10)[0]:
            shown += os.read(reader, 10_000)
    os.close(reader)
    assert b"100 of 400" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes of this kind")
def test_closed_stderr_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stderr = open(writer, "w")  # noqa: SIM115 - closing it fails, too
    monkeypatch.setattr(sys, "stderr", stderr)
    log = RunLog()
    log.note("nobody reads this")
    with log.progress("reading", 2) as bar:
        bar.update(2)
    monkeypatch.undo()
    with pytest.raises(BrokenPipeError):
        stderr.close()
    assert log.notes == ["nobody reads this"]
