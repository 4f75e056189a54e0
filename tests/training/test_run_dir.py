import json
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import pytest

from pixelplay.errors import ConfigError, DataError
from pixelplay.training.checkpoint import CHECKPOINT
from pixelplay.training.run_dir import new_run_dir


def make_run(path: Path, content: str) -> None:
    with new_run_dir(str(path), force=True) as folder:
        fill(folder, content)


def content_of(run: Path) -> object:
    return json.loads((run / "config.json").read_text())["seed"]


def fail_in(path: Path, error: BaseException) -> None:
    with new_run_dir(str(path), force=True) as folder:
        fill(folder, "new")
        raise error


def be_overtaken(path: Path) -> None:
    with new_run_dir(str(path), force=True) as folder:
        fill(folder, "new")
        path.mkdir()
        (path / "precious").touch()


def fill(folder: str, content: str) -> None:
    Path(folder, "model").mkdir()
    Path(folder, "config.json").write_text(json.dumps({"pixelplay": "train", "seed": content}))


def test_a_run_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "first"
    with new_run_dir(str(out), force=False) as folder:
        fill(folder, "{}")
        assert not out.exists()
    assert sorted(os.listdir(out)) == ["config.json", "model"]
    assert os.listdir(tmp_path / "runs") == ["first"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def test_an_existing_run_is_kept_without_force(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "old")
    with (
        pytest.raises(ConfigError, match="run exists; choose another --out, or replace it with --force"),
        new_run_dir(str(tmp_path / "run"), force=False),
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


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["images", "someone's config", "run with notes", "file"])
def test_what_is_no_run_is_never_replaced(kind: str, force: bool, tmp_path: Path) -> None:
    target = tmp_path / "photos"
    if kind == "file":
        target.write_text("mine")
    elif kind == "run with notes":
        make_run(target, "old")
        (target / "my notes.txt").touch()
    else:
        target.mkdir()
        (target / ("a.jpg" if kind == "images" else "config.json")).write_text('{"seed": 0}')
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with (
        pytest.raises(ConfigError, match=r"exists and is no run of PixelPlay, or .* never replaced; choose"),
        new_run_dir(str(target), force=force),
    ):
        pytest.fail("the block must not begin")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with new_run_dir(str(tmp_path / "run"), force=False) as folder:
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
            new_run_dir(str(place), force=False),
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
        new_run_dir(str(tmp_path / "run"), force=False),
    ):
        pytest.fail("the block must not begin")
    assert os.listdir(tmp_path) == []


# --- what an interrupted run leaves ---


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def checkpoint_in(folder: str | Path) -> Path:
    path = Path(folder, "checkpoint", "checkpoint.safetensors")
    path.parent.mkdir(exist_ok=True)
    path.write_text("weights")
    return path


def be_interrupted(path: Path, error: BaseException) -> None:
    with new_run_dir(str(path), force=False, resume=True) as folder:
        Path(folder, "plan.json").write_text("{}")
        checkpoint_in(folder)
        raise error


@pytest.mark.parametrize("error", [DataError("no"), KeyboardInterrupt(), OSError(28, "disk full")])
def test_a_failed_run_with_a_checkpoint_is_kept_to_be_continued(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        be_interrupted(tmp_path / "run", error)
    assert os.listdir(tmp_path) == ["run.partial"]
    with new_run_dir(str(tmp_path / "run"), force=False, resume=True) as folder:
        assert Path(folder, "checkpoint", "checkpoint.safetensors").read_text() == "weights"
        assert Path(folder, "plan.json").exists()
        fill(folder, "continued")
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "model", "plan.json"]
    assert os.listdir(tmp_path) == ["run"]


def test_a_failed_run_without_a_checkpoint_goes(tmp_path: Path) -> None:
    def fail_early() -> None:
        with new_run_dir(str(tmp_path / "run"), force=False, resume=True) as folder:
            Path(folder, "plan.json").touch()
            checkpoint_in(folder).rename(Path(folder, "checkpoint", "checkpoint.safetensors.tmp"))
            raise DataError("no")

    with pytest.raises(DataError):
        fail_early()
    assert os.listdir(tmp_path) == []


def test_an_interrupted_run_is_refused_with_both_ways_on(tmp_path: Path) -> None:
    checkpoint_in(make_folder(tmp_path / "run.partial"))
    with (
        pytest.raises(ConfigError, match=r"run\.partial holds an interrupted run; .*--resume, .* --force"),
        new_run_dir(str(tmp_path / "run"), force=False),
    ):
        pytest.fail("the block must not begin")
    assert (tmp_path / "run.partial/checkpoint/checkpoint.safetensors").read_text() == "weights"


def test_force_starts_an_interrupted_run_anew(tmp_path: Path) -> None:
    partial = make_folder(tmp_path / "run.partial")
    checkpoint_in(partial)
    (partial / "metrics.json.tmp").touch()
    with new_run_dir(str(tmp_path / "run"), force=True) as folder:
        assert set(os.listdir(folder)) <= {".lock"}
        fill(folder, "new")
    assert content_of(tmp_path / "run") == "new"
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_run_killed_before_its_first_checkpoint_leaves_is_in_no_ones_way(
    resume: bool, tmp_path: Path
) -> None:
    partial = make_folder(tmp_path / "run.partial")
    (partial / ".lock").touch()
    for name in ("plan.json.tmp", "val.csv.partial", "metrics.json.tmp"):  # what was being written
        (partial / name).touch()
    make_folder(partial / "checkpoint")
    (partial / "checkpoint" / "images.json").touch()
    with new_run_dir(str(tmp_path / "run"), force=False, resume=resume) as folder:
        assert set(os.listdir(folder)) <= {".lock"}
        fill(folder, "new")
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_foreign_folder_of_that_name_is_left_as_it_is(
    has_checkpoint: bool, force: bool, resume: bool, tmp_path: Path
) -> None:
    partial = make_folder(tmp_path / "run.partial")
    (partial / "thesis.txt").write_text("years of work")
    if has_checkpoint:
        checkpoint_in(partial)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with (
        pytest.raises(ConfigError, match=r"run\.partial holds files that are not of a run; move them or"),
        new_run_dir(str(tmp_path / "run"), force=force, resume=resume),
    ):
        pytest.fail("the block must not begin")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert (partial / "thesis.txt").read_text() == "years of work"


def test_a_file_of_that_name_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "run.partial").write_text("years of work")
    with (
        pytest.raises(ConfigError, match="cannot be written: File exists; choose another --out"),
        new_run_dir(str(tmp_path / "run"), force=True),
    ):
        pytest.fail("the block must not begin")
    assert (tmp_path / "run.partial").read_text() == "years of work"


@pytest.mark.parametrize("error", [None, DataError("no")])
def test_a_foreign_file_that_appears_meanwhile_is_never_deleted(
    error: Exception | None, tmp_path: Path
) -> None:
    def work() -> None:
        with new_run_dir(str(tmp_path / "run"), force=False) as folder:
            fill(folder, "new")
            Path(folder, "thesis.txt").write_text("years of work")
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(DataError):
            work()
    where = tmp_path / ("run" if error is None else "run.partial")
    assert (where / "thesis.txt").read_text() == "years of work"


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with new_run_dir(str(tmp_path / "run"), force=False) as folder:
        fill(folder, "first")
        for force, resume in ((False, False), (True, False), (False, True)):
            with (
                pytest.raises(ConfigError, match=r"another process is training into .*run\.partial; wait"),
                new_run_dir(str(tmp_path / "run"), force=force, resume=resume),
            ):
                pytest.fail("the block must not begin")
    assert content_of(tmp_path / "run") == "first"
    assert os.listdir(tmp_path) == ["run"]


def test_a_training_whose_place_was_taken_meanwhile_is_kept(tmp_path: Path) -> None:
    def be_overtaken_in_training() -> None:
        with new_run_dir(str(tmp_path / "run"), force=True) as folder:
            checkpoint_in(folder)
            make_folder(tmp_path / "run")
            (tmp_path / "run" / "precious").touch()

    with pytest.raises(ConfigError, match="never replaced"):
        be_overtaken_in_training()
    assert (tmp_path / "run.partial/checkpoint/checkpoint.safetensors").read_text() == "weights"
    assert os.listdir(tmp_path / "run") == ["precious"]


def test_a_kill_while_runs_are_exchanged_does_not_lose_the_old_one(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "old")
    os.rename(tmp_path / "run", tmp_path / "run.partial-old")
    with (
        pytest.raises(ConfigError, match="run exists; choose another --out, or replace it with --force"),
        new_run_dir(str(tmp_path / "run"), force=False),
    ):
        pytest.fail("the block must not begin")
    assert content_of(tmp_path / "run") == "old"
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("leaves", ["the new run", "the old run", "both"])
def test_a_kill_while_runs_are_exchanged_blocks_no_later_one(leaves: str, tmp_path: Path) -> None:
    """What `force` renames: RUN → RUN.partial-old, RUN.partial → RUN; then the old one goes."""
    make_run(tmp_path / "run", "old")
    os.rename(tmp_path / "run", tmp_path / "run.partial-old")
    if leaves in ("the new run", "both"):
        make_run(tmp_path / "new", "new")
        os.rename(tmp_path / "new", tmp_path / ("run" if leaves == "both" else "run.partial"))
    make_run(tmp_path / "run", "newest")
    make_run(tmp_path / "run", "last")
    assert content_of(tmp_path / "run") == "last"
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("leaves", ["checkpoint", ".lock"])
def test_a_kill_after_the_renames_leaves_a_whole_run_that_is_tidied_later(
    leaves: str, tmp_path: Path
) -> None:
    make_run(tmp_path / "run", "done")
    (tmp_path / "run" / "checkpoint").mkdir()
    (tmp_path / "run" / "checkpoint" / CHECKPOINT).touch()
    (tmp_path / "run" / ".lock").touch()
    with (
        pytest.raises(ConfigError, match="run exists"),
        new_run_dir(str(tmp_path / "run"), force=False, resume=True),
    ):
        pytest.fail("the block must not begin")
    assert content_of(tmp_path / "run") == "done"
    assert not (tmp_path / "run" / leaves).exists()


def test_what_can_be_resumed_is_there_until_the_run_stands_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []
    rename = os.replace

    def watch(source: str, target: str) -> None:
        if target == str(tmp_path / "run"):
            moved.append(os.path.isfile(os.path.join(source, "checkpoint", CHECKPOINT)))
        rename(source, target)

    monkeypatch.setattr(os, "replace", watch)
    with new_run_dir(str(tmp_path / "run"), force=False) as folder:
        fill(folder, "new")
        Path(folder, "checkpoint").mkdir()
        Path(folder, "checkpoint", CHECKPOINT).touch()
    assert moved == [True]
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "model"]


@pytest.mark.parametrize("force", [False, True])
def test_a_users_folder_in_a_finished_run_is_neither_tidied_nor_replaced(force: bool, tmp_path: Path) -> None:
    make_run(tmp_path / "run", "done")
    (tmp_path / "run" / "checkpoint").mkdir()
    (tmp_path / "run" / "checkpoint" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(ConfigError, match="holds other files too"),
        new_run_dir(str(tmp_path / "run"), force=force),
    ):
        pytest.fail("the block must not begin")
    assert (tmp_path / "run" / "checkpoint" / "thesis.txt").exists()
