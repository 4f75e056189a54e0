"""Decoded images for training: decoded once, kept a little larger than the network needs."""

from pixelplay.arrays import UInt8Array
from pixelplay.data.audit import digest_bytes
from pixelplay.data.cache import ArrayCache
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.decode import DECODE_VERSION, decode_image
from pixelplay.data.transforms import Preprocessing, eval_transform
from pixelplay.errors import ImageError

MARGIN = 1.25  # side kept over side needed: a crop then still has pixels enough
MAX_SHARE = 0.5  # of the cache; larger sets of images are decoded in every pass


class PixelCache:
    """Gives the whole of each image as a square, from the cache or from its file.

    Images are squashed to the square, as the network sees them; what augmentation cuts from them
    it cuts in fractions of their sides.

    Args:
        index: N images, known to be readable.
        digests: (N,) content of each.
        side_px: of the squares.
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
        self.side_px = round(MARGIN * preprocessing.input_size)
        self._index, self._digests = dataset, digests
        self._view = Preprocessing(
            input_size=self.side_px,
            mean=preprocessing.mean,
            std=preprocessing.std,
            interpolation=preprocessing.interpolation,
        )
        n_bytes = len(dataset) * 3 * self.side_px**2
        fits = n_bytes <= MAX_SHARE * max_bytes
        self._too_many = ""
        if max_bytes and not fits:
            room, taken = (f"{size / 1e6:,.1f} MB" for size in (MAX_SHARE * max_bytes, n_bytes))
            self._too_many = f"they take {taken}, and {room} of the cache are for them; raise --cache-gb"
        key = f"{DECODE_VERSION}-{self.side_px}-{preprocessing.interpolation}"
        self._cache = ArrayCache(cache_dir, "pixels", key, max_bytes=max_bytes if fits else 0)

    def __getitem__(self, i: int) -> UInt8Array:
        """Pixels (S, S, 3) of image i; threads may ask at the same time.

        Raises:
            ImageError: it can no longer be read, or is no longer what it was.
        """
        if self._digests[i] in self._cache:
            return self._cache.get(self._digests[i])
        path = self._index.paths[i]
        data = self._index.storage.read(path)
        if digest_bytes(data) != self._digests[i]:  # the cache would keep it as what it was
            raise ImageError(path, "unreadable", "it has changed since it was first read; start again")
        return eval_transform(decode_image(data, path=path, target_px=self.side_px), self._view)

    def keep(self, i: int, pixels: UInt8Array) -> None:
        """Remember what `self[i]` gave; from one thread only."""
        if self._digests[i] not in self._cache:
            self._cache.add(self._digests[i], pixels)

    @property
    def failure(self) -> str:
        """Why they are decoded anew in every pass, unless that was asked for; "" where they are kept."""
        return self._too_many or self._cache.failure

    def flush(self) -> None:
        """Write what is remembered to the disk."""
        self._cache.flush()
