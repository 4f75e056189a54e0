"""A convolution and the activation behind it in one pass over memory.

What a layer makes of a batch does not fit into a core's cache, and so activations take a third of a fused
network's time on a CPU. oneDNN applies them while it writes. PyTorch keeps that for its compiler, under a
name that may change: where it is missing, one follows the other.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

_NAMES: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}


def has_name(activation: nn.Module | None) -> bool:
    """Whether oneDNN knows an activation."""
    return type(activation) in _NAMES


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
    activation: nn.Module | None,
) -> Tensor:
    """Convolve maps (B, C, H, W) on a CPU, and apply an activation, whose gradient is the caller's affair."""
    if activation is None:
        return conv2d(x, weight, bias, stride, padding, groups=groups)
    if not (has_name(activation) and _is_there()):
        made: Tensor = activation(conv2d(x, weight, bias, stride, padding, groups=groups))
        return made
    name, numbers = _NAMES[type(activation)]
    made = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, (1, 1), groups, name, numbers, ""
    )
    return made


@cache
def _is_there() -> bool:
    x, weight = torch.ones(1, 1, 2, 2), torch.full((1, 1, 1, 1), 7.0)
    sides = (1, 1), (0, 0)
    try:
        made = torch.ops.mkldnn._convolution_pointwise(
            x, weight, None, sides[1], sides[0], sides[0], 1, "hardtanh", [0.0, 6.0], ""
        )
    except (
        AttributeError,
        RuntimeError,
        TypeError,
    ):  # no such name, no oneDNN in this build, other arguments
        return False
    return bool((made == 6).all())


def as_computed(x: Tensor) -> Tensor:
    """Maps on a CPU in the precision that autocast asks for, channels last."""
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    return x.contiguous(memory_format=torch.channels_last)


class ActivatedConv2d(nn.Module):
    """A frozen convolution with zeros around and the activation behind it."""

    def __init__(self, conv: nn.Conv2d, activation: nn.Module) -> None:
        super().__init__()
        assert conv.dilation == (1, 1)
        assert conv.padding_mode == "zeros"
        assert not isinstance(conv.padding, str)
        self.conv, self.activation = conv, activation
        self.padding = conv.padding

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C', H', W') of maps (B, C, H, W)."""
        conv = self.conv
        if x.device.type != "cpu":
            made: Tensor = self.activation(conv(x))
            return made
        x = as_computed(x)
        bias = None if conv.bias is None else conv.bias.to(x.dtype)
        return convolve(
            x,
            conv.weight.to(x.dtype),
            bias,
            stride=conv.stride,
            padding=self.padding,
            groups=conv.groups,
            activation=self.activation,
        )
