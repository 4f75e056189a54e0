"""Inputs of a training step: augmented pixels, or cached feature maps of augmented views.

`AugmentedPixels` (full fine-tuning) augments pixels in every epoch. `CachedViews` (partial fine-tuning)
computes the feature maps of some augmented views of each image once and keeps them on disk. All randomness
derives from seed, epoch and image, so any batch can be reproduced at any time, in any thread or process.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pixelplay.array_types import Float32Array, IntArray, UInt8Array
from pixelplay.config import AugmentConfig
from pixelplay.data.augment import SETTING_USED_BY, augment_view
from pixelplay.data.cache import ArrayCache
from pixelplay.data.decode import DECODE_VERSION
from pixelplay.data.pixel_cache import PixelCache
from pixelplay.data.transforms import Preprocessing, Size, eval_transform
from pixelplay.model.device import (
    Device,
    inference_memory_message,
    map_on_cores,
    to_device,
    translate_memory_errors,
)
from pixelplay.model.features import Normalizer
from pixelplay.model.split_backbone import FrozenStages
from pixelplay.thread_pool import default_workers, prefetch_map

LoadedRows = tuple[IntArray, list[UInt8Array], UInt8Array]  # rows, decoded squares, views or feature maps
Inputs = tuple[Tensor, Tensor]  # feature maps (B, C, H, W) and channel statistics (B, D_frozen) on the device
AnyBatch = TypeVar("AnyBatch")
MIXING = ("mixup", "cutmix")
PLAIN, MIRRORED = -1, -2  # views without augmentation
VIEWS_VERSION = 1  # increase when the same pixels yield views that differ by more than rounding


class Batch(NamedTuple):
    """Images of one training batch."""

    rows: IntArray  # (B,) positions in the training data
    times: IntArray  # (B,) how often each has been drawn before in the same epoch
    weights: Float32Array  # (B,) loss weights


def stream(
    batches: Sequence[AnyBatch], load: Callable[[AnyBatch], Callable[[], Inputs]], num_workers: int | None
) -> Iterator[tuple[AnyBatch, Inputs]]:
    """Yield batches in order with their inputs, prefetching a few."""
    ahead = max(8, num_workers or default_workers())  # keeps every worker busy
    loaded = prefetch_map(load, batches, num_workers=num_workers, ahead=ahead)
    for batch, bring in zip(batches, loaded, strict=True):
        yield batch, bring()


@dataclass(frozen=True, kw_only=True)
class AugmentedPixels:
    """Pixels, augmented again in every epoch."""

    pixels: PixelCache
    preprocessing: Preprocessing
    augmenting: AugmentConfig
    hflip: bool
    device: Device
    seed: int

    def train_batch(self, batch: Batch, epoch: int, size: Size) -> Callable[[], Inputs]:
        """Load one augmented view of each row, in a thread; the result moves them to the device."""
        wholes = [self.pixels[i] for i in batch.rows]
        views = [
            augment_view(
                whole,
                self.augmenting,
                self.preprocessing,
                np.random.default_rng([self.seed, epoch, int(i), int(time)]),
                hflip=self.hflip,
                size=size,
            )
            for whole, i, time in zip(wholes, batch.rows, batch.times, strict=True)
        ]
        return self._bring(views, batch.rows, wholes)

    def plain_batch(self, rows: IntArray, *, mirrored: bool = False) -> Callable[[], Inputs]:
        """Load each row as prediction sees it, or its mirror image."""
        wholes = [self.pixels[i] for i in rows]
        views = [_plain_view(whole, self.preprocessing, mirrored=mirrored) for whole in wholes]
        return self._bring(views, rows, wholes)

    def flush(self) -> None:
        """Write loaded images to the cache."""
        self.pixels.flush()

    @cached_property
    def _normalize(self) -> Normalizer:
        return Normalizer(self.preprocessing, self.device.name)

    def _bring(
        self, views: Sequence[UInt8Array], rows: IntArray, wholes: Sequence[UInt8Array]
    ) -> Callable[[], Inputs]:
        pixels = torch.from_numpy(np.stack(views))
        if self.device.name == "cuda":
            pixels = pixels.pin_memory()

        def bring() -> Inputs:
            for i, whole in zip(rows, wholes, strict=True):
                self.pixels.keep(i, whole)  # here, because only one thread may
            images = self._normalize(pixels)
            return images, images.new_empty(len(images), 0)

        return bring


class CachedViews:
    """Feature maps of augmented views at the cut, kept on disk.

    Args:
        digests: (N,) content hash of each image.
        network: architecture and feature kind of the backbone.
        cached_views: V, augmented views per training image.
        cache_dir: folder; views are reused as long as nothing they depend on changes.
    """

    def __init__(
        self,
        frozen: FrozenStages,
        pixels: AugmentedPixels,
        digests: Sequence[bytes],
        *,
        network: tuple[str, str],
        cached_views: int,
        weights_id: str,
        cache_dir: str,
        max_bytes: int,
    ) -> None:
        self.cached_views = cached_views
        self._pixels, self._digests, self._shape = pixels, digests, frozen.map_shape
        device = pixels.device
        self._dtype = torch.bfloat16 if device.is_bf16 else torch.float32
        self._n_map_bytes = int(np.prod(frozen.map_shape)) * self._dtype.itemsize
        self._front = frozen.to(device.name, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._normalize = Normalizer(pixels.preprocessing, device.name)
        key = {
            "versions": [DECODE_VERSION, VIEWS_VERSION],
            "network": network,
            "weights": weights_id,
            "cut": frozen.n_stages,
            "shape": [*frozen.map_shape, frozen.n_stats],
            "preprocessing": asdict(pixels.preprocessing),
            "numbers": f"{device.name} {self._dtype}",
        }
        # mixing happens later and does not affect the views
        augmenting = {
            name: [kind for kind in value if kind not in MIXING] if name == "augment" else value
            for name, value in asdict(pixels.augmenting).items()
            if not {*SETTING_USED_BY.get(name, ("any",))} <= {*MIXING}
        }
        varied = {**key, "augmenting": augmenting, "hflip": pixels.hflip, "seed": pixels.seed}
        self._plain = [
            ArrayCache(cache_dir, "views", _digest_of({**key, "mirrored": mirrored}), max_bytes=max_bytes)
            for mirrored in (False, True)
        ]
        self._varied = [
            ArrayCache(cache_dir, "views", _digest_of({**varied, "view": view}), max_bytes=max_bytes)
            for view in range(cached_views)
        ]

    @staticmethod
    def bytes_per_view(frozen: FrozenStages, device: Device) -> int:
        """Return the size of one view of one image on disk."""
        return int(np.prod(frozen.map_shape)) * (2 if device.is_bf16 else 4) + 4 * frozen.n_stats

    def compute(
        self,
        train: IntArray,
        plain: IntArray,
        *,
        batch_size: int,
        num_workers: int | None,
        mirror: bool = False,
        on_progress: Callable[[int], object] = lambda n: None,
    ) -> str | None:
        """Cache V views of each `train` row, the plain view of each `plain` row; return why not, or None.

        Args:
            mirror: also cache the mirror image of each `plain` row.
        """
        for cache, rows, view in [
            (self._plain[0], plain, PLAIN),
            *([(self._plain[1], plain, MIRRORED)] if mirror else []),
            *((cache, train, view) for view, cache in enumerate(self._varied)),
        ]:
            todo = np.array([i for i in rows if self._digests[i] not in cache], dtype=np.int64)
            on_progress(len(rows) - len(todo))
            for chunk, wholes, made in self._make(todo, view, batch_size, num_workers):
                for i, whole, row in zip(chunk, wholes, made, strict=True):
                    self._pixels.pixels.keep(i, whole)
                    cache.add(self._digests[i], row)
                on_progress(len(chunk))
            cache.flush()
            self._pixels.flush()
            if cache.failure:
                return cache.failure
        return None

    def drop(self) -> None:
        """Delete all views from disk."""
        for cache in (*self._plain, *self._varied):
            cache.drop()

    def measure_s(self, rows: IntArray, batch_size: int, num_workers: int | None, *, n_warmup: int) -> float:
        """Measure the seconds per augmented view after `n_warmup` batches, if more follow; store nothing."""
        ends, sizes = [time.perf_counter()], [0]
        for chunk, _, _ in self._make(rows, 0, batch_size, num_workers):
            ends.append(time.perf_counter())
            sizes.append(len(chunk))
        n_warmup = n_warmup if n_warmup < len(sizes) - 1 else 0
        return (ends[-1] - ends[n_warmup]) / sum(sizes[n_warmup + 1 :])

    def train_batch(self, batch: Batch, epoch: int, size: Size) -> Callable[[], Inputs]:
        """Load the next view of each row; images start with different views."""
        chosen = [
            self._varied[(epoch + int(time) + int.from_bytes(self._digests[i][:4])) % self.cached_views]
            for i, time in zip(batch.rows, batch.times, strict=True)
        ]
        return self._bring([cache.get(self._digests[i]) for i, cache in zip(batch.rows, chosen, strict=True)])

    def plain_batch(self, rows: IntArray, *, mirrored: bool = False) -> Callable[[], Inputs]:
        """Load the plain view of each row, or its mirror image."""
        return self._bring([self._plain[mirrored].get(self._digests[i]) for i in rows])

    def flush(self) -> None:
        """Do nothing; all views are there already."""

    def _make(
        self, rows: IntArray, view: int, batch_size: int, num_workers: int | None
    ) -> Iterator[LoadedRows]:
        """Yield rows, decoded squares, and bytes (n, …) of one view's feature maps and statistics."""

        source = self._pixels

        def load(i: int) -> tuple[UInt8Array, UInt8Array]:
            whole = source.pixels[i]
            if view < 0:
                return whole, _plain_view(whole, source.preprocessing, mirrored=view == MIRRORED)
            digest = self._digests[i]
            rng = np.random.default_rng([source.seed, view, int.from_bytes(digest)])
            return whole, augment_view(
                whole, source.augmenting, source.preprocessing, rng, hflip=source.hflip
            )

        def read() -> Iterator[LoadedRows]:
            loaded = iter(prefetch_map(load, rows, num_workers=num_workers))
            for start in range(0, len(rows), batch_size):
                wholes, views = zip(*islice(loaded, batch_size), strict=True)
                yield rows[start : start + batch_size], list(wholes), np.stack(views)

        def work(read: LoadedRows) -> LoadedRows:
            chunk, wholes, pixels = read
            return chunk, wholes, self._run_front(pixels, batch_size)

        return map_on_cores(work, read(), source.device.name)

    @torch.inference_mode()
    def _run_front(self, pixels: UInt8Array, batch_size: int) -> UInt8Array:
        """Return bytes (n, …) of the feature maps and channel statistics of pixels (n, S, S, 3)."""
        n = len(pixels)
        # every batch is padded to full size, so that a view does not depend on the size of its batch
        full = np.concatenate([pixels, np.zeros((batch_size - n, *pixels.shape[1:]), np.uint8)])
        device = self._pixels.device
        message = inference_memory_message(device.name, batch_size)
        with translate_memory_errors(message), device.autocast():
            maps, stats = self._front(self._normalize(torch.from_numpy(full)))
        maps = maps[:n].to(self._dtype).contiguous().cpu()
        parts = [maps.view(torch.uint8).reshape(n, -1), stats[:n].cpu().view(torch.uint8).reshape(n, -1)]
        return np.asarray(torch.cat(parts, dim=1).numpy())

    def _bring(self, rows: Sequence[UInt8Array]) -> Callable[[], Inputs]:
        raw = np.stack(rows)
        maps = torch.from_numpy(raw[:, : self._n_map_bytes].copy()).view(self._dtype)
        maps = maps.view(len(rows), *self._shape).contiguous(memory_format=torch.channels_last)
        # a copy: after an odd number of bf16 values, float32 values would be misaligned
        stats = torch.from_numpy(raw[:, self._n_map_bytes :].copy().view(np.float32))
        device = self._pixels.device.name
        if device == "cuda":
            maps, stats = maps.pin_memory(), stats.pin_memory()
        return lambda: (to_device(maps, device), to_device(stats, device))


InputSource = AugmentedPixels | CachedViews


def _plain_view(whole: UInt8Array, preprocessing: Preprocessing, *, mirrored: bool) -> UInt8Array:
    view = eval_transform(whole, preprocessing)  # (S, S, 3)
    return np.ascontiguousarray(view[:, ::-1]) if mirrored else view


def _digest_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
