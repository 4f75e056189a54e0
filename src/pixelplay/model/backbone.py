"""timm name, local file or bundled package → network with its preprocessing.

A backbone maps images to features: mean and standard deviation of each channel after each of
the last stages, beside the network's own pooled features. Earlier stages keep texture and local
contrast that the last layer has given up; for data unlike ImageNet that is worth several points,
at little cost in time (benchmarks/LOG.md).

Source: Evci et al., "Head2Toe: Utilizing Intermediate Representations for Better Transfer
Learning", ICML 2022, arXiv:2201.03529.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pixelplay.data.transforms import FILTERS, Preprocessing
from pixelplay.errors import BundleError, ConfigError
from pixelplay.model.weights import EMBEDDED, find_weights, read_state_dict
from pixelplay.text import name_some, suggest

# of bundles and cache keys: raise it when the same pixels yield other features, by more than rounding
FEATURES_VERSION = 1
FeatureKind = Literal["stages", "pooled"]
AUXILIARY = "AuxLogits"  # the second classifier of Inception, in the middle, that only learning needs
N_STAGES = 5  # of longer lists (EfficientNet's seven, a transformer's blocks) the last five


class Backbone(nn.Module):
    """A timm network without its classifier.

    Attributes:
        name: timm's name of the architecture, with its weights tag.
        features: "stages", the moments of the last stages beside the pooled features; or "pooled".
    """

    def __init__(self, name: str, network: nn.Module, features: FeatureKind = "stages") -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        """Turn normalised images (B, 3, H, W) into features (B, D) float32."""
        return features_behind(self.network, self.stages, images)

    @property
    def stages(self) -> tuple[int, ...]:
        """Positions, among all stages of the network, of those whose moments are features."""
        unfreeze_stages = len(stage_modules(self.network))
        return (
            tuple(range(max(0, unfreeze_stages - N_STAGES), unfreeze_stages))
            if self.features == "stages"
            else ()
        )

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm knows of the weights: input size, mean, classifier's name and more."""
        config: dict[str, Any] = self.network.pretrained_cfg  # type: ignore[assignment]
        return config

    @cached_property
    def n_features(self) -> int:
        """D, the length of the feature vector."""
        was_training = self.training
        with torch.inference_mode():
            n_features = self.eval()(torch.zeros(1, *self.pretrained_cfg["input_size"])).shape[1]
        self.train(was_training)
        return int(n_features)


def stage_modules(network: Any) -> tuple[str, ...]:
    """Name the module at the end of each stage, from the stem to the head."""
    from timm.models import EfficientNet

    # timm lists only those EfficientNet stages that halve the resolution; the others count too
    if isinstance(network, EfficientNet):
        return tuple(f"blocks.{i}" for i in range(len(network.blocks)))
    return tuple(str(info["module"]) for info in network.feature_info)


def features_behind(network: Any, stages: Sequence[int], inputs: Tensor) -> Tensor:
    """Moments of some stages, then pooled features: (B, D) float32."""
    return features_and_maps(network, stages, inputs, ())[0]


def features_and_maps(
    network: Any, stages: Sequence[int], inputs: Tensor, kept: Iterable[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The same, and the maps (B, C_s, H_s, W_s) at the end of some stages."""
    wanted = sorted({*stages, *kept}) or [-1]
    last, found = network.forward_intermediates(inputs, **_select_stages(network, wanted))
    maps = dict(zip(wanted, found, strict=True))
    pooled = network.forward_head(last, pre_logits=True)  # (B, C)
    stats = [moment for stage in stages for moment in _channel_stats(maps[stage])]
    return torch.cat([*stats, pooled.float()], dim=1), maps  # (B, D)


def maps_of(network: Any, stages: Sequence[int], images: Tensor) -> list[Tensor]:
    """Feature maps (B, C_s, H_s, W_s) at the end of some stages; what lies behind them is not run."""
    chosen = _select_stages(network, stages)
    maps: list[Tensor] = network.forward_intermediates(
        images, intermediates_only=True, stop_early=True, **chosen
    )
    return maps


def channel_stats(maps: Sequence[Tensor]) -> Tensor:
    """Means and deviations of maps (B, C_s, H_s, W_s), side by side: (B, D) float32."""
    return torch.cat([moment for stage in maps for moment in _channel_stats(stage)], dim=1)


def _select_stages(network: Any, stages: Sequence[int]) -> dict[str, Any]:
    from timm.models import EfficientNet

    unfreeze_stages = len(stage_modules(network))
    positions = [stage % unfreeze_stages for stage in stages]
    if isinstance(network, EfficientNet):
        return {"indices": [i + 1 for i in positions], "extra_blocks": True}  # 0 is the stem
    return {"indices": positions}


def _channel_stats(stage: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over positions, (B, C) float32 each, of maps (B, C, H, W)."""
    values = stage.float()
    mean = values.mean(dim=(2, 3), keepdim=True)
    variance = (values - mean).square().mean(dim=(2, 3))  # torch.var_mean takes ten times as long on a CPU
    return mean.flatten(1), (variance + 1e-12).sqrt()  # the root's slope at 0 is infinite


@dataclass(frozen=True, kw_only=True)
class PretrainedBackbone:
    """A backbone with trained weights and the way its images are prepared.

    Attributes:
        weights_id: hexadecimal digest of the weights file; the feature cache's key.
        origin: where the weights came from, in words.
    """

    backbone: Backbone
    preprocessing: Preprocessing
    weights_id: str
    origin: str


def pick_backbone_name(asked: str, device: str) -> str:
    """Resolve `auto`: the embedded network on a CPU, ConvNeXt-Tiny on a GPU."""
    if asked != "auto":
        return asked
    return "lite0" if device == "cpu" else "convnext_tiny.in12k_ft_in1k"


def check_backbone_name(name: str) -> None:
    """Raise for a name that is neither embedded nor in timm's local list.

    Raises:
        ConfigError: unknown; the nearest known names are given.
    """
    if name in EMBEDDED:
        return
    import timm

    # timm takes names with a colon or slash for addresses
    is_local = ":" not in name and "/" not in name and timm.is_model(name.split(".")[0])
    if not is_local or ("." in name and not timm.is_model_pretrained(name)):
        hint = suggest(name, [*EMBEDDED, *timm.list_models(), *timm.list_pretrained()])
        raise ConfigError(
            f"backbone {name!r} is unknown{hint}; lite0 and lite2 work offline, timm has the rest"
        )


def load_backbone(
    name: str,
    weights: str | None,
    *,
    offline: bool,
    features: FeatureKind = "stages",
    input_size: int | None = None,
) -> PretrainedBackbone:
    """Build a network by name and fill it with trained weights, strictly.

    Args:
        name: "lite0", "lite2" or a timm model, with its tag if it has one.
        weights: local file that replaces the published weights.
        features: what the backbone gives of each image.
        input_size: side of its images, px (default: as the weights were trained).

    Raises:
        ConfigError: unknown name, no weights to be had, or an image size that it refuses.
        BundleError: weights that do not fit; the keys are named.
    """
    check_backbone_name(name)
    timm_name = EMBEDDED[name].timm_name if name in EMBEDDED else name
    network = create_network(timm_name)
    found = find_weights(name, network.pretrained_cfg, weights, offline=offline)
    load_weights_into(network, read_state_dict(found.path, is_embedded=found.is_embedded), found.path)
    backbone, preprocessing = Backbone(timm_name, network, features), _preprocessing_of(network)
    if input_size is not None:
        check_input_size(backbone, input_size)
        preprocessing = replace(preprocessing, input_size=input_size)
    return PretrainedBackbone(
        backbone=backbone,
        preprocessing=preprocessing,
        weights_id=found.sha256,
        origin=found.origin,
    )


def check_input_size(backbone: Backbone, size_px: int) -> None:
    """Raise for a size that a network cannot take.

    Raises:
        ConfigError: with the reason, and the size that its weights were trained with.
    """
    native_px = int(backbone.pretrained_cfg["input_size"][-1])
    if size_px != native_px and (reason := input_size_error(backbone, size_px)):
        raise ConfigError(
            f"{backbone.name} takes no images of {size_px} px ({reason}); its weights were trained "
            f"with {native_px} px"
        )


def input_size_error(backbone: Backbone, size_px: int) -> str | None:
    """Say why a network takes no images of a size; None where it does."""
    try:
        with torch.inference_mode():
            backbone.eval()(torch.zeros(1, 3, size_px, size_px))
    except (RuntimeError, AssertionError, ValueError) as error:
        return " ".join(str(error).split())[:120]
    return None


def create_network(timm_name: str) -> Any:
    """Build an untrained timm network without classifier; nothing is downloaded."""
    import timm

    with _quiet_timm():
        try:
            # the random start is overwritten by weights; the user's own random numbers stay untouched
            with torch.random.fork_rng(devices=[]):
                return timm.create_model(timm_name, pretrained=False, num_classes=0)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"backbone {timm_name!r} cannot be built: {error}") from None


def create_with_weights(timm_name: str, state: dict[str, Tensor], origin: str) -> Any:
    """Build a network that a stranger names, once it is known that the stranger's weights fit.

    Those are already in memory; a name may stand for a network that is larger than all of it.

    Raises:
        BundleError: keys or shapes that do not fit; the first ten are named.
    """
    with torch.device("meta"):  # shapes without values
        fitting_state(create_network(timm_name), state, origin)
    network = create_network(timm_name)
    load_weights_into(network, state, origin)
    return network


def load_weights_into(network: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load weights into a network without classifier.

    Raises:
        BundleError: keys or shapes that do not fit; the first ten are named.
    """
    network.load_state_dict({**network.state_dict(), **fitting_state(network, state, origin)}, strict=True)


def fitting_state(network: nn.Module, state: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Weights without those of a classifier, which must be all that the network has, and no others.

    Raises:
        BundleError: keys or shapes that do not fit; the first ten are named.
    """
    config: Any = network.pretrained_cfg
    classifiers = config.get("classifier") or ()
    prefixes = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    own = network.state_dict()
    excluded = tuple(f"{name}." for name in _left_out(network, prefixes))
    state = {key: value for key, value in state.items() if key in own or not key.startswith(excluded)}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    foreign = [key for key in state if key not in own]
    misshapen = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    for what, keys in (("lacks", missing), ("has unknown", foreign), ("has other shapes in", misshapen)):
        if keys:
            architecture = config["architecture"]
            raise BundleError(f"{origin} does not fit {architecture}: it {what} {name_some(keys)}")
    return state


def _left_out(network: nn.Module, classifiers: Sequence[str]) -> Iterator[str]:
    """What a network without classifier has not: that, what it alone was wrapped in, and a second one.

    Some classifiers have a norm of their own in front, and go with it.
    """
    yield AUXILIARY
    for name in classifiers:
        yield name
        parent = name.rpartition(".")[0]
        if parent and isinstance(dict(network.named_modules()).get(parent), nn.Identity | None):
            yield parent


def _preprocessing_of(network: nn.Module) -> Preprocessing:
    config: Any = network.pretrained_cfg
    return Preprocessing(
        input_size=int(config["input_size"][-1]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        # timm's "random" means: any filter, chosen while training
        interpolation=config["interpolation"] if config["interpolation"] in FILTERS else "bicubic",
    )


@contextmanager
def _quiet_timm() -> Iterator[None]:
    """timm's notices about its own aliases and tags are not for our user."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
