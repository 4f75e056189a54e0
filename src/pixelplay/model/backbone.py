"""timm network → multi-stage features.

A backbone maps images to features: the mean and standard deviation of each channel after each of the
last five stages, followed by the network's own pooled features. Earlier stages keep texture and local
contrast that the last layer discards; on data unlike ImageNet they add several points of accuracy at little
cost (benchmarks/DECISIONS.md).

Source: Evci et al., "Head2Toe: Utilizing Intermediate Representations for Better Transfer
Learning", ICML 2022, arXiv:2201.03529.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pixelplay.data.transforms import FILTERS, Fit, Preprocessing, Size, describe_size
from pixelplay.errors import BundleError, ConfigError
from pixelplay.model.device import use_one_thread_after_fork
from pixelplay.model.weights import (
    EMBEDDED,
    embedded_timm_name,
    find_weights,
    has_weights,
    quiet_logger,
    read_state_dict,
)
from pixelplay.text import name_some, suggest

# part of bundles and cache keys; increase when equal pixels give features that differ by more than rounding
FEATURES_VERSION = 1
FeatureKind = Literal["stages", "pooled"]
AUXILIARY = "AuxLogits"  # Inception's second classifier, used in training only
# candidates of `best` on a GPU; the first is also that of `auto`
BEST_ON_GPU = (
    "convnext_tiny.in12k_ft_in1k",
    "convnext_tiny.dinov3_lvd1689m",
    "vit_small_patch16_dinov3.lvd1689m",
    "lite0",
)
N_STAGES = 5  # networks with more stages (EfficientNet: 7; a transformer: its blocks) use the last five


class Backbone(nn.Module):
    """A timm network without its classifier.

    Its name is timm's, with the weights tag. The features are channel statistics of the last stages and
    pooled features ("stages"), or "pooled" ones only.
    """

    def __init__(self, name: str, network: nn.Module, features: FeatureKind = "stages") -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        """Turn normalised images (B, 3, H, W) into features (B, D) float32."""
        return compute_features(self.network, self.stages, images)

    @property
    def stages(self) -> tuple[int, ...]:
        """Indices of the stages whose channel statistics are features."""
        if self.features == "pooled":
            return ()
        n_stages = len(stage_modules(self.network))
        return tuple(range(max(0, n_stages - N_STAGES), n_stages))

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the weights: input size, mean, std and more."""
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

    @cached_property
    def feature_groups(self) -> dict[str, slice]:
        """Columns of the features: channel means and deviations of each stage, then pooled features."""
        images = torch.zeros(1, *self.pretrained_cfg["input_size"])
        with torch.inference_mode():
            maps = compute_maps(self.network.eval(), self.stages, images) if self.stages else []
        widths = {
            f"stage {stage + 1} {name}": each.shape[1]
            for stage, each in zip(self.stages, maps, strict=True)
            for name in ("mean", "deviation")
        }
        widths["pooled"] = self.n_features - sum(widths.values())
        stops = np.cumsum(list(widths.values())).tolist()
        return {
            name: slice(stop - width, stop) for (name, width), stop in zip(widths.items(), stops, strict=True)
        }


def stage_modules(network: Any) -> tuple[str, ...]:
    """List the name of each stage's last module, from the stem to the head."""
    from timm.models import EfficientNet

    # timm lists only the EfficientNet stages that halve the resolution
    if isinstance(network, EfficientNet):
        return tuple(f"blocks.{i}" for i in range(len(network.blocks)))
    return tuple(str(info["module"]) for info in network.feature_info)


def compute_features(network: Any, stages: Sequence[int], inputs: Tensor) -> Tensor:
    """Compute channel statistics, then pooled features: (B, D) float32."""
    return compute_features_and_maps(network, stages, inputs, ())[0]


def compute_features_and_maps(
    network: Any, stages: Sequence[int], inputs: Tensor, map_stages: Iterable[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Compute features (B, D) and the feature maps (B, C_s, H_s, W_s) of `map_stages`."""
    wanted = sorted({*stages, *map_stages}) or [-1]
    last, found = network.forward_intermediates(inputs, **_select_stages(network, wanted))
    maps = dict(zip(wanted, found, strict=True))
    pooled = network.forward_head(last, pre_logits=True)  # (B, C)
    return torch.cat([*channel_stats([maps[s] for s in stages]), pooled.float()], dim=1), maps  # (B, D)


def compute_maps(network: Any, stages: Sequence[int], images: Tensor) -> list[Tensor]:
    """Compute feature maps (B, C_s, H_s, W_s) of some stages; later ones do not run."""
    options = {"intermediates_only": True, "stop_early": True, **_select_stages(network, stages)}
    maps: list[Tensor] = network.forward_intermediates(images, **options)
    return maps


def channel_stats(maps: Iterable[Tensor]) -> list[Tensor]:
    """Compute channel mean and deviation, (B, C_s) float32 each, of feature maps (B, C_s, H_s, W_s)."""
    stats = []
    for stage in maps:
        values = stage.float()
        mean = values.mean(dim=(2, 3), keepdim=True)
        # torch.var_mean takes ten times as long on a CPU; the gradient of the root is infinite at 0
        variance = (values - mean).square().mean(dim=(2, 3))
        stats += [mean.flatten(1), (variance + 1e-12).sqrt()]
    return stats


def _select_stages(network: Any, stages: Sequence[int]) -> dict[str, Any]:
    from timm.models import EfficientNet

    n_stages = len(stage_modules(network))
    indices = [stage % n_stages for stage in stages]
    if isinstance(network, EfficientNet):
        return {"indices": [i + 1 for i in indices], "extra_blocks": True}  # 0 is the stem
    return {"indices": indices}


@dataclass(frozen=True, kw_only=True)
class PretrainedBackbone:
    """A backbone with pretrained weights and its preprocessing."""

    backbone: Backbone
    preprocessing: Preprocessing
    weights_id: str  # SHA-256 of the weights file, hexadecimal; part of the feature cache's key
    origin: str  # source of the weights, for the records
    licence: str  # of the weights, as timm names it; "unknown" for a local file


def resolve_backbone_names(requested: str, device: str, *, offline: bool = False) -> tuple[str, ...]:
    """Resolve the candidates: `auto`, `best` or names separated by commas.

    On a CPU `auto` is EfficientNet-Lite0, which is embedded, elsewhere ConvNeXt-Tiny. `best` is a short list
    without those whose weights are known to be missing.

    Raises:
        ConfigError: an empty or repeated name.
    """
    if requested == "auto":
        return ("lite0",) if device == "cpu" else (BEST_ON_GPU[0],)
    if requested == "best":
        names = tuple(EMBEDDED) if device == "cpu" else BEST_ON_GPU
        return tuple(name for name in names if has_weights(name, offline=offline))
    names = tuple(name.strip() for name in requested.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(
            f"backbone={requested!r} has an empty or repeated name; use for example lite0,lite2"
        )
    return names


def check_backbone_name(name: str) -> None:
    """Raise ConfigError with the nearest names unless a network is embedded or in timm's local list."""
    if name in EMBEDDED:
        return
    import timm

    # timm treats names with a colon or slash as addresses
    is_local = ":" not in name and "/" not in name and timm.is_model(name.split(".")[0])
    if not is_local or ("." in name and not timm.is_model_pretrained(name)):
        hint = suggest(name, [*EMBEDDED, *timm.list_models(), *timm.list_pretrained()])
        raise ConfigError(f"unknown backbone {name!r}{hint or '; use lite0, lite2 or a timm model'}")


def load_backbone(
    name: str,
    weights: str | None,
    *,
    offline: bool,
    features: FeatureKind = "stages",
    input_size: Size | None = None,
    fit: Fit = "squash",
) -> PretrainedBackbone:
    """Build a network by name and load its pretrained weights strictly.

    Args:
        name: "lite0", "lite2" or a timm model, optionally with a weights tag.
        weights: local file that replaces the published weights.
        input_size: of the images (default: the one the weights were trained with).
        fit: how images are fitted into it.

    Raises:
        ConfigError: unknown name, no weights found, or an input size the network does not support.
        BundleError: weights that do not fit; the keys are named.
    """
    check_backbone_name(name)
    network = create_network(embedded_timm_name(name))
    path, sha256, origin = find_weights(name, network.pretrained_cfg, weights, offline=offline)
    state = read_state_dict(path)
    if weights is None and name in EMBEDDED:  # efficientnet_pytorch defines the same layers in the same order
        state = dict(zip(network.state_dict(), state.values(), strict=False))  # its classifier comes last
    load_weights_into(network, state, path)
    backbone = Backbone(embedded_timm_name(name), network, features)
    if input_size is not None:
        check_input_size(backbone, input_size)
    trained = backbone.pretrained_cfg
    preprocessing = Preprocessing(
        input_size=input_size or tuple(trained["input_size"][1:]),
        mean=tuple(trained["mean"]),
        std=tuple(trained["std"]),
        # timm's "random" means a randomly drawn filter in training
        interpolation=trained["interpolation"] if trained["interpolation"] in FILTERS else "bicubic",
        fit=fit,
    )
    return PretrainedBackbone(
        backbone=backbone,
        preprocessing=preprocessing,
        weights_id=sha256,
        origin=origin,
        licence="unknown" if weights is not None else trained.get("license") or "unknown",
    )


def check_input_size(backbone: Backbone, size: Size) -> None:
    """Raise ConfigError with the reason unless a network supports an input size."""
    native: Size = tuple(backbone.pretrained_cfg["input_size"][1:])
    if size != native and (reason := input_size_error(backbone, size)):
        raise ConfigError(
            f"{backbone.name} does not support images of {describe_size(size)} px ({reason}); its weights "
            f"were trained with {describe_size(native)} px"
        )


def input_size_error(backbone: Backbone, size: Size) -> str | None:
    """Return the reason why a network does not support an input size; None if it does."""
    try:
        with torch.inference_mode():
            backbone.eval()(torch.zeros(1, 3, *size))
    except (RuntimeError, AssertionError, ValueError) as error:
        return " ".join(str(error).split())[:120]
    return None


def create_network(timm_name: str) -> Any:
    """Build an untrained timm network without classifier; nothing is downloaded."""
    import timm

    use_one_thread_after_fork()  # before the first work in a process
    # timm's notices about its own aliases and tags are suppressed, and the user's random state is preserved
    quiet = warnings.catch_warnings(action="ignore")
    with quiet, quiet_logger("timm", logging.ERROR), torch.random.fork_rng(devices=[]):
        try:
            return timm.create_model(timm_name, pretrained=False, num_classes=0)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"backbone {timm_name!r} cannot be built: {error}") from None


def create_with_weights(timm_name: str, state: dict[str, Tensor], origin: str) -> Any:
    """Build a network from untrusted weights, after checking that they fit its shapes.

    The weights are already in memory, but the name may denote a network larger than all of it. Errors are
    those of `select_fitting_weights`.
    """
    with torch.device("meta"):  # shapes without values
        select_fitting_weights(create_network(timm_name), state, origin)
    network = create_network(timm_name)
    load_weights_into(network, state, origin)
    return network


def load_weights_into(network: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load weights into a network without classifier; errors are those of `select_fitting_weights`."""
    fitting = select_fitting_weights(network, state, origin)
    network.load_state_dict({**network.state_dict(), **fitting}, strict=True)


def select_fitting_weights(network: nn.Module, state: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Drop the classifier's weights and check that the rest fits exactly.

    Raises:
        BundleError: keys or shapes that do not fit; the first ten are named.
    """
    config: Any = network.pretrained_cfg
    classifiers = config.get("classifier") or ()
    prefixes = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    own = network.state_dict()
    dropped = tuple(f"{name}." for name in _classifier_modules(network, prefixes))
    state = {key: value for key, value in state.items() if key in own or not key.startswith(dropped)}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    mismatched = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    for problem, keys in (("lacks", missing), ("has unknown", unknown), ("has other shapes in", mismatched)):
        if keys:
            raise BundleError(
                f"{origin} does not fit {config['architecture']}: it {problem} {name_some(keys)}"
            )
    return state


def _classifier_modules(network: nn.Module, classifiers: Sequence[str]) -> Iterator[str]:
    """List modules that timm drops together with the classifier."""
    yield AUXILIARY
    for name in classifiers:
        yield name
        parent = name.rpartition(".")[0]
        if parent and isinstance(dict(network.named_modules()).get(parent), nn.Identity | None):
            yield parent
