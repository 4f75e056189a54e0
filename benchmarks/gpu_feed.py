"""Does the input path keep a GPU busy? ConvNeXt-Tiny at 224 px, all layers trained, bf16, channels last.

Three rates in one run, img/s of training steps: `pixelplay train --finetune full` on real JPEG files (from the
run's history.csv, every file decoded anew in every epoch), the same network, loss and AdamW in a plain loop
on one batch that already lies on the GPU (no averaged weights, no schedule: what this GPU can do), and, where
its train.py is given, timm's script on the same files with the same crop and mirroring. Weights are random:
speed does not depend on them. Epochs that compile or warm up are left out. Memory is the most that was in use
on the whole GPU less what was in use before, seen every 20 ms.

An epoch's img_per_s counts the measuring on the val part that stands between it and the epoch before, so with
DATA of your own a large val part lowers it; what is drawn here has next to none.

Expected on a GPU with 16 processor cores beside it: files at least 0.95 of the resident batch. Not measured
yet.

Usage: python benchmarks/gpu_feed.py [DATA] [--timm-train train.py] [--batch-size 128] [--compile on]
DATA has train, val and test folders of class folders; without it JPEG files of 500 px are drawn.
"""

import argparse
import csv
import io
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pixelplay.config import FinetuneConfig, TrainConfig
from pixelplay.model.backbone import create_network, load_backbone
from pixelplay.model.classifier import Classifier, TrainableLinearHead
from pixelplay.model.split_backbone import split_backbone
from pixelplay.thread_pool import default_workers
from pixelplay.training.optim import make_optimizer

NETWORK = "convnext_tiny"
SIZE_PX, QUALITY = 500, 90
AIM = 0.95
# the averages over the epoch stand in brackets: Time: 0.052s, 2461.54/s  (0.060s, 2133.33/s)
TIMM_LINE = re.compile(r"Train: (\d+) \[.*?Time: .*?\([\d.]+s,\s*([\d.]+)/s\)")


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Speed of training steps: img/s of each epoch or stretch, and the most GPU memory meanwhile."""

    name: str
    img_per_s: tuple[float, ...]
    peak_gb: float

    @property
    def median(self) -> float:
        return statistics.median(self.img_per_s)


class GpuMemory:
    """Watches the memory in use on the GPU, by all processes."""

    def __enter__(self) -> "GpuMemory":
        torch.cuda.empty_cache()
        self._before = self._most = self._in_use()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def peak_gb(self) -> float:
        return (self._most - self._before) / 1e9

    def _watch(self) -> None:
        while not self._is_over.wait(0.02):
            self._most = max(self._most, self._in_use())

    def _in_use(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free


def draw_jpeg(k: int, i: int) -> bytes:
    """A gradient of the class's own direction under coarse and fine noise, about as large as an image."""
    rng = np.random.default_rng((k, i))
    angle = 2 * np.pi * k / 7 + rng.normal(0, 0.2)
    y, x = np.mgrid[0:SIZE_PX, 0:SIZE_PX] / SIZE_PX
    gradient = 128 + 90 * (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5))  # (H, W)
    coarse = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
    noise = np.asarray(coarse.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC), np.float64)  # (H, W, 3)
    grain = rng.normal(0, 6, (SIZE_PX, SIZE_PX, 1))
    pixels = gradient[..., None] + 0.4 * (noise - 128) + grain
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def draw_data(folder: Path, n_images: int, n_classes: int) -> None:
    """Write n_images training files and few others: an epoch's img_per_s holds the measuring before it."""

    def write(job: tuple[str, int, int]) -> None:
        part, k, i = job
        (folder / part / f"class_{k}" / f"{i:06}.jpg").write_bytes(draw_jpeg(k, i))

    jobs = []
    for part, n, first in (("train", n_images, 0), ("val", 4 * n_classes, 10**6), ("test", n_classes, 10**7)):
        for k in range(n_classes):
            (folder / part / f"class_{k}").mkdir(parents=True)
        jobs += [(part, i % n_classes, first + i) for i in range(n)]
    with ThreadPoolExecutor(default_workers()) as pool:
        list(pool.map(write, jobs))


def write_random_weights(path: Path) -> None:
    torch.manual_seed(0)
    state = create_network(NETWORK).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, path)


def run_pixelplay(data: Path, weights: Path, args: argparse.Namespace) -> Rate:
    """Train from files and read each epoch's speed from the run's records."""
    with tempfile.TemporaryDirectory() as folder, GpuMemory() as memory:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "pixelplay", "train", str(data), "--out", str(out), "--quiet"]
        command += [
            "--finetune",
            "full",
            "--backbone",
            NETWORK,
            "--weights",
            str(weights),
            "--head-init",
            "random",
        ]
        command += ["--epochs", str(args.epochs), "--train-batch-size", str(args.batch_size)]
        command += ["--device", "cuda", "--precision", "bf16", "--compile", args.compile]
        command += ["--n-folds", "2", "--time-budget", "2h"]
        command += ["--imbalance", "none", "--num-workers", str(args.num_workers)]
        command += ["--offline", "--cache-gb", "0", *args.train_options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(out / "history.csv", encoding="utf-8", newline="") as file:
            # epoch 0 is the classifier as it starts
            kept = [row for row in csv.DictReader(file) if int(row["epoch"]) > args.skip_epochs]
    return make_rate("PixelPlay, JPEG files", [float(row["img_per_s"]) for row in kept], memory)


def run_timm(data: Path, n_classes: int, args: argparse.Namespace) -> Rate:
    """Train timm's plain network with timm's script and read the speeds that it logs."""
    config = TrainConfig()
    with tempfile.TemporaryDirectory() as folder, GpuMemory() as memory:
        command = [sys.executable, args.timm_train, "--data-dir", str(data), "--output", folder]
        command += ["--train-split", "train", "--val-split", "val", "--num-classes", str(n_classes)]
        command += ["--model", NETWORK, "--img-size", "224", "--batch-size", str(args.batch_size)]
        command += ["--epochs", str(args.epochs), "--warmup-epochs", "0", "--log-interval", "10"]
        command += ["--amp", "--amp-dtype", "bfloat16", "--channels-last"]
        command += ["--torchcompile"] if args.compile == "on" else []
        command += ["--opt", "adamw", "--lr", str(config.finetuning.rates(is_full=True)[0])]
        command += ["--weight-decay", str(config.finetuning.weight_decay)]
        command += ["--clip-grad", str(config.finetuning.clip_grad_norm), "--smoothing", "0"]
        command += ["--scale", str(config.augmenting.crop_scale), "1.0", "--color-jitter", "0"]
        command += ["--train-interpolation", "bicubic", "--workers", str(args.num_workers), "--pin-mem"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
        raise SystemExit(f"error: {args.timm_train} ended with status {done.returncode}")
    # the last line of an epoch holds the average over all of it
    by_epoch = {int(epoch): float(speed) for epoch, speed in TIMM_LINE.findall(done.stdout)}
    speeds = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    return make_rate("timm's train.py, JPEG files", speeds[args.skip_epochs :], memory)


def make_rate(name: str, speeds: Sequence[float], memory: GpuMemory) -> Rate:
    if not speeds:
        raise SystemExit(
            f"error: no speed of {name} is left after the epochs that are skipped; raise --epochs"
        )
    return Rate(name=name, img_per_s=tuple(speeds), peak_gb=memory.peak_gb)


def make_classifier(weights: Path, n_classes: int, batch_size: int) -> tuple[nn.Module, Optimizer]:
    """The network and optimizer of `--finetune full --start random`."""
    loaded = load_backbone(NETWORK, str(weights), offline=True)
    _, tail = split_backbone(loaded.backbone, None, loaded.preprocessing.input_size)
    zeros = np.zeros(loaded.backbone.n_features, np.float32)
    classifier = Classifier(tail, TrainableLinearHead(zeros, zeros + 1, n_classes, start=None, dropout=0.0))
    optimizer = make_optimizer(classifier, FinetuneConfig(), batch_size)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]  # the loop's schedule would set it
    return WholeImages(classifier), optimizer


class WholeImages(nn.Module):
    """A classifier without a frozen front: images are its maps, and there are no moments."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(images, images.new_empty(len(images), 0))
        return logits


def make_plain_network(n_classes: int) -> tuple[nn.Module, Optimizer]:
    """timm's network under timm's head, with the same AdamW."""
    import timm

    settings = FinetuneConfig()
    network: nn.Module = timm.create_model(NETWORK, num_classes=n_classes)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    lr, _ = settings.rates(is_full=True)
    return network, torch.optim.AdamW(groups, lr=lr, weight_decay=settings.weight_decay, fused=True)


def run_resident(
    name: str, make: Callable[[], tuple[nn.Module, Optimizer]], n_classes: int, args: argparse.Namespace
) -> Rate:
    """Train on one batch that never leaves the GPU."""
    torch.backends.cudnn.benchmark = True  # as in the loop
    with GpuMemory() as memory:
        network, optimizer = make()
        network.to("cuda", memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        images = torch.randn(args.batch_size, 3, 224, 224, device="cuda")
        images = images.to(memory_format=torch.channels_last)
        labels = torch.randint(n_classes, (args.batch_size,), device="cuda")
        speeds = time_steps(network, optimizer, images, labels, args)
    torch.compiler.reset()  # lets go of the network and so of its memory
    return make_rate(name, speeds, memory)


def time_steps(
    network: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor, args: argparse.Namespace
) -> list[float]:
    """img/s of args.repeats stretches of args.steps steps, after warming up."""
    device = images.device.type
    clip_grad_norm = FinetuneConfig().clip_grad_norm or float("inf")
    forward: Any = torch.compile(network) if args.compile == "on" else network

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = forward(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def stretch(n: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(n):
            step()
        synchronize(device)
        return n * len(images) / (time.perf_counter() - start)

    stretch(args.steps)  # compiles and warms up
    return [stretch(args.steps) for _ in range(args.repeats)]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def show(rate: Rate) -> None:
    span = f"{min(rate.img_per_s):.0f} to {max(rate.img_per_s):.0f}, n = {len(rate.img_per_s)}"
    print(f"| {rate.name} | {rate.median:.0f} ({span}) | {rate.peak_gb:.2f} GB |", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", nargs="?", type=Path, help="default: JPEG files are drawn")
    parser.add_argument("--timm-train", metavar="PATH", help="train.py of timm's repository")
    parser.add_argument("--n-images", type=int, default=8192, help="training files to draw")
    parser.add_argument("--n-classes", type=int, default=10, help="classes to draw")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--compile", choices=("on", "off"), default="on")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--skip-epochs", type=int, default=1, help="first epochs, which compile and warm up")
    parser.add_argument("--steps", type=int, default=60, help="a stretch of the resident batch")
    parser.add_argument("--repeats", type=int, default=5, help="stretches")
    parser.add_argument("--num-workers", type=int, default=default_workers())
    parser.add_argument(
        "--train-options", nargs=argparse.REMAINDER, default=[], help="last: the rest goes to pixelplay train"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark needs a GPU that torch can use, and torch.cuda finds none")
    with tempfile.TemporaryDirectory() as folder:
        data, weights = args.data or Path(folder) / "data", Path(folder) / "random.safetensors"
        if args.data is None:
            draw_data(data, args.n_images, args.n_classes)
        n_classes = sum(path.is_dir() for path in (data / "train").glob("*"))
        if not n_classes:
            raise SystemExit(f"error: {data} has no train folder of class folders")
        write_random_weights(weights)
        where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.num_workers} workers"
        print(f"{NETWORK}, all layers, bf16, batch {args.batch_size}, compile {args.compile}; {where}\n")
        print("| | img/s, median (range) | peak GPU memory |\n|---|---|---|", flush=True)
        # each row is printed when it is there: what comes later may fail on a machine left alone
        make_ours = partial(make_classifier, weights, n_classes, args.batch_size)
        resident = run_resident("the same network, resident", make_ours, n_classes, args)
        show(resident)
        make_plain = partial(make_plain_network, n_classes)
        show(run_resident("timm's plain network, resident", make_plain, n_classes, args))
        files = run_pixelplay(data, weights, args)
        show(files)
        ratio = files.median / resident.median
        print(f"| files / resident, aim at least {AIM} | {ratio:.3f} | |", flush=True)
        if args.timm_train is None or not Path(args.timm_train).is_file():
            why = "--timm-train was not given" if args.timm_train is None else f"no file {args.timm_train}"
            print(f"\ntimm's train.py is left out: {why}; timm's repository has it, its package does not")
        else:
            show(run_timm(data, n_classes, args))


if __name__ == "__main__":
    main()
