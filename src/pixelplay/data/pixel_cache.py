"""Decoded images for training: decoded once, stored slightly larger than the network input."""

from dataclasses import replace

from pixelplay.array_types import UInt8Array
from pixelplay.data.audit import digest_bytes
from pixelplay.data.cache import ArrayCache
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.decode import DECODE_VERSION
from pixelplay.data.transforms import Preprocessing, decode_for, eval_transform
from pixelplay.errors import ImageError

MARGIN = 1.25  # stored side over input side, so that a crop still has enough pixels
MAX_FRACTION = 0.5  # of the cache; larger datasets are decoded in every epoch


class PixelCache:
    """Return each image at a size above the network's input, from the cache or from its file.

    It is fitted as for prediction; augmentation crops in fractions of its sides.

    Args:
        dataset: N readable images.
        digests: (N,) of the files.
        preprocessing: of the network.
        cache_dir: root folder of the cache.
        max_bytes: size limit of the cache.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        digests: tuple[bytes, ...],
        preprocessing: Preprocessing,
        *,
        cache_dir: str,
        max_bytes: int,
    ) -> None:
        height, width = (round(MARGIN * side) for side in preprocessing.input_size)
        self._dataset, self._digests = dataset, digests
        self.preprocessing = replace(preprocessing, input_size=(height, width))
        n_bytes, limit = len(dataset) * 3 * height * width, MAX_FRACTION * max_bytes
        sizes = f"they need {n_bytes / 1e6:,.1f} MB but can use {limit / 1e6:,.1f} MB"
        self._too_large = f"{sizes}; raise --cache-gb" if 0 < limit < n_bytes else ""
        fit = preprocessing.fit if preprocessing.fit != "pad" else f"pad{preprocessing.mean}"
        key = f"{DECODE_VERSION}-{height}x{width}-{preprocessing.interpolation}-{fit}"
        key += f"-{preprocessing.max_value:g}"
        self._cache = ArrayCache(cache_dir, "pixels", key, max_bytes=max_bytes if n_bytes <= limit else 0)

    def __getitem__(self, i: int) -> UInt8Array:
        """Return image i as (H, W, 3) uint8; thread-safe.

        Raises:
            ImageError: the file has become unreadable or has changed.
        """
        if self._digests[i] in self._cache:
            return self._cache.get(self._digests[i])
        path = self._dataset.paths[i]
        data = self._dataset.storage.read(path)
        if digest_bytes(data) != self._digests[i]:  # the cache would store it under the old digest
            raise ImageError(path, "unreadable", "it has changed since it was first read; start again")
        return eval_transform(decode_for(data, self.preprocessing, path=path), self.preprocessing)

    def keep(self, i: int, pixels: UInt8Array) -> None:
        """Add the pixels of image i to the cache; call from one thread only."""
        if self._digests[i] not in self._cache:
            self._cache.add(self._digests[i], pixels)

    @property
    def failure(self) -> str:
        """Reason why every epoch decodes the images again; "" if they are cached or `max_bytes` is 0."""
        return self._too_large or self._cache.failure

    def flush(self) -> None:
        """Write added pixels to the disk."""
        self._cache.flush()
