"""What journal.py promises: notes kept in order, said once, named by their chapter or by none; progress."""

import json
import os
import sys
import time

import pytest

from pixelplay.run_log import RunLog


def test_a_note_about_a_chapter_names_it_and_one_about_all_is_said_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = RunLog()
    for fold in (1, 2):
        with log.chapter(f"fold {fold}"):
            log.note_for_all("a setting does not count")
            log.note("an image is missing")
    assert log.notes == [
        "a setting does not count",
        "fold 1: an image is missing",
        "fold 2: an image is missing",
    ]
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")] == [
        f"note: {note}" for note in log.notes
    ]


def test_progress_counts_to_what_is_expected_now(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def half_is_left_out(log: RunLog) -> list[str]:
        with log.progress("training", 800, "batches") as bar:
            bar.expect(400)
            clock[0] += 100
            bar.update(100)
        return capsys.readouterr().err.splitlines()

    assert half_is_left_out(RunLog()) == [
        "training: 100 batches of 400, 5:00 min left",
        "training: 100 batches in 1:40 min",
    ]
    said = [json.loads(line) for line in half_is_left_out(RunLog(is_json=True))]
    assert [(each["n"], each["total"], each["left_s"]) for each in said[1:]] == [(100, 400, 300.0)] * 2
    assert half_is_left_out(RunLog(quiet=True)) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals of this kind")
def test_a_moving_bar_counts_to_what_is_expected_now(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.openpty()
    with open(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with RunLog().progress("training", 800, "batches") as bar:
            bar.expect(400)
            time.sleep(0.25)  # it moves no more often
            bar.update(100)
        shown = os.read(reader, 10_000).decode()
    os.close(reader)
    assert "100 of 400" in shown
