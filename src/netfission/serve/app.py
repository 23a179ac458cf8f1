"""The application: a page, predictions as JSON, health and metrics."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from netfission.classifier import Classifier
from netfission.classifier.predictions import Predictions
from netfission.serve.batching import Batcher, FullError
from netfission.serve.limits import FORMATS, Bodies, Limits, check_pixels, decoded, files_of, is_small
from netfission.serve.prometheus import Counted, Metrics
from netfission.serve.responses import Answer, answers

_VERSION = version("netfission")
_DECODERS = 2  # threads
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _Result:
    """Of one image: the answer as it is mostly wanted, and where it stands in its batch."""

    answer: Answer
    batch: Predictions
    row: int

    def whole(self, names: Sequence[str]) -> Answer:
        """The answer with all classes."""
        alone = Predictions(self.batch.logits[self.row, None], self.batch.threshold)
        return answers(alone, names, len(names))[0]


class Service:
    """What answers requests with one network.

    Args:
        classifier: the network; see `serve` for how it is made ready.
        title: what it is called.
        limits: of requests.
        threads: batches that run at once.
        max_batch: images that are run at once, at most.
        max_wait_s: seconds that a batch waits for images that are being decoded, at most.
        max_under_way: images that are being decoded, wait or run; more are refused (503).
        risk: see `Classifier.predict`.
    """

    def __init__(
        self,
        classifier: Classifier,
        title: str,
        *,
        limits: Limits,
        threads: int,
        max_batch: int,
        max_wait_s: float,
        max_under_way: int,
        risk: float | None = None,
    ) -> None:
        self._classifier = classifier
        self._title = title
        self._limits = limits
        self._risk = risk
        self._bodies = Bodies(limits)
        self._metrics = Metrics()
        self._decoders = ThreadPoolExecutor(_DECODERS, "decoder")
        self._batcher = Batcher(
            self._run,
            threads=threads,
            max_batch=max_batch,
            max_wait_s=max_wait_s,
            max_under_way=max_under_way,
            observe=self._metrics.batch_size.observe,
        )
        self._metrics.under_way.set_function(lambda: self._batcher.under_way)

    def application(self) -> Starlette:
        """An ASGI application, to be run once."""
        routes = [
            Route("/predict", self._predict, methods=["POST"]),
            Route("/model", self._model),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            *(Route(path, _file(*file)) for path, file in _PAGE.items()),
        ]
        paths = frozenset(route.path for route in routes)
        return Starlette(
            routes=routes,
            middleware=[Middleware(Counted, self._metrics, paths)],
            exception_handlers={
                HTTPException: _refused,
                FullError: _full,
                ClientDisconnect: _gone,
                Exception: _failed,
            },
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        with self._decoders, self._batcher:
            yield

    async def _predict(self, request: Request) -> Response:
        start = time.perf_counter()
        every = _asks_for_all(request)
        is_form = request.headers.get("content-type", "").startswith("multipart/form-data")
        async with self._bodies.read(request) as body:
            contents = await files_of(request, body, self._limits) if is_form else [body]
            try:
                async with asyncio.timeout(self._limits.timeout_s):
                    results = await self._batcher.answers(len(contents), partial(self._decode, contents))
            except TimeoutError as error:
                raise HTTPException(504, f"no answer within {self._limits.timeout_s:g} s") from error
        self._metrics.images.inc(len(results))
        names = self._classifier.spec.classes
        told = [result.whole(names) if every else result.answer for result in results]
        seconds = {"seconds": time.perf_counter() - start}
        return JSONResponse({"predictions": told} | seconds if is_form else told[0] | seconds)

    async def _decode(self, contents: Sequence[bytes]) -> list[Tensor]:
        await asyncio.sleep(0)  # until all that came together are announced: they make one batch
        decode = [partial(self._decoded, contents, row) for row in range(len(contents))]
        if len(contents) == 1 and is_small(contents[0]):
            return [decode[0]()]
        loop = asyncio.get_running_loop()
        if len(contents) > 1:
            await loop.run_in_executor(self._decoders, check_pixels, contents, self._limits)
        return await asyncio.gather(*(loop.run_in_executor(self._decoders, one) for one in decode))

    def _decoded(self, contents: Sequence[bytes], row: int) -> Tensor:
        try:
            return decoded(contents[row], limits=self._limits, pixels=self._classifier.pixels)
        except HTTPException as error:
            which = f"image {row + 1} of {len(contents)}: " if len(contents) > 1 else ""
            raise HTTPException(error.status_code, f"{which}{error.detail}") from error

    def _run(self, pixels: Sequence[Tensor]) -> list[_Result]:
        predictions = self._classifier.predict(torch.stack(list(pixels)), risk=self._risk)
        answered = answers(predictions, self._classifier.spec.classes)
        return [_Result(answer, predictions, row) for row, answer in enumerate(answered)]

    async def _model(self, _: Request) -> Response:
        spec = self._classifier.spec
        return JSONResponse(
            {
                "name": self._title,
                "model": spec.model,
                "classes": spec.classes,
                "image": spec.shape,
                "exits": spec.fission["exits"],
                "calibrated": self._classifier.calibration is not None,
                "risk": self._risk,
                "threshold": self._classifier.threshold(self._risk),
                "formats": FORMATS,
                "max_bytes": self._limits.max_bytes,
                "max_pixels": self._limits.max_pixels,
                "max_images": self._limits.max_images,
                "version": _VERSION,
            }
        )

    async def _health(self, _: Request) -> Response:
        ok = self._batcher.alive
        content = {"ok": ok, "model": self._title, "version": _VERSION}
        return JSONResponse(content, 200 if ok else 503)

    async def _show_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")


def _asks_for_all(request: Request) -> bool:
    """Whether every class is to be listed."""
    asked = request.query_params.get("all", "0")
    if asked not in ("0", "1"):
        raise HTTPException(400, f"all={asked}: takes 0 or 1")
    return asked == "1"


def _file(name: str, media_type: str) -> Any:
    content = (files("netfission.serve") / "page" / name).read_bytes()

    async def endpoint(_: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return endpoint


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))


async def _full(*_: Any) -> Response:
    return _error(503, "too many images at once; try again", {"Retry-After": "1"})


async def _gone(*_: Any) -> Response:
    return _error(400, "the request ended before its body")


async def _failed(*_: Any) -> Response:
    return _error(500, "the network failed on these images")
