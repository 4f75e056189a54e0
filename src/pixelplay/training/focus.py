"""What the network gets wrong is drawn more often than what it knows, and counts less each time."""

import numpy as np
from numpy.typing import NDArray

from pixelplay.arrays import Float64Array, IntArray

MOST_DRAWS = 2.0  # of a photograph in an epoch that would show it once
LEAST_MISS = 1e-4  # keeps shares defined where nothing was wrong


def expected_draws(misses: NDArray[np.floating], focus: float) -> Float64Array:
    """How often each of n photographs is to come in an epoch, on average.

    A share of the epoch goes to all alike and the rest by how wrong the network was, which the gradient of
    cross entropy grows with: at the logits its norm is from 1 to √2 times that. What comes x times as often
    has to count 1 / x, at most 1 / (1 − focus), for the expected gradient to stay what it is.

    Args:
        misses: (n,) in [0, 1], how wrong the network was about each.
        focus: the share that goes by that, in [0, 1).

    Returns:
        (n,) with sum n, each from 1 − focus to `MOST_DRAWS`.

    Source: Katharopoulos and Fleuret, "Not All Samples Are Created Equal: Deep Learning with Importance
    Sampling", ICML 2018, arXiv:1803.00942, section 3; misses remembered from the last visit, as by Schaul et
    al., "Prioritized Experience Replay", ICLR 2016, arXiv:1511.05952.
    """
    least, n = 1.0 - focus, len(misses)
    wants = np.maximum(misses.astype(np.float64), LEAST_MISS)
    draws = np.full(n, MOST_DRAWS)
    is_open = np.ones(n, dtype=np.bool_)  # those that the limit does not hold back
    while is_open.any():
        left = n - MOST_DRAWS * (n - is_open.sum()) - least * is_open.sum()
        draws[is_open] = least + wants[is_open] * left / wants[is_open].sum()
        is_over = is_open & (draws > MOST_DRAWS)
        if not is_over.any():
            break
        draws[is_over] = MOST_DRAWS
        is_open &= ~is_over
    return draws


def whole_draws(expected: Float64Array, rng: np.random.Generator) -> IntArray:
    """Make whole numbers of expected draws (n,): each rounded up or down by chance, as many as before in all.

    Source: Madow, "On the Theory of Systematic Sampling, II", Annals of Mathematical Statistics 20(3), 1949.
    """
    n = round(expected.sum())
    marks = np.floor(np.cumsum(expected) + rng.random()).astype(np.int64)
    marks[-1] = n  # rounding could lose one
    return np.asarray(np.diff(np.minimum(marks, n), prepend=0), dtype=np.int64)
