"""A backbone split into frozen stages, computed once, and the stages that are trained.

The output of the frozen stages for an image, the feature map at the split and the channel statistics of
their own stages, can be cached on disk; the trainable stages turn it into the features of the whole backbone.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pixelplay.data.transforms import Size
from pixelplay.errors import ConfigError
from pixelplay.model.backbone import (
    Backbone,
    channel_stats,
    compute_features,
    compute_features_and_maps,
    compute_maps,
    stage_modules,
)
from pixelplay.model.fusion import agree, draw_noise, fuse_for_inference


class FrozenStages(nn.Module):
    """The first `n_stages` > 0 stages, before the split.

    Example images (B, 3, S, S) determine `map_shape`, (C, H, W) of the feature map at the split, and
    `n_stats`, the number D_frozen of channel statistics.
    """

    def __init__(self, backbone: Backbone, n_stages: int, images: Tensor) -> None:
        super().__init__()
        self.network = backbone.network
        self.n_stages = n_stages
        self._stats_stages = [stage for stage in backbone.stages if stage < n_stages]
        maps, stats = self(images)
        self.map_shape: tuple[int, int, int] = (maps.shape[1], maps.shape[2], maps.shape[3])
        self.n_stats = int(stats.shape[1])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Turn images (B, 3, H, W) into feature maps (B, C, H', W') and statistics."""
        maps = compute_maps(self.network, sorted({*self._stats_stages, self.n_stages - 1}), images)
        no_stats = images.new_empty(images.shape[0], 0, dtype=torch.float32)
        return maps[-1], torch.cat([no_stats, *channel_stats(maps if self._stats_stages else [])], dim=1)


class TrainableStages(nn.Module):
    """The stages after the split; with `n_frozen` 0 the whole backbone."""

    def __init__(self, backbone: Backbone, n_frozen: int) -> None:
        super().__init__()
        self.network = copy.deepcopy(backbone.network)
        self.n_frozen = n_frozen
        self._stats_stages = [stage for stage in backbone.stages if stage >= n_frozen]
        if n_frozen:
            _remove_modules_until(self.network, stage_modules(self.network)[n_frozen - 1].split("."))

    def forward(self, maps: Tensor, stats: Tensor) -> Tensor:
        """Turn feature maps (B, C, H, W) and statistics (B, D_frozen) into features (B, D)."""
        return torch.cat([stats, compute_features(self.network, self._stats_stages, maps)], dim=1)

    def write_into(self, backbone: Backbone) -> None:
        """Copy the trained weights into the whole backbone."""
        state = backbone.network.state_dict()
        backbone.network.load_state_dict({**state, **self.network.state_dict()}, strict=True)


class BranchedBackbone(Backbone):
    """A frozen backbone with branches: fine-tuned copies of its last stages.

    The features are those of the frozen network, then those of each branch. One head on all of them averages
    the logits of several classifiers, and the shared stages run once.
    """

    def __init__(self, backbone: Backbone, branches: Iterable[TrainableStages]) -> None:
        super().__init__(backbone.name, backbone.network, backbone.features)
        self._branches = nn.ModuleList(branches)

    @property
    def branches(self) -> list[TrainableStages]:
        """The branches, in the order of their features."""
        return [branch for branch in self._branches if isinstance(branch, TrainableStages)]

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) into features (B, D + D - D_frozen per branch)."""
        branches = self.branches
        split_stages = [branch.n_frozen - 1 for branch in branches if branch.n_frozen]
        features, maps = compute_features_and_maps(self.network, self.stages, images, split_stages)
        maps[-1] = images  # input of branches that share no stage
        no_stats = images.new_empty(images.shape[0], 0, dtype=torch.float32)
        return torch.cat(
            [features, *(branch(maps[branch.n_frozen - 1], no_stats) for branch in branches)], dim=1
        )


class BackboneSplitError(ConfigError):
    """The last stages of a network cannot be trained separately."""


def split_backbone(
    backbone: Backbone, n_trainable: int | None, input_size: Size
) -> tuple[FrozenStages | None, TrainableStages]:
    """Split a backbone before its last stages.

    Args:
        n_trainable: number of stages to train; None for all of them and the stem.
        input_size: of the images.

    Returns:
        The frozen stages, fused; None if everything is trained. The trainable stages, as they were.

    Raises:
        ConfigError: `n_trainable` is out of range.
        BackboneSplitError: the network cannot be split there.
    """
    if n_trainable is None:
        return None, TrainableStages(backbone, 0)
    n_stages = len(stage_modules(backbone.network))
    if n_stages < 2:
        raise _split_error(backbone, "it has one stage")
    if not 1 <= n_trainable < n_stages:
        raise ConfigError(
            f"unfreeze_stages={n_trainable} is outside the range 1 to {n_stages - 1} of {backbone.name}; "
            "--finetune full trains everything"
        )
    n_frozen = n_stages - n_trainable
    images = draw_noise(1, 3, *input_size)
    with torch.inference_mode():
        expected = backbone.eval()(images)
    trainable = TrainableStages(backbone, n_frozen).eval()
    fused = fuse_for_inference(backbone, input_size)
    try:
        with torch.inference_mode():
            frozen = FrozenStages(fused, n_frozen, images).eval()
            is_equal = agree(trainable(*frozen(images)), expected)
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, LookupError) as error:
        raise _split_error(backbone, str(error)) from None
    if not is_equal:
        raise _split_error(backbone, "the split network computes different features")
    return frozen, trainable


def _split_error(backbone: Backbone, reason: str) -> BackboneSplitError:
    reason = " ".join(reason.split())[:120]
    return BackboneSplitError(
        f"{backbone.name} cannot be split before its last stages ({reason}); use --finetune full or none"
    )


def _remove_modules_until(module: Any, path: list[str]) -> None:
    """Replace modules up to and including one by identities."""
    for name, child in list(module.named_children()):
        if name == path[0] and len(path) > 1:
            _remove_modules_until(child, path[1:])
        else:
            setattr(module, name, nn.Identity())
        if name == path[0]:
            return
