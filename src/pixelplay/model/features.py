"""Pixels → features: one forward pass for each view of each photograph."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from pixelplay.arrays import Float32Array, UInt8Array
from pixelplay.config import Precision, TrainConfig
from pixelplay.data.audit import digest_bytes, first_of_each
from pixelplay.data.cache import PhotographCache, default_cache_dir
from pixelplay.data.dataset import ImageIndex
from pixelplay.data.decode import DECODE_VERSION, decode_image
from pixelplay.data.near_duplicates.search import CLOSE_PX, CopyPair, find_copies
from pixelplay.data.near_duplicates.thumbnails import THUMB_PX, THUMB_VERSION, make_thumb
from pixelplay.data.transforms import Preprocessing, eval_view
from pixelplay.errors import BundleError, ImageError
from pixelplay.model.backbone import FEATURES_VERSION, Backbone, LoadedBackbone
from pixelplay.model.device import (
    Device,
    memory_errors_explained,
    on_every_core,
    to_device,
    too_large_to_read,
)
from pixelplay.model.fusion import fuse_for_inference
from pixelplay.run_log import Journal
from pixelplay.thread_pool import map_ahead

GPU_BATCH = 32


CPU_BATCH_PIXELS = 8 * 224**2


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


CHUNK = 64  # photographs that are passed on together: what comes after works on many as fast as on few


NO_THUMB = np.zeros((THUMB_PX, THUMB_PX), np.uint8)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One photograph as it leaves the loader: prepared pixels, cached features, or an error.

    Beside them lies a thumb, where one is asked for and the cache has none.
    """

    digest: bytes = b""
    pixels: UInt8Array | None = None
    thumb: UInt8Array | None = None
    error: ImageError | None = None


def stream_features(
    extractor: FeatureExtractor,
    load: Callable[[int], Loaded],
    n: int,
    *,
    cache: PhotographCache | None = None,
    num_workers: int | None = None,
) -> Iterator[tuple[list[Loaded], Float32Array]]:
    """Yield photographs in order with their features, in chunks of CHUNK; the last may be smaller.

    Args:
        load: gives photograph i; it runs in threads. One without pixels or error is in the cache.
        n: number of photographs.

    Yields:
        Photographs of the chunk and their features (chunk, D); the row of an error is NaN.
    """
    n_at_once = torch.get_num_threads() if extractor.device == "cpu" else 1  # batches under way
    ahead = max(CHUNK, 2 * extractor.batch_size * n_at_once)
    photographs = map_ahead(load, range(n), num_workers=num_workers, ahead=ahead)

    def extract(chunk: list[Loaded]) -> tuple[list[Loaded], Float32Array]:
        pixels = [loaded.pixels for loaded in chunk if loaded.pixels is not None]
        none = np.empty((0, extractor.n_features), np.float32)
        return chunk, extractor(np.stack(pixels)) if pixels else none

    ready: list[Loaded] = []
    features: list[Float32Array] = []
    batches = _gather(photographs, extractor.batch_size)
    for batch, fresh in on_every_core(extract, batches, extractor.device):
        ready += batch
        features.append(_put_in_order(batch, fresh, cache))
        while len(ready) >= CHUNK:  # of one length, so that streams of several models keep step
            rows = np.concatenate(features)
            yield ready[:CHUNK], rows[:CHUNK]
            ready, features = ready[CHUNK:], [rows[CHUNK:]]
    if ready:
        yield ready, np.concatenate(features)


def _gather(photographs: Iterator[Loaded], batch_size: int) -> Iterator[list[Loaded]]:
    """Gather photographs in order until as many as make a batch have pixels."""
    waiting: list[Loaded] = []
    n_pixels = 0
    for loaded in photographs:
        waiting.append(loaded)
        n_pixels += loaded.pixels is not None
        if n_pixels == batch_size or len(waiting) >= 1024:
            yield waiting
            waiting, n_pixels = [], 0
    if waiting:
        yield waiting


def _put_in_order(
    chunk: Sequence[Loaded], fresh: Float32Array, cache: PhotographCache | None
) -> Float32Array:
    """Features (chunk, D), those of pixels fresh and others from the cache; NaN in the row of an error."""
    if not np.isfinite(fresh).all():
        raise BundleError(
            "the network gives features that are not finite; its weights are damaged, "
            "or it needs --precision fp32"
        )
    features = np.full((len(chunk), fresh.shape[1]), np.nan, np.float32)
    features[[loaded.pixels is not None for loaded in chunk]] = fresh
    for row, loaded in zip(features, chunk, strict=True):
        if cache is not None and loaded.error is None:
            if loaded.pixels is None:
                row[:] = cache.get(loaded.digest)
            else:
                cache.add(loaded.digest, row)
    return features


@dataclass(frozen=True, kw_only=True)
class PhotographFeatures:
    """What reading N photographs once has given.

    Attributes:
        values: (N, D) float32; NaN where a photograph could not be used.
        digests: (N,) content of each file in 16 bytes; b"" where it could not be read.
        errors: position → why a photograph could not be used.
        thumbs: (N, S, S) small grey pictures, black where a photograph could not be used; None where they
            were not asked for.
    """

    values: Float32Array
    digests: list[bytes]
    errors: dict[int, ImageError]
    thumbs: UInt8Array | None = None


def read_photographs(
    index: ImageIndex, loaded: LoadedBackbone, config: TrainConfig, device: Device, journal: Journal
) -> PhotographFeatures:
    """See every photograph once with the backbone as it came; what was seen before comes from the cache."""
    extractor = make_extractor(loaded.backbone, loaded.preprocessing, config, device)
    folder, max_bytes = config.cache_dir or default_cache_dir(), int(config.cache_gb * 1e9)
    cache = PhotographCache(folder, "features", extractor.cache_key(loaded.weights_id), max_bytes=max_bytes)
    thumb_cache = None
    if config.near_duplicates:
        key = f"{DECODE_VERSION}-{THUMB_VERSION}-{loaded.preprocessing.input_size}"
        thumb_cache = PhotographCache(folder, "thumbs", key, max_bytes=max_bytes)
    with journal.progress("reading", len(index)) as bar:
        photographs = read_features(
            index,
            extractor,
            cache,
            thumb_cache=thumb_cache,
            num_workers=config.compute.num_workers,
            on_progress=bar.update,
        )
    for what, each in (("features", cache), ("thumbs", thumb_cache)):
        if each is not None and each.failure:
            journal.note(f"{what} cannot be kept in the cache: {each.failure}")
    return photographs


def read_features(
    index: ImageIndex,
    extractor: FeatureExtractor,
    cache: PhotographCache,
    *,
    thumb_cache: PhotographCache | None = None,
    num_workers: int | None = None,
    on_progress: Callable[[int], object] = lambda n: None,
) -> PhotographFeatures:
    """Read, decode and extract every photograph once, in index order; known ones come from the cache.

    Args:
        thumb_cache: of thumbs; None: none are made.
    """

    def load(i: int) -> Loaded:
        return _load(index, i, extractor.preprocessing, cache, thumb_cache)

    values = np.empty((len(index), extractor.n_features), np.float32)
    digests: list[bytes] = []
    errors: dict[int, ImageError] = {}
    thumbs: list[UInt8Array] = []
    try:
        stream = stream_features(extractor, load, len(index), cache=cache, num_workers=num_workers)
        for chunk, features in stream:
            start = len(digests)
            values[start : start + len(chunk)] = features
            errors |= {start + i: seen.error for i, seen in enumerate(chunk) if seen.error is not None}
            digests += [seen.digest for seen in chunk]
            if thumb_cache is not None:
                thumbs += [_keep_thumb(seen, thumb_cache) for seen in chunk]
            on_progress(len(chunk))
    finally:
        for each in (cache, thumb_cache):  # also when interrupted: what is computed is kept
            if each is not None:
                each.flush()
    all_thumbs = None if thumb_cache is None else np.stack([NO_THUMB, *thumbs])[1:]
    return PhotographFeatures(values=values, digests=digests, errors=errors, thumbs=all_thumbs)


def _load(
    index: ImageIndex,
    i: int,
    preprocessing: Preprocessing,
    cache: PhotographCache,
    thumb_cache: PhotographCache | None,
) -> Loaded:
    """Read a photograph, and decode it unless the caches know all that is wanted of it."""
    path, digest = index.paths[i], b""
    try:
        data = index.store.read(path)
        digest = digest_bytes(data)
        has_features, has_thumb = digest in cache, thumb_cache is None or digest in thumb_cache
        if has_features and has_thumb:
            return Loaded(digest=digest)
        pixels = decode_image(data, path=path, target_px=preprocessing.input_size)
        return Loaded(
            digest=digest,
            pixels=None if has_features else eval_view(pixels, preprocessing),
            thumb=None if has_thumb else make_thumb(pixels),
        )
    except ImageError as error:
        return Loaded(digest=digest, error=error.detached())


def _keep_thumb(seen: Loaded, thumb_cache: PhotographCache) -> UInt8Array:
    """The thumb of a photograph, from now on in the cache."""
    if seen.error is not None:
        return NO_THUMB
    if seen.thumb is None:
        return thumb_cache.get(seen.digest)
    thumb_cache.add(seen.digest, seen.thumb)
    return seen.thumb


def look_for_copies(
    index: ImageIndex,
    photographs: PhotographFeatures,
    num_workers: int | None,
    journal: Journal,
    *,
    hflip: bool = True,
) -> list[CopyPair]:
    """Find near copies among photographs of which thumbs were made.

    Args:
        hflip: a mirror image means the same, and so is a copy.

    Returns:
        Pairs of positions in the index, of one photograph of each digest.
    """
    assert photographs.thumbs is not None
    rows = first_of_each(photographs.digests)
    rows = rows[~np.isin(rows, list(photographs.errors))]

    def read(k: int) -> UInt8Array:
        path = index.paths[rows[k]]
        return decode_image(index.store.read(path), path=path, target_px=CLOSE_PX)

    thumbs, features = photographs.thumbs[rows], photographs.values[rows]
    found = find_copies(thumbs, read, features, has_mirrored=hflip, num_workers=num_workers, journal=journal)
    return [replace(pair, first=int(rows[pair.first]), second=int(rows[pair.second])) for pair in found]
