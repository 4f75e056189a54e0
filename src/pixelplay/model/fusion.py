"""A convolution and the activation behind it in one pass over memory.

What a layer makes of a batch does not fit into a core's cache, and so activations take up to a third of a
fused network's time on a CPU (benchmarks/LOG.md). oneDNN applies them while it writes. PyTorch keeps that
for its compiler, under a name that may change: where it is missing, one follows the other.
"""

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pixelplay.model.backbone import Backbone

_NAMES: dict[type[nn.Module], tuple[str, list[float]]] = {  # oneDNN's, and their numbers
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}
_NO_DILATION = (1, 1)


def is_listed(activation: nn.Module | None) -> bool:
    """Whether an activation can be applied while a convolution writes."""
    return type(activation) in _NAMES


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
    activation: nn.Module | None,
) -> Tensor:
    """Convolve maps (B, C, H, W) and apply an activation; on a CPU, without gradients."""
    if is_listed(activation) and _has_one_pass(x.dtype):
        name, numbers = _NAMES[type(activation)]  # type: ignore[index]
        made: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, padding, stride, _NO_DILATION, groups, name, numbers, ""
        )
        return made
    made = conv2d(x, weight, bias, stride, padding, groups=groups)
    return made if activation is None else activation(made)


@cache
def _has_one_pass(dtype: torch.dtype) -> bool:
    x, weight = torch.ones(1, 1, 2, 2, dtype=dtype), torch.full((1, 1, 1, 1), 7.0, dtype=dtype)
    stride, padding, groups = (1, 1), (0, 0), 1
    # the name may be missing, oneDNN itself or its bf16, or the arguments may be others
    try:
        made = torch.ops.mkldnn._convolution_pointwise(
            x, weight, None, padding, stride, _NO_DILATION, groups, *_NAMES[nn.ReLU6], ""
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((made == 6).all())


def as_computed(x: Tensor) -> Tensor:
    """Maps on a CPU in the precision that autocast asks for, channels last."""
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    return x.contiguous(memory_format=torch.channels_last)


class ActivatedConv2d(nn.Module):
    """A convolution with zeros around it, not dilated, and the activation behind it."""

    def __init__(self, conv: nn.Conv2d, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.activation = conv, activation

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C', H', W') of maps (B, C, H, W)."""
        conv = self.conv
        assert not isinstance(conv.padding, str)
        if x.device.type != "cpu" or torch.is_grad_enabled():
            made: Tensor = self.activation(conv(x))
            return made
        x = as_computed(x)
        weight, bias = (None if value is None else value.to(x.dtype) for value in (conv.weight, conv.bias))
        assert weight is not None
        return convolve(x, weight, bias, conv.stride, conv.padding, conv.groups, self.activation)


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
    fused = copy.deepcopy(backbone).requires_grad_(False)
    with torch.no_grad():
        calls = trace_layers(fused, images)
        activations = _fold_batch_norms(fused, calls)
        new_of = _fold_same_padding(fused, calls)
        for conv, activation in activations.items():
            _activate(fused, new_of.get(conv, conv), activation)
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


def find_foldable(calls: list[Call]) -> dict[nn.Conv2d, nn.BatchNorm2d]:
    """Convolutions, and the batch norms that take their outputs as they are.

    Seen in eval mode: dropout between the two would not show.
    """
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
    for conv, norm in find_foldable(calls).items():
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
    if is_plain and not isinstance(conv.padding, str) and is_listed(activation):
        _replace(backbone, activation, nn.Identity())
        _replace(backbone, conv, ActivatedConv2d(conv, activation))


def padding_of(conv: nn.Conv2d, sides: Sequence[int]) -> tuple[int, bool] | None:
    """Padding that is alike on all edges, and whether the kernel must grow for it.

    TensorFlow's "same" convolutions pad by what the size asks for, a row less above than below where that is
    odd. With a row and a column of zeros put before the kernel, equal padding reads the same pixels, and
    needs no copy of the input.

    Args:
        sides: height and width of the maps that it is given.

    Returns:
        Rows and columns on each edge, and whether zeros go before the kernel; None where it pads otherwise.
    """
    from timm.layers.conv2d_same import Conv2dSame

    is_square = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding))
    if not is_square or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return None
    if conv.dilation != (1, 1) or type(conv) not in (nn.Conv2d, Conv2dSame):
        return None
    if type(conv) is nn.Conv2d:
        return conv.padding[0], False
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    needed = {max(0, (math.ceil(side / stride) - 1) * stride + kernel - side) for side in sides}
    return ((max(needed) + 1) // 2, max(needed) % 2 == 1) if len(needed) == 1 else None


def _fold_same_padding(backbone: Backbone, calls: list[Call]) -> dict[nn.Conv2d, nn.Conv2d]:
    """Old convolutions and the new ones in their places."""
    new_of: dict[nn.Conv2d, nn.Conv2d] = {}
    for call in calls:
        old = call.layer
        if not isinstance(old, nn.Conv2d) or type(old) is nn.Conv2d or old in new_of:
            continue
        if (padded := padding_of(old, call.given.shape[2:])) is None:
            continue
        padding, is_grown = padded
        new = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size[0] + is_grown,
            stride=old.stride[0],
            padding=padding,
            groups=old.groups,
            bias=old.bias is not None,
        )
        new.weight, new.bias = nn.Parameter(grow(old.weight) if is_grown else old.weight), old.bias
        _replace(backbone, old, new)
        new_of[old] = new
    return new_of


def grow(kernel: Tensor) -> Tensor:
    """Put a row and a column of zeros before a kernel (C', C, K, K)."""
    return pad(kernel, (1, 0, 1, 0))


def _replace(backbone: Backbone, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, layer in backbone.named_modules() if layer is old)
    parent, _, child = name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, new)
