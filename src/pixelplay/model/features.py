"""Images → features, cached on disk."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch

from pixelplay.array_types import Float32Array, UInt8Array
from pixelplay.config import Precision, TrainConfig
from pixelplay.data.audit import digest_bytes, first_occurrences
from pixelplay.data.cache import DIGEST_BYTES, ArrayCache, default_cache_dir
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.decode import DECODE_VERSION, MAX_VALUE, decode_image
from pixelplay.data.near_duplicates.search import (
    CLOSE_PX,
    SEARCH_VERSION,
    NearDuplicatePair,
    search_near_duplicates,
)
from pixelplay.data.near_duplicates.thumbnails import THUMBNAIL_PX, THUMBNAIL_VERSION, make_thumbnail
from pixelplay.data.transforms import Preprocessing, Size, decode_for, eval_transform
from pixelplay.errors import BundleError, ImageError
from pixelplay.model.backbone import FEATURES_VERSION, Backbone, PretrainedBackbone
from pixelplay.model.device import (
    Device,
    inference_memory_message,
    map_on_cores,
    to_device,
    translate_memory_errors,
)
from pixelplay.model.fusion import fuse_for_inference
from pixelplay.run_log import RunLog
from pixelplay.thread_pool import prefetch_map

GPU_BATCH = 32
CPU_BATCH_PIXELS = 8 * 224**2
CHUNK = 64  # images per yielded chunk
MAX_WAITING = 1024  # images without pixels that may wait for a full batch
EMPTY_THUMBNAIL = np.zeros((THUMBNAIL_PX, THUMBNAIL_PX), np.uint8)


class Normalizer:
    """Moves pixels to the device and normalises them with mean and std."""

    def __init__(self, preprocessing: Preprocessing, device: str) -> None:
        self._device = device
        self._mean = torch.tensor(preprocessing.mean, device=device).mul(255).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=device).mul(255).view(1, 3, 1, 1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn pixels (B, H, W, 3) uint8 into images (B, 3, H, W) float32."""
        images = to_device(pixels, self._device).permute(0, 3, 1, 2)
        return (images.float() - self._mean) / self._std


def resolve_batch_size(requested: int | None, device: str, input_size: Size) -> int:
    """Replace None by a default; on a CPU its feature maps fit into a core's cache."""
    if requested is not None:
        return requested
    return max(1, CPU_BATCH_PIXELS // math.prod(input_size)) if device == "cpu" else GPU_BATCH


class FeatureExtractor:
    """Computes features of preprocessed images in batches.

    Every batch is padded to the same size, so an image's features do not depend on the number of other
    images in its batch.

    Args:
        hflip: average the features of each image and its mirror image.
        batch_size: images per batch; None selects one that suits the device.
        training_precision: precision of the features the head was trained on, if different.

    Attributes:
        backbone: the fused network, on the device.
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
        training_precision: Precision | None = None,
    ) -> None:
        self.batch_size = resolve_batch_size(batch_size, device, preprocessing.input_size)
        self.n_features = backbone.n_features
        self.preprocessing = preprocessing
        self.device = device
        self._hflip = hflip
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._network = [backbone.name, backbone.features]
        fused = fuse_for_inference(backbone.eval(), preprocessing.input_size)
        if (training_precision, precision) == ("bf16", "fp32"):
            # Most of the difference between the precisions comes from rounded weights: with the rounding of
            # autocast, only a third as many probabilities change by more than 0.02.
            for layer in fused.modules():
                if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                    for values in layer.parameters(recurse=False):
                        values.data = values.data.bfloat16().float()
        self.backbone = fused.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._normalize = Normalizer(preprocessing, device)

    def __call__(self, pixels: UInt8Array) -> Float32Array:
        """Compute features (B, D) of pixels (B, H, W, 3), B <= batch size."""
        n = len(pixels)
        with translate_memory_errors(inference_memory_message(self.device, self.batch_size)):
            if n < self.batch_size:
                padding = np.zeros((self.batch_size - n, *pixels.shape[1:]), np.uint8)
                pixels = np.concatenate([pixels, padding])
            features = self.extract(torch.from_numpy(pixels))
        return np.asarray(features[:n].cpu().numpy())

    @torch.inference_mode()
    def extract(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute features (B, D) of pixels (B, H, W, 3) uint8, as a tensor on the device."""
        images = self._normalize(pixels)  # (B, 3, H, W)
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            features: torch.Tensor = self.backbone(images)  # (B, D)
            if self._hflip:
                features = (features + self.backbone(images.flip(3))) / 2
        return features

    def cache_key(self, weights_id: str) -> str:
        """Hash everything except the image that features depend on."""
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
    """Build the extractor for training, which prediction on the same device matches."""
    return FeatureExtractor(
        backbone,
        preprocessing,
        hflip=config.hflip,
        device=device.name,
        precision=device.precision,
        batch_size=config.compute.batch_size,
    )


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """One image from the loader; without pixels and error, it is cached."""

    digest: bytes = b""  # 16-byte content hash; b"" if the file could not be read
    pixels: UInt8Array | None = None  # (H, W, 3), preprocessed
    thumbnail: UInt8Array | None = None  # for the near-duplicate search, if requested and not cached
    error: ImageError | None = None


def stream_features(
    extractor: FeatureExtractor,
    load: Callable[[int], LoadedImage],
    n: int,
    *,
    cache: ArrayCache | None = None,
    num_workers: int | None = None,
) -> Iterator[tuple[list[LoadedImage], Float32Array]]:
    """Yield images in order with their features, in chunks of CHUNK images.

    Args:
        load: loads image i < n; called in threads. Without pixels and error, its features are in the cache.
        cache: known features; new ones are added.
        num_workers: loader threads; None selects one per core.

    Yields:
        Images of the chunk and their features (chunk, D); NaN in the row of an error.
    """
    n_parallel = torch.get_num_threads() if extractor.device == "cpu" else 1  # batches computed at once
    ahead = max(CHUNK, 2 * extractor.batch_size * n_parallel)
    images = prefetch_map(load, range(n), num_workers=num_workers, ahead=ahead)

    def extract(batch: list[LoadedImage]) -> tuple[list[LoadedImage], Float32Array]:
        return batch, _compute(extractor, batch)

    ready: list[LoadedImage] = []
    features: list[Float32Array] = []
    batches = _make_batches(images, extractor.batch_size)
    for batch, computed in map_on_cores(extract, batches, extractor.device):
        ready += batch
        features.append(_merge_cached(batch, computed, cache))
        while len(ready) >= CHUNK:  # of equal length, so that streams of several models stay aligned
            rows = np.concatenate(features)
            yield ready[:CHUNK], rows[:CHUNK]
            ready, features = ready[CHUNK:], [rows[CHUNK:]]
    if ready:
        yield ready, np.concatenate(features)


def extract_batch(extractor: FeatureExtractor, batch: Sequence[LoadedImage]) -> Float32Array:
    """Compute features (B, D) of at most one batch of images in the calling thread; errors are NaN.

    They are the same as those of `stream_features`, whatever else is in the batch.
    """
    return _merge_cached(batch, _compute(extractor, batch), None)


def _compute(extractor: FeatureExtractor, batch: Sequence[LoadedImage]) -> Float32Array:
    """Compute features of the images of a batch that have pixels."""
    pixels = [image.pixels for image in batch if image.pixels is not None]
    none = np.empty((0, extractor.n_features), np.float32)
    return extractor(np.stack(pixels)) if pixels else none


def _make_batches(images: Iterable[LoadedImage], batch_size: int) -> Iterator[list[LoadedImage]]:
    """Group images in order until `batch_size` of them have pixels."""
    batch: list[LoadedImage] = []
    n_pixels = 0
    for image in images:
        batch.append(image)
        n_pixels += image.pixels is not None
        if n_pixels == batch_size or len(batch) >= MAX_WAITING:
            yield batch
            batch, n_pixels = [], 0
    if batch:
        yield batch


def _merge_cached(
    batch: Sequence[LoadedImage], computed: Float32Array, cache: ArrayCache | None
) -> Float32Array:
    """Return features (B, D), computed or cached; errors are rows of NaN."""
    if not np.isfinite(computed).all():
        raise BundleError(
            "the network computes features that are not finite: its weights are damaged or "
            "it needs --precision fp32"
        )
    features = np.full((len(batch), computed.shape[1]), np.nan, np.float32)
    features[[image.pixels is not None for image in batch]] = computed
    for row, image in zip(features, batch, strict=True):
        if cache is not None and image.error is None:
            if image.pixels is None:
                row[:] = cache.get(image.digest)
            else:
                cache.add(image.digest, row)
    return features


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """Features of N images, and their digests, errors and thumbnails."""

    values: Float32Array  # (N, D); NaN for images that could not be read
    digests: list[bytes]  # (N,) 16-byte content hashes; b"" for files that could not be read
    errors: dict[int, ImageError]  # by index: why an image could not be read
    thumbnails: UInt8Array | None = None  # (N, S, S) grey, black for unreadable images; None if not requested


def extract_features(
    dataset: ImageDataset, loaded: PretrainedBackbone, config: TrainConfig, device: Device, log: RunLog
) -> ImageFeatures:
    """Extract features of all images with the pretrained backbone."""
    extractor = make_extractor(loaded.backbone, loaded.preprocessing, config, device)
    folder, max_bytes = config.cache_dir or default_cache_dir(), int(config.cache_gb * 1e9)
    cache = ArrayCache(folder, "features", extractor.cache_key(loaded.weights_id), max_bytes=max_bytes)
    thumbnail_cache = None
    if config.near_duplicates:
        longest, max_value = max(loaded.preprocessing.input_size), loaded.preprocessing.max_value
        key = f"{DECODE_VERSION}-{THUMBNAIL_VERSION}-{longest}-{max_value:g}"
        thumbnail_cache = ArrayCache(folder, "thumbs", key, max_bytes=max_bytes)
    with log.progress("reading", len(dataset)) as bar:
        images = extract_cached_features(
            dataset,
            extractor,
            cache,
            thumbnail_cache=thumbnail_cache,
            num_workers=config.compute.num_workers,
            on_progress=bar.update,
        )
    for content, each in (("features", cache), ("thumbnails", thumbnail_cache)):
        if each is not None and each.failure:
            log.note(f"could not cache {content}: {each.failure}")
    return images


def extract_cached_features(
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    cache: ArrayCache,
    *,
    thumbnail_cache: ArrayCache | None = None,
    num_workers: int | None = None,
    on_progress: Callable[[int], object] = lambda n: None,
) -> ImageFeatures:
    """Read, decode and extract every image that is not in the cache.

    Args:
        thumbnail_cache: of thumbnails; None makes none.
        num_workers: loader threads; None selects one per core.
        on_progress: called with the number of images finished since the last call.
    """
    load = partial(_load_image, dataset, extractor.preprocessing, cache, thumbnail_cache)
    values = np.empty((len(dataset), extractor.n_features), np.float32)
    digests: list[bytes] = []
    errors: dict[int, ImageError] = {}
    thumbnails: list[UInt8Array] = []
    try:
        stream = stream_features(extractor, load, len(dataset), cache=cache, num_workers=num_workers)
        for chunk, features in stream:
            start = len(digests)
            values[start : start + len(chunk)] = features
            errors |= {start + i: image.error for i, image in enumerate(chunk) if image.error is not None}
            digests += [image.digest for image in chunk]
            if thumbnail_cache is not None:
                thumbnails += [_cached_thumbnail(image, thumbnail_cache) for image in chunk]
            on_progress(len(chunk))
    finally:
        for each in (cache, thumbnail_cache):  # keeps what is computed after an interrupt
            if each is not None:
                each.flush()
    stacked = None if thumbnail_cache is None else np.stack([EMPTY_THUMBNAIL, *thumbnails])[1:]
    return ImageFeatures(values=values, digests=digests, errors=errors, thumbnails=stacked)


def _load_image(
    dataset: ImageDataset,
    preprocessing: Preprocessing,
    cache: ArrayCache,
    thumbnail_cache: ArrayCache | None,
    i: int,
) -> LoadedImage:
    """Read an image, and decode it unless everything requested is cached."""
    path, digest = dataset.paths[i], b""
    try:
        data = dataset.storage.read(path)
        digest = digest_bytes(data)
        has_features = digest in cache
        has_thumbnail = thumbnail_cache is None or digest in thumbnail_cache
        if has_features and has_thumbnail:
            return LoadedImage(digest=digest)
        pixels = decode_for(data, preprocessing, path=path)
        return LoadedImage(
            digest=digest,
            pixels=None if has_features else eval_transform(pixels, preprocessing),
            thumbnail=None if has_thumbnail else make_thumbnail(pixels),
        )
    except ImageError as error:
        return LoadedImage(digest=digest, error=error.detached())


def _cached_thumbnail(image: LoadedImage, cache: ArrayCache) -> UInt8Array:
    """Return the thumbnail of an image, adding a new one to the cache."""
    if image.error is not None:
        return EMPTY_THUMBNAIL
    if image.thumbnail is None:
        return cache.get(image.digest)
    cache.add(image.digest, image.thumbnail)
    return image.thumbnail


def find_near_duplicates(
    dataset: ImageDataset,
    images: ImageFeatures,
    config: TrainConfig,
    log: RunLog,
    *,
    max_value: float = MAX_VALUE,
) -> list[NearDuplicatePair]:
    """Find near-duplicates, with `hflip` also of mirror images, among images with thumbnails.

    The result is cached, for other runs on the same images.

    Returns:
        Pairs of dataset indices; exact duplicates are represented by the first of them.
    """
    assert images.thumbnails is not None
    rows = first_occurrences(images.digests)
    rows = rows[~np.isin(rows, list(images.errors))]
    thumbnails, features = images.thumbnails[rows], images.values[rows]
    cache = ArrayCache(
        config.cache_dir or default_cache_dir(),
        "pairs",
        f"{SEARCH_VERSION}-{DECODE_VERSION}-{max_value:g}-{'mirrored' if config.hflip else 'upright'}",
        max_bytes=int(config.cache_gb * 1e9),
    )
    digest = hashlib.blake2b(thumbnails.data, digest_size=DIGEST_BYTES)
    digest.update(np.ascontiguousarray(features).data)
    if (key := digest.digest()) in cache:
        found = [NearDuplicatePair.from_row(row) for row in cache.get(key)]
    else:
        failed: list[str] = []

        def read(k: int) -> UInt8Array:
            path = dataset.paths[rows[k]]
            try:
                data = dataset.storage.read(path)
                return decode_image(data, path=path, target_px=CLOSE_PX, max_value=max_value)
            except ImageError:
                failed.append(path)
                raise

        num_workers = config.compute.num_workers
        found = search_near_duplicates(
            thumbnails, read, features, mirrored=config.hflip, num_workers=num_workers, log=log
        )
        if not failed:  # another run may be able to read what has become unreadable
            cache.add(key, np.array([pair.to_row() for pair in found]).reshape(-1, 4))
            cache.flush()
    return [replace(pair, first=int(rows[pair.first]), second=int(rows[pair.second])) for pair in found]
