"""Pixels → features: one forward pass for each view of each image."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from pixelplay.arrays import Float32Array, UInt8Array
from pixelplay.config import Precision, TrainConfig
from pixelplay.data.audit import digest_bytes, first_occurrences
from pixelplay.data.cache import ArrayCache, default_cache_dir
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.decode import DECODE_VERSION, decode_image
from pixelplay.data.near_duplicates.search import CLOSE_PX, NearDuplicatePair, search_near_duplicates
from pixelplay.data.near_duplicates.thumbnails import THUMBNAIL_PX, THUMBNAIL_VERSION, make_thumbnail
from pixelplay.data.transforms import Preprocessing, eval_transform
from pixelplay.errors import BundleError, ImageError
from pixelplay.model.backbone import FEATURES_VERSION, Backbone, PretrainedBackbone
from pixelplay.model.device import (
    Device,
    explain_memory_errors,
    inference_memory_error,
    map_on_cores,
    to_device,
)
from pixelplay.model.fusion import fuse_for_inference
from pixelplay.run_log import RunLog
from pixelplay.thread_pool import prefetch_map

GPU_BATCH = 32
CPU_BATCH_PIXELS = 8 * 224**2


class Normalizer:
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
    """Turns batches of prepared images into features.

    Every batch is filled up to one size, so an image's features do not depend on how many
    others came with it.

    Args:
        backbone: with its weights.
        preprocessing: what it expects of its images.
        hflip: average over the image and its mirror image.
        device: "cpu", "cuda" or "mps".
        precision: number format of the computation, "fp32" or "bf16".
        batch_size: images a batch; None for as many as suit the device.
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
            # Most of what parts the formats is that bf16 rounds the weights, for all images alike:
            # with this a third as many probabilities move by more than 0.02.
            fused = _with_bf16_weights(fused)
        self._backbone = fused.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._normalize = Normalizer(preprocessing, device)

    def __call__(self, pixels: UInt8Array) -> Float32Array:
        """Features (B, D) of prepared images (B, S, S, 3); B at most the batch size.

        With hflip they are the mean over the image and its mirror image; of several views of each,
        (B, V, S, S, 3), the mean over those.
        """
        if pixels.ndim == 5:
            views = np.stack([self(pixels[:, v]) for v in range(pixels.shape[1])])  # (V, B, D)
            return np.asarray(views.mean(axis=0))
        n = len(pixels)
        with explain_memory_errors(inference_memory_error(self.device, self.batch_size)):
            if n < self.batch_size:
                padding = np.zeros((self.batch_size - n, *pixels.shape[1:]), np.uint8)
                pixels = np.concatenate([pixels, padding])
            features = self.extract(torch.from_numpy(pixels))
        return np.asarray(features[:n].cpu().numpy())

    @torch.inference_mode()
    def extract(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of pixels (B, S, S, 3) uint8, as a tensor on the device."""
        images = self._normalize(pixels)  # (B, 3, S, S)
        is_bf16 = self._dtype == torch.bfloat16
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=is_bf16):
            features: torch.Tensor = self._backbone(images)  # (B, D)
            if self._hflip:
                features = (features + self._backbone(images.flip(3))) / 2
        return features

    def cache_key(self, weights_id: str) -> str:
        """Name all that features depend on, beside the image's bytes."""
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


CHUNK = 64  # images that are passed on together: what comes after works on many as fast as on few
EMPTY_THUMBNAIL = np.zeros((THUMBNAIL_PX, THUMBNAIL_PX), np.uint8)


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """One image as it leaves the loader: prepared pixels, cached features, or an error.

    Beside them lies a thumb, where one is asked for and the cache has none.
    """

    digest: bytes = b""
    pixels: UInt8Array | None = None
    thumbnail: UInt8Array | None = None
    error: ImageError | None = None


def stream_features(
    extractor: FeatureExtractor,
    load: Callable[[int], LoadedImage],
    n: int,
    *,
    cache: ArrayCache | None = None,
    num_workers: int | None = None,
) -> Iterator[tuple[list[LoadedImage], Float32Array]]:
    """Yield images in order with their features, in chunks of CHUNK; the last may be smaller.

    Args:
        load: gives image i; it runs in threads. One without pixels or error is in the cache.
        n: number of images.

    Yields:
        Images of the chunk and their features (chunk, D); the row of an error is NaN.
    """
    n_at_once = torch.get_num_threads() if extractor.device == "cpu" else 1  # batches under way
    ahead = max(CHUNK, 2 * extractor.batch_size * n_at_once)
    images = prefetch_map(load, range(n), num_workers=num_workers, ahead=ahead)

    def extract(chunk: list[LoadedImage]) -> tuple[list[LoadedImage], Float32Array]:
        pixels = [loaded.pixels for loaded in chunk if loaded.pixels is not None]
        none = np.empty((0, extractor.n_features), np.float32)
        return chunk, extractor(np.stack(pixels)) if pixels else none

    ready: list[LoadedImage] = []
    features: list[Float32Array] = []
    batches = _gather(images, extractor.batch_size)
    for batch, fresh in map_on_cores(extract, batches, extractor.device):
        ready += batch
        features.append(_put_in_order(batch, fresh, cache))
        while len(ready) >= CHUNK:  # of one length, so that streams of several models keep step
            rows = np.concatenate(features)
            yield ready[:CHUNK], rows[:CHUNK]
            ready, features = ready[CHUNK:], [rows[CHUNK:]]
    if ready:
        yield ready, np.concatenate(features)


def _gather(images: Iterator[LoadedImage], batch_size: int) -> Iterator[list[LoadedImage]]:
    """Gather images in order until as many as make a batch have pixels."""
    waiting: list[LoadedImage] = []
    n_pixels = 0
    for loaded in images:
        waiting.append(loaded)
        n_pixels += loaded.pixels is not None
        if n_pixels == batch_size or len(waiting) >= 1024:
            yield waiting
            waiting, n_pixels = [], 0
    if waiting:
        yield waiting


def _put_in_order(
    chunk: Sequence[LoadedImage], fresh: Float32Array, cache: ArrayCache | None
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
class ImageFeatures:
    """What reading N images once has given.

    Attributes:
        values: (N, D) float32; NaN where an image could not be used.
        digests: (N,) content of each file in 16 bytes; b"" where it could not be read.
        errors: position → why an image could not be used.
        thumbs: (N, S, S) small grey pictures, black where an image could not be used; None where they
            were not asked for.
    """

    values: Float32Array
    digests: list[bytes]
    errors: dict[int, ImageError]
    thumbnails: UInt8Array | None = None


def extract_features(
    dataset: ImageDataset, loaded: PretrainedBackbone, config: TrainConfig, device: Device, log: RunLog
) -> ImageFeatures:
    """See every image once with the backbone as it came; what was seen before comes from the cache."""
    extractor = make_extractor(loaded.backbone, loaded.preprocessing, config, device)
    folder, max_bytes = config.cache_dir or default_cache_dir(), int(config.cache_gb * 1e9)
    cache = ArrayCache(folder, "features", extractor.cache_key(loaded.weights_id), max_bytes=max_bytes)
    thumbnail_cache = None
    if config.near_duplicates:
        key = f"{DECODE_VERSION}-{THUMBNAIL_VERSION}-{loaded.preprocessing.input_size}"
        thumbnail_cache = ArrayCache(folder, "thumbs", key, max_bytes=max_bytes)
    with log.progress("reading", len(dataset)) as bar:
        images = extract_features_of(
            dataset,
            extractor,
            cache,
            thumbnail_cache=thumbnail_cache,
            num_workers=config.compute.num_workers,
            on_progress=bar.update,
        )
    for what, each in (("features", cache), ("thumbs", thumbnail_cache)):
        if each is not None and each.failure:
            log.note(f"{what} cannot be kept in the cache: {each.failure}")
    return images


def extract_features_of(
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    cache: ArrayCache,
    *,
    thumbnail_cache: ArrayCache | None = None,
    num_workers: int | None = None,
    on_progress: Callable[[int], object] = lambda n: None,
) -> ImageFeatures:
    """Read, decode and extract every image once, in index order; known ones come from the cache.

    Args:
        thumb_cache: of thumbs; None: none are made.
    """

    def load(i: int) -> LoadedImage:
        return _load(dataset, i, extractor.preprocessing, cache, thumbnail_cache)

    values = np.empty((len(dataset), extractor.n_features), np.float32)
    digests: list[bytes] = []
    errors: dict[int, ImageError] = {}
    thumbnails: list[UInt8Array] = []
    try:
        stream = stream_features(extractor, load, len(dataset), cache=cache, num_workers=num_workers)
        for chunk, features in stream:
            start = len(digests)
            values[start : start + len(chunk)] = features
            errors |= {start + i: seen.error for i, seen in enumerate(chunk) if seen.error is not None}
            digests += [seen.digest for seen in chunk]
            if thumbnail_cache is not None:
                thumbnails += [_keep_thumb(seen, thumbnail_cache) for seen in chunk]
            on_progress(len(chunk))
    finally:
        for each in (cache, thumbnail_cache):  # also when interrupted: what is computed is kept
            if each is not None:
                each.flush()
    all_thumbs = None if thumbnail_cache is None else np.stack([EMPTY_THUMBNAIL, *thumbnails])[1:]
    return ImageFeatures(values=values, digests=digests, errors=errors, thumbnails=all_thumbs)


def _load(
    dataset: ImageDataset,
    i: int,
    preprocessing: Preprocessing,
    cache: ArrayCache,
    thumbnail_cache: ArrayCache | None,
) -> LoadedImage:
    """Read an image, and decode it unless the caches know all that is wanted of it."""
    path, digest = dataset.paths[i], b""
    try:
        data = dataset.storage.read(path)
        digest = digest_bytes(data)
        has_features, has_thumb = digest in cache, thumbnail_cache is None or digest in thumbnail_cache
        if has_features and has_thumb:
            return LoadedImage(digest=digest)
        pixels = decode_image(data, path=path, target_px=preprocessing.input_size)
        return LoadedImage(
            digest=digest,
            pixels=None if has_features else eval_transform(pixels, preprocessing),
            thumbnail=None if has_thumb else make_thumbnail(pixels),
        )
    except ImageError as error:
        return LoadedImage(digest=digest, error=error.detached())


def _keep_thumb(seen: LoadedImage, thumbnail_cache: ArrayCache) -> UInt8Array:
    """The thumb of an image, from now on in the cache."""
    if seen.error is not None:
        return EMPTY_THUMBNAIL
    if seen.thumbnail is None:
        return thumbnail_cache.get(seen.digest)
    thumbnail_cache.add(seen.digest, seen.thumbnail)
    return seen.thumbnail


def find_near_duplicates(
    dataset: ImageDataset,
    images: ImageFeatures,
    num_workers: int | None,
    log: RunLog,
    *,
    hflip: bool = True,
) -> list[NearDuplicatePair]:
    """Find near copies among images of which thumbs were made.

    Args:
        hflip: a mirror image means the same, and so is a copy.

    Returns:
        Pairs of positions in the index, of one image of each digest.
    """
    assert images.thumbnails is not None
    rows = first_occurrences(images.digests)
    rows = rows[~np.isin(rows, list(images.errors))]

    def read(k: int) -> UInt8Array:
        path = dataset.paths[rows[k]]
        return decode_image(dataset.storage.read(path), path=path, target_px=CLOSE_PX)

    thumbnails, features = images.thumbnails[rows], images.values[rows]
    found = search_near_duplicates(
        thumbnails, read, features, has_mirrored=hflip, num_workers=num_workers, log=log
    )
    return [replace(pair, first=int(rows[pair.first]), second=int(rows[pair.second])) for pair in found]
