"""Features → logits."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """Linear map from features to natural-prior logits.

    Attributes:
        weight: (K, D) float32.
        bias: (K,) float32.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (N, K) of features (N, D); a row of NaN stays NaN.

        A row's logits do not depend on the rows beside it, nor on how the arrays lie in memory. With
        a matrix product they would: its order of summation changes with N.
        """
        rows, weight = np.ascontiguousarray(features), np.ascontiguousarray(self.weight)
        return np.asarray(np.einsum("nd,kd->nk", rows, weight) + self.bias)
