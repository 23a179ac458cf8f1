"""Metrics of the server in the text format of Prometheus."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Metrics of one server.

    Example:
        >>> metrics = Metrics()
        >>> metrics.images.inc(3)
        >>> b"netfission_images_total 3.0" in metrics.text()
        True
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "netfission_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "netfission_predict_seconds",
            "Time from the head of a prediction request to the end of its answer",
            buckets=_SECONDS,
            registry=registry,
        )
        self.images = Counter("netfission_images", "Images answered", registry=registry)
        self.batch_size = Histogram(
            "netfission_batch_size", "Images per batch", buckets=_SIZES, registry=registry
        )
        self.in_flight = Gauge(
            "netfission_images_in_flight", "Images that are being decoded, wait or run", registry=registry
        )
        self.drift_images = Gauge(
            "netfission_drift_images", "Last images that are tested for drift", registry=registry
        )
        self.drift_p_value = Gauge(
            "netfission_drift_p_value",
            "p-value of the last images coming from the distribution of the calibration images",
            registry=registry,
        )

    def text(self) -> bytes:
        """Return the current values of all metrics."""
        return generate_latest(self._registry)


class CountingMiddleware:
    """Middleware that counts and times the requests of an application.

    Args:
        app: the application.
        metrics: what is updated.
        paths: paths that are counted by name; all others count as "other", so that a client cannot add
            counters without end.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count a request, and pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, send_and_note_status)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, status).inc()
            if path == "/predict":
                self._metrics.seconds.observe(time.perf_counter() - start)
