"""Class counts → what imbalance means for a user, and how learning is told of it.

Resampling and weights fit a model to another class mix than the data's; what is drawn, how much it counts
and the way back to natural priors stand side by side here, so that they agree.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pixelplay.arrays import Float64Array, IntArray
from pixelplay.config import Imbalance

OversampleTo = int | Literal["largest"] | None
HINT_RATIO = 5.0


def imbalance_ratio(counts: IntArray) -> float:
    """Largest over smallest class, among classes that have images; 1 for none."""
    present = counts[counts > 0]
    return float(present.max() / present.min()) if len(present) else 1.0


def class_priors(counts: IntArray) -> Float64Array:
    """Relative class frequencies π (K,), summing to 1."""
    return np.asarray(counts / counts.sum(), dtype=np.float64)


def class_weights(counts: IntArray) -> Float64Array:
    """Weight of an image of each class, (K,): N / (K·n_k), so that all classes weigh the same in sum.

    Over the N images the mean weight is 1. It is scikit-learn's `class_weight="balanced"`.
    """
    return np.asarray(counts.sum() / (len(counts) * counts), dtype=np.float64)


def draw_epoch(
    labels: IntArray, imbalance: Imbalance, oversample_to: OversampleTo, rng: np.random.Generator
) -> IntArray:
    """Draw the images of one epoch, in random order.

    A class's images come in rounds, each a fresh permutation: none comes twice before every one of
    its class has come once, as independent draws would have it.

    Args:
        labels: (N,) in [0, K), every class present.
        imbalance: sampler draws every class equally often, up to one; all others draw every image once.
        min_per_class: classes smaller than this are repeated up to exactly it; a sampler's epoch is
            then as long as the classes so raised.

    Returns:
        (n,) positions in [0, N); n is `epoch_length`, whatever `rng` draws.
    """
    counts = np.bincount(labels)
    times = _times_drawn(counts, imbalance, oversample_to)
    if imbalance == "sampler":
        times = rng.permutation(times)  # which classes come once more than the others
    members = np.split(np.argsort(labels, kind="stable"), counts.cumsum()[:-1])
    rounds = [_draw_in_rounds(rows, int(n), rng) for rows, n in zip(members, times, strict=True)]
    class_order = rng.permutation(np.repeat(np.arange(len(counts)), times))  # (n,)
    drawn = np.empty(len(class_order), np.int64)
    drawn[np.argsort(class_order, kind="stable")] = np.concatenate(rounds)
    return drawn


def epoch_length(counts: IntArray, imbalance: Imbalance, oversample_to: OversampleTo) -> int:
    """Number of images that `draw_epoch` draws from classes of these sizes (K,)."""
    return int(_times_drawn(counts, imbalance, oversample_to).sum())


def effective_prior(counts: IntArray, imbalance: Imbalance, oversample_to: OversampleTo) -> Float64Array:
    """Class mix π_eff (K,) of what a loss sees; logits fitted by a plain loss have it as their prior.

    Args:
        counts: (K,) images of each class that are learned from, all >= 1.
    """
    assert imbalance != "auto", "auto is resolved before anything is learned"
    if imbalance in ("sampler", "class_weights", "crt"):
        return np.full(len(counts), 1 / len(counts))
    return class_priors(_raised(counts, oversample_to))


def natural_offset(
    counts: IntArray, imbalance: Imbalance, oversample_to: OversampleTo, logit_tau: float
) -> Float64Array:
    """What is added to fitted logits z to give them natural priors, (K,).

    It is log π_data − log π_eff, or τ·log π_data where the loss itself added that to z.

    Args:
        counts: (K,) images of each class that are learned from, all >= 1.
        logit_tau: τ of logit_adjusted; balanced_softmax has 1.

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020,
    arXiv:2007.10740, equation 3; Menon et al., "Long-tail learning via logit adjustment", ICLR 2021,
    arXiv:2007.07314, equation 10.
    """
    log_priors = np.log(class_priors(counts))
    if imbalance == "balanced_softmax":
        return log_priors
    if imbalance == "logit_adjusted":
        return logit_tau * log_priors
    return log_priors - np.log(effective_prior(counts, imbalance, oversample_to))


def _raised(counts: IntArray, oversample_to: OversampleTo) -> IntArray:
    """Class sizes (K,) once smaller classes are repeated up to the asked size."""
    least = counts.max() if oversample_to == "largest" else oversample_to or 0
    return np.maximum(counts, least)


def _times_drawn(counts: IntArray, imbalance: Imbalance, oversample_to: OversampleTo) -> IntArray:
    """How often an epoch draws from each class, (K,); a sampler's odd ones go to the first classes."""
    raised = _raised(counts, oversample_to)
    if imbalance != "sampler":
        return raised
    each, left = divmod(int(raised.sum()), len(counts))
    return each + (np.arange(len(counts)) < left)


def _draw_in_rounds(rows: IntArray, n: int, rng: np.random.Generator) -> IntArray:
    """Draw n of the rows: whole permutations one after another, the last cut short."""
    n_rounds = -(-n // len(rows))
    return rng.permuted(np.tile(rows, (n_rounds, 1)), axis=1).ravel()[:n]


MOST_DRAWS = 2.0  # of an image in an epoch that would show it once
LEAST_MISS = 1e-4  # keeps shares defined where nothing was wrong


def expected_draws(misses: NDArray[np.floating], hard_example_frac: float) -> Float64Array:
    """How often each of n images is to come in an epoch, on average.

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
    least, n = 1.0 - hard_example_frac, len(misses)
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
