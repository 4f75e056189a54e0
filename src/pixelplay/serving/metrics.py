"""Prometheus metrics of the service."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

KNOWN_PATHS = (
    "/",
    "/v1/predict",
    "/v1/explain",
    "/v1/model",
    "/v1/reload",
    "/healthz",
    "/readyz",
    "/metrics",
)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class ServiceMetrics:
    """Counts requests, images and batches.

    Args:
        n_waiting: returns the number of images in progress.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, n_waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "pixelplay_requests", "Requests answered", ("path", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "pixelplay_request_seconds",
            "Time to answer a request",
            ("path",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._images = Counter("pixelplay_images", "Images by status", ("status",), registry=self._registry)
        self._batches = Histogram(
            "pixelplay_batch_images", "Images in a batch", buckets=IMAGES, registry=self._registry
        )
        in_progress = Gauge("pixelplay_images_in_progress", "Images in progress", registry=self._registry)
        in_progress.set_function(n_waiting)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request; unknown paths share one label, so that clients cannot add labels."""
        label = path if path in KNOWN_PATHS else "other"
        self._requests.labels(label, str(status)).inc()
        self._seconds.labels(label).observe(seconds)

    def count_image(self, status: str) -> None:
        """Count an image by the status of its row."""
        self._images.labels(status).inc()

    def count_batch(self, n: int) -> None:
        """Count a batch of n images."""
        self._batches.observe(n)

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
