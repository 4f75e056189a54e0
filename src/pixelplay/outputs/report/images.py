"""Thumbnails embedded in the report, up to a total size."""

import base64
import io
from collections.abc import Collection, Sequence

from PIL import Image

from pixelplay.array_types import UInt8Array
from pixelplay.config import DataConfig
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.decode import MAX_VALUE, decode_image, silence_pillow
from pixelplay.data.sources import open_dataset
from pixelplay.errors import ConfigError, DataError, ImageError
from pixelplay.run_log import RunLog
from pixelplay.thread_pool import prefetch_map

SMALL_PX, LARGE_PX = 144, 256
JPEG_QUALITY = 70
MAX_BYTES = 6 << 20  # of all images in a page; an image shown twice counts twice


class ReportImages:
    """Thumbnails of a dataset, encoded once, up to the size limit of a page.

    Args:
        source: folder, table or archive of the images; None if unknown.
        data: how to read it.
        max_value: value of white in images with more than 8 bits.

    Attributes:
        missing: why some or all images are missing; None if none are.
        thumbnails: path → data URL of each image that could be read.
        n_omitted: images, or places for them, that did not fit.
    """

    def __init__(
        self, source: str | None, data: DataConfig | None = None, *, max_value: float = MAX_VALUE
    ) -> None:
        self._max_value = max_value
        self.n_omitted = 0
        self.missing: str | None = None
        self._dataset: ImageDataset | None = None
        self.thumbnails: dict[str, str] = {}
        self._large: dict[str, str] = {}
        self._n_bytes = 0
        try:
            self._dataset = None if source is None else open_dataset(source, data)
        except (DataError, ConfigError, OSError) as error:
            self.missing = f"could not open the images ({error})"
        if source is None:
            self.missing = "the run does not record where its images are"
        self._known = frozenset(() if self._dataset is None else self._dataset.paths)

    def read(self, path: str, target_px: int) -> UInt8Array:
        """Decode an image (H, W, 3) at a size not much above `target_px`.

        Raises:
            ImageError: it is gone or unreadable.
        """
        if self._dataset is None or path not in self._known:
            raise ImageError(path, "missing", "no longer where it was")
        with silence_pillow():
            data = self._dataset.storage.read(path)
            return decode_image(data, path=path, target_px=target_px, max_value=self._max_value)

    def make_thumbnails(
        self, wanted: Sequence[str], num_workers: int | None, log: RunLog, *, enlarged: Collection[str] = ()
    ) -> None:
        """Encode thumbnails of `wanted` paths, the most important first, until they fill a page.

        The `enlarged` paths also get a larger image.
        """
        paths = [path for path in dict.fromkeys(wanted) if path in self._known]
        if self._dataset is not None and (n_gone := len(set(wanted)) - len(paths)):
            self.missing = f"{n_gone} of {len(set(wanted))} images are no longer where they were"

        def encode_path(i: int) -> list[str]:
            sides = [SMALL_PX, LARGE_PX] if paths[i] in enlarged else [SMALL_PX]
            try:
                pixels = self.read(paths[i], max(sides))
            except ImageError:
                return []
            return [encode(pixels, side) for side in sides]

        n_bytes = 0
        encoded = prefetch_map(encode_path, range(len(paths)), num_workers=num_workers)
        with log.progress("drawing", len(paths)) as bar:
            for path, sizes in zip(paths, encoded, strict=True):
                bar.update()
                if not sizes:
                    continue
                n_bytes += sum(map(len, sizes))
                if n_bytes > MAX_BYTES:
                    self.n_omitted += len(paths) - len(self.thumbnails)
                    break
                self.thumbnails[path] = sizes[0]
                if len(sizes) > 1:
                    self._large[path] = sizes[1]

    def small(self, path: str) -> str | None:
        """Return the thumbnail as a data URL for one place in the page, or None."""
        image = self.thumbnails.get(path)
        return image if image is not None and self.reserve(image) else None

    def large(self, path: str) -> str | None:
        """Return the larger image if there is one and it fits, else the thumbnail."""
        image = self._large.get(path)
        if image is None or self._n_bytes + len(image) > MAX_BYTES:
            return self.small(path)
        self.reserve(image)
        return image

    def reserve(self, *images: str) -> bool:
        """Count images towards the size of the page; False if they do not all fit."""
        n_bytes = sum(map(len, images))
        if self._n_bytes + n_bytes > MAX_BYTES:
            self.n_omitted += len(images)
            return False
        self._n_bytes += n_bytes
        return True


def encode(pixels: UInt8Array, max_side: int) -> str:
    """Shrink an image (H, W, 3) to fit a square and return it as a JPEG data URL."""
    image = Image.fromarray(pixels)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def interleave(lists: Sequence[Sequence[str]], n_each: int) -> list[str]:
    """Return the first item of each list, then the second of each, up to `n_each` per list."""
    longest = min(n_each, max(map(len, lists), default=0))
    return [items[i] for i in range(longest) for items in lists if i < len(items)]
