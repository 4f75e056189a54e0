"""Photographs → features and thumbs, each read once; what was seen before comes from the cache."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pixelplay.arrays import Float32Array, UInt8Array
from pixelplay.config import TrainConfig
from pixelplay.data.audit import digest_bytes
from pixelplay.data.cache import PhotographCache, default_cache_dir
from pixelplay.data.dataset import ImageIndex
from pixelplay.data.decode import DECODE_VERSION, decode_image
from pixelplay.data.near_duplicates.thumbnails import THUMB_PX, THUMB_VERSION, make_thumb
from pixelplay.data.transforms import Preprocessing, eval_view
from pixelplay.errors import BundleError, ImageError
from pixelplay.model.backbone import LoadedBackbone
from pixelplay.model.cores import on_every_core
from pixelplay.model.features import Device, FeatureExtractor, make_extractor
from pixelplay.run_log import Journal
from pixelplay.thread_pool import map_ahead

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
