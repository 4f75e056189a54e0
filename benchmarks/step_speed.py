"""Training steps of partial fine-tuning relative to full fine-tuning, in turn in one process.

Expected on two CPU cores with bf16: partial fine-tuning of the last two stages processes 25 to 35 times
as many images per second as full fine-tuning, and of the last four 10 to 15 times.

Usage: python benchmarks/step_speed.py [--backbone lite0] [--stages 1 2 3 4] [--repeats 5]
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from pixelplay.config import FinetuneConfig
from pixelplay.model.backbone import load_backbone
from pixelplay.model.classifier import Classifier, TrainableLinearHead
from pixelplay.model.cpu_layers import freeze_depthwise_filters
from pixelplay.model.device import resolve_precision
from pixelplay.model.split_backbone import split_backbone
from pixelplay.training.optim import make_optimizer
from records import Record, make_parser

BATCH_SIZE, N_CLASSES, N_STEPS = 32, 6, 3


def make_step(backbone: str, unfreeze_stages: int | None) -> Callable[[], None]:
    """Return a function that trains one step on a batch in memory; None trains all layers."""
    loaded = load_backbone(backbone, None, offline=True)
    size = loaded.preprocessing.input_size
    frozen, trainable = split_backbone(loaded.backbone, unfreeze_stages, size)
    map_shape, n_stats = ((3, *size), 0) if frozen is None else (frozen.map_shape, frozen.n_stats)
    if frozen is not None:
        freeze_depthwise_filters(trainable, map_shape, n_stats, fast=True)
    zeros = np.zeros(loaded.backbone.n_features, np.float32)
    head = TrainableLinearHead(zeros, zeros + 1, N_CLASSES, start=None, dropout=0.0)
    classifier = Classifier(trainable, head).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(classifier, FinetuneConfig(), BATCH_SIZE)
    use_bf16 = resolve_precision("auto", "cpu") == "bf16"
    maps = torch.randn(BATCH_SIZE, *map_shape).to(memory_format=torch.channels_last)
    stats = torch.zeros(BATCH_SIZE, n_stats)
    labels = torch.zeros(BATCH_SIZE, dtype=torch.int64)
    classifier.train()

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_bf16):
            logits = classifier(maps.bfloat16() if use_bf16 and unfreeze_stages else maps, stats)
        torch.nn.functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Time the steps of every number of stages in turn."""
    parser = make_parser(__doc__)
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3, 4], help="last stages to train")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    steps = {n: make_step(args.backbone, n) for n in [*args.stages, None]}
    rates: dict[int | None, list[float]] = {n: [] for n in steps}
    for step in steps.values():
        step()
    for _ in range(args.repeats):
        for n, step in steps.items():
            start = time.perf_counter()
            for _ in range(N_STEPS):
                step()
            rates[n].append(N_STEPS * BATCH_SIZE / (time.perf_counter() - start))
    title = f"Training steps of {args.backbone}, batches of {BATCH_SIZE} in memory"
    record = Record("Speed", title, args.record)
    for n, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates[None], strict=True)]
        name = "all layers" if n is None else f"last {n} stage{'s' if n > 1 else ''}"
        print(
            f"{name}: {statistics.median(values):.0f} img/s, "
            f"{statistics.median(ratios):.1f} times all layers ({min(ratios):.1f} to {max(ratios):.1f})"
        )
        record.add("random tensors", "", name, {"img/s": values, "relative to all layers": ratios})
    record.write()


if __name__ == "__main__":
    main()
