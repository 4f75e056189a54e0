"""Every command and Python example of the README runs, on drawn images."""

import re
import shlex
from pathlib import Path

import pytest

from conftest import draw_folder, draw_of_class
from images import encode
from pixelplay.cli.commands import COMMANDS
from pixelplay.cli.main import main
from servers import serve_once

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMAND_LINES = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
]


@pytest.fixture
def reader_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the data that the README assumes, and work there."""
    draw_folder(tmp_path / "images", {"bars": 9, "dots": 8})
    draw_folder(tmp_path / "holdout", {"bars": 5, "dots": 4}, first_seed=50)
    (tmp_path / "new_images").mkdir()
    for i in range(2):
        (tmp_path / f"new_images/{i}.jpg").write_bytes(encode(draw_of_class("bars", 90 + i), "JPEG"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_is_short_and_its_blocks_have_known_languages() -> None:
    assert len(README.splitlines()) <= 150
    assert {language for language, _ in BLOCKS} <= {"sh", "console", "python", "text"}


def test_every_example_of_the_readme_runs(reader_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session: dict[str, object] = {}  # of one reader who types the whole page
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), session)
        for line in block.splitlines() if language == "sh" else []:
            words = shlex.split(line, comments=True)
            run = serve_once if words[1] == "serve" else main
            assert run(words[1:]) == 0, (line, capsys.readouterr().err)
    header = (reader_folder / "predictions.csv").read_text().splitlines()[0]
    assert header == "path,status,error,prediction,probability,prob_bars,prob_dots,novelty"
    assert (reader_folder / "runs/first/report.html").exists()


def test_readme_shows_every_command() -> None:
    assert {words[0] for words in COMMAND_LINES} == {"pixelplay"}
    assert {words[1] for words in COMMAND_LINES} == set(COMMANDS)


def test_make_targets_and_files_of_the_readme_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`make (\w+)`", README)) <= set(targets)
    linked = [target for target in re.findall(r"\]\(([^)#]+)", README) if "://" not in target]
    assert [target for target in linked if not (ROOT / target).exists()] == []
