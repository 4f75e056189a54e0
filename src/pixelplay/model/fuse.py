"""A frozen network → the same function with fewer passes over memory.

On a CPU most of EfficientNet's time goes into batch norms, padding copies and activations. Batch norms
of a frozen network are folded into the convolution before them; TensorFlow's one-sided padding of
strided convolutions becomes a row and a column of zeros in their kernels; activations are applied by the
convolution itself.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pixelplay.model.activated import ActivatedConv2d, has_name
from pixelplay.model.backbone import Backbone

TOLERANCE = 1e-3  # of the largest feature; folding as such changes the last bits only


@dataclass(frozen=True, kw_only=True)
class Call:
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
        calls = trace_layers(fused, images)
        activations = _fold_batch_norms(fused, calls)
        padded = _fold_one_sided_padding(fused, calls)
        for conv, activation in activations.items():
            _activate(fused, padded.get(conv, conv), activation)
    with torch.inference_mode():
        difference = (fused(images) - expected).abs().max()
    return fused if difference <= TOLERANCE * expected.abs().max() else copy.deepcopy(backbone)


def trace_layers(network: nn.Module, *inputs: Tensor) -> list[Call]:
    """Run a network once and list every use of a convolution or batch norm, in order."""
    calls: list[Call] = []

    def record(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        calls.append(Call(layer=layer, given=given[0], made=made))

    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return calls


def foldable(calls: list[Call]) -> dict[nn.Conv2d, nn.BatchNorm2d]:
    """Convolutions and the batch norms with fixed statistics that take their outputs as they are."""
    uses = Counter(call.layer for call in calls)
    maker = {id(call.made): call.layer for call in calls}  # the calls keep their tensors, and so their ids
    found = {}
    for call in calls:
        norm, conv = call.layer, maker.get(id(call.given))
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(conv, nn.Conv2d):
            continue
        if uses[norm] == uses[conv] == 1 and norm.running_mean is not None:
            found[conv] = norm
    return found


def _fold_batch_norms(backbone: Backbone, calls: list[Call]) -> dict[nn.Conv2d, nn.Module]:
    """Fold each batch norm that can be into the convolution before it, and give what is left of it."""
    activations = {}
    for conv, norm in foldable(calls).items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        # timm's BatchNormAct2d applies it too; a copy, for several might share one
        activations[conv] = copy.deepcopy(getattr(norm, "act", nn.Identity()))
        _replace(backbone, norm, activations[conv])
    return activations


def _activate(backbone: Backbone, conv: nn.Conv2d, activation: nn.Module) -> None:
    """Let a convolution apply the activation that follows it."""
    is_plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and conv.dilation == (1, 1)
    if is_plain and not isinstance(conv.padding, str) and has_name(activation):
        _replace(backbone, activation, nn.Identity())
        _replace(backbone, conv, ActivatedConv2d(conv, activation))


def is_padded_below(call: Call) -> bool:
    """Whether a "same" convolution of stride 2 pads one row less above than below, as on even sizes.

    With a row and a column of zeros put before its kernel, equal padding by half of the kernel on all
    sides reads the same pixels, and needs no copy of the input.
    """
    from timm.layers.conv2d_same import Conv2dSame

    layer: Any = call.layer
    if not isinstance(layer, Conv2dSame) or layer.stride != (2, 2) or layer.dilation != (1, 1):
        return False
    side = layer.kernel_size[0]
    is_even = call.given.shape[2] % 2 == 0 and call.given.shape[3] % 2 == 0
    return is_even and layer.kernel_size == (side, side) and side % 2 == 1


def _fold_one_sided_padding(backbone: Backbone, calls: list[Call]) -> dict[nn.Conv2d, nn.Conv2d]:
    """Old convolutions and the new ones in their places."""
    padded: dict[nn.Conv2d, nn.Conv2d] = {}
    for call in calls:
        if not is_padded_below(call):
            continue
        old: Any = call.layer
        side = old.kernel_size[0]
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
        padded[old] = new
    return padded


def _replace(backbone: Backbone, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, layer in backbone.named_modules() if layer is old)
    parent, _, child = name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, new)
