"""PixelPlay and fastai after the same training time on two CPU cores.

Both start from the same ImageNet weights (EfficientNet-Lite0), read the same files and use the same
predefined train, val and test splits (TrashNet), in one run of this script. PixelPlay: whole commands
without a cache, one for each time budget and one linear probe. fastai: the best of three settings by
validation accuracy at the time limit, each with a schedule as long as the limit allows; its clock starts
with its process and stops while the test split is evaluated. fastai trains on train and selects on val;
PixelPlay's probe is fitted on both. With several limits each budget uses the smallest limit that covers
it; with the default limit shorter budgets are read from the middle of its schedule, which is not the best
that fastai can do in that time.

Expected (two idle cores): PixelPlay exceeds 0.81 and 0.87 once its probe is fitted, after about a minute;
fastai takes at least ten times as long to 0.81. The defaults take two hours or more. Nothing else may run
at the same time: where another process occupies one of two cores, a training step in two threads takes
twenty times as long or more.

Usage: python benchmarks/compare_fastai.py TRASHNET --fastai-python PATH [--limits 5m 15m 30m]
PATH is the Python of another environment: python -m venv ENV && ENV/bin/pip install fastai timm
A short version: --budgets 1m --limits 2m --settings fine_tune
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from safetensors.torch import save_file

from commands import run_pixelplay
from pixelplay.config import SPLITS, parse_duration
from pixelplay.data.decode import decode_image
from pixelplay.data.sources import open_dataset
from pixelplay.model.backbone import load_backbone
from records import Record, make_parser

SETTINGS = ("fine_tune", "frozen_then_slices", "one_cycle_mixup")
WORKER = Path(__file__).with_name("fastai_worker.py")
ORIENTATION = 274  # EXIF tag


@dataclass(frozen=True, kw_only=True)
class Run:
    """One whole `pixelplay train`."""

    name: str
    seconds: float
    test_accuracy: float


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Accuracy of fastai after an epoch."""

    seconds: float
    val_accuracy: float
    test_accuracy: float


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One setting of fastai with a schedule for one time limit."""

    setting: str
    limit_s: float
    n_epochs: int
    versions: str
    epochs: tuple[Epoch, ...]

    def after(self, seconds: float) -> Epoch | None:
        """Return the last epoch finished by then."""
        done = [epoch for epoch in self.epochs if epoch.seconds <= seconds]
        return done[-1] if done else None

    @property
    def val_accuracy(self) -> float:
        """Return the validation accuracy at the time limit, which chooses the setting."""
        last = self.after(self.limit_s)
        return last.val_accuracy if last else 0.0


def prepare_data(source: str, folder: Path, short_side: int) -> None:
    """Write upright images with the same short side (px) for both; smaller files are copied unchanged."""
    dataset = open_dataset(source)
    if not all(dataset.in_split(split).any() for split in SPLITS):
        raise SystemExit(f"error: {source} has no train, val and test splits")
    for i, (path, label, split) in enumerate(zip(dataset.paths, dataset.labels, dataset.splits, strict=True)):
        if split < 0 or label < 0:
            continue
        target = folder / SPLITS[split] / dataset.classes[label] / f"{i:06}{Path(path).suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        data = dataset.storage.read(path)
        with Image.open(io.BytesIO(data)) as image:
            is_ready = min(image.size) <= short_side and image.getexif().get(ORIENTATION, 1) == 1
        if is_ready:
            target.write_bytes(data)
            continue
        upright = Image.fromarray(decode_image(data, path=path))
        scale = min(1.0, short_side / min(upright.size))
        width, height = (round(scale * side) for side in upright.size)
        resized = upright.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        resized.save(target.with_suffix(".jpg"), quality=90)


def write_weights(path: Path) -> int:
    """Write the embedded weights with timm's names; return the input size, px."""
    loaded = load_backbone("lite0", None, offline=True)
    state = loaded.backbone.network.state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return loaded.preprocessing.input_size[0]


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a process with a number of threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def train_pixelplay(name: str, options: Sequence[str], data: Path, args: argparse.Namespace) -> Run:
    """Train once without a cache."""
    words = ["--offline", "--device", "cpu", "--num-workers", str(args.threads), "--seed", str(args.seed)]
    with run_pixelplay("train", data, [*words, *options], env=environment(args.threads)) as finished:
        accuracy = finished.metrics["test"]["accuracy"]["value"]
    run = Run(name=name, seconds=finished.seconds, test_accuracy=accuracy)
    report(run)
    return run


def run_fastai(setting: str, limit: str, data: Path, weights: Path, args: argparse.Namespace) -> Attempt:
    """Start the worker with fastai's interpreter and read its lines."""
    limit_s = parse_duration(limit)
    command = [args.fastai_python, "-W", "ignore", str(WORKER), str(data), "--setting", setting]
    command += ["--weights", str(weights), "--limit-s", str(limit_s), "--size", str(args.size)]
    command += ["--batch-size", str(args.fastai_batch_size), "--threads", str(args.threads)]
    command += ["--seed", str(args.seed), "--started", repr(time.time())]
    if args.fastai_epochs is not None:
        command += ["--epochs", str(args.fastai_epochs)]
    if args.fastai_channels_last:
        command += ["--channels-last"]
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment(args.threads)
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                report(line.strip())
                lines.append(json.loads(line))
    if process.returncode:
        report(f"fastai, {setting}: exit status {process.returncode}; using the epochs before it")
    if not lines:
        raise SystemExit(f"error: fastai, {setting}: could not start; see its output above")
    head, *epochs = lines
    return Attempt(
        setting=setting,
        limit_s=limit_s,
        n_epochs=head.pop("n_epochs"),
        versions=", ".join(f"{name} {version}" for name, version in head.items()),
        epochs=tuple(
            Epoch(**{name: line[name] for name in ("seconds", "val_accuracy", "test_accuracy")})
            for line in epochs
        ),
    )


def report(what: object) -> None:
    """Print a line and the load of the machine on stderr."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{what}  (load {load:.1f})", file=sys.stderr, flush=True)


def choose(attempts: Sequence[Attempt]) -> dict[float, Attempt]:
    """Map each time limit to the setting with the best validation accuracy."""
    chosen: dict[float, Attempt] = {}
    for attempt in attempts:
        best = chosen.get(attempt.limit_s)
        if best is None or attempt.val_accuracy > best.val_accuracy:
            chosen[attempt.limit_s] = attempt
    return dict(sorted(chosen.items()))


def seconds_to(target: float, runs: Sequence[Run], chosen: dict[float, Attempt]) -> dict[str, float | None]:
    """Return the seconds until each program reached a test accuracy, None where it did not."""
    own = min((run.seconds for run in runs if run.test_accuracy >= target), default=None)
    # with several time limits the fastest counts, in fastai's favour
    epochs = (epoch for attempt in chosen.values() for epoch in attempt.epochs)
    other = min((epoch.seconds for epoch in epochs if epoch.test_accuracy >= target), default=None)
    return {"PixelPlay": own, "fastai": other}


def add_rows(
    record: Record, probe: Run, runs: Sequence[Run], attempts: Sequence[Attempt], args: argparse.Namespace
) -> None:
    """Print and record times to the targets, every run of PixelPlay and every setting of fastai."""
    chosen, split = choose(attempts), "official test"
    for target in args.targets:
        for name, seconds in seconds_to(target, [probe, *runs], chosen).items():
            shown = "not reached" if seconds is None else f"{seconds:.0f} s"
            print(f"time to a test accuracy of {target:.2f}, {name}: {shown}")
            method = f"{name}, until a test accuracy of {target:.2f}"
            record.add(args.data, split, method, {}, seeds=[args.seed], seconds=seconds or ())
    for run in (probe, *runs):
        print(f"PixelPlay, {run.name}: test accuracy {run.test_accuracy:.4f} after {run.seconds:.0f} s")
        accuracy = {"accuracy": run.test_accuracy}
        record.add(
            args.data, split, f"PixelPlay, {run.name}", accuracy, seeds=[args.seed], seconds=run.seconds
        )
    for run in runs:
        budget_s = parse_duration(run.name)
        limit_s = min((limit for limit in chosen if limit >= budget_s), default=max(chosen))
        epoch = chosen[limit_s].after(budget_s)
        name = f"fastai, {chosen[limit_s].setting}, after {run.name}"
        print(
            f"{name}: {'no epoch finished' if epoch is None else f'test accuracy {epoch.test_accuracy:.4f}'}"
        )
        metrics = {} if epoch is None else {"accuracy": epoch.test_accuracy}
        record.add(args.data, split, name, metrics, seeds=[args.seed], seconds=budget_s)
    for attempt in attempts:
        last = attempt.after(attempt.limit_s)
        best = " (best on val)" if chosen[attempt.limit_s] is attempt else ""
        name = f"fastai, {attempt.setting}{best}, {len(attempt.epochs)} of {attempt.n_epochs} epochs"
        metrics = {} if last is None else {"accuracy": last.test_accuracy, "val accuracy": last.val_accuracy}
        print(f"{name}, time limit {attempt.limit_s:.0f} s: {metrics or 'no epoch finished'}")
        record.add(args.data, split, name, metrics, seeds=[args.seed], seconds=attempt.limit_s)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line and check its durations."""
    parser = make_parser(__doc__)
    parser.add_argument("data", help="images with train, val and test splits")
    parser.add_argument("--fastai-python", required=True, help="interpreter with fastai >= 2.8 and timm")
    parser.add_argument(
        "--budgets", nargs="+", default=["5m", "15m", "25m"], help="PixelPlay's --time-budget"
    )
    parser.add_argument("--targets", nargs="+", type=float, default=[0.81, 0.87], help="test accuracies")
    parser.add_argument("--limits", nargs="+", default=["30m"], help="time limits of each fastai setting")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--fastai-epochs", type=int, help="at least 2 [as many as the time limit allows]")
    parser.add_argument("--fastai-batch-size", type=int, default=64, help="[64, fastai's default]")
    parser.add_argument("--fastai-channels-last", action="store_true", help="use channels-last tensors")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--short-side", type=int, default=256, help="of the files, px [256]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for duration in (*args.budgets, *args.limits):
        parse_duration(duration)  # fail now rather than after an hour
    return args


def main() -> None:
    """Train with both programs and compare."""
    args = parse_arguments()
    record = Record("Comparison with fastai", "PixelPlay and fastai after the same time", args.record)
    with tempfile.TemporaryDirectory() as folder:
        data, weights = Path(folder) / "data", Path(folder) / "lite0.safetensors"
        prepare_data(args.data, data, args.short_side)
        args.size = write_weights(weights)
        backbone = ("--backbone", "lite0")
        probe = train_pixelplay("linear probe", (*backbone, "--finetune", "none"), data, args)
        runs = [
            train_pixelplay(budget, (*backbone, "--finetune", "auto", "--time-budget", budget), data, args)
            for budget in args.budgets
        ]
        attempts = [
            run_fastai(setting, limit, data, weights, args)
            for limit in args.limits
            for setting in args.settings
        ]
        record.content["notes"] = [f"{attempts[0].versions}; {args.threads} threads, seed {args.seed}."]
        add_rows(record, probe, runs, attempts, args)
    record.write()


if __name__ == "__main__":
    main()
