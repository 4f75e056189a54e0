"""What the stages of a backbone put out, as tensors that a gradient can be taken with respect to."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pixelplay.errors import ConfigError
from pixelplay.model.backbone import Backbone, features_and_maps, stage_modules
from pixelplay.model.split_backbone import BranchedBackbone

Shape = tuple[int, int, int]  # C, H, W
Layout = Callable[[Tensor, Shape], Tensor]
TOLERANCE = 1e-3  # of the largest value: a stage's output against the map that timm makes of it


class StageHooks:
    """Watches the last stages of a backbone, those of the frozen network and of each tail beside it.

    A class's logit depends on all of them: each branch ends in features of its own.

    Args:
        n_stages: how many of the last ones. Those that a tail does not run are left out, and those whose
            output is no map: Hiera's tokens, say, stand in another order than their places.
        input_size: side of its images, px.

    Raises:
        ConfigError: no stage gives a map.
    """

    def __init__(self, backbone: Backbone, n_stages: int, input_size: int) -> None:
        names = stage_modules(backbone.network)
        asked = range(max(0, len(names) - n_stages), len(names))
        self._layouts = _find_layouts(backbone.network, {i: names[i] for i in asked}, input_size)
        if not self._layouts:
            raise ConfigError(
                f"{backbone.name} cannot be explained: none of its last {len(asked)} stages puts out a map; "
                "train with another --backbone"
            )
        networks: list[tuple[Any, int]] = [(backbone.network, 0)]
        if isinstance(backbone, BranchedBackbone):
            networks += [(tail.network, tail.n_front) for tail in backbone.tails]
        self._stages: list[tuple[nn.Module, int]] = [
            (network.get_submodule(names[i]), i)
            for network, n_front in networks
            for i in self._layouts
            if i >= n_front
        ]

    @contextmanager
    def __call__(self) -> Iterator[list[Tensor]]:
        """Give a list that holds, after one forward pass inside the block, what each stage put out."""
        # the frozen network and each tail run after one another, and so do their stages
        outputs: list[Tensor] = []
        hooks = [module.register_forward_hook(partial(_keep, outputs)) for module, _ in self._stages]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()

    def as_maps(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Bring outputs, or gradients with respect to them, into the form of maps (B, C, H, W)."""
        pairs = zip(outputs, self._stages, strict=True)
        return [layout(x, shape) for x, (_, i) in pairs for layout, shape in [self._layouts[i]]]


def _keep(outputs: list[Tensor], module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    outputs.append(output)
    return output.clone()  # what follows may change its input in place


def _as_it_is(output: Tensor, shape: Shape) -> Tensor:
    return output


def _from_channels_last(output: Tensor, shape: Shape) -> Tensor:
    return output.permute(0, 3, 1, 2)


def _from_tokens(output: Tensor, shape: Shape) -> Tensor:
    n_channels, height, width = shape
    patches = output[:, output.shape[1] - height * width :]  # class and register tokens come first
    return patches.transpose(1, 2).reshape(-1, n_channels, height, width)


_LAYOUTS: tuple[Layout, ...] = (_as_it_is, _from_channels_last, _from_tokens)


def _find_layouts(network: Any, names: dict[int, str], input_size: int) -> dict[int, tuple[Layout, Shape]]:
    """How to bring the outputs of stages into the form of timm's maps, by position; only where it works."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, input_size, input_size, generator=generator)
    outputs: dict[int, Any] = {}
    modules = dict(network.named_modules())
    hooks = [
        modules[name].register_forward_hook(partial(_note, outputs, i))
        for i, name in names.items()
        if name in modules  # timm's names are not all those of modules
    ]
    try:
        with torch.no_grad():
            device = next(network.parameters()).device
            maps = features_and_maps(network, (), images.to(device), list(names))[1]
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[int, tuple[Layout, Shape]] = {}
    for i, expected in sorted(maps.items()):
        shape: Shape = (expected.shape[1], expected.shape[2], expected.shape[3])
        fitting = [layout for layout in _LAYOUTS if _fits(layout, outputs.get(i), expected, shape)]
        found |= {i: (fitting[0], shape)} if fitting else {}
    return found


def _note(outputs: dict[int, Any], i: int, module: nn.Module, inputs: object, output: object) -> None:
    outputs[i] = output.clone() if isinstance(output, Tensor) else None


def _fits(layout: Layout, output: Tensor | None, expected: Tensor, shape: Shape) -> bool:
    if output is None or output.ndim not in (3, 4):
        return False
    try:
        made = layout(output, shape)
    except RuntimeError:  # another number of dimensions or elements
        return False
    difference = (made - expected).abs().max() if made.shape == expected.shape else float("inf")
    return bool(difference <= TOLERANCE * expected.abs().max())
