"""What the stages of a backbone put out, as tensors that a gradient can be taken with respect to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pixelplay.errors import ConfigError
from pixelplay.model.backbone import Backbone, features_and_maps, stage_modules
from pixelplay.model.tail import BranchedBackbone

Shape = tuple[int, int, int]  # C, H, W


class StageWatch:
    """Watches the last stages of a backbone, those of the frozen network and of each tail beside it.

    A class's logit depends on all of them: each branch ends in features of its own.

    Args:
        n_stages: how many of the last ones; those that a tail does not run are left out.
        input_size: side of its images, px.

    Raises:
        ConfigError: the network's stages give no maps.
    """

    def __init__(self, backbone: Backbone, n_stages: int, input_size: int) -> None:
        names = stage_modules(backbone.network)
        watched = range(max(0, len(names) - n_stages), len(names))
        networks: list[tuple[Any, int]] = [(backbone.network, 0)]
        if isinstance(backbone, BranchedBackbone):
            networks += [(tail.network, tail.n_front) for tail in backbone.tails]
        self._stages: list[tuple[nn.Module, int]] = [
            (network.get_submodule(names[i]), i)
            for network, n_front in networks
            for i in watched
            if i >= n_front
        ]
        self._name = backbone.name
        self._shapes = _measure_stages(backbone.network, watched, input_size)

    @contextmanager
    def __call__(self) -> Iterator[list[Tensor]]:
        """Give a list that holds, after one forward pass inside the block, what each stage put out."""
        outputs: list[Tensor] = []
        hooks = [module.register_forward_hook(partial(_keep, outputs)) for module, _ in self._stages]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()

    def as_maps(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Bring outputs, or gradients with respect to them, into the form of maps (B, C, H, W)."""
        # the frozen network and each tail run after one another, and so do their stages
        stages = (i for _, i in self._stages)
        return [self._as_map(x, self._shapes[i]) for x, i in zip(outputs, stages, strict=True)]

    def _as_map(self, output: Tensor, shape: Shape) -> Tensor:
        n_channels, height, width = shape
        if tuple(output.shape[1:]) == shape:
            return output
        if tuple(output.shape[1:]) == (height, width, n_channels):
            return output.permute(0, 3, 1, 2)
        n_prefix = output.shape[1] - height * width  # class and register tokens come first
        if output.ndim == 3 and output.shape[2] == n_channels and n_prefix >= 0:
            patches = output[:, n_prefix:]  # (B, H·W, C)
            return patches.transpose(1, 2).reshape(-1, n_channels, height, width)
        raise ConfigError(
            f"{self._name} cannot be explained: a stage puts out {tuple(output.shape)}, "
            f"which is no map of {shape}; train with another --backbone"
        )


def _keep(outputs: list[Tensor], module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    outputs.append(output)
    return output.clone()  # what follows may change its input in place


def _measure_stages(network: Any, stages: Sequence[int], input_size: int) -> dict[int, Shape]:
    """Shapes (C, H, W) of the maps that timm makes of some stages, by position."""
    device = next(network.parameters()).device
    with torch.inference_mode():
        images = torch.zeros(1, 3, input_size, input_size, device=device)
        maps = features_and_maps(network, (), images, stages)[1]
    return {i: (maps[i].shape[1], maps[i].shape[2], maps[i].shape[3]) for i in stages}
