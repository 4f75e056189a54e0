"""MixUp and CutMix: mix each image of a batch, and its label, with another one."""

import math

import numpy as np
import torch
from torch import Tensor

from pixelplay.config import AugmentConfig


def mix_batch(
    inputs: Tensor, extras: Tensor, targets: Tensor, config: AugmentConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each image of a batch with a partner by MixUp or CutMix.

    The batch shares one method, one mixing ratio and, for CutMix, one patch. With both methods enabled each
    batch draws one of them; with none the arguments are returned. They are never modified.

    Args:
        inputs: (B, C, H, W) images or feature maps; memory format and dtype are kept.
        extras: (B, D) further inputs, mixed with the ratio of the labels.
        targets: (B, K) float, rows sum to 1, and still do afterwards.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv:1710.09412, section 2;
    between feature maps: Verma et al., "Manifold Mixup", ICML 2019, arXiv:1806.05236, section 2.
    """
    named = [name for name in ("mixup", "cutmix") if name in config.augment]
    if not named:
        return inputs, extras, targets
    partner = torch.from_numpy(rng.permutation(len(inputs))).to(inputs.device, non_blocking=inputs.is_cuda)
    if named[rng.integers(len(named))] == "mixup":
        partner_share = rng.beta(config.mixup_alpha, config.mixup_alpha)
        mixed = _blend(inputs, partner, partner_share)
    else:
        mixed, partner_share = _paste(inputs, partner, config.cutmix_alpha, rng)
    return mixed, _blend(extras, partner, partner_share), _blend(targets, partner, partner_share)


def _blend(values: Tensor, partner: Tensor, partner_share: float) -> Tensor:
    """Interpolate each row with its partner."""
    if not values.is_floating_point():
        return _blend(values.float(), partner, partner_share).round().to(values.dtype)
    return values.lerp(values[partner], partner_share)


def _paste(inputs: Tensor, partner: Tensor, alpha: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Paste the same patch of each partner; also return the fraction of the area it covers.

    The patch covers 1 − λ of the area, λ ~ Beta(α, α), and is clipped at the edges.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
    Features", ICCV 2019, arXiv:1905.04899, equations 1 and 2.
    """
    height, width = inputs.shape[-2:]
    side = math.sqrt(1 - rng.beta(alpha, alpha))  # of the patch, as a fraction of either side
    rows, columns = _draw_span(height, side, rng), _draw_span(width, side, rng)
    mixed = inputs.clone()
    mixed[..., rows, columns] = inputs[..., rows, columns][partner]
    return mixed, (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def _draw_span(size: int, side: float, rng: np.random.Generator) -> slice:
    """Draw an interval of pixels around a uniform centre, clipped to [0, size]."""
    middle, half = rng.uniform(0, size), side * size / 2
    return slice(max(round(middle - half), 0), min(round(middle + half), size))
