"""What the network gets wrong is drawn more often than what it knows, and counts less each time."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MOST_TIMES = 2.0  # that a draw comes in one epoch
LEAST_MISS = 1e-4  # draws that are all known are still told apart from none


def times_drawn(misses: NDArray[np.floating], focus: float) -> FloatArray:
    """How often each of n draws is to come in an epoch, on average.

    A share of the epoch goes to all alike and the rest by how wrong the network was, which the gradient of
    a cross entropy grows with.

    Args:
        misses: (n,) in [0, 1], how wrong the network was about each.
        focus: the share that goes by that, in [0, 1).

    Returns:
        (n,) with sum n, each from 1 − focus to `MOST_TIMES`.

    Source: Katharopoulos and Fleuret, "Not All Samples Are Created Equal", ICML 2018, arXiv:1803.00942,
    sections 3.1 and 3.2; the uniform share bounds what a draw counts.
    """
    least, n = 1.0 - focus, len(misses)
    wants = np.maximum(misses.astype(np.float64), LEAST_MISS)
    times = np.full(n, MOST_TIMES)
    is_open = np.ones(n, dtype=np.bool_)  # those that the limit does not hold back
    while is_open.any():
        left = n - MOST_TIMES * (n - is_open.sum()) - least * is_open.sum()
        times[is_open] = least + wants[is_open] * left / wants[is_open].sum()
        is_over = is_open & (times > MOST_TIMES)
        if not is_over.any():
            break
        times[is_over] = MOST_TIMES
        is_open &= ~is_over
    return times


def draw_times(times: FloatArray, rng: np.random.Generator) -> IntArray:
    """Make whole numbers of times (n,): each the one below or above, right on average, their sum kept.

    Source: Madow, "On the Theory of Systematic Sampling, II", Annals of Mathematical Statistics 1949.
    """
    n = round(times.sum())
    marks = np.floor(np.cumsum(times) + rng.random()).astype(np.int64)
    marks[-1] = n  # rounding could lose one
    return np.asarray(np.diff(np.minimum(marks, n), prepend=0), dtype=np.int64)
