"""Losses: cross entropy and its variants for imbalanced classes, computed in float32."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pixelplay.arrays import Float64Array, IntArray
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
    it does not shift priors. none, sampler and crt use the plain loss; they differ in what is drawn.

    Args:
        counts: (K,) training images per class, all >= 1.
        logit_tau: τ of logit_adjusted.
        focal_gamma: γ of focal.
        label_smoothing: fraction of each label that is spread, in [0, 1).
        oversample_to: to which smaller classes are repeated.
        device: device of the logits.

    Raises:
        ConfigError: focal with smoothed labels; its loss raises the same for mixed ones.
    """
    assert imbalance != "auto", "auto is resolved before training"
    if imbalance == "focal":
        if label_smoothing > 0:
            raise ConfigError(
                f"label_smoothing={label_smoothing} makes soft labels, which --imbalance focal does not "
                "support; set it to 0 or use another --imbalance"
            )
        return FocalLoss(gamma=focal_gamma)
    is_adjusted = imbalance in ("balanced_softmax", "logit_adjusted")
    is_weighted = imbalance == "class_weights"
    neutral = np.zeros(len(counts))

    def constant(values: Float64Array) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=device)

    return SoftCrossEntropy(
        shift=constant(natural_offset(counts, imbalance, None, logit_tau) if is_adjusted else neutral),
        weights=constant(class_weights(counts) if is_weighted else neutral + 1),
        spread=constant(
            class_priors(counts) if is_adjusted else effective_prior(counts, imbalance, oversample_to)
        ),
        label_smoothing=label_smoothing,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftCrossEntropy:
    """Cross entropy of shifted logits with weighted, smoothed targets.

    The sum over a batch is divided by B, not by its weights: otherwise the gradient of an image would
    depend on the rest of the batch. The mean weight over all images is 1, so the learning rate means the
    same with and without weights.

    Attributes:
        shift: (K,) added to the logits.
        weights: (K,) class weights.
        spread: (K,) distribution of the smoothed fraction of a label; sums to 1.
        label_smoothing: that fraction.
    """

    shift: Tensor
    weights: Tensor
    spread: Tensor
    label_smoothing: float

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of logits (B, K) for targets (B, K), a float32 scalar."""
        log_probs = torch.log_softmax(logits.float() + self.shift, dim=1)  # (B, K)
        # weighted before smoothing: `spread` is the distribution of the weighted labels
        weighted = targets.float() * self.weights  # (B, K)
        smooth = weighted.sum(1, keepdim=True) * self.spread  # (B, K)
        return -(torch.lerp(weighted, smooth, self.label_smoothing) * log_probs).sum(1).mean()


@dataclass(frozen=True, kw_only=True)
class FocalLoss:
    """Cross entropy times (1 − p)^γ, p the probability of the true class.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002, equation 4.
    """

    gamma: float

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of logits (B, K), K >= 2, for targets (B, K) of one class each.

        Raises:
            ConfigError: a target has several classes.
        """
        is_true = targets > 0
        if not (is_true.sum(1) == 1).all():
            raise ConfigError(
                "--imbalance focal does not support soft labels; omit mixup, cutmix and label_smoothing, or "
                "use another --imbalance"
            )
        log_probs = torch.log_softmax(logits.float(), dim=1)  # (B, K)
        # 1 − p as a sum over the other classes: a difference would underflow for confident predictions
        log_rest = log_probs.masked_fill(is_true, -torch.inf).logsumexp(1)  # (B,)
        log_p = log_probs.masked_fill(~is_true, 0).sum(1)  # (B,)
        return -(targets.float().sum(1) * (self.gamma * log_rest).exp() * log_p).mean()
