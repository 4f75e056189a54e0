"""Folded batch norms and fused activations for inference.

A layer's output does not fit into a core's cache, so separate activations take up to a third of a network's
time on a CPU (benchmarks/DECISIONS.md). oneDNN can apply them while a convolution writes its output. PyTorch
reserves that function for its compiler, under a name that may change; without it the activation runs
separately.
"""

import copy
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pixelplay.data.transforms import Size
from pixelplay.model.backbone import Backbone

TOLERANCE = 1e-3  # relative to the largest value; folding itself changes only the last bits
_ONEDNN_NAMES: dict[type[nn.Module], tuple[str, list[float]]] = {  # with their parameters
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}


def draw_noise(*shape: int) -> Tensor:
    """Draw normally distributed values, the same at every call, to compare two networks on."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def agree(found: Tensor, expected: Tensor) -> bool:
    """Check that two outputs of one shape are equal up to rounding; NaN is never equal."""
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def is_fusible(activation: nn.Module | None) -> bool:
    """Check that oneDNN can fuse an activation with a convolution."""
    return type(activation) in _ONEDNN_NAMES


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
    activation: nn.Module | None,
) -> Tensor:
    """Convolve feature maps (B, C, H, W) and apply an activation on a CPU."""
    if is_fusible(activation) and _has_fused_convolution(x.dtype):
        name, parameters = _ONEDNN_NAMES[type(activation)]  # type: ignore[index]
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, padding, stride, (1, 1), groups, name, parameters, ""
        )
        return output
    output = conv2d(x, weight, bias, stride, padding, groups=groups)
    return output if activation is None else activation(output)


@cache
def _has_fused_convolution(dtype: torch.dtype) -> bool:
    x, weight = torch.ones(1, 1, 2, 2, dtype=dtype), torch.full((1, 1, 1, 1), 7.0, dtype=dtype)
    # the function, oneDNN itself or its bf16 may be missing, or the arguments may differ
    try:
        output = torch.ops.mkldnn._convolution_pointwise(
            x, weight, None, (0, 0), (1, 1), (1, 1), 1, *_ONEDNN_NAMES[nn.ReLU6], ""
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((output == 6).all())


def apply_autocast(x: Tensor) -> Tensor:
    """Convert feature maps to the active autocast dtype and channels-last layout."""
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    return x.contiguous(memory_format=torch.channels_last)


class ActivatedConv2d(nn.Module):
    """A zero-padded, undilated convolution followed by an activation."""

    def __init__(self, conv: nn.Conv2d, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.activation = conv, activation

    def forward(self, x: Tensor) -> Tensor:
        """Turn feature maps (B, C, H, W) into (B, C', H', W')."""
        conv = self.conv
        assert not isinstance(conv.padding, str)
        if x.device.type != "cpu" or torch.is_grad_enabled():
            output: Tensor = self.activation(conv(x))
            return output
        x = apply_autocast(x)
        weight, bias = (None if value is None else value.to(x.dtype) for value in (conv.weight, conv.bias))
        assert weight is not None
        return convolve(x, weight, bias, conv.stride, conv.padding, conv.groups, self.activation)


class LayerCall(NamedTuple):
    """One use of a layer in a forward pass."""

    layer: nn.Module
    input: Tensor
    output: Tensor


def fuse_for_inference(backbone: Backbone, input_size: Size) -> Backbone:
    """Copy a backbone with folded batch norms and fused activations.

    The copy is checked against the original, in eval mode, on noise of the input size; if it differs, a
    plain copy is returned.
    """
    images = draw_noise(1, 3, *input_size)
    with torch.inference_mode():
        expected = backbone(images)
    fused = copy.deepcopy(backbone).requires_grad_(False)
    with torch.no_grad():
        calls = trace_layers(fused, images)
        activations = _fold_batch_norms(fused, calls)
        replacements = _fold_same_padding(fused, calls)
        for conv, activation in activations.items():
            _fuse_activation(fused, replacements.get(conv, conv), activation)
    with torch.inference_mode():
        is_equal = agree(fused(images), expected)
    return fused if is_equal else copy.deepcopy(backbone)  # outside inference mode, so that it can be trained


def trace_layers(network: nn.Module, *inputs: Tensor) -> list[LayerCall]:
    """Run a network once and list every call of a convolution or batch norm, in order."""
    calls: list[LayerCall] = []

    def record(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(LayerCall(layer, arguments[0], output))

    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return calls


def find_foldable(calls: list[LayerCall]) -> dict[nn.Conv2d, nn.BatchNorm2d]:
    """Find convolutions whose output goes directly into a batch norm.

    Valid in eval mode only: dropout between the two would go unnoticed.
    """
    uses = Counter(call.layer for call in calls)
    producer = {id(call.output): call.layer for call in calls}  # ids are stable while calls hold the tensors
    found = {}
    for call in calls:
        norm, conv = call.layer, producer.get(id(call.input))
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(conv, nn.Conv2d):
            continue
        if uses[norm] == uses[conv] == 1 and norm.running_mean is not None:
            found[conv] = norm
    return found


def _fold_batch_norms(backbone: Backbone, calls: list[LayerCall]) -> dict[nn.Conv2d, nn.Module]:
    """Fold batch norms into convolutions and return remaining activations."""
    activations = {}
    for conv, norm in find_foldable(calls).items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        # timm's BatchNormAct2d includes the activation; copied, as several layers may share one
        activations[conv] = copy.deepcopy(getattr(norm, "act", nn.Identity()))
        _replace(backbone, norm, activations[conv])
    return activations


def _fuse_activation(backbone: Backbone, conv: nn.Conv2d, activation: nn.Module) -> None:
    """Move an activation into the convolution before it."""
    is_plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and conv.dilation == (1, 1)
    if is_plain and not isinstance(conv.padding, str) and is_fusible(activation):
        _replace(backbone, activation, nn.Identity())
        _replace(backbone, conv, ActivatedConv2d(conv, activation))


def symmetric_padding(conv: nn.Conv2d, sides: Sequence[int]) -> tuple[int, bool] | None:
    """Find equivalent padding that is equal on all edges.

    TensorFlow's "same" convolutions pad depending on the input size, one row less above than below if the
    total is odd. With a row and a column of zeros prepended to the kernel, equal padding reads the same
    pixels and needs no padded copy of the input.

    Returns:
        For an input with `sides` H and W: rows and columns of padding on each edge, and True if the kernel
        needs the zeros; None if the convolution pads in another way.
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


def _fold_same_padding(backbone: Backbone, calls: list[LayerCall]) -> dict[nn.Conv2d, nn.Conv2d]:
    """Replace "same" convolutions by plain ones; return old → new."""
    replacements: dict[nn.Conv2d, nn.Conv2d] = {}
    for call in calls:
        old = call.layer
        if not isinstance(old, nn.Conv2d) or type(old) is nn.Conv2d or old in replacements:
            continue
        if (symmetric := symmetric_padding(old, call.input.shape[2:])) is None:
            continue
        padding, needs_zeros = symmetric
        kernel, stride = old.kernel_size[0] + needs_zeros, old.stride[0]
        has_bias = old.bias is not None
        new = nn.Conv2d(
            old.in_channels, old.out_channels, kernel, stride, padding, groups=old.groups, bias=has_bias
        )
        weight = pad(old.weight, (1, 0, 1, 0)) if needs_zeros else old.weight
        new.weight, new.bias = nn.Parameter(weight), old.bias
        _replace(backbone, old, new)
        replacements[old] = new
    return replacements


def _replace(backbone: Backbone, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, layer in backbone.named_modules() if layer is old)
    parent, _, child = name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, new)
