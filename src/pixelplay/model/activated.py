"""A convolution and the activation behind it in one pass over memory.

What a layer makes of a batch does not fit into a core's cache, and so activations take up to a third of a
fused network's time on a CPU (benchmarks/LOG.md). oneDNN applies them while it writes. PyTorch keeps that
for its compiler, under a name that may change: where it is missing, one follows the other.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

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
