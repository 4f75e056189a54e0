"""Images → small pictures inside a page, as long as its size allows."""

import base64
import io
import os
from collections.abc import Collection, Sequence

from PIL import Image

from pixelplay.arrays import UInt8Array
from pixelplay.config import DataConfig
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.decode import decode_image, silence_pillow
from pixelplay.data.sources import scan_source
from pixelplay.errors import ConfigError, DataError, ImageError
from pixelplay.run_log import RunLog
from pixelplay.thread_pool import prefetch_map

SMALL_PX, LARGE_PX = 144, 256
QUALITY = 70
MAX_BYTES = 6 << 20  # of all pictures, each as often as the page shows it


class Pictures:
    """Makes pictures of images, each once, until the page has enough.

    Args:
        source: folder, table or archive that the images lie in; None where nobody knows.

    Attributes:
        missing: why there are no pictures, or not all; None where nothing is amiss.
        n_left_out: pictures, or places for them, for which no room was left.
    """

    def __init__(self, source: str | None, data: DataConfig | None = None) -> None:
        self.n_left_out = 0
        self.missing: str | None = None
        self._index: ImageDataset | None = None
        self._made: dict[str, str] = {}
        self._enlarged: dict[str, str] = {}
        self._n_bytes = 0
        try:
            self._index = None if source is None else scan_source(source, data)
        except (DataError, ConfigError, OSError) as error:
            self.missing = f"the images could not be opened ({error})"
        if source is None:
            self.missing = "nobody wrote down where the images are"
        self._known: frozenset[str] = frozenset() if self._index is None else frozenset(self._index.paths)

    def read(self, path: str, target_px: int) -> UInt8Array:
        """Decode an image (H, W, 3), not much larger than asked.

        Raises:
            ImageError: it cannot be used any more.
        """
        if self._index is None or path not in self._known:
            raise ImageError(path, "missing", "no longer where it was")
        with silence_pillow():
            return decode_image(self._index.storage.read(path), path=path, target_px=target_px)

    def make(
        self,
        wanted: Sequence[str],
        num_workers: int | None,
        log: RunLog,
        *,
        enlarged: Collection[str] = (),
    ) -> None:
        """Make small pictures of images, the most wanted first, until the page is full of them.

        Args:
            wanted: paths.
            enlarged: those of which a larger picture is made as well.
        """
        paths = [path for path in dict.fromkeys(wanted) if path in self._known]
        if self._index is not None and (n_gone := len(set(wanted)) - len(paths)):
            self.missing = f"{n_gone} of {len(set(wanted))} images are not where they were"

        def draw(i: int) -> list[str]:
            sides = [SMALL_PX, LARGE_PX] if paths[i] in enlarged else [SMALL_PX]
            try:
                pixels = self.read(paths[i], max(sides))
            except ImageError:
                return []
            return [encode(pixels, side) for side in sides]

        n_bytes = 0
        with log.progress("drawing", len(paths)) as bar:
            for path, drawn in zip(
                paths, prefetch_map(draw, range(len(paths)), num_workers=num_workers), strict=True
            ):
                bar.update()
                if not drawn:
                    continue
                n_bytes += sum(map(len, drawn))
                if n_bytes > MAX_BYTES:
                    self.n_left_out += len(paths) - len(self._made)
                    break
                self._made[path] = drawn[0]
                if len(drawn) > 1:
                    self._enlarged[path] = drawn[1]

    @property
    def is_empty(self) -> bool:
        """Whether no image could be drawn at all."""
        return not self._made

    def small(self, path: str) -> str | None:
        """The picture of an image as an address, for one place of the page; None where there is none."""
        picture = self._made.get(path)
        return picture if picture is not None and self.has_room(picture) else None

    def large(self, path: str) -> str | None:
        """The larger picture of an image, or the small one where there is none."""
        picture = self._enlarged.get(path)
        if picture is None or self._n_bytes + len(picture) > MAX_BYTES:
            return self.small(path)
        self._n_bytes += len(picture)
        return picture

    def has_room(self, *pictures: str) -> bool:
        """Whether the page can take further pictures, all of them; they are counted if it can."""
        n_bytes = sum(map(len, pictures))
        if self._n_bytes + n_bytes > MAX_BYTES:
            self.n_left_out += len(pictures)
            return False
        self._n_bytes += n_bytes
        return True


def encode(pixels: UInt8Array, side_px: int) -> str:
    """Fit pixels (H, W, 3) into a square and write them as a data address."""
    image = Image.fromarray(pixels)
    image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def find_source(asked: str | None, recorded: str | None) -> str | None:
    """Where the images are: as the user says, or where they were when the run was made.

    Raises:
        DataError: nothing is where the user says.
    """
    if asked is not None:
        if not os.path.exists(asked):
            raise DataError(f"{asked} does not exist; give the folder, table or archive of the images")
        return asked
    return recorded


def take_turns(lists: Sequence[Sequence[str]], n_each: int) -> list[str]:
    """The first of each list, then the second of each, up to n of each."""
    longest = min(n_each, max(map(len, lists), default=0))
    return [members[turn] for turn in range(longest) for members in lists if turn < len(members)]
