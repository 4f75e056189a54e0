"""Features → logits."""

from dataclasses import dataclass

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

    def averaged_with(self, other: "LinearHead", n_shared: int) -> "LinearHead":
        """The mean of this head's logits and another's, on the features of both side by side.

        Args:
            other: on its own features (N, D), of which the first are the first of this head's too.
            n_shared: how many those are; they stand once in the joint features (N, 2 D - n_shared).
        """
        own, others = self.weight / 2, other.weight / 2
        own[:, :n_shared] += others[:, :n_shared]
        weight = np.concatenate([own, others[:, n_shared:]], axis=1)
        return LinearHead(weight=weight, bias=((self.bias + other.bias) / 2).astype(np.float32))

    def arrays(self) -> dict[str, FloatArray]:
        """Its arrays by name, those that it has."""
        return {name: np.ascontiguousarray(a) for name, a in vars(self).items() if a is not None}


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
