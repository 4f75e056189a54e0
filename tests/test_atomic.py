"""Tests of pixelplay.atomic."""

import errno
import json
import os
from pathlib import Path

import pytest

from pixelplay.atomic import (
    atomic_files,
    atomic_write,
    replace_folder,
    restore_folder,
    write_bytes,
    write_json,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: str, error: BaseException) -> None:
    with atomic_write(path) as temporary:
        Path(temporary).write_text("half")
        raise error


def make_folder(path: Path, content: str) -> str:
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "file").write_text(content)
    return str(path)


@pytest.mark.parametrize(
    "error", [ValueError("bad row"), OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()]
)
def test_interrupted_write_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(type(error)):
        write_half(str(path), error)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["table.csv"]


def test_bytes_and_json_replace_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_bytes(b"old", str(path))
    write_json({"x": [1.5, None], "ä": "b"}, str(path))
    assert path.read_bytes().endswith(b"}\n")
    assert json.loads(path.read_text()) == {"x": [1.5, None], "ä": "b"}
    assert names_in(tmp_path) == ["a.json"]


def test_json_with_nan_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="nan"):
        write_json({"x": float("nan")}, str(path))
    assert path.read_text() == "old"


def test_new_folder_replaces_the_old_one(tmp_path: Path) -> None:
    new, target = make_folder(tmp_path / "run.partial", "new"), make_folder(tmp_path / "run", "old")
    replace_folder(new, target, lambda path: True)
    assert (tmp_path / "run" / "sub" / "file").read_text() == "new"
    assert names_in(tmp_path) == ["run"]


def test_failed_replacement_restores_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, target = make_folder(tmp_path / "run.partial", "new"), make_folder(tmp_path / "run", "old")
    replace = os.replace

    def fail(source: str, destination: str) -> None:
        if source == new:
            raise OSError(errno.EACCES, "denied")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="denied"):
        replace_folder(new, target, lambda path: True)
    assert (tmp_path / "run" / "sub" / "file").read_text() == "old"


@pytest.mark.parametrize("ours", [True, False])
def test_folder_of_a_killed_replacement_is_restored_if_it_is_ours(tmp_path: Path, ours: bool) -> None:
    make_folder(tmp_path / "run.partial-old", "old")
    restore_folder(str(tmp_path / "run.partial"), str(tmp_path / "run"), lambda path: ours)
    assert names_in(tmp_path) == (["run"] if ours else ["run.partial-old"])


def test_several_files_are_moved_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("old")

    def write_half_of_them() -> None:
        with atomic_files(str(tmp_path), ["a", "b"]) as folder:
            (Path(folder) / "a").write_text("new")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_half_of_them()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b": "old"}
    with atomic_files(str(tmp_path), ["a", "b"]) as folder:
        for name in "ab":
            (Path(folder) / name).write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new"}
