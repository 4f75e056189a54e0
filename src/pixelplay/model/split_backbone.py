"""A backbone cut in two: a frozen front, computed once, and a tail that is trained.

What the front makes of an image, the map at the cut and the moments of its own stages, can be
kept on disk; the tail turns it into the same features as the whole backbone.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixelplay.errors import ConfigError
from pixelplay.model.backbone import (
    Backbone,
    channel_stats,
    features_and_maps,
    features_behind,
    maps_of,
    stage_modules,
)
from pixelplay.model.fusion import fuse_for_inference

TOLERANCE = 1e-3  # of the largest feature: front and tail against the whole


class FrozenStages(nn.Module):
    """The stages in front of the cut, fused for inference."""

    def __init__(self, backbone: Backbone, n_front: int) -> None:
        super().__init__()
        self.network = backbone.network
        self._own = [stage for stage in backbone.stages if stage < n_front]
        self._last = n_front - 1

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Turn normalised images (B, 3, H, W) into the map at the cut and moments (B, D_front) float32."""
        maps = maps_of(self.network, sorted({*self._own, self._last}), images)
        stats = channel_stats(maps) if self._own else images.new_empty(len(images), 0, dtype=torch.float32)
        return maps[-1], stats


class TrainableStages(nn.Module):
    """The stages behind the cut; with `n_front` 0 the whole backbone."""

    def __init__(self, backbone: Backbone, n_front: int) -> None:
        super().__init__()
        self.network = copy.deepcopy(backbone.network)
        self.n_front = n_front
        self._own = [stage for stage in backbone.stages if stage >= n_front]
        if n_front:
            _blank_out(self.network, stage_modules(self.network)[n_front - 1].split("."))

    def forward(self, maps: Tensor, stats: Tensor) -> Tensor:
        """Turn maps at the cut (B, C, H, W) and moments (B, D_front) into features (B, D) float32."""
        return torch.cat([stats, features_behind(self.network, self._own, maps)], dim=1)

    def write_into(self, backbone: Backbone) -> None:
        """Put the tail's weights in their places in the whole backbone."""
        state = backbone.network.state_dict()
        backbone.network.load_state_dict({**state, **self.network.state_dict()}, strict=True)


class BranchedBackbone(Backbone):
    """A frozen backbone and, beside it, other tails that branch off from its stages.

    Its features are those of the frozen network, then those of each tail: one head on all of them
    averages what several classifiers say, and what they share runs once.

    Args:
        backbone: frozen.
        tails: of backbones like it.
    """

    def __init__(self, backbone: Backbone, tails: Iterable[TrainableStages]) -> None:
        super().__init__(backbone.name, backbone.network, backbone.features)
        self._tails = nn.ModuleList(tails)

    @property
    def tails(self) -> list[TrainableStages]:
        """In the order of their features."""
        return [tail for tail in self._tails if isinstance(tail, TrainableStages)]

    def forward(self, images: Tensor) -> Tensor:
        """Turn normalised images (B, 3, H, W) into features (B, D plus D - D_front of each tail) float32."""
        tails = self.tails
        cuts = [tail.n_front - 1 for tail in tails if tail.n_front]
        features, maps = features_and_maps(self.network, self.stages, images, cuts)
        maps[-1] = images  # what a tail starts from that shares nothing
        none = images.new_empty(len(images), 0, dtype=torch.float32)
        return torch.cat([features, *(tail(maps[tail.n_front - 1], none) for tail in tails)], dim=1)


@dataclass(frozen=True, kw_only=True)
class SplitBackbone:
    """A backbone in two parts.

    Attributes:
        front: frozen, fused; None where everything is trained.
        tail: what is trained, on the original weights.
        shape: (C, H, W) of the map at the cut; of the image where there is no front.
        n_moments: D_front.
    """

    front: FrozenStages | None
    tail: TrainableStages
    shape: tuple[int, int, int]
    n_stats: int


class BackboneSplitError(ConfigError):
    """A network has no last stages that could be trained on their own."""


def split_backbone(backbone: Backbone, n_tail: int | None, input_size: int) -> SplitBackbone:
    """Cut a backbone in front of its last stages.

    Args:
        n_tail: stages to train; None for all of them and the stem.
        input_size: side of its images, px.

    Raises:
        ConfigError: it has no such stages.
        UncuttableError: the network cannot be cut there.
    """
    unfreeze_stages = len(stage_modules(backbone.network))
    if n_tail is None:
        return SplitBackbone(
            front=None, tail=TrainableStages(backbone, 0), shape=(3, input_size, input_size), n_stats=0
        )
    if unfreeze_stages < 2:
        raise _uncuttable(backbone, "it has one stage")
    if not 1 <= n_tail < unfreeze_stages:
        raise ConfigError(
            f"unfreeze_stages={n_tail} is outside 1 to {unfreeze_stages - 1}, what partial can train of {backbone.name}; "
            "--finetune full trains everything"
        )
    n_front = unfreeze_stages - n_tail
    images = torch.randn(1, 3, input_size, input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = backbone.eval()(images)
    tail = TrainableStages(backbone, n_front).eval()
    front = FrozenStages(fuse_for_inference(backbone, input_size), n_front).eval()
    try:
        with torch.inference_mode():
            maps, stats = front(images)
            difference = (tail(maps, stats) - expected).abs().max()
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, LookupError) as error:
        raise _uncuttable(backbone, str(error)) from None
    if not difference <= TOLERANCE * expected.abs().max():
        raise _uncuttable(backbone, "its halves give other features than the whole")
    shape = tuple(int(n) for n in maps.shape[1:])
    assert len(shape) == 3
    return SplitBackbone(front=front, tail=tail, shape=shape, n_stats=stats.shape[1])


def _uncuttable(backbone: Backbone, why: str) -> BackboneSplitError:
    reason = " ".join(why.split())[:120]
    return BackboneSplitError(
        f"{backbone.name} cannot be cut in front of its last stages ({reason}); use --finetune full or probe"
    )


def _blank_out(module: Any, path: list[str]) -> None:
    """Replace everything up to and including a module by nothing, in the order of definition."""
    for name, child in list(module.named_children()):
        if name == path[0] and len(path) > 1:
            _blank_out(child, path[1:])
        else:
            setattr(module, name, nn.Identity())
        if name == path[0]:
            return
