"""Class activation maps from a stage's feature maps and gradients.

All these maps are densities in units of the logit: the mean of a Grad-CAM map over the image is the stage's
contribution to the logit, to first order. Maps of stages with different resolutions, and of several models,
can therefore be added.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelplay.config import CamName

CamMethod = Callable[[Tensor, Tensor], Tensor]  # feature maps and gradients (B, C, H, W) → (B, H, W)


def gradcam(maps: Tensor, gradients: Tensor) -> Tensor:
    """Weight each channel of feature maps (B, C, H, W) by its summed gradient: (B, H, W).

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, arXiv:1610.02391, equations 1 and 2.
    """
    return (gradients.sum(dim=(2, 3), keepdim=True) * maps).sum(dim=1)


def gradcam_plus_plus(maps: Tensor, gradients: Tensor) -> Tensor:
    """Weight each channel by its positive gradients, the more the fewer pixels.

    Source: Chattopadhay et al., "Grad-CAM++", WACV 2018, arXiv:1710.11063, equations 10, 11 and 19.
    """
    total = maps.sum(dim=(2, 3), keepdim=True)
    denominator = 2 * gradients.square() + total * gradients.pow(3)
    alpha = gradients.square() / denominator.where(denominator != 0, 1)
    return ((alpha * gradients.relu()).sum(dim=(2, 3), keepdim=True) * maps).sum(dim=1)


def layercam(maps: Tensor, gradients: Tensor) -> Tensor:
    """Weight each pixel of each channel by its own positive gradient.

    Source: Jiang et al., "LayerCAM", IEEE TIP 2021, doi:10.1109/TIP.2021.3089943, equations 5 to 7.
    """
    return (gradients.relu() * maps).sum(dim=1) * maps[0, 0].numel()


CAM_METHODS: dict[CamName, CamMethod] = {
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "layercam": layercam,
}


def sum_maps(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Resize class activation maps (B, H_s, W_s) of several stages to one size and add them."""
    resized = [F.interpolate(m[:, None], size=size, mode="bilinear", antialias=True)[:, 0] for m in maps]
    return reduce(torch.add, resized)
