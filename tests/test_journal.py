"""What journal.py promises about notes: kept in order, said once, named by their chapter or by none."""

import pytest

from pixelplay.journal import Journal


def test_a_note_about_a_chapter_names_it_and_one_about_all_is_said_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    journal = Journal()
    for fold in (1, 2):
        with journal.chapter(f"fold {fold}"):
            journal.note_for_all("a setting does not count")
            journal.note("a photograph is missing")
    assert journal.notes == [
        "a setting does not count",
        "fold 1: a photograph is missing",
        "fold 2: a photograph is missing",
    ]
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")] == [
        f"note: {note}" for note in journal.notes
    ]
