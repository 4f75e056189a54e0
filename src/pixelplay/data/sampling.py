"""Class imbalance: weighted sampler, oversampling, class weights, priors; and hard-example sampling.

Resampling and class weights fit a model to other priors than those of the data, see `natural_offset`.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pixelplay.array_types import Float64Array, IntArray
from pixelplay.config import Imbalance

OversampleTo = int | Literal["largest"] | None
HINT_RATIO = 5.0  # class ratio from which imbalance is noted and class weights are tried
MAX_DRAWS = 2.0  # per image and epoch
MIN_ERROR = 1e-4  # keeps the draws defined if every error is 0


def imbalance_ratio(counts: IntArray) -> float:
    """Divide the largest by the smallest class size, ignoring empty classes; 1 if all are empty."""
    present = counts[counts > 0]
    return float(present.max() / present.min()) if len(present) else 1.0


def class_priors(counts: IntArray) -> Float64Array:
    """Compute relative class frequencies π (K,), summing to 1."""
    return np.asarray(counts / counts.sum(), dtype=np.float64)


def class_weights(counts: IntArray) -> Float64Array:
    """Compute the weight N / (K·n_k) of an image of each class, (K,): classes have equal total weight.

    The mean over all images is 1, as with scikit-learn's `class_weight="balanced"`.
    """
    return np.asarray(counts.sum() / (len(counts) * counts), dtype=np.float64)


def draw_epoch(
    labels: IntArray, imbalance: Imbalance, oversample_to: OversampleTo, rng: np.random.Generator
) -> IntArray:
    """Draw the images of one epoch, in random order.

    No image comes twice before every image of its class has come once.

    Args:
        labels: (N,) in [0, K), every class present.
        imbalance: "sampler" draws all classes equally often (± 1); all others draw every image once.
        oversample_to: smaller classes are repeated up to exactly this size; the epoch of the sampler is as
            long as the classes after this.

    Returns:
        (n,) positions in [0, N); n is `epoch_length`.
    """
    counts = np.bincount(labels)
    times = _times_drawn(counts, imbalance, oversample_to)
    if imbalance == "sampler":
        times = rng.permutation(times)  # random classes are drawn once more than the others
    members = np.split(np.argsort(labels, kind="stable"), counts.cumsum()[:-1])
    rounds = []
    for rows, n in zip(members, times.tolist(), strict=True):
        repeated = np.tile(rows, (-(-n // len(rows)), 1))  # (rounds, n_k)
        rounds.append(rng.permuted(repeated, axis=1).ravel()[:n])
    class_order = rng.permutation(np.repeat(np.arange(len(counts)), times))  # (n,)
    drawn = np.empty(len(class_order), np.int64)
    drawn[np.argsort(class_order, kind="stable")] = np.concatenate(rounds)
    return drawn


def epoch_length(counts: IntArray, imbalance: Imbalance, oversample_to: OversampleTo) -> int:
    """Count the images that `draw_epoch` draws from classes of these sizes (K,)."""
    return int(_times_drawn(counts, imbalance, oversample_to).sum())


def effective_prior(counts: IntArray, imbalance: Imbalance, oversample_to: OversampleTo) -> Float64Array:
    """Compute the priors π_eff (K,) that a plain loss is fitted to, from class sizes (K,) >= 1."""
    assert imbalance != "auto", "auto is resolved before training"
    if imbalance in ("sampler", "class_weights"):
        return np.full(len(counts), 1 / len(counts))
    return class_priors(_oversampled(counts, oversample_to))


def natural_offset(
    counts: IntArray, imbalance: Imbalance, oversample_to: OversampleTo, logit_tau: float
) -> Float64Array:
    """Compute the offset (K,) that gives fitted logits the natural priors when added.

    It is log π_data − log π_eff, or τ·log π_data if the loss itself added that to the logits.

    Args:
        counts: (K,) training images of each class, all >= 1.
        logit_tau: τ of logit_adjusted; balanced_softmax uses 1.

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


def _oversampled(counts: IntArray, oversample_to: OversampleTo) -> IntArray:
    """Compute class sizes (K,) after smaller classes are repeated."""
    return np.maximum(counts, counts.max() if oversample_to == "largest" else oversample_to or 0)


def _times_drawn(counts: IntArray, imbalance: Imbalance, oversample_to: OversampleTo) -> IntArray:
    """Count an epoch's draws from each class, (K,); the sampler gives the remainder to the first classes."""
    sizes = _oversampled(counts, oversample_to)
    if imbalance != "sampler":
        return sizes
    each, left = divmod(int(sizes.sum()), len(counts))
    return each + (np.arange(len(counts)) < left)


def expected_draws(errors: NDArray[np.floating], hard_example_frac: float) -> Float64Array:
    """Compute how often each of n images is drawn in an epoch of n draws, on average.

    A fraction of the epoch is drawn in proportion to the error of the network, which approximates the
    gradient of cross entropy: its norm at the logits is 1 to √2 times the error. The rest is drawn uniformly.
    The weight 1 / draws keeps the expected gradient unchanged.

    Args:
        errors: (n,) in [0, 1], error on each image: 1 − probability of its label.
        hard_example_frac: fraction drawn by error, in [0, 1).

    Returns:
        (n,) with sum n, each from 1 − hard_example_frac to `MAX_DRAWS`.

    Source: Katharopoulos and Fleuret, "Not All Samples Are Created Equal: Deep Learning with Importance
    Sampling", ICML 2018, arXiv:1803.00942, section 3; errors are remembered from the last visit as in Schaul
    et al., "Prioritized Experience Replay", ICLR 2016, arXiv:1511.05952.
    """
    least, n = 1.0 - hard_example_frac, len(errors)
    weights = np.maximum(errors.astype(np.float64), MIN_ERROR)
    draws = np.full(n, MAX_DRAWS)
    is_below = np.ones(n, dtype=np.bool_)  # images below the limit
    while is_below.any():
        # draws left after the uniform part and the images at the limit, shared by error
        left = n - MAX_DRAWS * (n - is_below.sum()) - least * is_below.sum()
        draws[is_below] = least + weights[is_below] * left / weights[is_below].sum()
        is_above = is_below & (draws > MAX_DRAWS)
        if not is_above.any():
            break
        draws[is_above] = MAX_DRAWS
        is_below &= ~is_above
    return draws


def round_draws(expected: Float64Array, rng: np.random.Generator) -> IntArray:
    """Round expected draws (n,) up or down at random, keeping their mean and their sum.

    Source: Madow, "On the Theory of Systematic Sampling, II", Annals of Mathematical Statistics 20(3), 1949.
    """
    n = round(expected.sum())
    ends = np.floor(np.cumsum(expected) + rng.random()).astype(np.int64)
    ends[-1] = n  # floating-point rounding could lose one
    return np.asarray(np.diff(np.minimum(ends, n), prepend=0), dtype=np.int64)
