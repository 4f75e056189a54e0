"""Count of the images and bytes that the service has accepted."""

from collections.abc import Iterator
from contextlib import contextmanager

from pixelplay.serving.problems import Problem
from pixelplay.serving.settings import LimitsConfig

UPLOADS_IN_MEMORY = 8  # bodies of the largest allowed size that may be in memory together


class Admission:
    """Counts images and bytes in progress and refuses more than the limits.

    It is used in the thread of the event loop only, so it needs no lock.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self.n_images = 0
        self._n_bytes = 0
        self._limits = limits

    @contextmanager
    def images(self, n: int) -> Iterator[None]:
        """Count n images while the block runs; Problem 429 if they do not fit into the queue."""
        if self.n_images + n > self._limits.max_queue:
            raise _busy(f"{self.n_images} images are in progress; the limit is {self._limits.max_queue}")
        self.n_images += n
        try:
            yield
        finally:
            self.n_images -= n

    @contextmanager
    def bytes(self) -> Iterator["ReceivedBytes"]:
        """Count the bytes that the block receives, until it ends."""
        received = ReceivedBytes(self)
        try:
            yield received
        finally:
            self._n_bytes -= received.n

    def add_bytes(self, n: int) -> None:
        """Count n more bytes; Problem 429 if all uploads together need too much memory."""
        self._n_bytes += n
        if self._n_bytes > UPLOADS_IN_MEMORY * self._limits.max_bytes:
            raise _busy("too many uploads are in progress")


class ReceivedBytes:
    """Number of bytes of one upload."""

    def __init__(self, admission: Admission) -> None:
        self.n = 0
        self._admission = admission

    def add(self, n: int) -> None:
        """Count n more bytes; errors as `Admission.add_bytes`."""
        self.n += n
        self._admission.add_bytes(n)


def _busy(reason: str) -> Problem:
    return Problem(429, f"{reason}; try again later", headers={"Retry-After": "1"})
