"""Which parameters move how fast, and when."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from pixelplay.config import FinetuneConfig
from pixelplay.model.classifier import Classifier

RATES_BATCH = 32  # photographs a step that the learning rates are meant for


def make_optimizer(
    classifier: Classifier, finetune: FinetuneConfig, photographs_a_step: float, *, lr_frac: float = 1.0
) -> torch.optim.AdamW:
    """Make AdamW with a learning rate for each stage, and no decay on norms, biases and layer scales.

    Each group keeps its peak learning rate as "peak_lr". Adam's step does not grow with the gradient, so
    the rate goes with the root of the photographs a step (Malladi et al. 2022, arXiv:2205.10287).
    """
    scale = lr_frac * math.sqrt(photographs_a_step / RATES_BATCH)
    top_lr, layer_decay = finetune.rates(is_full=not classifier.tail.n_front)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, value, distance in classifier.distances():
        is_head = name.startswith("head.")
        lr = finetune.head_lr if is_head else top_lr * layer_decay**distance
        is_vector = sum(side > 1 for side in value.shape) <= 1  # some layer scales are (C, 1, 1)
        decay = 0.0 if is_vector else finetune.weight_decay
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


class AveragedWeights:
    """Exponential moving average of a network's parameters.

    Its horizon is a fraction of all steps, so that a short training is averaged over a short time.

    Args:
        names: parameters that are averaged.
        horizon: steps that it looks back over.
    """

    def __init__(self, network: nn.Module, names: Iterable[str], horizon: float) -> None:
        own = dict(network.named_parameters())
        self._live = {name: own[name] for name in names}
        self.look_back(horizon)
        self.values = {name: value.detach().clone() for name, value in self._live.items()}

    def look_back(self, horizon: float) -> None:
        """Set the horizon, steps."""
        self._horizon = max(1.0, horizon)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step counted from 0; at first it is the plain mean of all so far."""
        share = max(1 / self._horizon, 1 / (1 + step))
        torch._foreach_lerp_(list(self.values.values()), list(self._live.values()), share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averaged and live weights; a second call exchanges them back."""
        for name, live in self._live.items():
            kept = live.detach().clone()
            live.copy_(self.values[name])
            self.values[name].copy_(kept)
