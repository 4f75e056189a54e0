"""Features → logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import Float32Array, Float64Array, IntArray


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

    On photographs that look alike many channels hardly move. Divided by their own deviation they would
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
