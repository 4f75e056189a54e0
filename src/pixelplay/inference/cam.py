"""Activations and gradients of a stage → where the evidence for a class lies.

All maps are densities in units of the logit (the mean of Grad-CAM's over the image is what a stage
contributes to it, to first order), so maps of stages of different resolution, and of several networks that
answer together, can be added.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from pixelplay.config import CamName

CamMethod = Callable[[Tensor, Tensor], Tensor]  # maps and gradients (B, C, H, W) → (B, H, W)


def gradcam(maps: Tensor, gradients: Tensor) -> Tensor:
    """Each channel (B, C, H, W) weighted by its gradient summed over positions: (B, H, W).

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, arXiv:1610.02391, equations 1 and 2.
    """
    return (gradients.sum(dim=(2, 3), keepdim=True) * maps).sum(dim=1)


def gradcam_plus_plus(maps: Tensor, gradients: Tensor) -> Tensor:
    """Likewise, by positive gradients alone, those counting more where few positions carry the class.

    Source: Chattopadhay et al., "Grad-CAM++", WACV 2018, arXiv:1710.11063, equations 10, 11 and 19.
    """
    total = maps.sum(dim=(2, 3), keepdim=True)
    denominator = 2 * gradients.square() + total * gradients.pow(3)
    alpha = gradients.square() / denominator.where(denominator != 0, 1)
    return ((alpha * gradients.relu()).sum(dim=(2, 3), keepdim=True) * maps).sum(dim=1)


def layercam(maps: Tensor, gradients: Tensor) -> Tensor:
    """Each position weighted by its own positive gradient.

    Source: Jiang et al., "LayerCAM", IEEE TIP 2021, doi:10.1109/TIP.2021.3089943, equations 5 to 7.
    """
    return (gradients.relu() * maps).sum(dim=1) * maps[0, 0].numel()


CAM_METHODS: dict[CamName, CamMethod] = {
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "layercam": layercam,
}


def sum_maps(densities: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Sum of maps (B, H_s, W_s) of several stages at one (height, width): (B, height, width)."""
    grown = [_resize(density, size) for density in densities]
    total = grown[0]
    for density in grown[1:]:
        total = total + density
    return total


def _resize(density: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(density[:, None], size=size, mode="bilinear", antialias=True)[:, 0]
