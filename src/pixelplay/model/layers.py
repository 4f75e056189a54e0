"""Layers of a tail in training: frozen depthwise filters, and on a CPU fewer passes over memory.

What a layer makes of a batch does not fit into a core's cache, and so half of a step of a network with
batch norms is no arithmetic. These keep their statistics: each is a scale and a shift, and goes anew in
every step into the weights of the convolution before it.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from pixelplay.model.activated import as_computed, convolve
from pixelplay.model.fuse import TOLERANCE, Call, foldable, is_padded_below, trace_layers
from pixelplay.model.tail import Halves

_TOPS: dict[type[nn.Module], float] = {nn.ReLU: math.inf, nn.ReLU6: 6.0}  # of rectifiers: both begin at 0


def freeze_spatial_filters(halves: Halves, *, is_cpu: bool) -> None:
    """Train what mixes channels, and leave depthwise filters and their scales as they are.

    They hold 3 % of the weights, and their gradient takes two thirds of a step on a CPU. There the layers
    of the tail also get a shorter way to the same outputs and slopes. It is checked on noise: where it
    leads elsewhere, they keep their own.
    """
    tail = halves.tail.eval()
    noise = torch.randn(1, *halves.shape, generator=torch.Generator().manual_seed(0))
    inputs = noise, noise.new_zeros(1, halves.n_moments)
    with torch.no_grad():
        expected, calls = tail(*inputs), trace_layers(tail, *inputs)
    norms = foldable(calls)
    convs = [(call.layer, call) for call in calls if isinstance(call.layer, nn.Conv2d)]
    for conv, _ in convs:
        if _is_depthwise(conv):
            conv.weight.requires_grad_(False)
            if conv in norms and norms[conv].affine:
                norms[conv].weight.requires_grad_(False)
    if not is_cpu:
        return
    shortened = [layer for conv, call in convs for layer in _shorten(conv, call, norms.get(conv))]
    with torch.no_grad():
        difference = (tail(*inputs) - expected).abs().max()
    if not difference <= TOLERANCE * expected.abs().max():
        for layer in set(shortened):
            del layer.forward


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels > 1


def _shorten(conv: nn.Conv2d, call: Call, norm: nn.BatchNorm2d | None) -> list[Any]:
    """Give a convolution and the batch norm behind it another forward pass, where there is one."""
    run: partial[Tensor]
    rectifier = _rectifier_of(norm)
    if _is_depthwise(conv) and _can_turn_around(conv, call):
        run = partial(_slide, conv, norm, rectifier, is_padded_below(call))
    elif type(conv) is not nn.Conv2d or norm is None or _is_depthwise(conv):
        return []
    elif conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1 and conv.padding == (0, 0):
        run = partial(_mix, conv, norm, rectifier)
    else:
        run, rectifier = partial(_convolve, conv, norm), None
    conv.forward = run  # type: ignore[method-assign]
    if norm is None:
        return [conv]
    norm.forward = partial(_finish, norm, rectifier is not None)  # type: ignore[method-assign]
    return [conv, norm]


def _rectifier_of(norm: Any) -> nn.Module | None:
    """What a batch norm does besides normalising, where that is a rectifier and nothing else."""
    activation = getattr(norm, "act", None)
    is_all = isinstance(getattr(norm, "drop", None), nn.Identity)
    return activation if is_all and type(activation) in _TOPS else None


def _can_turn_around(conv: nn.Conv2d, call: Call) -> bool:
    """Whether the slope of a depthwise convolution is one of stride 1 with its filter turned around."""
    if isinstance(conv.padding, str):
        return False
    is_plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros"
    return (
        (is_padded_below(call) or (is_plain and conv.padding[0] < conv.kernel_size[0]))
        and conv.out_channels == conv.in_channels
        and conv.dilation == (1, 1)
        and all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding))
    )


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution and the batch norm behind it as one."""
    weight, bias = conv.weight, conv.bias
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()  # (C,)
        bias = -norm.running_mean if bias is None else bias - norm.running_mean
        if norm.affine:
            scale = scale * norm.weight
        weight, bias = weight * scale[:, None, None, None], bias * scale
        if norm.affine:
            bias = bias + norm.bias
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _finish(norm: Any, is_rectified: bool, x: Tensor) -> Tensor:
    """What a batch norm does besides normalising; timm's BatchNormAct2d drops and activates too."""
    for name in () if is_rectified else ("drop", "act"):
        x = getattr(norm, name, nn.Identity())(x)
    return x


def _convolve(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    x = as_computed(x)
    made: Tensor = conv._conv_forward(x, *_fold(conv, norm, x.dtype))
    return made


def _slide(
    conv: nn.Conv2d, norm: nn.BatchNorm2d | None, rectifier: nn.Module | None, is_below: bool, x: Tensor
) -> Tensor:
    x = as_computed(x)
    weight, bias = _fold(conv, norm, x.dtype)
    padding = conv.padding
    if is_below:
        weight, padding = pad(weight, (1, 0, 1, 0)), tuple(side // 2 for side in conv.kernel_size)
    made: Tensor = _Slide.apply(x, weight, bias, conv.stride, padding, rectifier)
    return made


def _mix(conv: nn.Conv2d, norm: nn.BatchNorm2d, rectifier: nn.Module | None, x: Tensor) -> Tensor:
    x = as_computed(x)
    made: Tensor = _Mix.apply(x, *_fold(conv, norm, x.dtype), rectifier)
    return made


class _Slide(torch.autograd.Function):
    """A frozen depthwise filter, its bias, and perhaps a rectifier.

    oneDNN's slope takes twice the time of its forward pass, in bf16 with a stride a hundred times, and is
    itself a convolution: of the output's slopes, spread out by the stride, with the filter turned around.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        rectifier: nn.Module | None,
    ) -> Tensor:
        """Maps (B, C, H', W') of maps (B, C, H, W)."""
        made = convolve(
            x, weight, bias, stride=stride, padding=padding, groups=len(weight), activation=rectifier
        )
        ctx.save_for_backward(weight, *_kept(made, rectifier))
        ctx.size, ctx.stride, ctx.rectifier = x.shape[2:], stride[0], rectifier
        ctx.margin = weight.shape[2] - 1 - padding[0]
        return made

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """Slopes of the maps (B, C, H, W) and of the bias (C,)."""
        weight, *made = ctx.saved_tensors
        slope = _slope_before(slope, made, ctx.rectifier)
        slope_bias = _rows(slope).sum(0) if ctx.needs_input_grad[2] else None
        if ctx.stride > 1:
            height, width = (n + weight.shape[2] - 1 - 2 * ctx.margin for n in ctx.size)
            spread = slope.new_zeros(len(slope), height, width, slope.shape[1]).permute(0, 3, 1, 2)
            places = spread[:, :, :: ctx.stride, :: ctx.stride]
            places[:, :, : slope.shape[2], : slope.shape[3]] = slope
            slope = spread
        turned = weight.flip(2, 3)
        slope_x = conv2d(slope, turned, None, 1, ctx.margin, groups=len(weight))
        return slope_x, None, slope_bias, None, None, None


class _Mix(torch.autograd.Function):
    """A 1 × 1 convolution, and perhaps a rectifier.

    Its slopes are two matrix products; oneDNN's convolutions backwards take a third longer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rectifier: nn.Module | None) -> Tensor:
        """Maps (B, C', H, W) of maps (B, C, H, W)."""
        made = convolve(x, weight, bias, stride=(1, 1), padding=(0, 0), groups=1, activation=rectifier)
        ctx.save_for_backward(x, weight, *_kept(made, rectifier))
        ctx.rectifier = rectifier
        return made

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """Slopes of the maps, the weight and the bias."""
        x, weight, *made = ctx.saved_tensors
        slope_rows, rows = _rows(_slope_before(slope, made, ctx.rectifier)), _rows(x)
        slope_x = None
        if ctx.needs_input_grad[0]:
            slope_x = (slope_rows @ weight.flatten(1)).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        return slope_x, (slope_rows.t() @ rows).view_as(weight), slope_rows.sum(0), None


def _kept(made: Tensor, rectifier: nn.Module | None) -> list[Tensor]:
    return [] if rectifier is None else [made]


def _slope_before(slope: Tensor, made: list[Tensor], rectifier: nn.Module | None) -> Tensor:
    """Slope in front of a rectifier, by what it has made: beyond its ends nothing goes through."""
    if rectifier is None:
        return slope
    passed: Tensor = torch.ops.aten.hardtanh_backward(slope, made[0], 0.0, _TOPS[type(rectifier)])
    return passed


def _rows(maps: Tensor) -> Tensor:
    """Positions of maps (B, C, H, W) as rows (B·H·W, C)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
