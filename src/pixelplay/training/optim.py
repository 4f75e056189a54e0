"""AdamW with a learning rate per stage."""

import math

import torch
from torch import nn

from pixelplay.config import FinetuneConfig
from pixelplay.model.classifier import Classifier

REFERENCE_BATCH = 32  # images per step that the learning rates are defined for


def make_optimizer(
    classifier: Classifier, settings: FinetuneConfig, images_per_step: float, *, lr_frac: float = 1.0
) -> torch.optim.AdamW:
    """Create AdamW with a learning rate per stage and no decay on norms, biases and layer scales.

    Each parameter group keeps its peak learning rate, times `lr_frac`, as "peak_lr". Adam's step does not
    grow with the gradient, so it scales with the square root of the images per step. timm's
    `param_groups_layer_decay` decays per layer instead of per stage and needs the whole network.

    Source: Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", NeurIPS 2022,
    arXiv:2205.10287.
    """
    scale = lr_frac * math.sqrt(images_per_step / REFERENCE_BATCH)
    top_lr, layer_decay = settings.rates(full=not classifier.stages.n_frozen)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, value, distance in classifier.distances():
        lr = settings.head_lr if name.startswith("head.") else top_lr * layer_decay**distance
        is_vector = sum(side > 1 for side in value.shape) <= 1  # some layer scales are (C, 1, 1)
        decay = 0.0 if is_vector else settings.weight_decay
        groups.setdefault((lr * scale, decay), []).append(value)
    return torch.optim.AdamW(
        [
            {"params": values, "lr": 0.0, "peak_lr": lr, "weight_decay": decay}
            for (lr, decay), values in groups.items()
        ],
        fused=True,  # a quarter of the time on a CPU, where the default makes ten passes over every tensor
    )
