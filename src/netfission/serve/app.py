"""The web application: a page, predictions as JSON, health and metrics."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from netfission.serve.answerer import Answerer, ImageInput, Question
from netfission.serve.batching import Batcher, FullError
from netfission.serve.hosts import HostMiddleware
from netfission.serve.limits import (
    FORMATS,
    BodyReader,
    Limits,
    check_total_pixels,
    decode_image,
    is_small,
    read_form,
)
from netfission.serve.prometheus import CountingMiddleware, Metrics
from netfission.serve.query import check_query

_VERSION = version("netfission")
_DECODERS = 2  # threads
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/common.js": ("common.js", "text/javascript"),
    "/targets.js": ("targets.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Service:
    """The answers to all requests, from one network.

    Args:
        answerer: runs the network, and answers.
        title: its name on the page.
        limits: of a request.
        threads: number of batches that run at once.
        max_batch: largest number of images in a batch.
        max_wait_s: longest time in seconds that a batch waits for images that are being decoded.
        max_in_flight: largest number of images that are being decoded, wait or run; more are refused (503).
        hosts: names that are answered to, see `HostMiddleware`.
        cors_origins: origins whose pages may read the answers, besides the server's own; `*` for all.
    """

    def __init__(
        self,
        answerer: Answerer,
        title: str,
        *,
        limits: Limits,
        threads: int,
        max_batch: int,
        max_wait_s: float,
        max_in_flight: int,
        hosts: Sequence[str] = (),
        cors_origins: Sequence[str] = (),
    ) -> None:
        self._answerer = answerer
        self._title = title
        self._limits = limits
        self._hosts = hosts
        self._cors_origins = cors_origins
        self._bodies = BodyReader(limits)
        self._metrics = Metrics()
        self._decoders = ThreadPoolExecutor(_DECODERS, "decoder")
        self._batcher = Batcher(
            answerer.run,
            threads=threads,
            max_batch=max_batch,
            max_wait_s=max_wait_s,
            max_in_flight=max_in_flight,
            share=answerer.share,
            observe=self._metrics.batch_size.observe,
        )
        self._metrics.in_flight.set_function(lambda: self._batcher.in_flight)
        self._metrics.drift_images.set_function(lambda: len(answerer.drift))
        self._metrics.drift_p_value.set_function(answerer.drift.p_value)

    def application(self) -> ASGIApp:
        """Return an ASGI application, which can be run once."""
        routes = [
            Route("/predict", self._predict, methods=["POST"]),
            Route("/model", self._model),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            *(Route(path, _file(*file)) for path, file in _PAGE.items()),
        ]
        paths = frozenset(route.path for route in routes)
        application = Starlette(
            routes=routes,
            middleware=[
                Middleware(CountingMiddleware, self._metrics, paths),
                Middleware(HostMiddleware, self._hosts),
            ],
            exception_handlers={
                HTTPException: _answer_refusal,
                FullError: _answer_full,
                ClientDisconnect: _answer_disconnect,
                Exception: _answer_failure,
            },
            lifespan=self._lifespan,
        )
        application.router.redirect_slashes = False  # to where the request says that it was sent
        if not self._cors_origins:
            return application
        # Outside of the application, so that pages can read its error 500, too.
        return CORSMiddleware(
            application, self._cors_origins, allow_methods=("GET", "POST"), expose_headers=("Retry-After",)
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        with self._decoders, self._batcher:
            yield

    async def _predict(self, request: Request) -> Response:
        start = time.perf_counter()
        query, question = request.query_params, None
        if query:  # most requests have none
            check_query(query, self._answerer.parameters)
            question = self._answerer.question(query)
        is_form = request.headers.get("content-type", "").startswith("multipart/form-data")
        async with self._bodies.read(request) as body:
            contents = await read_form(request, body, self._limits) if is_form else [body]
            refused: dict[int, HTTPException] = {}

            async def decode() -> list[ImageInput]:
                if question is not None:  # its images are in flight while it is prepared
                    await asyncio.get_running_loop().run_in_executor(self._decoders, _prepare, question)
                return await self._decode(contents, refused)

            try:
                async with asyncio.timeout(self._limits.timeout_s):
                    results = await self._batcher.answers(len(contents), decode)
            except TimeoutError as error:
                raise HTTPException(504, f"no answer within {self._limits.timeout_s:g} s") from error
        self._metrics.images.inc(len(results))
        if question is None:
            answered = iter([result.answer for result in results])
        else:
            loop = asyncio.get_running_loop()
            answered = iter(await loop.run_in_executor(self._decoders, question.answers, results))
        answers = [
            {"error": refused[row].detail} if row in refused else next(answered)
            for row in range(len(contents))
        ]
        seconds = {"seconds": time.perf_counter() - start}
        return JSONResponse({"predictions": answers} | seconds if is_form else answers[0] | seconds)

    async def _decode(self, contents: Sequence[bytes], refused: dict[int, HTTPException]) -> list[ImageInput]:
        """Return the images, and put the errors of those that are refused into `refused`.

        Raises:
            HTTPException: all images are refused, or they have too many pixels together.
        """
        await asyncio.sleep(0)  # until all that arrived together count as decoding: they make one batch
        decode = [partial(self._decode_one, contents, row) for row in range(len(contents))]
        if len(contents) == 1 and is_small(contents[0]):
            return [decode[0]()]
        loop = asyncio.get_running_loop()
        if len(contents) > 1:
            await loop.run_in_executor(self._decoders, check_total_pixels, contents, self._limits)
        decoding = (loop.run_in_executor(self._decoders, one) for one in decode)
        decoded = await asyncio.gather(*decoding, return_exceptions=True)
        for row, error in enumerate(decoded):
            if isinstance(error, HTTPException):
                refused[row] = error
            elif isinstance(error, BaseException):
                raise error
        if len(refused) == len(contents):
            raise refused[0]
        return [image for image in decoded if isinstance(image, ImageInput)]

    def _decode_one(self, contents: Sequence[bytes], row: int) -> ImageInput:
        name = f"image {row + 1} of {len(contents)}" if len(contents) > 1 else "image"
        return decode_image(contents[row], self._limits, self._answerer.read, name)

    async def _model(self, _: Request) -> Response:
        return JSONResponse(
            {
                "name": self._title,
                **self._answerer.describe(),
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
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(self._decoders, self._metrics.text)  # the test of drift takes time
        return Response(text, media_type="text/plain; version=0.0.4")


def _prepare(question: Question) -> None:
    """Prepare a question; HTTPException (400) if it asks for what cannot be kept."""
    try:
        question.prepare()
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def _file(name: str, media_type: str) -> Any:
    content = (files("netfission.serve") / "page" / name).read_bytes()

    async def endpoint(_: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return endpoint


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


async def _answer_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))


async def _answer_full(*_: Any) -> Response:
    return _error(503, "too many images at once; try again", {"Retry-After": "1"})


async def _answer_disconnect(*_: Any) -> Response:
    return _error(400, "the request ended before its body was complete")


async def _answer_failure(*_: Any) -> Response:
    return _error(500, "the network failed on these images")
