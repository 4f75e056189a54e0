import json
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import pytest

from pixelplay.errors import ConfigError, DataError
from pixelplay.outputs.run_dir import new_run_dir


def make_run(path: Path, content: str) -> None:
    with new_run_dir(str(path), is_forced=True) as folder:
        fill(folder, content)


def content_of(run: Path) -> object:
    return json.loads((run / "config.json").read_text())["seed"]


def fail_in(path: Path, error: BaseException) -> None:
    with new_run_dir(str(path), is_forced=True) as folder:
        fill(folder, "new")
        raise error


def be_overtaken(path: Path) -> None:
    with new_run_dir(str(path), is_forced=True) as folder:
        fill(folder, "new")
        path.mkdir()
        (path / "precious").touch()


def fill(folder: str, content: str) -> None:
    Path(folder, "model").mkdir()
    Path(folder, "config.json").write_text(json.dumps({"pixelplay": "train", "seed": content}))


def test_a_run_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "first"
    with new_run_dir(str(out), is_forced=False) as folder:
        fill(folder, "{}")
        assert not out.exists()
    assert sorted(os.listdir(out)) == ["config.json", "model"]
    assert os.listdir(tmp_path / "runs") == ["first"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def test_an_existing_run_is_kept_without_force(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "old")
    with (
        pytest.raises(ConfigError, match="run exists; choose another --out, or replace it with --force"),
        new_run_dir(str(tmp_path / "run"), is_forced=False),
    ):
        pytest.fail("the block must not begin")
    assert content_of(tmp_path / "run") == "old"


def test_force_replaces_a_run_with_all_that_is_in_it(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "old")
    (tmp_path / "run" / "metrics.json").touch()
    make_run(tmp_path / "run", "new")
    assert content_of(tmp_path / "run") == "new"
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "model"]
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("is_forced", [False, True])
@pytest.mark.parametrize("kind", ["photographs", "someone's config", "run with notes", "file"])
def test_what_is_no_run_is_never_replaced(kind: str, is_forced: bool, tmp_path: Path) -> None:
    target = tmp_path / "photos"
    if kind == "file":
        target.write_text("mine")
    elif kind == "run with notes":
        make_run(target, "old")
        (target / "my notes.txt").touch()
    else:
        target.mkdir()
        (target / ("a.jpg" if kind == "photographs" else "config.json")).write_text('{"seed": 0}')
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with (
        pytest.raises(ConfigError, match=r"exists and is no run of PixelPlay, or .* never replaced; choose"),
        new_run_dir(str(target), is_forced=is_forced),
    ):
        pytest.fail("the block must not begin")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with new_run_dir(str(tmp_path / "run"), is_forced=False) as folder:
        fill(folder, "{}")
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("error", [DataError("no"), KeyboardInterrupt(), OSError(28, "disk full")])
def test_a_failed_run_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        fail_in(tmp_path / "run", error)
    assert os.listdir(tmp_path) == []


def test_a_failed_run_leaves_the_old_one(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "old")
    with pytest.raises(KeyboardInterrupt):
        fail_in(tmp_path / "run", KeyboardInterrupt())
    assert content_of(tmp_path / "run") == "old"
    assert os.listdir(tmp_path) == ["run"]


def test_what_has_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="never replaced"):
        be_overtaken(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["precious"]
    assert os.listdir(tmp_path) == ["run"]


def test_a_link_stays_and_its_run_is_replaced(tmp_path: Path) -> None:
    make_run(tmp_path / "disk" / "run", "old")
    os.symlink(tmp_path / "disk" / "run", tmp_path / "latest")
    make_run(tmp_path / "latest", "new")
    assert os.path.islink(tmp_path / "latest")
    assert content_of(tmp_path / "disk" / "run") == "new"
    assert os.listdir(tmp_path / "disk") == ["run"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = [tmp_path / "file" / "run", tmp_path / ("x" * 300)]
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o555)
        places.append(tmp_path / "closed" / "run")
    for place in places:
        with (
            pytest.raises(ConfigError, match=r"cannot be written: .*; choose another --out"),
            new_run_dir(str(place), is_forced=False),
        ):
            pytest.fail("the block must not begin")


def test_a_full_disk_is_noticed_before_the_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 3 << 20))
    with (
        pytest.raises(
            ConfigError, match=r"has 3 MB free, a run needs 200; free some or choose another --out"
        ),
        new_run_dir(str(tmp_path / "run"), is_forced=False),
    ):
        pytest.fail("the block must not begin")
    assert os.listdir(tmp_path) == []
