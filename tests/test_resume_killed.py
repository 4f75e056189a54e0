"""Resume after SIGKILL of real processes: the same model as from an uninterrupted run."""

import csv
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

import pixelplay
from pixelplay.cli.main import main
from pixelplay.training import trainer
from pixelplay.training.checkpoint import CHECKPOINT
from tables import read_rows

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")

TIMES = ("img_per_s", "seconds")  # columns that differ between runs
TRAININGS = {
    "partial": ["--finetune", "partial", "--train-batch-size", "8", "--val-frac", "0.15"],
    # dropout, mixup, batch-norm statistics, repeated images, gradient accumulation
    "full": [
        *("--finetune", "full", "--head", "mlp", "--dropout", "0.3", "--drop-path", "0.2"),
        *("--augment", "crop", "mixup", "--imbalance", "sampler"),
        *("--train-batch-size", "8", "--grad-accum-steps", "2"),
    ],
}


@dataclass(frozen=True)
class Death:
    """SIGKILL before the n-th change of a file of the run whose name has an ending."""

    run: str
    n: int
    ending: str = ""

    def watch(self) -> None:
        """Watch this process from now on."""
        left = self.n

        def see(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if _changes_a_file(event, arguments):
                path = os.path.abspath(os.fsdecode(arguments[0]))
                if path.startswith(self.run) and path.endswith(self.ending):
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(see)


def _changes_a_file(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        is_path = isinstance(arguments[0], str | bytes)
        return is_path and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def _run(argv: list[str], checkpoint_every_s: float, death: Death | None) -> None:
    """Run a command in a started process."""
    trainer.CHECKPOINT_EVERY_S = checkpoint_every_s
    if death is not None:
        death.watch()
    sys.exit(main(argv))


Start = Callable[..., BaseProcess]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start a command in its own process; imports are done once for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["test_resume_killed", "pixelplay.api", "pixelplay.outputs.console", "timm"]
    )
    processes: list[BaseProcess] = []
    source = Path(pixelplay.__file__).parents[1]

    def run(
        argv: list[str],
        *,
        checkpoint_every_s: float = trainer.CHECKPOINT_EVERY_S,
        death: Death | None = None,
    ) -> BaseProcess:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(
                "PYTHONPATH",
                os.pathsep.join([str(source), str(Path(__file__).parent)]),
            )
            process = context.Process(target=_run, args=(argv, checkpoint_every_s, death))
            process.start()
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def lengthless(drawn_images: Path, small_settings: list[str]) -> list[str]:
    """Return the common options of all runs, except for the number of epochs."""
    return ["train", str(drawn_images), *small_settings, "--quiet"]


@pytest.fixture(scope="module")
def three_epochs(lengthless: list[str]) -> list[str]:
    """The common options of all runs of three epochs."""
    return [*lengthless, "--epochs", "3"]


@pytest.fixture(scope="module", params=TRAININGS)
def training(request: pytest.FixtureRequest, three_epochs: list[str]) -> list[str]:
    return [*three_epochs, *TRAININGS[request.param]]


@pytest.fixture(scope="module")
def uninterrupted(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: a run that was not killed."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main([*training, "--out", str(run), "--cache-dir", str(run.parent / "cache")]) == 0
    # otherwise linear probes would be compared
    assert json.loads((run / "metrics.json").read_text())["finetune"] != "none"
    return run


def _kill_once(process: BaseProcess, is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_reached() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _await_death(process: BaseProcess) -> None:
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def _progress(run: Path) -> dict[str, Any]:
    """Read the progress in the checkpoint of an interrupted run."""
    from safetensors import safe_open

    with safe_open(f"{run}.partial/checkpoint/{CHECKPOINT}", framework="np") as file:
        progress: dict[str, Any] = json.loads(file.metadata()["progress"])
    return progress


def _content(run: Path) -> dict[str, Any]:
    """Read all files of a run, without times and the cache folder."""
    found: dict[str, Any] = {
        path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file()
    }
    del found["environment.json"]  # has the time
    config = json.loads(found["config.json"])
    rows = list(csv.DictReader(found["history.csv"].decode().splitlines()))
    history = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return {**found, "config.json": config | {"cache_dir": None, "command": None}, "history.csv": history}


def _assert_same(run: Path, uninterrupted: Path) -> None:
    """Check that all files are equal byte for byte, and that there are no others."""
    assert sorted(path.name for path in run.parent.iterdir()) == ["cache", "run"]
    found, expected = _content(run), _content(uninterrupted)
    assert set(found) == set(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    best = json.loads(found["metrics.json"])["chosen"]["epoch"]["value"]
    assert best > 0  # otherwise the model would not depend on the training
    assert {"model/backbone.safetensors", "model/head.safetensors", "history.csv"} <= set(found)


@pytest.mark.parametrize("training", ["partial"], indirect=True)
def test_resume_after_four_kills_equals_an_uninterrupted_run(
    training: list[str], uninterrupted: Path, start: Start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train = [*training, "--out", str(run), "--cache-dir", str(tmp_path / "cache"), "--resume"]
    checkpoints = tmp_path / "run.partial/checkpoint"

    # nothing to resume yet
    _kill_once(start(train), lambda: (checkpoints / "settings.json").exists())
    assert not (checkpoints / CHECKPOINT).exists()
    assert not run.exists()

    _kill_once(start(train), lambda: (checkpoints / CHECKPOINT).exists())
    assert _progress(run)["epoch"] in (2, 3, 4)

    # during the refit on train and val
    last = checkpoints / "refit/checkpoint"
    _await_death(start(train, checkpoint_every_s=0, death=Death(str(last), 5, f"{CHECKPOINT}.tmp")))
    assert (last / CHECKPOINT).exists()

    # while the records of the finished model are written
    _await_death(start(train, death=Death(f"{run}.partial", 2, "predictions.csv.partial")))
    assert (tmp_path / "run.partial/predictions.csv.partial").exists()
    assert not run.exists()

    assert main(train) == 0
    _assert_same(run, uninterrupted)


def test_resume_within_an_epoch_continues_from_the_last_step(
    training: list[str], uninterrupted: Path, start: Start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train = [*training, "--out", str(run), "--cache-dir", str(tmp_path / "cache"), "--resume"]

    def kill(n: int) -> dict[str, Any]:
        # each step makes two changes: the file, then its name
        death = Death(f"{run}.partial", n, f"{CHECKPOINT}.tmp")
        _await_death(start(train, checkpoint_every_s=0, death=death))
        return _progress(run)

    progress = kill(4)
    n_batches = progress["n_batches"]
    assert (progress["epoch"], progress["step"]) == (1, 1)
    assert 0 < 8 * n_batches == progress["n_seen"] < 32
    assert (tmp_path / f"run.partial/checkpoint/{CHECKPOINT}.tmp").exists()

    # after the last step of the epoch, before its evaluation
    n_steps = 4 // n_batches
    progress = kill(2 * (n_steps - 1) + 1)
    assert (progress["epoch"], progress["step"], progress["n_batches"]) == (1, n_steps, 4)

    assert main(train) == 0
    _assert_same(run, uninterrupted)


@pytest.mark.slow
def test_resume_after_a_kill_before_any_change_of_a_file(
    training: list[str], uninterrupted: Path, start: Start, tmp_path: Path
) -> None:
    for n in range(1, 1000):
        folder = tmp_path / str(n)
        run = folder / "run"
        train = [*training, "--out", str(run), "--cache-dir", str(folder / "cache"), "--resume"]
        process = start(train, checkpoint_every_s=0, death=Death(str(run), n))
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert main(train) == 0 or run.exists(), f"killed before change {n}"
        _assert_same(run, uninterrupted)
    assert n > 30


@pytest.mark.parametrize(("ending", "n"), [("fold.safetensors.tmp", 2), (f"{CHECKPOINT}.tmp", 4)])
def test_resume_of_a_cross_validation_keeps_finished_folds(
    ending: str, n: int, three_epochs: list[str], start: Start, tmp_path: Path
) -> None:
    """Kill while the second fold is written, or trained; the first is not trained again."""
    settings = [
        "crossval",
        *three_epochs[1:],
        *TRAININGS["partial"],
        "--unfreeze-stages",
        "1",
        "--n-folds",
        "3",
    ]
    expected_run, run = tmp_path / "uninterrupted", tmp_path / "killed/run"
    run.parent.mkdir()
    assert main([*settings, "--out", str(expected_run), "--cache-dir", str(tmp_path / "cache")]) == 0
    assert "partial" in json.loads((expected_run / "metrics.json").read_text())["finetune"]
    command = [*settings, "--out", str(run), "--cache-dir", str(run.parent / "cache"), "--resume"]
    second = run.parent / "run.partial/checkpoint/fold-00-01"
    _await_death(start(command, checkpoint_every_s=0, death=Death(str(second), n, ending)))
    first = run.parent / "run.partial/checkpoint/fold-00-00/fold.safetensors"
    before = first.stat().st_mtime_ns
    _await_death(start(command, death=Death(f"{run}.partial", 1, "oof.csv.partial")))
    assert first.stat().st_mtime_ns == before
    assert main(command) == 0
    assert sorted(path.name for path in run.parent.iterdir()) == ["cache", "run"]
    found, expected = _content(run), _content(expected_run)
    assert set(found) == set(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


# --- interrupted runs ---


def test_running_and_interrupted_runs_are_protected(
    lengthless: list[str], start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*lengthless, "--out", str(tmp_path / "run"), "--finetune", "partial", "--cached-views", "1"]
    command += ["--val-frac", "0.15"]

    def refusal(*argv: str, epochs: str = "3") -> str:
        capsys.readouterr()
        status = main([*command, "--epochs", epochs, *argv])
        shown = capsys.readouterr()
        assert (status, shown.out) == (1, "")
        assert shown.err.startswith("error: ")
        assert shown.err.count("\n") == 1
        return shown.err

    partial = tmp_path / "run.partial"
    process = start([*command, "--epochs", "9999"])
    deadline = time.monotonic() + 120
    while not (partial / "checkpoint" / CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for argv in ([], ["--force"], ["--resume"]):
        assert f"{partial} is in use by another process;" in refusal(*argv, epochs="9999")
    _kill_once(process, lambda: True)

    left = (partial / "checkpoint" / CHECKPOINT).read_bytes()
    line = refusal(epochs="9999")
    assert f"{partial} is an interrupted run" in line
    assert "--resume" in line
    assert "--force" in line
    assert "finetuning.epochs was 9999, is 3" in refusal("--resume")
    assert (partial / "checkpoint" / CHECKPOINT).read_bytes() == left
    (partial / "checkpoint" / CHECKPOINT).write_bytes(left[:-100])
    line = refusal("--resume", epochs="9999")
    assert f"could not read {partial / 'checkpoint' / CHECKPOINT}" in line
    assert "use --force instead of --resume" in line

    assert main([*command, "--epochs", "3", "--force"]) == 0
    assert os.listdir(tmp_path) == ["run"]
    rows = read_rows(tmp_path / "run/history.csv")
    assert [row["epoch"] for row in rows][:4] == ["0", "1", "2", "3"]
