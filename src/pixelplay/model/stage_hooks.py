"""Stage outputs of a backbone, for class activation maps."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pixelplay.data.transforms import Size
from pixelplay.errors import ConfigError
from pixelplay.model.backbone import Backbone, compute_features_and_maps, stage_modules
from pixelplay.model.fusion import agree, draw_noise
from pixelplay.model.split_backbone import BranchedBackbone

MapShape = tuple[int, int, int]  # C, H, W
Layout = Callable[[Tensor, MapShape], Tensor]


class StageHooks:
    """Records the outputs of a backbone's last stages, and of those in each branch.

    The logit of a class depends on all of them, as each branch has its own features. Skipped are stages a
    branch does not run, and stages whose output cannot be converted to a feature map (Hiera's tokens are not
    in spatial order).

    Raises:
        ConfigError: no stage output can be converted to a feature map.
    """

    def __init__(self, backbone: Backbone, n_stages: int, input_size: Size) -> None:
        names = stage_modules(backbone.network)
        last_stages = range(max(0, len(names) - n_stages), len(names))
        self._layouts = _find_layouts(backbone.network, {i: names[i] for i in last_stages}, input_size)
        if not self._layouts:
            raise ConfigError(
                f"{backbone.name} cannot be explained: none of its last {len(last_stages)} stages outputs a "
                "feature map; train with another --backbone"
            )
        networks: list[tuple[Any, int]] = [(backbone.network, 0)]
        if isinstance(backbone, BranchedBackbone):
            networks += [(branch.network, branch.n_frozen) for branch in backbone.branches]
        self._stages: list[tuple[nn.Module, int]] = [
            (network.get_submodule(names[i]), i)
            for network, n_frozen in networks
            for i in self._layouts
            if i >= n_frozen
        ]

    def __call__(self) -> AbstractContextManager[dict[int, Tensor]]:
        """Yield a dict that a forward pass in the block fills with stage outputs, in order."""
        # the order is that of execution: the frozen network, then one branch after another
        return _record_outputs(dict(enumerate(module for module, _ in self._stages)))

    def as_maps(self, outputs: Iterable[Tensor]) -> list[Tensor]:
        """Convert stage outputs, or gradients of them, to feature maps (B, C, H, W)."""
        pairs = zip(outputs, self._stages, strict=True)
        return [layout(x, shape) for x, (_, i) in pairs for layout, shape in [self._layouts[i]]]


@contextmanager
def _record_outputs(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Any]]:
    outputs: dict[int, Any] = {}

    def record(key: int, module: nn.Module, inputs: object, output: object) -> Tensor | None:
        outputs[key] = output
        return output.clone() if isinstance(output, Tensor) else None  # the next layer may change it in place

    hooks = [module.register_forward_hook(partial(record, key)) for key, module in modules.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _tokens(output: Tensor, shape: MapShape) -> Tensor:
    n_channels, height, width = shape
    patches = output[:, output.shape[1] - height * width :]  # class and register tokens come first
    return patches.transpose(1, 2).reshape(-1, n_channels, height, width)


_LAYOUTS: tuple[Layout, ...] = (
    lambda output, shape: output,  # channels first
    lambda output, shape: output.permute(0, 3, 1, 2),  # channels last
    _tokens,
)


def _find_layouts(
    network: Any, names: dict[int, str], input_size: Size
) -> dict[int, tuple[Layout, MapShape]]:
    """Find the layout that turns each stage's output into timm's feature map."""
    images = draw_noise(1, 3, *input_size)
    modules = dict(network.named_modules())  # some of timm's stage names are not among them
    existing = {i: modules[name] for i, name in names.items() if name in modules}
    with torch.no_grad(), _record_outputs(existing) as outputs:
        images = images.to(next(network.parameters()).device)
        maps = compute_features_and_maps(network, (), images, list(names))[1]
    found: dict[int, tuple[Layout, MapShape]] = {}
    for i, expected in sorted(maps.items()):
        shape: MapShape = (expected.shape[1], expected.shape[2], expected.shape[3])
        matching = [layout for layout in _LAYOUTS if _matches(layout, outputs.get(i), expected, shape)]
        found |= {i: (matching[0], shape)} if matching else {}
    return found


def _matches(layout: Layout, output: object, expected: Tensor, shape: MapShape) -> bool:
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        return False
    try:
        maps = layout(output, shape)
    except RuntimeError:  # another number of dimensions or elements
        return False
    return maps.shape == expected.shape and agree(maps, expected)
