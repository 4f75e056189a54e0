"""Training steps of partial tuning against full tuning of the same model, in one process, in turn.

Expected on two CPU cores with bf16: partial tuning of the last two stages 25 to 35 times as many images
a second as full tuning, of the last four 10 to 15 times.

Usage: python benchmarks/step_speed.py [--backbone lite0] [--stages 1 2 3 4] [--repeats 5]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from pixelplay.config import FinetuneConfig
from pixelplay.model.backbone import load_backbone
from pixelplay.model.classifier import Classifier, TrainableLinearHead
from pixelplay.model.cpu_layers import freeze_depthwise_filters
from pixelplay.model.device import pick_precision
from pixelplay.model.split_backbone import split_backbone
from pixelplay.training.optim import make_optimizer

BATCH, N_CLASSES = 32, 6


def make_step(backbone: str, unfreeze_stages: int | None) -> Callable[[], None]:
    """One step on a batch that is already there."""
    loaded = load_backbone(backbone, None, offline=True)
    frozen, trainable = split_backbone(loaded.backbone, unfreeze_stages, loaded.preprocessing.input_size)
    size = loaded.preprocessing.input_size
    map_shape, n_stats = ((3, size, size), 0) if frozen is None else (frozen.map_shape, frozen.n_stats)
    if frozen is not None:
        freeze_depthwise_filters(trainable, map_shape, n_stats, fast=True)
    zeros = np.zeros(loaded.backbone.n_features, np.float32)
    head = TrainableLinearHead(zeros, zeros + 1, N_CLASSES, start=None, dropout=0.0)
    classifier = Classifier(trainable, head).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(classifier, FinetuneConfig(), BATCH)
    is_bf16 = pick_precision("auto", "cpu") == "bf16"
    maps = torch.randn(BATCH, *map_shape).to(memory_format=torch.channels_last)
    stats = torch.zeros(BATCH, n_stats)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    classifier.train()

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
            logits = classifier(maps.bfloat16() if is_bf16 and unfreeze_stages else maps, stats)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sides: list[int | None] = [*args.stages, None]
    steps = {side: make_step(args.backbone, side) for side in sides}
    rates: dict[int | None, list[float]] = {side: [] for side in sides}
    for step in steps.values():
        step()
    for _ in range(args.repeats):
        for side, step in steps.items():
            start = time.perf_counter()
            for _ in range(3):
                step()
            rates[side].append(3 * BATCH / (time.perf_counter() - start))
    for side in args.stages:
        ratios = [a / b for a, b in zip(rates[side], rates[None], strict=True)]
        rate, ratio = statistics.median(rates[side]), statistics.median(ratios)
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
        print(f"last {side} stages: {rate:.0f} img/s, {ratio:.1f} times full ({spread})")
    print(f"full: {statistics.median(rates[None]):.0f} img/s")


if __name__ == "__main__":
    main()
