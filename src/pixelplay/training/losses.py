"""Losses: cross entropy and its variants for imbalanced classes, computed in float32."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pixelplay.array_types import Float64Array, IntArray
from pixelplay.config import Imbalance
from pixelplay.data.sampling import OversampleTo, class_priors, class_weights, effective_prior, natural_offset
from pixelplay.errors import ConfigError

LossFunction = Callable[[Tensor, Tensor], Tensor]


def make_loss(
    imbalance: Imbalance,
    counts: IntArray,
    *,
    logit_tau: float,
    focal_gamma: float,
    label_smoothing: float,
    oversample_to: OversampleTo = None,
    device: str = "cpu",
) -> LossFunction:
    """Create the loss: logits (B, K) and targets (B, K) → mean over the batch.

    Targets are class probabilities, one-hot or mixed by MixUp and CutMix, times the weight of the image.
    Logits are those of the network; `natural_offset` gives them natural priors afterwards. Label smoothing
    spreads towards the class frequencies that the loss fits, π_eff, or π_data where log π_data is added, so
    it does not shift priors. none and sampler use the plain loss; they differ in what is drawn.

    Args:
        counts: (K,) training images per class, all >= 1.
        logit_tau: τ of logit_adjusted.
        focal_gamma: γ of focal, which raises ConfigError for smoothed or mixed labels.
        label_smoothing: fraction of each label that is spread, in [0, 1).
    """
    assert imbalance != "auto", "auto is resolved before training"
    if imbalance == "focal":
        if label_smoothing > 0:
            conflict = f"label_smoothing={label_smoothing} is not supported by --imbalance focal"
            raise ConfigError(f"{conflict}; set it to 0 or use another --imbalance")
        return partial(_focal_loss, focal_gamma)
    shift, weights = np.zeros(len(counts)), np.ones(len(counts))
    if imbalance in ("balanced_softmax", "logit_adjusted"):
        shift, spread = natural_offset(counts, imbalance, None, logit_tau), class_priors(counts)
    else:
        spread = effective_prior(counts, imbalance, oversample_to)
    if imbalance == "class_weights":
        weights = class_weights(counts)

    def constant(values: Float64Array) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=device)

    return partial(_soft_cross_entropy, constant(shift), constant(weights), constant(spread), label_smoothing)


def _soft_cross_entropy(
    shift: Tensor, weights: Tensor, spread: Tensor, label_smoothing: float, logits: Tensor, targets: Tensor
) -> Tensor:
    """Return the mean cross entropy of shifted logits (B, K) with weighted, smoothed targets (B, K).

    The sum over a batch is divided by B, not by its weights: otherwise the gradient of an image would
    depend on the rest of the batch. The mean weight over all images is 1, so the learning rate means the
    same with and without weights.

    Args:
        shift: (K,) added to the logits.
        weights: (K,) class weights.
        spread: (K,) distribution of the smoothed fraction of a label; sums to 1.
    """
    log_probs = torch.log_softmax(logits.float() + shift, dim=1)  # (B, K)
    # weighted before smoothing: `spread` is the distribution of the weighted labels
    weighted = targets.float() * weights  # (B, K)
    smooth = weighted.sum(1, keepdim=True) * spread  # (B, K)
    return -(torch.lerp(weighted, smooth, label_smoothing) * log_probs).sum(1).mean()


def _focal_loss(gamma: float, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of (1 − p)^γ times the cross entropy, p the probability of the true class.

    Args:
        logits: (B, K), K >= 2.
        targets: (B, K), of one class each; others raise ConfigError.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002, equation 4.
    """
    is_true = targets > 0
    if not (is_true.sum(1) == 1).all():
        raise ConfigError("--imbalance focal does not support mixup, cutmix and label_smoothing; omit them")
    log_probs = torch.log_softmax(logits.float(), dim=1)  # (B, K)
    # 1 − p as a sum over the other classes: a difference would underflow for confident predictions
    log_rest = log_probs.masked_fill(is_true, -torch.inf).logsumexp(1)  # (B,)
    log_p = log_probs.masked_fill(~is_true, 0).sum(1)  # (B,)
    return -(targets.float().sum(1) * (gamma * log_rest).exp() * log_p).mean()
