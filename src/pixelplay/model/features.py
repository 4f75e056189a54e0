"""Pixels → features: one forward pass for each view of each photograph."""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pixelplay.arrays import Float32Array, UInt8Array
from pixelplay.config import ComputeConfig, Precision, TrainConfig
from pixelplay.data.decode import DECODE_VERSION
from pixelplay.data.transforms import Preprocessing
from pixelplay.errors import ConfigError
from pixelplay.model.backbone import FEATURES_VERSION, Backbone
from pixelplay.model.fuse import fuse_for_inference

GPU_BATCH = 32
CPU_BATCH_PIXELS = 8 * 224**2


def pick_device(asked: str) -> str:
    """Resolve `auto`, and refuse a device that this machine does not have.

    Raises:
        ConfigError: the asked device is not there.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if has[name])
    if not has[asked]:
        raise ConfigError(f"device {asked!r} is not available here; use --device auto")
    return asked


def pick_precision(asked: Precision, device: str) -> Precision:
    """Resolve `auto`: bf16 where the device computes it natively, else fp32."""
    if asked != "auto":
        return asked
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device == "cpu":
        capabilities: Mapping[str, Any] = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "fp32"


def to_device(values: torch.Tensor, device: str) -> torch.Tensor:
    """Values on a device, in time for what comes next there; with CUDA the host goes on at once.

    An Apple GPU would read them later, when their memory may be something else.
    """
    return values.to(device, non_blocking=device == "cuda")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where and in which numbers a network runs.

    Attributes:
        name: "cpu", "cuda" or "mps".
        precision: "fp32" or "bf16".
    """

    name: str
    precision: Precision

    @property
    def is_bf16(self) -> bool:
        """Whether convolutions and matrix products run in bf16."""
        return self.precision == "bf16"

    def autocast(self) -> torch.autocast:
        """Context in which they run in the chosen numbers."""
        return torch.autocast(self.name, dtype=torch.bfloat16, enabled=self.is_bf16)

    def generators(self) -> list[int]:
        """Positions of the GPUs whose random numbers `torch.random.fork_rng` is to give back."""
        return [torch.cuda.current_device()] if self.name == "cuda" else []


def find_device(compute: ComputeConfig) -> Device:
    """Resolve what `auto` is on this machine.

    Raises:
        ConfigError: the asked device is not there.
    """
    name = pick_device(compute.device)
    return Device(name=name, precision=pick_precision(compute.precision, name))


class Normaliser:
    """Brings pixels to the device and to the numbers that a network expects."""

    def __init__(self, preprocessing: Preprocessing, device: str) -> None:
        self._device = device
        self._mean = torch.tensor(preprocessing.mean, device=device).mul(255).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=device).mul(255).view(1, 3, 1, 1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn pixels (B, S, S, 3) uint8 into images (B, 3, S, S) float32, channels last in memory."""
        images = to_device(pixels, self._device).permute(0, 3, 1, 2)
        return (images.float() - self._mean) / self._std


def pick_batch_size(asked: int | None, device: str, input_size: int) -> int:
    """Resolve None: on a CPU so few that what a layer passes on to the next stays in a core's cache."""
    if asked is not None:
        return asked
    return max(1, CPU_BATCH_PIXELS // input_size**2) if device == "cpu" else GPU_BATCH


class FeatureExtractor:
    """Turns batches of prepared photographs into features.

    Every batch is filled up to one size, so a photograph's features do not depend on how many
    others came with it.

    Args:
        backbone: with its weights.
        preprocessing: what it expects of its images.
        hflip: average over the photograph and its mirror image.
        device: "cpu", "cuda" or "mps".
        precision: number format of the computation, "fp32" or "bf16".
        batch_size: photographs a batch; None for as many as suit the device.
        learned_in: number format of the features that the head was learned on, where it is another.
    """

    def __init__(
        self,
        backbone: Backbone,
        preprocessing: Preprocessing,
        *,
        hflip: bool,
        device: str,
        precision: Precision,
        batch_size: int | None = None,
        learned_in: Precision | None = None,
    ) -> None:
        self.batch_size = pick_batch_size(batch_size, device, preprocessing.input_size)
        self.n_features = backbone.n_features
        self.preprocessing = preprocessing
        self.device = device
        self._hflip = hflip
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._network = [backbone.name, backbone.features]
        fused = fuse_for_inference(backbone.eval(), preprocessing.input_size)
        if (learned_in, precision) == ("bf16", "fp32"):
            # Most of what parts the formats is that bf16 rounds the weights, for all photographs alike:
            # with this a third as many probabilities move by more than 0.02.
            fused = _with_bf16_weights(fused)
        self._backbone = fused.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._normalise = Normaliser(preprocessing, device)

    def __call__(self, pixels: UInt8Array) -> Float32Array:
        """Features (B, D) of prepared photographs (B, S, S, 3); B at most the batch size.

        With hflip they are the mean over the photograph and its mirror image; of several views of each,
        (B, V, S, S, 3), the mean over those.
        """
        if pixels.ndim == 5:
            views = np.stack([self(pixels[:, v]) for v in range(pixels.shape[1])])  # (V, B, D)
            return np.asarray(views.mean(axis=0))
        n = len(pixels)
        with memory_errors_explained(too_large_to_read(self.device, self.batch_size)):
            if n < self.batch_size:
                padding = np.zeros((self.batch_size - n, *pixels.shape[1:]), np.uint8)
                pixels = np.concatenate([pixels, padding])
            features = self.extract(torch.from_numpy(pixels))
        return np.asarray(features[:n].cpu().numpy())

    @torch.inference_mode()
    def extract(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of pixels (B, S, S, 3) uint8, as a tensor on the device."""
        images = self._normalise(pixels)  # (B, 3, S, S)
        is_bf16 = self._dtype == torch.bfloat16
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=is_bf16):
            features: torch.Tensor = self._backbone(images)  # (B, D)
            if self._hflip:
                features = (features + self._backbone(images.flip(3))) / 2
        return features

    def cache_key(self, weights_id: str) -> str:
        """Name all that features depend on, beside the photograph's bytes."""
        parts = {
            "versions": [DECODE_VERSION, FEATURES_VERSION],
            "weights": weights_id,
            "network": self._network,
            "preprocessing": asdict(self.preprocessing),
            "hflip": self._hflip,
            "numbers": f"{self.device} {self._dtype}",
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class TooLittleMemoryError(ConfigError):
    """Memory does not suffice for the smallest batches, or for those that were asked for."""


def too_large_to_read(device: str, batch_size: int) -> TooLittleMemoryError:
    """The error of a network that only looks, and what to lower."""
    return TooLittleMemoryError(
        f"{device} has too little memory for batches of {batch_size}; lower --batch-size"
    )


@contextmanager
def memory_errors_explained(explained: TooLittleMemoryError) -> Iterator[None]:
    """Raise where memory runs out what says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise explained from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: CUDA has an error of its own, a CPU and MPS say it in words."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    is_named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_named or any(said in str(error) for said in words)


def make_extractor(
    backbone: Backbone, preprocessing: Preprocessing, config: TrainConfig, device: Device
) -> FeatureExtractor:
    """The extractor that training uses, and prediction on the same device after it."""
    return FeatureExtractor(
        backbone,
        preprocessing,
        hflip=config.hflip,
        device=device.name,
        precision=device.precision,
        batch_size=config.compute.batch_size,
    )


def _with_bf16_weights(backbone: Backbone) -> Backbone:
    """Copy a backbone and round, in fp32, the weights that autocast would round."""
    rounded = copy.deepcopy(backbone)
    for layer in rounded.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            for values in layer.parameters(recurse=False):
                values.data = values.data.bfloat16().float()
    return rounded
