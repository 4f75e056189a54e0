"""A frozen network → the same function with fewer passes over memory.

On a CPU half of EfficientNet's time goes into batch norms and padding copies. Batch norms of a
frozen network are folded into the convolution before them; TensorFlow's one-sided padding of
strided convolutions becomes a row and a column of zeros in their kernels.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pixelplay.model.backbone import Backbone

TOLERANCE = 1e-3  # of the largest feature; folding as such changes the last bits only


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One use of a layer in a forward pass."""

    layer: nn.Module
    given: Tensor
    made: Tensor


def fuse_for_inference(backbone: Backbone, input_size: int) -> Backbone:
    """Copy a backbone and fuse what can be fused at one input size.

    The fused copy is checked against the original on noise; where it differs, a plain copy is returned.

    Args:
        backbone: in eval mode.
        input_size: side of the images that it will see, px.
    """
    images = torch.randn(1, 3, input_size, input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = backbone(images)
    fused = copy.deepcopy(backbone)
    with torch.no_grad():
        calls = _trace(fused, images)
        _fold_batch_norms(fused, calls)
        _fold_one_sided_padding(fused, calls)
    with torch.inference_mode():
        difference = (fused(images) - expected).abs().max()
    return fused if difference <= TOLERANCE * expected.abs().max() else copy.deepcopy(backbone)


def _trace(backbone: Backbone, images: Tensor) -> list[_Call]:
    """Run once and list every use of a convolution or batch norm, in order."""
    calls: list[_Call] = []

    def record(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        calls.append(_Call(layer=layer, given=given[0], made=made))

    layers = [layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    backbone(images)
    for hook in hooks:
        hook.remove()
    return calls


def _fold_batch_norms(backbone: Backbone, calls: list[_Call]) -> None:
    """Fold each batch norm that takes a convolution's output as it is into that convolution."""
    uses = Counter(call.layer for call in calls)
    maker = {id(call.made): call.layer for call in calls}  # the calls keep their tensors, and so their ids
    for call in calls:
        norm, conv = call.layer, maker.get(id(call.given))
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(conv, nn.Conv2d):
            continue
        if uses[norm] != 1 or uses[conv] != 1 or norm.running_mean is None or norm.running_var is None:
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        # timm's BatchNormAct2d applies the activation too
        _replace(backbone, norm, getattr(norm, "act", nn.Identity()))


def _fold_one_sided_padding(backbone: Backbone, calls: list[_Call]) -> None:
    """Give "same" convolutions of stride 2 on even sizes a fixed padding.

    They pad one row less above than below. With a row and a column of zeros put before the
    kernel, equal padding on all sides reads the same pixels, and needs no copy of the input.
    """
    from timm.layers.conv2d_same import Conv2dSame

    for call in calls:
        old: Any = call.layer
        is_even = call.given.shape[2] % 2 == 0 and call.given.shape[3] % 2 == 0
        if not isinstance(old, Conv2dSame) or not is_even or old.stride != (2, 2) or old.dilation != (1, 1):
            continue
        side = old.kernel_size[0]
        if old.kernel_size != (side, side) or side % 2 == 0:
            continue
        new = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            side + 1,
            stride=2,
            padding=side // 2,
            groups=old.groups,
            bias=old.bias is not None,
        )
        new.weight, new.bias = nn.Parameter(pad(old.weight, (1, 0, 1, 0))), old.bias
        _replace(backbone, old, new)


def _replace(backbone: Backbone, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, layer in backbone.named_modules() if layer is old)
    parent, _, child = name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, new)
