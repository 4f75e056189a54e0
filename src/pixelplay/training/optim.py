"""Which parameters move how fast, and when."""

import math

import torch
from torch import nn

from pixelplay.config import FinetuneConfig
from pixelplay.model.classifier import Classifier

RATES_BATCH = 32  # images a step that the learning rates are meant for


def make_optimizer(
    classifier: Classifier, finetuning: FinetuneConfig, images_per_step: float, *, lr_frac: float = 1.0
) -> torch.optim.AdamW:
    """Make AdamW with a learning rate for each stage, and no decay on norms, biases and layer scales.

    Each group keeps its peak learning rate as "peak_lr". Adam's step does not grow with the gradient, so
    the rate goes with the root of the images a step (Malladi et al. 2022, arXiv:2205.10287).
    """
    scale = lr_frac * math.sqrt(images_per_step / RATES_BATCH)
    top_lr, layer_decay = finetuning.rates(is_full=not classifier.tail.n_front)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, value, distance in classifier.distances():
        is_head = name.startswith("head.")
        lr = finetuning.head_lr if is_head else top_lr * layer_decay**distance
        is_vector = sum(side > 1 for side in value.shape) <= 1  # some layer scales are (C, 1, 1)
        decay = 0.0 if is_vector else finetuning.weight_decay
        groups.setdefault((lr * scale, decay), []).append(value)
    return torch.optim.AdamW(
        [
            {"params": values, "lr": 0.0, "peak_lr": lr, "weight_decay": decay}
            for (lr, decay), values in groups.items()
        ],
        fused=True,  # a quarter of the time on a CPU, where the default goes through every tensor ten times
    )


def lr_factor(step: int, n_steps: int, warmup_frac: float) -> float:
    """Share of the peak learning rate in a step counted from 0: a linear rise, then half a cosine to 0.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017, arXiv:1608.03983, eq. 5.
    """
    n_warmup = round(warmup_frac * n_steps)
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))
