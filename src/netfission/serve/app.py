"""The web application: a page, predictions as JSON, health and metrics."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from importlib.metadata import version
from importlib.resources import files
from typing import Any, get_args

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from torch import Tensor

from netfission.classifier import Classifier
from netfission.classifier.answer_settings import AnswerSettings
from netfission.classifier.predictions import AnswerLimits
from netfission.evaluation.conformal import SetScore
from netfission.evaluation.p_values import DetectorScore
from netfission.serve.batching import Batcher, FullError
from netfission.serve.drift import DriftWindow
from netfission.serve.hosts import HostMiddleware
from netfission.serve.limits import (
    FORMATS,
    BodyReader,
    Limits,
    check_total_pixels,
    decode_image,
    is_small,
    read_form,
    refusal,
)
from netfission.serve.prometheus import CountingMiddleware, Metrics
from netfission.serve.responses import TOP, Answer, json_answers
from netfission.utils.errors import did_you_mean

_VERSION = version("netfission")
_DECODERS = 2  # threads
_QUERY = ("all", *(field.name for field in fields(AnswerSettings)))
_REMEMBERED = 64  # settings of requests whose limits are kept
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
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class ImageResult:
    """One image's answer by the server's settings, and the logits of its batch, for answers by others."""

    answer: Answer
    logits: Tensor
    row: int


class Service:
    """The answers to all requests, from one network.

    Args:
        classifier: the network, deployed and on its device.
        title: its name on the page.
        limits: of a request.
        threads: number of batches that run at once.
        max_batch: largest number of images in a batch.
        max_wait_s: longest time in seconds that a batch waits for images that are being decoded.
        max_in_flight: largest number of images that are being decoded, wait or run; more are refused (503).
        answers: what is asked of the answers to requests that ask for nothing else.
        drift_window: number of the last images that are tested for drift; default see `DriftWindow`.
        hosts: names that are answered to, see `HostMiddleware`.
        cors_origins: origins whose pages may read the answers, besides the server's own; `*` for all.
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
        max_in_flight: int,
        answers: AnswerSettings | None = None,
        drift_window: int | None = None,
        hosts: Sequence[str] = (),
        cors_origins: Sequence[str] = (),
    ) -> None:
        self._classifier = classifier
        self._title = title
        self._limits = limits
        self._answers = answers or AnswerSettings()
        self._limits_of: Callable[[AnswerSettings], AnswerLimits] = lru_cache(_REMEMBERED)(
            lambda asked: asked.limits(classifier)
        )
        self._answer_limits = self._answers.limits(classifier)
        self._hosts = hosts
        self._cors_origins = cors_origins
        self._bodies = BodyReader(limits)
        self._metrics = Metrics()
        self._decoders = ThreadPoolExecutor(_DECODERS, "decoder")
        self._batcher = Batcher(
            self._run,
            threads=threads,
            max_batch=max_batch,
            max_wait_s=max_wait_s,
            max_in_flight=max_in_flight,
            observe=self._metrics.batch_size.observe,
        )
        self._metrics.in_flight.set_function(lambda: self._batcher.in_flight)
        self._drift = DriftWindow(self._answer_limits.detector, drift_window)
        self._metrics.drift_images.set_function(lambda: len(self._drift))
        self._metrics.drift_p_value.set_function(self._drift.p_value)

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
        _check_query(request)
        all_classes = _flag(request, "all")
        asked = _answer_settings(request, self._answers)
        limits = self._answer_limits
        is_form = request.headers.get("content-type", "").startswith("multipart/form-data")
        async with self._bodies.read(request) as body:
            contents = await read_form(request, body, self._limits) if is_form else [body]
            refused: dict[int, HTTPException] = {}

            async def decode() -> list[Tensor]:
                nonlocal limits
                if asked != self._answers:  # its images are in flight while the limits are computed
                    loop = asyncio.get_running_loop()
                    limits = await loop.run_in_executor(self._decoders, self._ask, asked)
                return await self._decode(contents, refused)

            try:
                async with asyncio.timeout(self._limits.timeout_s):
                    results = await self._batcher.answers(len(contents), decode)
            except TimeoutError as error:
                raise HTTPException(504, f"no answer within {self._limits.timeout_s:g} s") from error
        self._metrics.images.inc(len(results))
        if limits is not self._answer_limits or all_classes:
            answer = partial(self._answers_within, results, limits, all_classes)
            classified = iter(await asyncio.get_running_loop().run_in_executor(self._decoders, answer))
        else:
            classified = iter([result.answer for result in results])
        answers = [
            {"error": refused[row].detail} if row in refused else next(classified)
            for row in range(len(contents))
        ]
        seconds = {"seconds": time.perf_counter() - start}
        return JSONResponse({"predictions": answers} | seconds if is_form else answers[0] | seconds)

    async def _decode(self, contents: Sequence[bytes], refused: dict[int, HTTPException]) -> list[Tensor]:
        """Return the pixels of the images, and put the errors of those that are refused into `refused`.

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
        return [pixels for pixels in decoded if isinstance(pixels, Tensor)]

    def _decode_one(self, contents: Sequence[bytes], row: int) -> Tensor:
        name = f"image {row + 1} of {len(contents)}" if len(contents) > 1 else "image"
        return decode_image(contents[row], self._limits, self._classifier.pixels, name)

    def _run(self, pixels: Sequence[Tensor]) -> list[ImageResult]:
        logits = self._classifier.logits(torch.stack(list(pixels)))
        self._drift.add(logits, average=self._classifier.spec.average)
        predictions = self._classifier.interpret(logits, self._answer_limits)
        answers = json_answers(predictions, self._classifier.spec.classes, limits=self._answer_limits)
        return [ImageResult(answer, logits, row) for row, answer in enumerate(answers)]

    def _ask(self, asked: AnswerSettings) -> AnswerLimits:
        """Return the limits of a request's settings.

        Raises:
            HTTPException: they are not valid.
        """
        try:
            return self._limits_of(asked)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error

    def _answers_within(
        self, results: Sequence[ImageResult], limits: AnswerLimits, all_classes: bool
    ) -> list[Answer]:
        """Return the answers by the settings of one request."""
        names = self._classifier.spec.classes
        logits = torch.stack([result.logits[result.row] for result in results])
        predictions = self._classifier.interpret(logits, limits)
        return json_answers(predictions, names, len(names) if all_classes else TOP, limits=limits)

    @property
    def _threshold_temperature(self) -> float:
        """The temperature of the probabilities that the threshold applies to."""
        return self._classifier.temperature if self._answer_limits.delta is None else 1.0

    async def _model(self, _: Request) -> Response:
        spec, calibration = self._classifier.spec, self._classifier.calibration
        evaluation = self._classifier.evaluation
        return JSONResponse(
            {
                "name": self._title,
                "model": spec.model,
                "classes": spec.classes,
                "image": spec.shape,
                "exits": spec.predictions,
                "calibrated": calibration is not None,
                "calibration_images": 0 if calibration is None else calibration.n,
                "calibrated_on": None if calibration is None else calibration.fitted_on,
                "accuracy": None if evaluation is None else evaluation.ensemble["top1"],
                "test_images": 0 if evaluation is None else evaluation.n,
                "risk": self._answer_limits.risk,
                "threshold": self._answer_limits.threshold,
                "threshold_temperature": self._threshold_temperature,
                "delta": self._answer_limits.delta,
                "coverage": self._answer_limits.coverage,
                "class_wise": self._answer_limits.class_wise,
                "accept_false_alarms": self._answer_limits.accept_false_alarms,
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


def _check_query(request: Request) -> None:
    """Refuse parameters of the query that have no meaning, or that stand there twice."""
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name not in _QUERY:
            expected = f"of {', '.join(_QUERY)}"
            suggestion = did_you_mean(name, _QUERY)
            raise refusal(400, "query", expected, f"{name!r}{suggestion and f'; {suggestion}'}")
        if names.count(name) > 1:
            raise refusal(400, name, "given once", f"{names.count(name)} times")


def _flag(request: Request, name: str) -> bool:
    """Return whether a parameter of the query is 1, not 0 or left out."""
    value = request.query_params.get(name, "0")
    if value not in ("0", "1"):
        raise refusal(400, name, "0 or 1", repr(value))
    return value == "1"


def _answer_settings(request: Request, default: AnswerSettings) -> AnswerSettings:
    """Return the settings of a request: those of the server, with what its query asks for instead."""
    asked: dict[str, Any] = {}
    for name in ("risk", "delta", "coverage", "accept_false_alarms"):
        if (text := request.query_params.get(name)) is not None:
            try:
                asked[name] = float(text)
            except ValueError as error:
                raise refusal(400, name, "a number", repr(text)) from error
    for name, kind in (("score", SetScore), ("detector", DetectorScore)):
        if (text := request.query_params.get(name)) is not None:
            if text not in get_args(kind):
                raise refusal(400, name, f"one of {', '.join(get_args(kind))}", repr(text))
            asked[name] = text
    if "class_wise" in request.query_params:
        asked["class_wise"] = _flag(request, "class_wise")
    try:
        return replace(default, **asked)
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
