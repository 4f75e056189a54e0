"""Features → logits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """Linear map from features to natural-prior logits, with one hidden layer in front of it if it has one.

    Attributes:
        weight: (K, D) float32; (K, H) behind a hidden layer of H units.
        bias: (K,) float32.
        hidden_weight: (H, D) float32, its batch norm folded in; None without hidden layer.
        hidden_bias: (H,) float32; None without hidden layer.
    """

    weight: FloatArray
    bias: FloatArray
    hidden_weight: FloatArray | None = None
    hidden_bias: FloatArray | None = None

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

    def logits(self, features: FloatArray) -> FloatArray:
        """Logits (N, K) of features (N, D); a row of NaN stays NaN."""
        if self.hidden_weight is not None and self.hidden_bias is not None:
            features = np.maximum(_linear(features, self.hidden_weight, self.hidden_bias), np.float32(0))
        return _linear(features, self.weight, self.bias)

    def shifted(self, offset: NDArray[np.float64]) -> "LinearHead":
        """The same head with an offset (K,) added to its logits."""
        return LinearHead(
            weight=self.weight,
            bias=(self.bias + offset).astype(np.float32),
            hidden_weight=self.hidden_weight,
            hidden_bias=self.hidden_bias,
        )

    def placed(self, columns: NDArray[np.int64], n_features: int) -> "LinearHead":
        """The same logits from wider features (N, n_features), of which `columns` (D,) are its own."""
        name = "weight" if self.hidden_weight is None else "hidden_weight"
        first = getattr(self, name)
        wide = np.zeros((len(first), n_features), np.float32)
        wide[:, columns] = first
        return replace(self, **{name: wide})

    def arrays(self) -> dict[str, FloatArray]:
        """Its arrays by name, those that it has."""
        return {name: np.ascontiguousarray(a) for name, a in vars(self).items() if a is not None}


def average_heads(heads: Sequence[LinearHead], temperatures: Sequence[float] | None = None) -> LinearHead:
    """One head whose logits are the mean of those of M heads, each divided by its temperature.

    Args:
        heads: on the same features; all have a hidden layer, or none.
        temperatures: (M,) > 0; None: 1 for all.
    """
    shares = [1 / (len(heads) * T) for T in temperatures or [1.0] * len(heads)]  # (M,)
    biases = [np.float32(share) * head.bias for share, head in zip(shares, heads, strict=True)]
    weights = [np.float32(share) * head.weight for share, head in zip(shares, heads, strict=True)]
    hidden = [(h.hidden_weight, h.hidden_bias) for h in heads if h.hidden_weight is not None]
    assert len(hidden) in (0, len(heads)), "a head with a hidden layer and one without have no mean"
    bias: FloatArray = np.sum(biases, axis=0)  # (K,)
    if not hidden:
        return LinearHead(weight=np.sum(weights, axis=0), bias=bias)
    units, offsets = zip(*hidden, strict=True)
    return LinearHead(
        weight=np.concatenate(weights, axis=1),  # (K, M H)
        bias=bias,
        hidden_weight=np.concatenate(units),  # (M H, D)
        hidden_bias=np.concatenate(offsets),
    )


def feature_scale(features: FloatArray) -> tuple[FloatArray, FloatArray]:
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


def _linear(features: FloatArray, weight: FloatArray, bias: FloatArray) -> FloatArray:
    """Affine map of rows.

    A row's result does not depend on the rows beside it, nor on how the arrays lie in memory. With a
    matrix product it would: its order of summation changes with N.
    """
    rows = np.ascontiguousarray(features)
    return np.asarray(np.einsum("nd,kd->nk", rows, np.ascontiguousarray(weight)) + bias)
