"""Layers of a tail in training: frozen depthwise filters, and on a CPU fewer passes over memory.

What a layer makes of a batch does not fit into a core's cache, and so half of a step of a network with
batch norms is no arithmetic (benchmarks/LOG.md). These keep their statistics: each is a scale and a shift,
and goes anew in every step into the weights of the convolution before it.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from pixelplay.model.fusion import (
    TOLERANCE,
    as_computed,
    convolve,
    find_foldable,
    grow,
    padding_of,
    trace_layers,
)
from pixelplay.model.split_backbone import SplitBackbone

# where rectifiers, which let nothing below 0 through, stop what is above
_TOPS: dict[type[nn.Module], float] = {nn.ReLU: math.inf, nn.ReLU6: 6.0}


def freeze_depthwise_filters(stages: SplitBackbone, *, is_shortened: bool) -> None:
    """Train what mixes channels, and leave depthwise filters and their scales as they are.

    They hold 3 % of the weights, and their gradient takes two thirds of a step on a CPU. The tail is in
    eval mode afterwards.

    Args:
        is_shortened: give layers a shorter way to the same outputs and gradients, that a CPU takes.
            The outputs are checked on noise in fp32: where they differ, all layers keep their own.
    """
    tail = stages.tail.eval()
    _lengthen(tail)  # by whoever called this before
    noise = torch.randn(1, *stages.shape, generator=torch.Generator().manual_seed(0))
    inputs = noise, noise.new_zeros(1, stages.n_stats)
    with torch.no_grad():
        calls = trace_layers(tail, *inputs)
    norms = find_foldable(calls)
    convs = {call.layer: call.given.shape[2:] for call in calls if isinstance(call.layer, nn.Conv2d)}
    for conv, sides in convs.items():
        if _is_depthwise(conv):
            _freeze(conv, norms.get(conv), is_bias_trained=_turns_around(conv, sides))
    if not is_shortened:
        return
    with torch.no_grad():
        expected = tail(*inputs)
        for conv, sides in convs.items():
            _shorten(conv, norms.get(conv), sides)
        difference = (tail(*inputs) - expected).abs().max()
    if not difference <= TOLERANCE * expected.abs().max():
        _lengthen(tail)


def _lengthen(tail: nn.Module) -> None:
    """Give layers their own forward passes back."""
    for layer in tail.modules():
        vars(layer).pop("forward", None)


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels > 1


def _freeze(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, *, is_bias_trained: bool) -> None:
    """Freeze a filter and its scale, and its own bias unless the bias has a cheap gradient."""
    conv.weight.requires_grad_(False)
    if conv.bias is not None:
        conv.bias.requires_grad_(is_bias_trained)
    if norm is not None and norm.affine:
        norm.weight.requires_grad_(False)


def _turns_around(conv: nn.Conv2d, sides: torch.Size) -> bool:
    """Whether a filter's slope is a convolution of stride 1 with the filter turned around."""
    padded = padding_of(conv, sides)
    return padded is not None and conv.in_channels == conv.out_channels and padded[0] < conv.kernel_size[0]


def _shorten(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, sides: torch.Size) -> None:
    """Give a convolution and the batch norm behind it another forward pass, where there is one."""
    rectifier = _rectifier_of(norm)
    run: partial[Tensor]
    if _is_depthwise(conv):
        if not _turns_around(conv, sides):
            return
        run = partial(_run_filter, conv, norm, rectifier)
    elif norm is None or type(conv) is not nn.Conv2d:
        return
    elif conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1 and conv.padding == (0, 0):
        run = partial(_run_pointwise, conv, norm, rectifier)
    else:
        run, rectifier = partial(_run_folded, conv, norm), None
    conv.forward = run  # type: ignore[method-assign]
    if norm is not None:
        norm.forward = partial(_finish, norm, rectifier is not None)  # type: ignore[method-assign]


def _rectifier_of(norm: Any) -> nn.Module | None:
    """What timm's batch norm does besides normalising, where that is a rectifier and nothing else."""
    activation = getattr(norm, "act", None)
    is_all = isinstance(getattr(norm, "drop", None), nn.Identity)
    return activation if is_all and type(activation) in _TOPS else None


def _finish(norm: Any, is_rectified: bool, x: Tensor) -> Tensor:
    """What is left to do of a batch norm; timm's drops and activates."""
    if is_rectified or not hasattr(norm, "act"):
        return x
    dropped: Tensor = norm.drop(x)
    activated: Tensor = norm.act(dropped)
    return activated


def _run_folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    x = as_computed(x)
    made: Tensor = conv._conv_forward(x, *_fold(conv, norm, x.dtype))
    return made


def _run_filter(
    conv: nn.Conv2d, norm: nn.BatchNorm2d | None, rectifier: nn.Module | None, x: Tensor
) -> Tensor:
    x = as_computed(x)
    weight, bias = _fold(conv, norm, x.dtype)
    padded = padding_of(conv, x.shape[2:])
    assert padded is not None
    padding, is_grown = padded
    weight = grow(weight) if is_grown else weight
    made: Tensor = _FrozenFilter.apply(x, weight, bias, conv.stride[0], padding, rectifier)
    return made


def _run_pointwise(conv: nn.Conv2d, norm: nn.BatchNorm2d, rectifier: nn.Module | None, x: Tensor) -> Tensor:
    x = as_computed(x)
    made: Tensor = _Pointwise.apply(x, *_fold(conv, norm, x.dtype), rectifier)
    return made


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution and the batch norm behind it as one."""
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


class _FrozenFilter(torch.autograd.Function):
    """A depthwise filter that stays, its bias, and perhaps a rectifier.

    oneDNN's slope of the maps takes twice the time of its forward pass, in bf16 with a stride a hundred
    times. It is itself such a convolution: of the output's slopes, spread out by the stride, with the
    filter turned around.
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
        """Maps (B, C, H', W') of maps (B, C, H, W)."""
        made = convolve(x, weight, bias, (stride,) * 2, (padding,) * 2, len(weight), rectifier)
        ctx.save_for_backward(weight, made if rectifier else None)
        ctx.sides, ctx.stride, ctx.rectifier = x.shape[2:], stride, rectifier
        ctx.margin = weight.shape[2] - 1 - padding
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Slopes of the maps (B, C, H, W) and of the bias (C,)."""
        weight, made = ctx.saved_tensors
        gradient = _slope_before(gradient, made, ctx.rectifier)
        slope_bias = _rows(gradient).sum(0) if ctx.needs_input_grad[2] else None
        slope_x = None
        if ctx.needs_input_grad[0]:
            if ctx.stride > 1:
                height, width = (side + weight.shape[2] - 1 - 2 * ctx.margin for side in ctx.sides)
                gradient = _spread(gradient, ctx.stride, height, width)
            slope_x = conv2d(gradient, weight.flip(2, 3), None, 1, ctx.margin, groups=len(weight))
        return slope_x, None, slope_bias, None, None, None


class _Pointwise(torch.autograd.Function):
    """A 1 × 1 convolution, and perhaps a rectifier.

    Its slopes are two matrix products; oneDNN's convolutions backwards take a third longer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rectifier: nn.Module | None) -> Tensor:
        """Maps (B, C', H, W) of maps (B, C, H, W)."""
        made = convolve(x, weight, bias, (1, 1), (0, 0), 1, rectifier)
        ctx.save_for_backward(x, weight, made if rectifier else None)
        ctx.rectifier = rectifier
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Slopes of the maps, the weight and the bias."""
        x, weight, made = ctx.saved_tensors
        slope_rows, rows = _rows(_slope_before(gradient, made, ctx.rectifier)), _rows(x)
        slope_x = None
        if ctx.needs_input_grad[0]:
            slope_x = (slope_rows @ weight.flatten(1)).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        return slope_x, (slope_rows.t() @ rows).view_as(weight), slope_rows.sum(0), None


def _slope_before(gradient: Tensor, made: Tensor | None, rectifier: nn.Module | None) -> Tensor:
    """Slope in front of a rectifier, by what it has made: at its ends nothing goes through."""
    if rectifier is None:
        return gradient
    passed: Tensor = torch.ops.aten.hardtanh_backward(gradient, made, 0.0, _TOPS[type(rectifier)])
    return passed


def _spread(maps: Tensor, stride: int, height: int, width: int) -> Tensor:
    """Maps (B, C, H, W) with zeros between and behind their values, (B, C, height, width)."""
    spread = maps.new_zeros(len(maps), height, width, maps.shape[1]).permute(0, 3, 1, 2)
    spread[:, :, ::stride, ::stride][:, :, : maps.shape[2], : maps.shape[3]] = maps
    return spread


def _rows(maps: Tensor) -> Tensor:
    """Positions of maps (B, C, H, W) as rows (B·H·W, C)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
