"""What the server counts, in the text format of Prometheus."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter(
            "netfission_requests", "Requests by path and status", ["path", "status"], registry=own
        )
        self.seconds = Histogram(
            "netfission_predict_seconds",
            "From the head of a request for predictions to the end of its answer",
            buckets=_SECONDS,
            registry=own,
        )
        self.images = Counter("netfission_images", "Images answered", registry=own)
        self.batch_size = Histogram(
            "netfission_batch_size", "Images in a batch", buckets=_SIZES, registry=own
        )
        self.under_way = Gauge(
            "netfission_images_under_way", "Images that are being decoded, wait or run", registry=own
        )

    def text(self) -> bytes:
        """All of them now."""
        return generate_latest(self._registry)


class Counted:
    """An application whose requests are counted and timed."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths  # no others, or a client could add counters without end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count a request, and pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500

        async def count_noun(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, count_noun)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, status).inc()
            if path == "/predict":
                self._metrics.seconds.observe(time.perf_counter() - start)
