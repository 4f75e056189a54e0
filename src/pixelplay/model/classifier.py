"""Features → logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pixelplay.arrays import Float32Array, Float64Array, IntArray
from pixelplay.errors import ConfigError
from pixelplay.model.backbone import stage_modules
from pixelplay.model.split_backbone import TrainableStages


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """Linear map from features to natural-prior logits, with one hidden layer in front of it if it has one.

    Attributes:
        weight: (K, D) float32; (K, H) behind a hidden layer of H units.
        bias: (K,) float32.
        hidden_weight: (H, D) float32, its batch norm folded in; None without hidden layer.
        hidden_bias: (H,) float32; None without hidden layer.
    """

    weight: Float32Array
    bias: Float32Array
    hidden_weight: Float32Array | None = None
    hidden_bias: Float32Array | None = None

    def fits(self, n_features: int, n_classes: int) -> bool:
        """Whether it takes so many features to so many logits, and its arrays fit each other."""
        shapes = {name: values.shape for name, values in self.arrays().items()}
        n_hidden = shapes["hidden_weight"][0] if shapes.get("hidden_weight") else None
        expected: dict[str, tuple[int, ...]] = {
            "weight": (n_classes, n_hidden or n_features),
            "bias": (n_classes,),
        }
        if n_hidden is not None:
            expected |= {"hidden_weight": (n_hidden, n_features), "hidden_bias": (n_hidden,)}
        return shapes == expected

    def logits(self, features: Float32Array) -> Float32Array:
        """Logits (N, K) of features (N, D); a row of NaN stays NaN."""
        if self.hidden_weight is not None and self.hidden_bias is not None:
            features = np.maximum(_linear(features, self.hidden_weight, self.hidden_bias), np.float32(0))
        return _linear(features, self.weight, self.bias)

    def shifted(self, offset: Float64Array) -> "LinearHead":
        """The same head with an offset (K,) added to its logits."""
        return LinearHead(
            weight=self.weight,
            bias=(self.bias + offset).astype(np.float32),
            hidden_weight=self.hidden_weight,
            hidden_bias=self.hidden_bias,
        )

    def arrays(self) -> dict[str, Float32Array]:
        """Its arrays by name, those that it has."""
        return {name: np.ascontiguousarray(a) for name, a in vars(self).items() if a is not None}


def average_heads(
    heads: Sequence[LinearHead],
    columns: Sequence[IntArray],
    n_features: int,
    temperatures: Sequence[float] | None = None,
) -> LinearHead:
    """One head whose logits are the mean of those of M heads, each divided by its temperature.

    Args:
        heads: all have a hidden layer, or none.
        columns: of each head, where its features (D_m,) stand among those of all.
        n_features: D, of all.
        temperatures: (M,) > 0; None: 1 for all.
    """
    n_hidden = [0 if head.hidden_weight is None else len(head.hidden_weight) for head in heads]
    assert all(n_hidden) or not any(n_hidden), "a head with a hidden layer and one without have no mean"
    n_classes, starts = len(heads[0].bias), np.cumsum([0, *n_hidden])
    first = np.zeros((starts[-1] or n_classes, n_features), np.float32)  # what meets the features
    second = np.zeros((n_classes, starts[-1]), np.float32)  # behind the hidden units, if there are any
    bias, hidden_bias = np.zeros(n_classes, np.float32), np.zeros(starts[-1], np.float32)
    for m, (head, places) in enumerate(zip(heads, columns, strict=True)):
        share = np.float32(1 / (len(heads) * (1.0 if temperatures is None else temperatures[m])))
        bias += share * head.bias
        if head.hidden_weight is None or head.hidden_bias is None:
            first[:, places] += share * head.weight
            continue
        units = slice(starts[m], starts[m + 1])
        first[units, places] = head.hidden_weight
        hidden_bias[units] = head.hidden_bias
        second[:, units] = share * head.weight
    if not any(n_hidden):
        return LinearHead(weight=first, bias=bias)
    return LinearHead(weight=second, bias=bias, hidden_weight=first, hidden_bias=hidden_bias)


def feature_scale(features: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Mean (D,) of features (N, D), and what each is divided by: its deviation, softened by the median one.

    On images that look alike many channels hardly move. Divided by their own deviation they would
    count as much as all others, and a head leans on them a thousandfold: it fits noise, and the smallest
    step of the backbone behind it throws its logits about. Here a channel counts as it moves, up to the
    median; what moves more counts alike.
    """
    mean = features.mean(0, dtype=np.float64)
    std = features.std(0, dtype=np.float64)
    moves = std > 1e-6  # what never moves says nothing
    scale = np.hypot(std, np.median(std[moves]) if moves.any() else 1.0)
    return mean.astype(np.float32), scale.astype(np.float32)


def _linear(features: Float32Array, weight: Float32Array, bias: Float32Array) -> Float32Array:
    """Affine map of rows.

    A row's result does not depend on the rows beside it, nor on how the arrays lie in memory. With a
    matrix product it would: its order of summation changes with N.
    """
    rows = np.ascontiguousarray(features)
    return np.asarray(np.einsum("nd,kd->nk", rows, np.ascontiguousarray(weight)) + bias)


HIDDEN = 512  # units of the original recipe's head


class TrainableLinearHead(nn.Module):
    """Linear head on scaled features: one learning rate then suits all of them.

    Args:
        mean: (D,) of each feature in training.
        scale: (D,) what each is divided by, > 0.
        n_classes: K.
        start: raw-feature head to start from; None starts from zero.
        dropout: share of the features left out in a training step.
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
        """Logits (B, K) of features (B, D)."""
        logits: Tensor = self.linear(self.dropout((features - self.mean) / self.scale))
        return logits

    def export(self) -> LinearHead:
        """The same map on raw features."""
        weight = self.linear.weight.detach().double() / self.scale  # (K, D)
        bias = self.linear.bias.detach().double() - weight @ self.mean.double()  # (K,)
        return LinearHead(weight=_to_array(weight), bias=_to_array(bias))


class TrainableMlpHead(nn.Module):
    """Head of the original recipe: Linear D→512, BatchNorm, ReLU, Dropout, Linear 512→K."""

    def __init__(self, n_features: int, n_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(n_features, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(HIDDEN, n_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, K) of features (B, D)."""
        logits: Tensor = self.linear(self.dropout(torch.relu(self.norm(self.hidden(features)))))
        return logits

    def export(self) -> LinearHead:
        """The same map with the batch norm folded in."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        scale = self.norm.weight.detach().double() / (variance.double() + self.norm.eps).sqrt()  # (H,)
        weight = self.hidden.weight.detach().double() * scale[:, None]  # (H, D)
        bias = (self.hidden.bias.detach().double() - mean) * scale + self.norm.bias.detach()  # (H,)
        return LinearHead(
            weight=_to_array(self.linear.weight),
            bias=_to_array(self.linear.bias),
            hidden_weight=_to_array(weight),
            hidden_bias=_to_array(bias),
        )


class Classifier(nn.Module):
    """Tail → features → logits.

    The tail stays in eval mode: its batch norms keep the statistics of ImageNet, for batches of a small
    data set would give worse ones. Stochastic depth and dropout work all the same.
    """

    def __init__(
        self, tail: TrainableStages, head: TrainableLinearHead | TrainableMlpHead, *, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.tail = tail
        self.head = head
        if drop_path:
            _set_drop_path(tail, drop_path)

    def forward(self, maps: Tensor, stats: Tensor) -> Tensor:
        """Logits (B, K) float32 of maps at the cut (B, C, H, W) and moments in front of it (B, D_front)."""
        features: Tensor = self.tail(maps, stats)  # (B, D)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(features.float())
        return logits

    def train(self, mode: bool = True) -> "Classifier":
        """Switch dropout and stochastic depth; batch norms of the tail stay frozen."""
        super().train(mode)
        for layer in self.tail.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()
        return self

    def distances(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Name, value and stages between it and the last one, of every parameter that is trained."""
        network = self.tail.network
        ends = stage_modules(network)
        stage_of = _stages_of_parameters(network, ends)
        for name, value in self.named_parameters():
            if value.requires_grad:
                inner = name.removeprefix("tail.network.")
                yield name, value, 0 if name.startswith("head.") else len(ends) - 1 - stage_of[inner]


def _stages_of_parameters(network: nn.Module, ends: tuple[str, ...]) -> dict[str, int]:
    """Parameter → the first stage that ends with its module or behind it, in the order of definition."""
    place = {name: n for n, (name, _) in enumerate(network.named_modules(remove_duplicate=False))}
    # what was blanked out lies in front of everything
    last = [
        max((n for name, n in place.items() if f"{name}.".startswith(f"{end}.")), default=-1) for end in ends
    ]
    return {
        name: sum(n < place[name.rpartition(".")[0]] for n in last[:-1])
        for name, _ in network.named_parameters()
    }


def _set_drop_path(tail: TrainableStages, share: float) -> None:
    """Raise stochastic depth linearly from the first block to the last.

    Raises:
        ConfigError: no block could be left out.

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, arXiv:1603.09382.
    """
    from timm.layers.drop import DropPath

    names = ("drop_path", "drop_path1", "drop_path2")  # a transformer's block has two branches
    blocks = [
        layer
        for layer in tail.network.modules()
        if any(hasattr(layer, name) for name in names) and _has_way_around(layer)
    ]
    if not blocks:
        raise ConfigError(
            f"drop_path={share} says nothing here: what is trained of this backbone has no branch to be left "
            "out; leave it out"
        )
    for i, block in enumerate(blocks, start=1):
        for name in names:
            if hasattr(block, name):
                setattr(block, name, DropPath(share * i / len(blocks)))


def _has_way_around(block: nn.Module) -> bool:
    """Whether anything is left of the signal where a block's branch is left out; timm's blocks say it so."""
    is_residual = getattr(block, "has_skip", True) and getattr(block, "residual", True)
    has_skip = all(getattr(block, name, True) is not None for name in ("identity", "shortcut"))
    return bool(is_residual and has_skip)


def _to_array(values: Tensor) -> Float32Array:
    return np.array(values.detach().float().cpu().numpy())  # a copy: training may go on
