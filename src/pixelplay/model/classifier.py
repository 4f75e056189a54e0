"""Heads and the trainable classifier: features → logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pixelplay.array_types import Float32Array, Float64Array, IntArray
from pixelplay.errors import ConfigError
from pixelplay.model.backbone import stage_modules
from pixelplay.model.split_backbone import TrainableStages


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """Linear map to natural-prior logits, optionally after a hidden layer with its batch norm folded in."""

    weight: Float32Array  # (K, D); (K, H) after a hidden layer of H units
    bias: Float32Array  # (K,)
    hidden_weight: Float32Array | None = None  # (H, D)
    hidden_bias: Float32Array | None = None  # (H,)

    def fits(self, n_features: int, n_classes: int) -> bool:
        """Check that the shapes agree with each other, with D and with K."""
        shapes = {name: values.shape for name, values in self.arrays().items()}
        n_hidden = shapes["hidden_weight"][0] if shapes.get("hidden_weight") else None
        expected = {"weight": (n_classes, n_hidden or n_features), "bias": (n_classes,)}
        if n_hidden is not None:
            expected |= {"hidden_weight": (n_hidden, n_features), "hidden_bias": (n_hidden,)}
        return shapes == expected

    def logits(self, features: Float32Array) -> Float32Array:
        """Compute logits (N, K) of features (N, D); a row of NaN stays NaN."""
        if self.hidden_weight is not None and self.hidden_bias is not None:
            features = np.maximum(_linear(features, self.hidden_weight, self.hidden_bias), np.float32(0))
        return _linear(features, self.weight, self.bias)

    def shifted(self, offset: Float64Array) -> "LinearHead":
        """Return a head with an offset (K,) added to the logits."""
        return replace(self, bias=(self.bias + offset).astype(np.float32))

    def arrays(self) -> dict[str, Float32Array]:
        """Return the existing arrays by name."""
        return {name: np.ascontiguousarray(a) for name, a in vars(self).items() if a is not None}


def average_heads(
    heads: Sequence[LinearHead],
    columns: Sequence[IntArray],
    n_features: int,
    temperatures: Sequence[float] | None = None,
) -> LinearHead:
    """Build one head with the mean logits of M heads, all with a hidden layer or all without.

    Args:
        columns: for each head, the columns (D_m,) of its features among all D = `n_features`.
        temperatures: (M,) > 0; None means 1.
    """
    n_hidden = [0 if head.hidden_weight is None else len(head.hidden_weight) for head in heads]
    assert all(n_hidden) or not any(n_hidden), "heads with and without hidden layer cannot be averaged"
    n_classes, starts = len(heads[0].bias), np.cumsum([0, *n_hidden])
    # Layer on the features: K outputs, or the hidden units of all heads one after another.
    first = np.zeros((starts[-1] or n_classes, n_features), np.float32)
    second = np.zeros((n_classes, starts[-1]), np.float32)  # layer on the hidden units
    bias, hidden_bias = np.zeros(n_classes, np.float32), np.zeros(starts[-1], np.float32)
    for m, (head, own) in enumerate(zip(heads, columns, strict=True)):
        factor = np.float32(1 / (len(heads) * (1.0 if temperatures is None else temperatures[m])))
        bias += factor * head.bias
        if head.hidden_weight is None or head.hidden_bias is None:
            first[:, own] += factor * head.weight
            continue
        units = slice(starts[m], starts[m + 1])
        first[units, own] = head.hidden_weight
        hidden_bias[units] = head.hidden_bias
        second[:, units] = factor * head.weight
    if not any(n_hidden):
        return LinearHead(weight=first, bias=bias)
    return LinearHead(weight=second, bias=bias, hidden_weight=first, hidden_bias=hidden_bias)


def feature_scale(features: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Compute the mean and scale, (D,) each, that standardise features (N, D).

    On similar images many features hardly vary. Divided by their own standard deviation they would weigh
    as much as all others: the head would fit noise with huge weights, and the smallest change of the backbone
    would change its logits. The scale √(std² + median²) keeps features that vary less than the median small
    and gives all others about the same weight.
    """
    mean = features.mean(0, dtype=np.float64)
    std = features.std(0, dtype=np.float64)
    varies = std > 1e-6  # constant features do not count in the median
    scale = np.hypot(std, np.median(std[varies]) if varies.any() else 1.0)
    return mean.astype(np.float32), scale.astype(np.float32)


def _linear(features: Float32Array, weight: Float32Array, bias: Float32Array) -> Float32Array:
    """Apply an affine map to each row.

    Unlike a matrix product, whose order of summation changes with N, the result of a row depends neither on
    the other rows nor on the memory layout.
    """
    rows = np.ascontiguousarray(features)
    return np.asarray(np.einsum("nd,kd->nk", rows, np.ascontiguousarray(weight)) + bias)


HIDDEN = 512  # units of the original recipe's head


class TrainableLinearHead(nn.Module):
    """Linear head on standardised features; one learning rate fits all of them.

    Args:
        mean, scale: (D,) of the training features, as from `feature_scale`.
        start: initial head on raw features; None starts from zero.
        dropout: fraction of features dropped in a training step.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        mean: Float32Array,
        scale: Float32Array,
        n_classes: int,
        *,
        start: LinearHead | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("scale", torch.from_numpy(scale))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(len(mean), n_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if start is not None:
            weight, bias = torch.from_numpy(start.weight), torch.from_numpy(start.bias)
            self.linear.weight.data.copy_(weight * self.scale)
            self.linear.bias.data.copy_(bias + weight @ self.mean)

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits (B, K) of features (B, D)."""
        logits: Tensor = self.linear(self.dropout((features - self.mean) / self.scale))
        return logits

    def export(self) -> LinearHead:
        """Return the equivalent head on raw features."""
        weight = self.linear.weight.detach().double() / self.scale  # (K, D)
        bias = self.linear.bias.detach().double() - weight @ self.mean.double()  # (K,)
        return LinearHead(weight=_to_array(weight), bias=_to_array(bias))


class TrainableMlpHead(nn.Module):
    """The original recipe's head: Linear, BatchNorm, ReLU, Dropout, Linear."""

    def __init__(self, n_features: int, n_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(n_features, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(HIDDEN, n_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits (B, K) of features (B, D)."""
        logits: Tensor = self.linear(self.dropout(torch.relu(self.norm(self.hidden(features)))))
        return logits

    def export(self) -> LinearHead:
        """Return the equivalent head with the batch norm folded in."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        scale = self.norm.weight.detach().double() / (variance.double() + self.norm.eps).sqrt()  # (H,)
        weight = self.hidden.weight.detach().double() * scale[:, None]  # (H, D)
        bias = (self.hidden.bias.detach().double() - mean) * scale + self.norm.bias.detach()  # (H,)
        arrays = map(_to_array, (self.linear.weight, self.linear.bias, weight, bias))
        return LinearHead(
            **dict(zip(("weight", "bias", "hidden_weight", "hidden_bias"), arrays, strict=True))
        )


class Classifier(nn.Module):
    """Trainable stages and head: feature maps → features → logits.

    Batch norms stay in eval mode: ImageNet's statistics are better than those of small batches. Stochastic
    depth and dropout work as usual.
    """

    def __init__(
        self, stages: TrainableStages, head: TrainableLinearHead | TrainableMlpHead, *, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.stages = stages
        self.head = head
        if drop_path:
            _set_drop_path(stages, drop_path)

    def forward(self, maps: Tensor, stats: Tensor) -> Tensor:
        """Compute logits (B, K) of feature maps (B, C, H, W) and statistics (B, D_frozen)."""
        features: Tensor = self.stages(maps, stats)  # (B, D)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(features.float())
        return logits

    def train(self, mode: bool = True) -> "Classifier":
        """Switch dropout and stochastic depth; batch norms stay in eval mode."""
        super().train(mode)
        for layer in self.stages.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()
        return self

    def distances(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Yield each trainable parameter's name, value and distance to the last stage."""
        network = self.stages.network
        ends = stage_modules(network)
        # a parameter's stage follows from the order of definition; removed stages come before everything
        order = {name: n for n, (name, _) in enumerate(network.named_modules(remove_duplicate=False))}
        last = [
            max((n for name, n in order.items() if f"{name}.".startswith(f"{end}.")), default=-1)
            for end in ends
        ]
        stage_of = {
            value: sum(n < order[name.rpartition(".")[0]] for n in last[:-1])
            for name, value in network.named_parameters()
        }
        for name, value in self.named_parameters():
            if value.requires_grad:
                yield name, value, len(ends) - 1 - stage_of[value] if value in stage_of else 0


def _set_drop_path(stages: TrainableStages, rate: float) -> None:
    """Increase stochastic depth linearly from the first residual block to `rate` in the last.

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, arXiv:1603.09382.
    """
    from timm.layers.drop import DropPath

    names = ("drop_path", "drop_path1", "drop_path2")  # a transformer's block has two branches
    layers = [x for x in stages.network.modules() if any(hasattr(x, name) for name in names)]
    blocks = [layer for layer in layers if _has_skip_connection(layer)]
    if not blocks:
        raise ConfigError(
            f"drop_path={rate} has no effect: the trained stages of this backbone have no residual branch; "
            "remove the setting"
        )
    for i, block in enumerate(blocks, start=1):
        for name in names:
            if hasattr(block, name):
                setattr(block, name, DropPath(rate * i / len(blocks)))


def _has_skip_connection(block: nn.Module) -> bool:
    """Check timm's attributes for a skip connection."""
    is_residual = getattr(block, "has_skip", True) and getattr(block, "residual", True)
    has_skip = all(getattr(block, name, True) is not None for name in ("identity", "shortcut"))
    return bool(is_residual and has_skip)


def _to_array(values: Tensor) -> Float32Array:
    return np.array(values.detach().float().cpu().numpy())  # a copy, as training may continue
