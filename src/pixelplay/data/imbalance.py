"""Class counts → what imbalance means for a user."""

import numpy as np
from numpy.typing import NDArray

HINT_RATIO = 5.0


def imbalance_ratio(counts: NDArray[np.int64]) -> float:
    """Largest over smallest class, among classes that have images; 1 for none."""
    present = counts[counts > 0]
    return float(present.max() / present.min()) if len(present) else 1.0


def class_priors(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Relative class frequencies π (K,), summing to 1."""
    return np.asarray(counts / counts.sum(), dtype=np.float64)
