"""Tests of the run folder: atomic writing, replacing, locking and what an interrupted run keeps."""

import json
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import pytest

from pixelplay.errors import ConfigError, DataError
from pixelplay.training.checkpoint import CHECKPOINT
from pixelplay.training.run_dir import is_finished, new_run_dir

EXISTS = r"/run .*--force .*--out"
NOT_A_RUN = r" (?!.*--force).*--out$"


def check_refused(path: Path, match: str, *, force: bool = False, resume: bool = False) -> None:
    """Check that a run cannot be written to a folder."""
    with (
        pytest.raises(ConfigError, match=match),
        new_run_dir(str(path), force=force, resume=resume),
    ):
        pytest.fail("the block must not run")


def make_run(path: Path, content: str) -> None:
    with new_run_dir(str(path), force=True) as folder:
        fill(folder, content)


def content_of(run: Path) -> object:
    return json.loads((run / "config.json").read_text())["seed"]


def interrupt_new_run(path: Path, error: BaseException) -> None:
    with new_run_dir(str(path), force=True) as folder:
        fill(folder, "new")
        raise error


def lose_race(path: Path) -> None:
    with new_run_dir(str(path), force=True) as folder:
        fill(folder, "new")
        path.mkdir()
        (path / "precious").touch()


def fill(folder: str, content: str) -> None:
    Path(folder, "model").mkdir()
    Path(folder, "config.json").write_text(json.dumps({"pixelplay": "train", "seed": content}))


def test_run_dir_appears_once_complete(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "first"
    with new_run_dir(str(out), force=False) as folder:
        fill(folder, "{}")
        assert not out.exists()
    assert sorted(os.listdir(out)) == ["config.json", "model"]
    assert os.listdir(tmp_path / "runs") == ["first"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def test_existing_run_is_kept_without_force(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "old")
    check_refused(tmp_path / "run", EXISTS)
    assert content_of(tmp_path / "run") == "old"


def test_force_replaces_all_files_of_a_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "old")
    (tmp_path / "run" / "metrics.json").touch()
    make_run(tmp_path / "run", "new")
    assert content_of(tmp_path / "run") == "new"
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "model"]
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["images", "other config", "run with notes", "file"])
def test_force_never_replaces_anything_but_a_run(kind: str, force: bool, tmp_path: Path) -> None:
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
    check_refused(target, f"/photos{NOT_A_RUN}", force=force)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with new_run_dir(str(tmp_path / "run"), force=False) as folder:
        fill(folder, "{}")
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("error", [DataError("no"), KeyboardInterrupt(), OSError(28, "disk full")])
def test_failed_run_is_removed(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        interrupt_new_run(tmp_path / "run", error)
    assert os.listdir(tmp_path) == []


def test_failed_run_keeps_the_previous_one(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "old")
    with pytest.raises(KeyboardInterrupt):
        interrupt_new_run(tmp_path / "run", KeyboardInterrupt())
    assert content_of(tmp_path / "run") == "old"
    assert os.listdir(tmp_path) == ["run"]


def test_folder_created_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"/run{NOT_A_RUN}"):
        lose_race(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["precious"]
    assert os.listdir(tmp_path) == ["run"]


def test_force_replaces_the_run_behind_a_symbolic_link(tmp_path: Path) -> None:
    make_run(tmp_path / "disk" / "run", "old")
    os.symlink(tmp_path / "disk" / "run", tmp_path / "latest")
    make_run(tmp_path / "latest", "new")
    assert os.path.islink(tmp_path / "latest")
    assert content_of(tmp_path / "disk" / "run") == "new"
    assert os.listdir(tmp_path / "disk") == ["run"]


def test_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = [tmp_path / "file" / "run", tmp_path / ("x" * 300)]
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o555)
        places.append(tmp_path / "closed" / "run")
    for place in places:
        check_refused(place, rf"/{place.name}: .*--out$")


def test_full_disk_is_an_error_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 3 << 20))
    check_refused(tmp_path / "run", r" 3 MB .* 200 MB.*--out")
    assert os.listdir(tmp_path) == []


# --- interrupted runs ---


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def checkpoint_in(folder: str | Path) -> Path:
    path = Path(folder, "checkpoint", "checkpoint.safetensors")
    path.parent.mkdir(exist_ok=True)
    path.write_text("weights")
    return path


def interrupt_with_checkpoint(path: Path, error: BaseException) -> None:
    with new_run_dir(str(path), force=False, resume=True) as folder:
        Path(folder, "plan.json").write_text("{}")
        checkpoint_in(folder)
        raise error


@pytest.mark.parametrize("error", [DataError("no"), KeyboardInterrupt(), OSError(28, "disk full")])
def test_resume_continues_a_failed_run_with_checkpoint(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        interrupt_with_checkpoint(tmp_path / "run", error)
    assert os.listdir(tmp_path) == ["run.partial"]
    with new_run_dir(str(tmp_path / "run"), force=False, resume=True) as folder:
        assert Path(folder, "checkpoint", "checkpoint.safetensors").read_text() == "weights"
        assert Path(folder, "plan.json").exists()
        fill(folder, "continued")
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "model", "plan.json"]
    assert os.listdir(tmp_path) == ["run"]


def test_failed_run_without_checkpoint_is_removed(tmp_path: Path) -> None:
    def fail_early() -> None:
        with new_run_dir(str(tmp_path / "run"), force=False, resume=True) as folder:
            Path(folder, "plan.json").touch()
            checkpoint_in(folder).rename(Path(folder, "checkpoint", "checkpoint.safetensors.tmp"))
            raise DataError("no")

    with pytest.raises(DataError):
        fail_early()
    assert os.listdir(tmp_path) == []


def test_interrupted_run_with_a_plan_is_kept_and_resumed(tmp_path: Path) -> None:
    def interrupt(name: str) -> None:
        with new_run_dir(str(tmp_path / "run"), force=False) as folder:
            Path(folder, name).touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt("history.csv")
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        interrupt("plan.json")
    assert os.listdir(tmp_path) == ["run.partial"]
    check_refused(tmp_path / "run", r"/run\.partial .*--resume.* --force")
    with new_run_dir(str(tmp_path / "run"), force=False, resume=True) as folder:
        assert os.path.isfile(os.path.join(folder, "plan.json"))
        fill(folder, "new")


def test_interrupted_run_needs_resume_or_force(tmp_path: Path) -> None:
    checkpoint_in(make_folder(tmp_path / "run.partial"))
    check_refused(tmp_path / "run", r"/run\.partial .*--resume.* --force")
    assert (tmp_path / "run.partial/checkpoint/checkpoint.safetensors").read_text() == "weights"


def test_force_starts_over_an_interrupted_run(tmp_path: Path) -> None:
    partial = make_folder(tmp_path / "run.partial")
    checkpoint_in(partial)
    (partial / "metrics.json.tmp").touch()
    with new_run_dir(str(tmp_path / "run"), force=True) as folder:
        assert set(os.listdir(folder)) <= {".lock"}
        fill(folder, "new")
    assert content_of(tmp_path / "run") == "new"
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("resume", [False, True])
def test_files_of_a_run_killed_before_its_first_checkpoint_are_removed(resume: bool, tmp_path: Path) -> None:
    partial = make_folder(tmp_path / "run.partial")
    (partial / ".lock").touch()
    for name in ("plan.json.tmp", "val.csv.partial", "metrics.json.tmp"):  # half-written files
        (partial / name).touch()
    make_folder(partial / "checkpoint")
    (partial / "checkpoint" / "images.json").touch()
    with new_run_dir(str(tmp_path / "run"), force=False, resume=resume) as folder:
        assert set(os.listdir(folder)) <= {".lock"}
        fill(folder, "new")
    assert os.listdir(tmp_path) == ["run"]


def test_resume_with_force_is_refused(tmp_path: Path) -> None:
    check_refused(tmp_path / "run", "--resume and --force", force=True, resume=True)


def test_resume_replaces_the_run_that_force_was_to_replace(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "old")
    checkpoint_in(make_folder(tmp_path / "run.partial"))
    assert not is_finished(str(tmp_path / "run"), {"seed": "old"})
    with new_run_dir(str(tmp_path / "run"), force=False, resume=True) as folder:
        fill(folder, "new")
    assert content_of(tmp_path / "run") == "new"
    assert is_finished(str(tmp_path / "run"), {"seed": "new"})


@pytest.mark.parametrize(("force", "resume"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_partial_folder_with_other_files_is_kept(
    has_checkpoint: bool, force: bool, resume: bool, tmp_path: Path
) -> None:
    partial = make_folder(tmp_path / "run.partial")
    (partial / "thesis.txt").write_text("years of work")
    if has_checkpoint:
        checkpoint_in(partial)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    check_refused(tmp_path / "run", rf"/run\.partial{NOT_A_RUN}", force=force, resume=resume)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert (partial / "thesis.txt").read_text() == "years of work"


def test_partial_path_that_is_a_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "run.partial").write_text("years of work")
    check_refused(tmp_path / "run", "/run: File exists.*--out", force=True)
    assert (tmp_path / "run.partial").read_text() == "years of work"


@pytest.mark.parametrize("error", [None, DataError("no")])
def test_other_files_created_meanwhile_are_kept(error: Exception | None, tmp_path: Path) -> None:
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


def test_run_dir_is_locked_while_training(tmp_path: Path) -> None:
    with new_run_dir(str(tmp_path / "run"), force=False) as folder:
        fill(folder, "first")
        for force, resume in ((False, False), (True, False), (False, True)):
            check_refused(tmp_path / "run", r"/run\.partial .*--out$", force=force, resume=resume)
    assert content_of(tmp_path / "run") == "first"
    assert os.listdir(tmp_path) == ["run"]


def test_finished_training_is_kept_when_the_folder_was_created_meanwhile(tmp_path: Path) -> None:
    def lose_race_in_training() -> None:
        with new_run_dir(str(tmp_path / "run"), force=True) as folder:
            checkpoint_in(folder)
            make_folder(tmp_path / "run")
            (tmp_path / "run" / "precious").touch()

    with pytest.raises(ConfigError, match=f"/run{NOT_A_RUN}"):
        lose_race_in_training()
    assert (tmp_path / "run.partial/checkpoint/checkpoint.safetensors").read_text() == "weights"
    assert os.listdir(tmp_path / "run") == ["precious"]


def test_previous_run_survives_a_kill_during_replacement(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "old")
    os.rename(tmp_path / "run", tmp_path / "run.partial-old")
    check_refused(tmp_path / "run", EXISTS)
    assert content_of(tmp_path / "run") == "old"
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("left", ["new run", "previous run", "both"])
def test_kill_during_replacement_does_not_block_later_runs(left: str, tmp_path: Path) -> None:
    """`force` renames RUN → RUN.partial-old and RUN.partial → RUN, then removes RUN.partial-old."""
    make_run(tmp_path / "run", "old")
    os.rename(tmp_path / "run", tmp_path / "run.partial-old")
    if left in ("new run", "both"):
        make_run(tmp_path / "new", "new")
        os.rename(tmp_path / "new", tmp_path / ("run" if left == "both" else "run.partial"))
    make_run(tmp_path / "run", "newest")
    make_run(tmp_path / "run", "last")
    assert content_of(tmp_path / "run") == "last"
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("left", ["checkpoint", ".lock"])
def test_temporary_files_of_a_finished_run_are_removed_later(left: str, tmp_path: Path) -> None:
    make_run(tmp_path / "run", "done")
    (tmp_path / "run" / "checkpoint").mkdir()
    (tmp_path / "run" / "checkpoint" / CHECKPOINT).touch()
    (tmp_path / "run" / ".lock").touch()
    check_refused(tmp_path / "run", EXISTS, resume=True)
    assert content_of(tmp_path / "run") == "done"
    assert not (tmp_path / "run" / left).exists()


def test_resume_is_possible_until_the_final_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_other_files_in_a_finished_run_are_kept(force: bool, tmp_path: Path) -> None:
    make_run(tmp_path / "run", "done")
    (tmp_path / "run" / "checkpoint").mkdir()
    (tmp_path / "run" / "checkpoint" / "thesis.txt").write_text("years of work")
    check_refused(tmp_path / "run", f"/run{NOT_A_RUN}", force=force)
    assert (tmp_path / "run" / "checkpoint" / "thesis.txt").exists()
