"""What a training step takes: inputs at the cut, from kept maps or from pixels made anew.

Two sources with one face. `ViewSource` (partial) computes some augmented views of each photograph as
far as the cut, once, and keeps them on disk. `PixelSource` (full) augments pixels in every epoch.
All chance comes from the seed, the epoch and the photograph, so a batch can be made again at any
time, on any thread, by any process.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixelplay.config import AugmentConfig
from pixelplay.data.augment import augment_view
from pixelplay.data.cache import PhotographCache
from pixelplay.data.decode import DECODE_VERSION
from pixelplay.data.loader import map_ahead
from pixelplay.data.pixels import PixelStore
from pixelplay.data.transforms import Preprocessing, eval_view
from pixelplay.model.features import Device, Normaliser
from pixelplay.model.tail import Halves

IntArray = NDArray[np.int64]
Inputs = tuple[Tensor, Tensor]  # maps (B, C, H, W) and moments (B, D_front), on the device
VIEWS_VERSION = 1  # raise it when the same pixels yield other views


class Source(Protocol):
    """Gives inputs of photographs, numbered as in the material."""

    def train_batch(self, rows: IntArray, epoch: int, size_px: int) -> Callable[[], Inputs]:
        """Load one varied view of each row, in a thread; the result brings it to the device."""

    def plain_batch(self, rows: IntArray) -> Callable[[], Inputs]:
        """Load the whole of each row as prediction sees it, without its mirror image."""


def stream(
    batches: Sequence[IntArray], load: Callable[[IntArray], Callable[[], Inputs]], num_workers: int | None
) -> Iterator[tuple[IntArray, Inputs]]:
    """Yield batches in order with their inputs, a few loaded ahead."""
    loaded = map_ahead(lambda i: load(batches[i]), len(batches), num_workers=num_workers, ahead=8)
    for rows, bring in zip(batches, loaded, strict=True):
        yield rows, bring()


@dataclass(frozen=True, kw_only=True)
class PixelSource:
    """Pixels, augmented anew in every epoch."""

    pixels: PixelStore
    preprocessing: Preprocessing
    augmenting: AugmentConfig
    hflip: bool
    device: Device
    seed: int

    def train_batch(self, rows: IntArray, epoch: int, size_px: int) -> Callable[[], Inputs]:
        """See `Source`."""
        views = [
            augment_view(
                self.pixels[i],
                self.augmenting,
                self.preprocessing,
                # a row that is drawn twice in an epoch differs by its place in the batch
                np.random.default_rng([self.seed, epoch, int(i), place]),
                hflip=self.hflip,
                size_px=size_px,
            )
            for place, i in enumerate(rows)
        ]
        return self._bring(views)

    def plain_batch(self, rows: IntArray) -> Callable[[], Inputs]:
        """See `Source`."""
        return self._bring([eval_view(self.pixels[i], self.preprocessing) for i in rows])

    def _bring(self, views: Sequence[NDArray[np.uint8]]) -> Callable[[], Inputs]:
        pixels = torch.from_numpy(np.stack(views))
        if self.device.name == "cuda":
            pixels = pixels.pin_memory()

        def bring() -> Inputs:
            images = Normaliser(self.preprocessing, self.device.name)(pixels)
            return images, images.new_empty(len(images), 0)

        return bring


class ViewSource:
    """Views as far as the cut, kept on disk.

    Args:
        halves: the backbone, cut.
        digests: (N,) content of each photograph.
        n_views: V, augmented views of each photograph that is learned from.
        weights_id: names the backbone's weights.
        cache_dir: where the views are kept; they are reused as long as nothing changes that they depend on.
    """

    def __init__(
        self,
        halves: Halves,
        pixels: PixelSource,
        digests: Sequence[bytes],
        *,
        n_views: int,
        weights_id: str,
        cache_dir: str,
        max_bytes: int,
    ) -> None:
        assert halves.front is not None
        self.n_views = n_views
        self._pixels, self._digests, self._shape = pixels, digests, halves.shape
        device = pixels.device
        self._dtype = torch.bfloat16 if device.is_bf16 else torch.float32
        self._n_map_bytes = int(np.prod(halves.shape)) * self._dtype.itemsize
        self._front = halves.front.to(device.name, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._normalise = Normaliser(pixels.preprocessing, device.name)
        key = {
            "versions": [DECODE_VERSION, VIEWS_VERSION],
            "weights": weights_id,
            "cut": halves.tail.n_front,
            "shape": [*halves.shape, halves.n_moments],
            "preprocessing": asdict(pixels.preprocessing),
            "numbers": f"{device.name} {self._dtype}",
        }
        varied = {**key, "augmenting": asdict(pixels.augmenting), "hflip": pixels.hflip, "seed": pixels.seed}
        self._plain = PhotographCache(cache_dir, "views", _digest_of(key), max_bytes=max_bytes)
        self._varied = [
            PhotographCache(cache_dir, "views", _digest_of({**varied, "view": view}), max_bytes=max_bytes)
            for view in range(n_views)
        ]

    @staticmethod
    def bytes_per_view(halves: Halves, device: Device) -> int:
        """What one view of one photograph takes on the disk."""
        return int(np.prod(halves.shape)) * (2 if device.is_bf16 else 4) + 4 * halves.n_moments

    def compute(
        self,
        train: IntArray,
        plain: IntArray,
        *,
        batch_size: int,
        num_workers: int | None,
        on_progress: Callable[[int], object] = lambda n: None,
    ) -> None:
        """Make what is not on the disk yet: V views of each `train` row, the whole of each `plain` row."""
        for cache, rows, view in [
            (self._plain, plain, None),
            *((cache, train, view) for view, cache in enumerate(self._varied)),
        ]:
            todo = np.array([i for i in rows if self._digests[i] not in cache], dtype=np.int64)
            on_progress(len(rows) - len(todo))
            for chunk, pixels in self._read(todo, view, batch_size, num_workers):
                for i, row in zip(chunk, self._run_front(pixels, batch_size), strict=True):
                    cache.add(self._digests[i], row)
                on_progress(len(chunk))
            cache.flush()
            if cache.failure:
                raise OSError(28, f"views cannot be kept: {cache.failure}")
        self._pixels.pixels.flush()

    def try_out(self, rows: IntArray, batch_size: int, num_workers: int | None) -> None:
        """Make one varied view of each row and keep nothing, to see how long it takes."""
        for _, pixels in self._read(rows, 0, batch_size, num_workers):
            self._run_front(pixels, batch_size)

    def train_batch(self, rows: IntArray, epoch: int, size_px: int) -> Callable[[], Inputs]:
        """See `Source`; in each epoch a photograph shows its next view, and each starts with another."""
        chosen = [
            self._varied[(epoch + place + int.from_bytes(self._digests[i][:4])) % self.n_views]
            for i, place in zip(rows, _occurrences(rows), strict=True)
        ]
        return self._bring([cache.get(self._digests[i]) for i, cache in zip(rows, chosen, strict=True)])

    def plain_batch(self, rows: IntArray) -> Callable[[], Inputs]:
        """See `Source`."""
        return self._bring([self._plain.get(self._digests[i]) for i in rows])

    def _read(
        self, rows: IntArray, view: int | None, batch_size: int, num_workers: int | None
    ) -> Iterator[tuple[IntArray, NDArray[np.uint8]]]:
        source = self._pixels

        def load(n: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
            whole = source.pixels[rows[n]]
            if view is None:
                return whole, eval_view(whole, source.preprocessing)
            digest = self._digests[rows[n]]
            rng = np.random.default_rng([source.seed, view, int.from_bytes(digest)])
            view_pixels = augment_view(
                whole, source.augmenting, source.preprocessing, rng, hflip=source.hflip
            )
            return whole, view_pixels

        pending = []
        for n, (whole, pixels) in enumerate(map_ahead(load, len(rows), num_workers=num_workers)):
            source.pixels.keep(rows[n], whole)
            pending.append(pixels)
            if len(pending) == batch_size or n + 1 == len(rows):
                yield rows[n + 1 - len(pending) : n + 1], np.stack(pending)
                pending = []

    @torch.inference_mode()
    def _run_front(self, pixels: NDArray[np.uint8], batch_size: int) -> NDArray[np.uint8]:
        """Bytes (n, …) of the maps and moments of pixels (n, S, S, 3)."""
        n = len(pixels)
        # every batch is full, so that a view does not depend on how many others came with it
        full = np.concatenate([pixels, np.zeros((batch_size - n, *pixels.shape[1:]), np.uint8)])
        with self._pixels.device.autocast():
            maps, moments = self._front(self._normalise(torch.from_numpy(full)))
        maps = maps[:n].to(self._dtype).contiguous().cpu()
        parts = [maps.view(torch.uint8).reshape(n, -1), moments[:n].cpu().view(torch.uint8).reshape(n, -1)]
        return np.asarray(torch.cat(parts, dim=1).numpy())

    def _bring(self, rows: Sequence[NDArray[np.uint8]]) -> Callable[[], Inputs]:
        raw = np.stack(rows)
        maps = torch.from_numpy(raw[:, : self._n_map_bytes].copy()).view(self._dtype)
        maps = maps.view(len(rows), *self._shape)
        # a copy: behind an odd number of bf16 values a float32 would start between two words
        moments = torch.from_numpy(raw[:, self._n_map_bytes :].copy().view(np.float32))
        maps = maps.contiguous(memory_format=torch.channels_last)
        device = self._pixels.device.name
        if device == "cuda":
            maps, moments = maps.pin_memory(), moments.pin_memory()
        return lambda: (maps.to(device, non_blocking=True), moments.to(device, non_blocking=True))


def _occurrences(rows: IntArray) -> list[int]:
    """How often each row has come before in the same batch."""
    seen: dict[int, int] = {}
    places = []
    for i in rows.tolist():
        places.append(seen.get(i, 0))
        seen[i] = places[-1] + 1
    return places


def _digest_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
