"""Every command and Python example in docs/ runs, page by page, on generated images."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from conftest import draw_of_class
from pixelplay.cli.main import main
from servers import serve_once

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DRAWN_AS = {"cat": "bars", "dog": "dots"}  # class in the documentation: what the image shows


def draw_images(root: Path, counts: dict[str, int], first_seed: int) -> None:
    """Write ROOT/<class>/cameraM_NNN.jpg."""
    for name, n in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            image = draw_of_class(DRAWN_AS[name], first_seed + i)
            image.save(root / name / f"camera{i % 4}_{i:03}.jpg", quality=90)


@pytest.fixture
def reader_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the data that the pages assume, and work there."""
    draw_images(tmp_path / "images", {"cat": 9, "dog": 8}, 0)
    draw_images(tmp_path / "holdout", {"cat": 4, "dog": 4}, 100)
    draw_images(tmp_path / "split_images/train", {"cat": 5, "dog": 5}, 200)
    draw_images(tmp_path / "split_images/test", {"cat": 2, "dog": 2}, 300)
    (tmp_path / "new_images").mkdir()
    for i in range(2):
        draw_of_class("bars", 400 + i).save(tmp_path / f"new_images/{i}.jpg", quality=90)
    rows = [
        f"{path.parent.name}/{path.name},{path.parent.name}"
        for path in sorted((tmp_path / "images").rglob("*.jpg"))
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    (tmp_path / "renamed.csv").write_text("\n".join(["picture,animal", *rows]) + "\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    (tmp_path / "sample_submission.csv").write_text("id,label\n1,cat\n0,cat\n")
    shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path, "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_names_its_language(page: Path) -> None:
    languages = {language for language, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert languages <= {"sh", "python", "text", "console"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_example_runs(page: Path, reader_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session: dict[str, object] = {}  # of one reader who types the whole page
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(block, page.name, "exec"), session)
        for line in block.splitlines() if language == "sh" else []:
            words = shlex.split(line, comments=True)
            assert words[0] == "pixelplay", line
            run = serve_once if words[1] == "serve" else main
            assert run(words[1:]) == 0, (line, capsys.readouterr().err)
