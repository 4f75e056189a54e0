"""Faster training of the last stages: frozen depthwise filters, and on a CPU fewer passes over memory.

A layer's output does not fit into a core's cache, so half of a training step of a network with batch norms is
not arithmetic (benchmarks/DECISIONS.md). The batch norms here keep their statistics: each is a scale and a
shift, which every step folds again into the weights of the convolution before it.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from pixelplay.model.fusion import (
    agree,
    apply_autocast,
    convolve,
    draw_noise,
    find_foldable,
    symmetric_padding,
    trace_layers,
)
from pixelplay.model.split_backbone import TrainableStages

# upper limits of rectifiers, whose lower limit is 0
_LIMITS: dict[type[nn.Module], float] = {nn.ReLU: math.inf, nn.ReLU6: 6.0}


def freeze_depthwise_filters(
    stages: TrainableStages, map_shape: tuple[int, int, int], n_stats: int, *, fast: bool
) -> None:
    """Freeze depthwise filters and their scales; other layers stay trainable.

    Depthwise filters hold 3 % of the weights, but their gradient takes two thirds of a step on a CPU. The
    stages are changed in place and in eval mode afterwards.

    Args:
        map_shape, n_stats: (C, H, W) of the input of the stages, and number of its channel statistics.
        fast: replace forward passes by equivalent ones with a faster backward pass on a CPU. The outputs are
            checked on noise in fp32; if they differ, all layers keep their own forward pass.
    """
    stages.eval()
    _restore_forward(stages)  # an earlier call may have replaced it
    noise = draw_noise(1, *map_shape)
    inputs = noise, noise.new_zeros(1, n_stats)
    with torch.no_grad():
        calls = trace_layers(stages, *inputs)
    norms = find_foldable(calls)
    convs = {call.layer: call.input.shape[2:] for call in calls if isinstance(call.layer, nn.Conv2d)}
    for conv, sides in convs.items():
        if _is_depthwise(conv):
            norm = norms.get(conv)
            conv.weight.requires_grad_(False)
            if conv.bias is not None:
                conv.bias.requires_grad_(_has_flipped_gradient(conv, sides))
            if norm is not None and norm.affine:
                norm.weight.requires_grad_(False)
    if not fast:
        return
    with torch.no_grad():
        expected = stages(*inputs)
        for conv, sides in convs.items():
            _replace_forward(conv, norms.get(conv), sides)
        if not agree(stages(*inputs), expected):
            _restore_forward(stages)


def _restore_forward(stages: nn.Module) -> None:
    for layer in stages.modules():
        vars(layer).pop("forward", None)


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels > 1


def _has_flipped_gradient(conv: nn.Conv2d, sides: torch.Size) -> bool:
    """Check that the input gradient is a convolution with the flipped filter."""
    symmetric = symmetric_padding(conv, sides)
    is_square = conv.in_channels == conv.out_channels
    return symmetric is not None and is_square and symmetric[0] < conv.kernel_size[0]


def _replace_forward(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, sides: torch.Size) -> None:
    """Use faster forward passes for a convolution and its batch norm."""
    rectifier = _rectifier_of(norm)
    forward: partial[Tensor]
    if _is_depthwise(conv):
        if not _has_flipped_gradient(conv, sides):
            return
        forward = partial(_forward_depthwise, conv, norm, rectifier)
    elif norm is None or type(conv) is not nn.Conv2d:
        return
    elif conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1 and conv.padding == (0, 0):
        forward = partial(_forward_pointwise, conv, norm, rectifier)
    else:
        forward, rectifier = partial(_forward_folded, conv, norm), None
    conv.forward = forward  # type: ignore[method-assign]
    if norm is not None:
        norm.forward = partial(_forward_rest, norm, rectifier is not None)  # type: ignore[method-assign]


def _rectifier_of(norm: Any) -> nn.Module | None:
    """Return the rectifier in timm's batch norm, if it has no dropout."""
    activation = getattr(norm, "act", None)
    has_no_drop = isinstance(getattr(norm, "drop", None), nn.Identity)
    return activation if has_no_drop and type(activation) in _LIMITS else None


def _forward_rest(norm: Any, rectified: bool, x: Tensor) -> Tensor:
    """Apply the rest of timm's batch norm layer: dropout and activation."""
    if rectified or not hasattr(norm, "act"):
        return x
    activated: Tensor = norm.act(norm.drop(x))
    return activated


def _forward_folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    x = apply_autocast(x)
    output: Tensor = conv._conv_forward(x, *_fold(conv, norm, x.dtype))
    return output


def _forward_depthwise(
    conv: nn.Conv2d, norm: nn.BatchNorm2d | None, rectifier: nn.Module | None, x: Tensor
) -> Tensor:
    x = apply_autocast(x)
    weight, bias = _fold(conv, norm, x.dtype)
    symmetric = symmetric_padding(conv, x.shape[2:])
    assert symmetric is not None
    weight = pad(weight, (1, 0, 1, 0)) if symmetric[1] else weight
    output: Tensor = _FrozenDepthwise.apply(x, weight, bias, conv.stride[0], symmetric[0], rectifier)
    return output


def _forward_pointwise(
    conv: nn.Conv2d, norm: nn.BatchNorm2d, rectifier: nn.Module | None, x: Tensor
) -> Tensor:
    x = apply_autocast(x)
    output: Tensor = _Pointwise.apply(x, *_fold(conv, norm, x.dtype), rectifier)
    return output


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Fold the batch norm after a convolution into its weight and bias."""
    weight, bias = conv.weight, conv.bias
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()  # (C',)
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        if norm.affine:
            scale = scale * norm.weight
        weight, bias = weight * scale[:, None, None, None], shift * scale
        if norm.affine:
            bias = bias + norm.bias
    return weight.to(dtype), None if bias is None else bias.to(dtype)


class _FrozenDepthwise(torch.autograd.Function):
    """A depthwise convolution with frozen filter, its bias, and an optional rectifier.

    oneDNN's gradient of the input takes twice the time of its forward pass, a hundred times in bf16 with a
    stride. It is itself such a convolution: of the output's gradient, spread out by the stride, with the
    flipped filter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: int,
        rectifier: nn.Module | None,
    ) -> Tensor:
        """Turn feature maps (B, C, H, W) into (B, C, H', W')."""
        output = convolve(x, weight, bias, (stride,) * 2, (padding,) * 2, len(weight), rectifier)
        ctx.save_for_backward(weight, output if rectifier else None)
        ctx.sides, ctx.stride, ctx.rectifier = x.shape[2:], stride, rectifier
        ctx.margin = weight.shape[2] - 1 - padding
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Compute the gradients of the input (B, C, H, W) and the bias (C,)."""
        weight, output = ctx.saved_tensors
        grad = _rectifier_gradient(grad, output, ctx.rectifier)
        grad_bias = _pixel_rows(grad).sum(0) if ctx.needs_input_grad[2] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.stride > 1:  # insert zeros between the pixels
                height, width = (side + weight.shape[2] - 1 - 2 * ctx.margin for side in ctx.sides)
                spread = grad.new_zeros(len(grad), height, width, len(weight)).permute(0, 3, 1, 2)
                spread[:, :, :: ctx.stride, :: ctx.stride][:, :, : grad.shape[2], : grad.shape[3]] = grad
                grad = spread
            grad_x = conv2d(grad, weight.flip(2, 3), None, 1, ctx.margin, groups=len(weight))
        return grad_x, None, grad_bias, None, None, None


class _Pointwise(torch.autograd.Function):
    """A 1 × 1 convolution with an optional rectifier.

    Its gradients are two matrix products; oneDNN's backward convolutions take a third longer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rectifier: nn.Module | None) -> Tensor:
        """Turn feature maps (B, C, H, W) into (B, C', H, W)."""
        output = convolve(x, weight, bias, (1, 1), (0, 0), 1, rectifier)
        ctx.save_for_backward(x, weight, output if rectifier else None)
        ctx.rectifier = rectifier
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Compute the gradients of input, weight and bias."""
        x, weight, output = ctx.saved_tensors
        grad_rows = _pixel_rows(_rectifier_gradient(grad, output, ctx.rectifier))  # (B·H·W, C')
        rows = _pixel_rows(x)  # (B·H·W, C)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ weight.flatten(1)).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        return grad_x, (grad_rows.t() @ rows).view_as(weight), grad_rows.sum(0), None


def _rectifier_gradient(grad: Tensor, output: Tensor | None, rectifier: nn.Module | None) -> Tensor:
    """Backpropagate through a rectifier; the gradient is 0 at both limits."""
    if rectifier is None:
        return grad
    before: Tensor = torch.ops.aten.hardtanh_backward(grad, output, 0.0, _LIMITS[type(rectifier)])
    return before


def _pixel_rows(maps: Tensor) -> Tensor:
    """Reshape feature maps (B, C, H, W) to one row per pixel (B·H·W, C)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
