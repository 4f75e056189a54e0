"""Every fenced block of the README runs, on drawn images."""

import re
import shlex
from pathlib import Path

import pytest

from conftest import draw_folder, draw_of_class
from images import encode
from pixelplay.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def reader_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the README's reader has: labelled images, new ones, a sample submission."""
    draw_folder(tmp_path / "photos", {"bars": 6, "dots": 4})
    for image in (tmp_path / "photos").rglob("*.*g"):
        image.rename(image.with_name(f"camera{image.name}"))
    draw_folder(tmp_path / "more_photos", {"bars": 2, "dots": 2}, first_seed=50)
    (tmp_path / "new_photos").mkdir()
    for i in range(2):
        (tmp_path / f"new_photos/{i}.jpg").write_bytes(encode(draw_of_class("bars", 90 + i), "JPEG"))
    (tmp_path / "sample_submission.csv").write_text("id,label\n1,bars\n0,bars\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_has_a_language_that_says_what_it_is() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python", "text"}


def test_every_command_and_every_python_block_runs(
    reader_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session: dict[str, object] = {}  # of the one reader who types all of them
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), session)
        for line in block.splitlines() if language == "sh" else []:
            words = shlex.split(line, comments=True)
            if words[0] != "pixelplay":
                continue
            command = words[: words.index(">")] if ">" in words else words
            assert main(command[1:]) == 0, (line, capsys.readouterr().err)
    assert (reader_folder / "submission.csv").read_text() == "id,label\n1,bars\n0,bars\n"
    listed = next(block for _, block in BLOCKS if block.startswith("runs/first/"))
    names = {line.split()[0].rstrip("/") for line in listed.splitlines()[1:] if line[2] != " "}
    held = [{path.name for path in (reader_folder / "runs" / run).iterdir()} for run in ("first", "2025")]
    assert held[0] | held[1] == names
    assert names - held[0] == {"val.csv", "plan.json", "history.csv"}
    assert names - held[1] == {"oof.csv"}
    header = (reader_folder / "predictions.csv").read_text().splitlines()[0]
    assert header == "path,status,error,label,probability,prob_bars,prob_dots,novelty"


def test_the_other_commands_exist() -> None:
    others = {
        line.split()[0] for language, block in BLOCKS if language == "sh" for line in block.splitlines()
    }
    assert others == {"pip", "pixelplay"}
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name in re.findall(r"`make (\w+)`", README)} <= set(targets)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"\.\[(\w+)\]", README):
        assert f"\n{extra} = [" in project


def test_the_drawn_house_is_the_house() -> None:
    listed = next(block for _, block in BLOCKS if block.startswith("src/pixelplay/"))
    drawn = {line.split()[0].rstrip("/") for line in listed.splitlines() if line.startswith("  ")}
    real = {path.name for path in (ROOT / "src/pixelplay").iterdir() if path.name[0] != "_"}
    assert drawn == real - {"py.typed"}


def test_every_public_name_is_in_the_readme() -> None:
    import pixelplay

    assert not [name for name in pixelplay.__all__ if f"`{name}`" not in README]
