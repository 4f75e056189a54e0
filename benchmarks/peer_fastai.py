"""PixelPlay and fastai beside each other: what each reaches after the same minutes on two CPU cores.

Both start from the same ImageNet weights (EfficientNet-Lite0), read the same files and learn from the same
given train, val and test parts (TrashNet), in one run of this script. PixelPlay: whole commands without any
cache, one for each time budget and one frozen probe. fastai: the best of three settings by validation
accuracy at the cap, each with a schedule as long as the cap allows; its clock begins with its process and
does not run while the test part is read. fastai learns from train and chooses by val, PixelPlay's probe
learns from both. With several caps each budget is answered by the smallest cap that covers it; with
the one of the defaults shorter budgets are read on the way through its schedule, which is not fastai's
best for them.

Expected (two idle cores): PixelPlay is above 0.81 and 0.87 as soon as its probe is done, after about a
minute; fastai takes at least ten times as long to 0.81. A sketch on a busy machine, fine_tune(3): 0.814
after 1,495 s. The defaults take two hours or more. Nothing else may run meanwhile: where another
process holds one of two cores, a training step in two threads takes twenty times as long, or more.

Usage: python benchmarks/peer_fastai.py TRASHNET --fastai-python PATH [--cap 5m 15m 30m]
where PATH is the Python of an environment of its own: python -m venv ENV && ENV/bin/pip install fastai timm
A short version: --budgets 1m --cap 2m --settings fine_tune
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

from pixelplay.config import SPLITS, parse_duration
from pixelplay.data.decode import decode_image
from pixelplay.data.sources import scan_source
from pixelplay.model.backbone import load_backbone

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
    """What fastai had after an epoch."""

    seconds: float
    val_accuracy: float
    test_accuracy: float


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One setting of fastai with a schedule for one cap."""

    setting: str
    cap_s: float
    n_epochs: int
    versions: str
    epochs: tuple[Epoch, ...]

    def after(self, seconds: float) -> Epoch | None:
        """The last epoch that was done by then."""
        done = [epoch for epoch in self.epochs if epoch.seconds <= seconds]
        return done[-1] if done else None

    @property
    def val_accuracy(self) -> float:
        """The figure that settings are chosen by."""
        last = self.after(self.cap_s)
        return last.val_accuracy if last else 0.0


def prepare_data(source: str, folder: Path, short_side: int) -> None:
    """Write upright copies with the same short side (px) for both; smaller files are copied as they are."""
    dataset = scan_source(source)
    if not all(dataset.in_split(part).any() for part in SPLITS):
        raise SystemExit(f"error: {source} must come with train, val and test parts")
    for i, (path, label, part) in enumerate(zip(dataset.paths, dataset.labels, dataset.splits, strict=True)):
        if part < 0 or label < 0:
            continue
        target = folder / SPLITS[part] / dataset.classes[label] / f"{i:06}{Path(path).suffix}"
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
    """Write the embedded weights under timm's names; the side of their input, px."""
    loaded = load_backbone("lite0", None, offline=True)
    state = loaded.backbone.network.state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return loaded.preprocessing.input_size


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def run_pixelplay(name: str, options: Sequence[str], data: Path, args: argparse.Namespace) -> Run:
    """Train once, cold: a cache folder of its own that nothing lies in."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "pixelplay", "train", str(data), "--out", str(out), "--quiet"]
        command += ["--cache-dir", str(Path(folder) / "cache"), "--offline", "--device", "cpu"]
        command += ["--num-workers", str(args.threads), "--seed", str(args.seed), *options]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment(args.threads))
        seconds = time.perf_counter() - start
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    run = Run(name=name, seconds=seconds, test_accuracy=metrics["test"]["accuracy"]["value"])
    say(run)
    return run


def run_fastai(setting: str, cap: str, data: Path, weights: Path, args: argparse.Namespace) -> Attempt:
    """Start the worker under fastai's own interpreter and read its lines."""
    cap_s = parse_duration(cap)
    command = [args.fastai_python, "-W", "ignore", str(WORKER), str(data), "--setting", setting]
    command += ["--weights", str(weights), "--cap-s", str(cap_s), "--size", str(args.size)]
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
                say(line.strip())
                lines.append(json.loads(line))
    if process.returncode:
        say(f"fastai's {setting} ended with status {process.returncode}; its epochs until then count")
    if not lines:
        raise SystemExit(f"error: fastai's {setting} did not start; its own words stand above")
    head, *epochs = lines
    return Attempt(
        setting=setting,
        cap_s=cap_s,
        n_epochs=head.pop("n_epochs"),
        versions=", ".join(f"{name} {version}" for name, version in head.items()),
        epochs=tuple(
            Epoch(**{name: line[name] for name in ("seconds", "val_accuracy", "test_accuracy")})
            for line in epochs
        ),
    )


def say(what: object) -> None:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{what}  (load {load:.1f})", file=sys.stderr, flush=True)


def choose(attempts: Sequence[Attempt]) -> dict[float, Attempt]:
    """Cap → the setting with the best validation accuracy at it."""
    chosen: dict[float, Attempt] = {}
    for attempt in attempts:
        best = chosen.get(attempt.cap_s)
        if best is None or attempt.val_accuracy > best.val_accuracy:
            chosen[attempt.cap_s] = attempt
    return dict(sorted(chosen.items()))


def time_row(target: float, runs: Sequence[Run], chosen: dict[float, Attempt]) -> str:
    """Seconds to a test accuracy on each side, and how many times as long fastai took."""
    ours = min((run.seconds for run in runs if run.test_accuracy >= target), default=None)
    # where there are several caps the quickest counts, in fastai's favour
    theirs = min(
        (e.seconds for attempt in chosen.values() for e in attempt.epochs if e.test_accuracy >= target),
        default=None,
    )
    lasted = max((attempt.epochs[-1].seconds for attempt in chosen.values() if attempt.epochs), default=0.0)
    left = "not reached" if ours is None else f"{ours:.0f} s"
    right = f"not within {lasted:.0f} s" if theirs is None else f"{theirs:.0f} s"
    if ours is None:
        ratio = "–"
    elif theirs is None:
        ratio = f"more than {lasted / ours:.1f} times as long"
    else:
        ratio = f"{theirs / ours:.1f} times as long"
    return f"| time to {target:.2f} test accuracy | {left} | {right} | {ratio} |"


def budget_row(run: Run, chosen: dict[float, Attempt]) -> str:
    """Test accuracy after one budget on each side."""
    seconds = parse_duration(run.name)
    cap_s = min((cap for cap in chosen if cap >= seconds), default=max(chosen))
    epoch = chosen[cap_s].after(seconds)
    left = f"{run.test_accuracy:.4f} (command took {run.seconds:.0f} s)"
    if epoch is None:
        return f"| test accuracy after {run.name} | {left} | no epoch done | – |"
    right = f"{epoch.test_accuracy:.4f} ({chosen[cap_s].setting}, cap {cap_s:.0f} s)"
    points = 100 * (epoch.test_accuracy - run.test_accuracy)
    return f"| test accuracy after {run.name} | {left} | {right} | {points:+.1f} points |"


def print_tables(
    probe: Run, runs: Sequence[Run], attempts: Sequence[Attempt], args: argparse.Namespace
) -> None:
    chosen = choose(attempts)
    print("| | PixelPlay | fastai, best of its settings | fastai is |\n|---|---|---|---|")
    for target in args.targets:
        print(time_row(target, [probe, *runs], chosen))
    for run in runs:
        print(budget_row(run, chosen))
    print("\n| PixelPlay | whole command, s | test accuracy |\n|---|---|---|")
    for run in (probe, *runs):
        print(f"| {run.name} | {run.seconds:.1f} | {run.test_accuracy:.4f} |")
    print("\n| fastai's setting | cap, s | epochs done | val at the cap | test then | |")
    print("|---|---|---|---|---|---|")
    for attempt in attempts:
        last = attempt.after(attempt.cap_s)
        figures = f"{last.val_accuracy:.4f} | {last.test_accuracy:.4f}" if last else "– | –"
        mark = "best val" if chosen[attempt.cap_s] is attempt else ""
        done = f"{len(attempt.epochs)} of {attempt.n_epochs}"
        print(f"| {attempt.setting} | {attempt.cap_s:.0f} | {done} | {figures} | {mark} |")
    print(f"\n{attempts[0].versions}; threads {args.threads}, seed {args.seed}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", help="images with train, val and test parts")
    parser.add_argument("--fastai-python", required=True, help="interpreter with fastai >= 2.8 and timm")
    parser.add_argument(
        "--budgets", nargs="+", default=["5m", "15m", "25m"], help="PixelPlay's --time-budget"
    )
    parser.add_argument("--targets", nargs="+", type=float, default=[0.81, 0.87], help="test accuracies")
    parser.add_argument("--cap", nargs="+", default=["30m"], help="time of each of fastai's settings")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--fastai-epochs", type=int, help="at least 2 (default: as many as the cap allows)")
    parser.add_argument("--fastai-batch-size", type=int, default=64, help="fastai's own default: 64")
    parser.add_argument("--fastai-channels-last", action="store_true", help="as some of its users do")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--short-side", type=int, default=256, help="of both sides' files, px")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for duration in (*args.budgets, *args.cap):
        parse_duration(duration)  # a misspelt one is to fail now, not after an hour
    return args


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        data, weights = Path(folder) / "data", Path(folder) / "lite0.safetensors"
        prepare_data(args.data, data, args.short_side)
        args.size = write_weights(weights)
        backbone = ("--backbone", "lite0")
        probe = run_pixelplay("probe", (*backbone, "--finetune", "none"), data, args)
        runs = [
            run_pixelplay(budget, (*backbone, "--finetune", "auto", "--time-budget", budget), data, args)
            for budget in args.budgets
        ]
        attempts = [
            run_fastai(setting, cap, data, weights, args) for cap in args.cap for setting in args.settings
        ]
        print_tables(probe, runs, attempts, args)


if __name__ == "__main__":
    main()
