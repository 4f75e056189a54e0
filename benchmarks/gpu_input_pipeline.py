"""GPU utilisation of the input pipeline: ConvNeXt-Tiny at 224 px, all layers trained, bf16, channels last.

Measures the speed of training steps in one run, in img/s: `pixelplay train --finetune full` on JPEG files
(from the run's history.csv; every file is decoded in every epoch), the same network, loss and AdamW in a
plain loop on one batch in GPU memory (no schedule: the upper limit of this GPU) and, with --timm-train,
timm's script on the same files with the same crop and mirroring. Weights are random, because speed does
not depend on them. Epochs that warm up are skipped. Memory is the peak of the whole GPU minus
what was in use before, sampled every 20 ms.

The img_per_s of an epoch includes the evaluation of the val split before it, so a large val split in your
own DATA lowers it; the generated data have a very small one.

Expected on a GPU with 16 CPU cores: files at least 0.95 of the batch in memory. Not measured yet.

Usage: python benchmarks/gpu_input_pipeline.py [DATA] [--timm-train train.py] [--batch-size 128]
DATA has train, val and test folders of class folders; without it JPEG files of 500 px are generated.
"""

import argparse
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

from commands import run_pixelplay
from pixelplay.config import FinetuneConfig, TrainConfig
from pixelplay.model.backbone import create_network, load_backbone
from pixelplay.model.classifier import Classifier, TrainableLinearHead
from pixelplay.model.split_backbone import split_backbone
from pixelplay.thread_pool import default_workers
from pixelplay.training.optim import make_optimizer
from records import Record, make_parser

NETWORK = "convnext_tiny"
SIZE_PX, QUALITY = 500, 90
TARGET_RATIO = 0.95
# the averages over the epoch are in brackets: Time: 0.052s, 2461.54/s  (0.060s, 2133.33/s)
TIMM_LINE = re.compile(r"Train: (\d+) \[.*?Time: .*?\([\d.]+s,\s*([\d.]+)/s\)")


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Speed of training steps: img/s of each epoch or repetition, and peak GPU memory."""

    name: str
    img_per_s: tuple[float, ...]
    peak_gb: float

    @property
    def median(self) -> float:
        """Return the median speed, in img/s."""
        return statistics.median(self.img_per_s)


class GpuMemory:
    """Record the peak memory of the GPU, all processes included."""

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
        """Return the peak minus what was in use before, in GB."""
        return (self._most - self._before) / 1e9

    def _watch(self) -> None:
        while not self._is_over.wait(0.02):
            self._most = max(self._most, self._in_use())

    def _in_use(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free


def draw_jpeg(k: int, i: int) -> bytes:
    """Generate a gradient in the direction of the class with noise, about as large as a real JPEG file."""
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
    """Write n_images training files and few others, because img_per_s includes their evaluation."""

    def write(job: tuple[str, int, int]) -> None:
        split, k, i = job
        (folder / split / f"class_{k}" / f"{i:06}.jpg").write_bytes(draw_jpeg(k, i))

    jobs = []
    for split, n, first in (
        ("train", n_images, 0),
        ("val", 4 * n_classes, 10**6),
        ("test", n_classes, 10**7),
    ):
        for k in range(n_classes):
            (folder / split / f"class_{k}").mkdir(parents=True)
        jobs += [(split, i % n_classes, first + i) for i in range(n)]
    with ThreadPoolExecutor(default_workers()) as pool:
        list(pool.map(write, jobs))


def write_random_weights(path: Path) -> None:
    """Write random weights of the network."""
    torch.manual_seed(0)
    state = create_network(NETWORK).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, path)


def train_pixelplay(data: Path, weights: Path, args: argparse.Namespace) -> Rate:
    """Train from files and read the speed of each epoch from history.csv."""
    options = [
        "--finetune",
        "full",
        "--backbone",
        NETWORK,
        "--weights",
        str(weights),
        "--head-init",
        "random",
    ]
    options += ["--epochs", str(args.epochs), "--train-batch-size", str(args.batch_size)]
    options += ["--device", "cuda", "--precision", "bf16"]
    options += ["--n-folds", "2", "--time-budget", "2h"]
    options += ["--imbalance", "none", "--num-workers", str(args.num_workers)]
    options += ["--offline", "--cache-gb", "0", *args.train_options]
    with GpuMemory() as memory, run_pixelplay("train", data, options) as run:
        rows = run.read_table("history.csv")
    # epoch 0 is the initial classifier
    kept = [row for row in rows if int(row["epoch"]) > args.skip_epochs]
    return make_rate("PixelPlay, JPEG files", [float(row["img_per_s"]) for row in kept], memory)


def run_timm(data: Path, n_classes: int, args: argparse.Namespace) -> Rate:
    """Train timm's network with timm's script and read the speeds from its log."""
    config = TrainConfig()
    with tempfile.TemporaryDirectory() as folder, GpuMemory() as memory:
        command = [sys.executable, args.timm_train, "--data-dir", str(data), "--output", folder]
        command += ["--train-split", "train", "--val-split", "val", "--num-classes", str(n_classes)]
        command += ["--model", NETWORK, "--img-size", "224", "--batch-size", str(args.batch_size)]
        command += ["--epochs", str(args.epochs), "--warmup-epochs", "0", "--log-interval", "10"]
        command += ["--amp", "--amp-dtype", "bfloat16", "--channels-last"]
        command += ["--opt", "adamw", "--lr", str(config.finetuning.rates(full=True)[0])]
        command += ["--weight-decay", str(config.finetuning.weight_decay)]
        command += ["--clip-grad", str(config.finetuning.clip_grad_norm), "--smoothing", "0"]
        command += ["--scale", str(config.augmenting.crop_scale), "1.0", "--color-jitter", "0"]
        command += ["--train-interpolation", "bicubic", "--workers", str(args.num_workers), "--pin-mem"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
        raise SystemExit(f"error: {args.timm_train} ended with status {done.returncode}")
    # the last line of an epoch has the average over the epoch
    by_epoch = {int(epoch): float(speed) for epoch, speed in TIMM_LINE.findall(done.stdout)}
    speeds = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    return make_rate("timm's train.py, JPEG files", speeds[args.skip_epochs :], memory)


def make_rate(name: str, speeds: Sequence[float], memory: GpuMemory) -> Rate:
    """Build a Rate; exit where no epoch is left to measure."""
    if not speeds:
        raise SystemExit(f"error: {name}: no epochs left after --skip-epochs; use more --epochs")
    return Rate(name=name, img_per_s=tuple(speeds), peak_gb=memory.peak_gb)


def make_classifier(weights: Path, n_classes: int, batch_size: int) -> tuple[nn.Module, Optimizer]:
    """Build the network and optimizer of `--finetune full --head-init random`."""
    loaded = load_backbone(NETWORK, str(weights), offline=True)
    _, tail = split_backbone(loaded.backbone, None, loaded.preprocessing.input_size)
    zeros = np.zeros(loaded.backbone.n_features, np.float32)
    classifier = Classifier(tail, TrainableLinearHead(zeros, zeros + 1, n_classes, start=None, dropout=0.0))
    optimizer = make_optimizer(classifier, FinetuneConfig(), batch_size)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]  # set by the schedule in training
    return ImageClassifier(classifier), optimizer


class ImageClassifier(nn.Module):
    """Apply a classifier without frozen stages directly to images."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (B, K); no channel statistics come from frozen stages."""
        logits: Tensor = self.classifier(images, images.new_empty(len(images), 0))
        return logits


def make_plain_network(n_classes: int) -> tuple[nn.Module, Optimizer]:
    """Build timm's network and head with the same AdamW."""
    import timm

    settings = FinetuneConfig()
    network: nn.Module = timm.create_model(NETWORK, num_classes=n_classes)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    lr, _ = settings.rates(full=True)
    return network, torch.optim.AdamW(groups, lr=lr, weight_decay=settings.weight_decay, fused=True)


def run_resident(
    name: str, make: Callable[[], tuple[nn.Module, Optimizer]], n_classes: int, args: argparse.Namespace
) -> Rate:
    """Train on one batch in GPU memory."""
    torch.backends.cudnn.benchmark = True  # as in training
    with GpuMemory() as memory:
        network, optimizer = make()
        network.to("cuda", memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        images = torch.randn(args.batch_size, 3, 224, 224, device="cuda")
        images = images.to(memory_format=torch.channels_last)
        labels = torch.randint(n_classes, (args.batch_size,), device="cuda")
        speeds = time_steps(network, optimizer, images, labels, args)
    return make_rate(name, speeds, memory)


def time_steps(
    network: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor, args: argparse.Namespace
) -> list[float]:
    """Return the img/s of args.repeats repetitions of args.steps steps, after warming up."""
    device = images.device.type
    clip_grad_norm = FinetuneConfig().clip_grad_norm or float("inf")

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = network(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def time_repetition(n: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(n):
            step()
        synchronize(device)
        return n * len(images) / (time.perf_counter() - start)

    time_repetition(args.steps)  # warms up
    return [time_repetition(args.steps) for _ in range(args.repeats)]


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def add_rate(record: Record, data: str, rate: Rate) -> None:
    """Print and record a rate."""
    span = f"{min(rate.img_per_s):.0f} to {max(rate.img_per_s):.0f}, n = {len(rate.img_per_s)}"
    print(f"{rate.name}: {rate.median:.0f} img/s ({span}), {rate.peak_gb:.2f} GB", flush=True)
    record.add(data, "train", rate.name, {"img/s": rate.img_per_s, "peak memory, GB": rate.peak_gb})


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("data", nargs="?", type=Path, help="[generated JPEG files]")
    parser.add_argument("--timm-train", metavar="PATH", help="train.py of timm's repository")
    parser.add_argument("--n-images", type=int, default=8192, help="training files to generate [8192]")
    parser.add_argument("--n-classes", type=int, default=10, help="classes to generate [10]")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--skip-epochs", type=int, default=1, help="first epochs that warm up [1]")
    parser.add_argument("--steps", type=int, default=60, help="steps of one repetition in GPU memory [60]")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions [5]")
    parser.add_argument("--num-workers", type=int, default=default_workers())
    parser.add_argument(
        "--train-options",
        nargs=argparse.REMAINDER,
        default=[],
        help="must be last: further options of pixelplay train",
    )
    return parser.parse_args()


def main() -> None:
    """Measure every input and compare files with GPU memory."""
    args = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark needs a CUDA GPU; torch.cuda finds none")
    with tempfile.TemporaryDirectory() as folder:
        data, weights = args.data or Path(folder) / "data", Path(folder) / "random.safetensors"
        if args.data is None:
            draw_data(data, args.n_images, args.n_classes)
        n_classes = sum(path.is_dir() for path in (data / "train").glob("*"))
        if not n_classes:
            raise SystemExit(f"error: {data} has no train folder of class folders")
        write_random_weights(weights)
        title = f"Full training of {NETWORK} on a GPU, bf16, batch {args.batch_size}"
        record = Record(
            "Speed", title, args.record, notes=[f"torch {torch.__version__}, {args.num_workers} workers"]
        )
        name = str(args.data or f"{args.n_images:,} generated JPEG files")
        make_ours = partial(make_classifier, weights, n_classes, args.batch_size)
        resident = run_resident("PixelPlay's network, batch in GPU memory", make_ours, n_classes, args)
        add_rate(record, name, resident)
        make_plain = partial(make_plain_network, n_classes)
        add_rate(
            record, name, run_resident("timm's network, batch in GPU memory", make_plain, n_classes, args)
        )
        files = train_pixelplay(data, weights, args)
        add_rate(record, name, files)
        ratio = files.median / resident.median
        print(f"files relative to GPU memory: {ratio:.3f} (target {TARGET_RATIO})", flush=True)
        record.add(name, "train", "files relative to GPU memory", {"ratio": ratio})
        if args.timm_train is None or not Path(args.timm_train).is_file():
            why = "--timm-train is not set" if args.timm_train is None else f"no file {args.timm_train}"
            print(f"timm's train.py skipped: {why}; it is in timm's repository, not in its package")
        else:
            add_rate(record, name, run_timm(data, n_classes, args))
        record.write()


if __name__ == "__main__":
    main()
