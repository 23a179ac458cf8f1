"""Start a server: deploy the network, open a socket, and run uvicorn."""

import faulthandler
import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import uvicorn
from PIL import Image

from netfission.classifier import Classifier, Predictor
from netfission.classifier.answer_settings import AnswerSettings
from netfission.classifier.folder import ModelFolder
from netfission.classifier.image_network import find_folder
from netfission.evaluation.guarantees import SPARSE_CLASSES
from netfission.serve.answerer import Answerer, deployed_network
from netfission.serve.app import Service
from netfission.serve.classes import ClassAnswerer
from netfission.serve.limits import Limits
from netfission.serve.protocol import BoundedHTTPProtocol
from netfission.serve.targets import TargetAnswerer
from netfission.utils.errors import MOST_THREADS, invalid

_BATCHES_AT_ONCE = 2  # one computes while Python prepares the other
_BATCHES_IN_FLIGHT = 8  # of the largest size
_LEAST_IN_FLIGHT = 256  # images
# As browsers send it: in lower case, without a path.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?")


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        host: address to listen on; the default can be reached from this machine only.
        port: port to listen on; 0 for any free port.
        device: `auto` (a GPU if there is one), `cpu` or `cuda`.
        threads: number of CPU threads; default PyTorch's.
        answers: what is asked of the answers to requests that ask for nothing else; default only
            `Classifier.default_risk`.
        allowed_host: names that the server answers to, besides IP addresses, localhost, the machine's own
            name and `host`; `*` for all.
        cors_origin: origins whose pages may read the answers, such as `https://example.org`, or `*` for all;
            default none but the server's own.
        drift_window: number of the last images that are tested for drift, see `GET /metrics`; default a tenth
            of the calibration images, at most 500.
        max_batch: largest number of images in a batch, and in a form.
        max_wait_ms: longest time in milliseconds that a batch waits for images that are being decoded.
        max_bytes: largest size of a request in bytes.
        max_pixels: largest number of pixels of all images in a request together; at most Pillow's limit.
        timeout_s: seconds for a request to arrive, and after that to be answered.

    Raises:
        ValueError: a setting is not valid.

    Example:
        >>> Settings(port=0).max_batch
        32
        >>> Settings(port=70000)
        Traceback (most recent call last):
        ValueError: port must be an integer from 0 to 65535, got 70000
    """

    host: str = "127.0.0.1"
    port: int = 8000
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    allowed_host: Sequence[str] = ()
    cors_origin: Sequence[str] = ()
    drift_window: int | None = None
    max_batch: int = 32
    max_wait_ms: float = 2.0
    max_bytes: int = 2**24
    max_pixels: int = 40_000_000
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        assert Image.MAX_IMAGE_PIXELS is not None
        maximum = {"port": 65535, "max_pixels": Image.MAX_IMAGE_PIXELS, "threads": MOST_THREADS}
        for name in ("threads", "drift_window", "max_batch", "max_bytes", "max_pixels", "port"):
            value, least = getattr(self, name), int(name != "port")
            if value is not None and not least <= value <= maximum.get(name, value):
                valid = (
                    f"an integer from {least} to {maximum[name]}" if name in maximum else "a positive integer"
                )
                raise invalid(name, valid, value)
        if not 0 <= self.max_wait_ms < float("inf"):
            raise invalid("max_wait_ms", "a number of milliseconds of at least 0", self.max_wait_ms)
        if not 0 < self.timeout_s < float("inf"):
            raise invalid("timeout_s", "a positive number of seconds", self.timeout_s)
        for origin in self.cors_origin:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise invalid("cors_origin", "* or an origin such as https://example.org:8443", origin)


def serve(name: str, settings: Settings) -> None:
    """Serve a network until SIGINT or SIGTERM; requests that have arrived by then are answered.

    It prints its address once it listens.

    Args:
        name: of the network, see `Classifier.from_pretrained`.
        settings: of the server.

    Raises:
        ValueError: the network cannot be loaded; its calibration does not allow what is asked of answers;
            the device is not available; or the server cannot listen on the address.
    """
    with listen(settings.host, settings.port) as listening, _quiet_libraries():
        server = make_server(name, settings)
        # No words about damaged files and forms, which are the clients', and so may be what they say.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        # Nor about the sets that requests ask for; those of the server's own settings have been warned of.
        warnings.filterwarnings("ignore", message=SPARSE_CLASSES)
        logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {name} on http://{shown}:{port} (press Ctrl-C to stop)", flush=True)
        with suppress(KeyboardInterrupt):  # which uvicorn raises again once all is answered
            server.run([listening])


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep decoders in C from writing to standard error: each damaged image could add lines to the log.

    What Python writes, and the stack if a library ends the process, still get there.
    """
    if sys.stderr is not sys.__stderr__ or sys.stderr is None:  # of a test, or of nobody
        yield
        return
    with ExitStack() as files:
        kept = files.enter_context(os.fdopen(os.dup(2), "w", buffering=1, errors=sys.stderr.errors))
        nowhere = files.enter_context(Path(os.devnull).open("w"))
        os.dup2(nowhere.fileno(), 2)
        faulthandler.enable(kept)
        try:
            with redirect_stderr(kept):
                yield
        finally:
            faulthandler.disable()
            os.dup2(kept.fileno(), 2)


def make_server(name: str, settings: Settings) -> uvicorn.Server:
    """Make the server of a network, which can be run once with a socket; see `serve`."""
    config = uvicorn.Config(
        _make_service(name, settings).application(),
        http=BoundedHTTPProtocol,
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        headers=[("X-Content-Type-Options", "nosniff")],  # of every answer
        proxy_headers=False,
        timeout_graceful_shutdown=round(settings.timeout_s) + 1,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens.

    Raises:
        ValueError: the host is not an address of this machine, or the port is in use or not permitted.

    Example:
        >>> with listen("127.0.0.1", 0) as listening:
        ...     listening.getsockname()[1] > 0
        True
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise invalid(
            "host and port",
            "an address of this machine and a free port",
            found=f"{host} and {port} ({error.strerror})",
            hint="port 0 stands for any free port",
        ) from error


def _make_service(name: str, settings: Settings) -> Service:
    folder = find_folder(name)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise invalid("device", "auto or cpu if there is no GPU", "cuda")
    device = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    task = folder.load_spec(any_task=True).find_task()
    make = _class_answerer if task.targets.exclusive else _target_answerer
    answerer = make(folder, settings, device)
    threads = settings.threads or torch.get_num_threads()
    at_once = min(_BATCHES_AT_ONCE, threads)
    torch.set_num_threads(threads // at_once)  # of each batch: threads started from now on inherit it
    return Service(
        answerer,
        name.rstrip("/").rpartition("/")[2],
        limits=Limits(settings.max_bytes, settings.max_pixels, settings.max_batch, settings.timeout_s),
        threads=at_once,
        max_batch=answerer.batch_size(settings.max_batch),
        max_wait_s=settings.max_wait_ms / 1000,
        max_in_flight=max(_LEAST_IN_FLIGHT, _BATCHES_IN_FLIGHT * settings.max_batch),
        hosts=(settings.host, *settings.allowed_host),
        cors_origins=settings.cors_origin,
    )


def _class_answerer(folder: ModelFolder, settings: Settings, device: str) -> Answerer:
    """Make the answerer of a classifier; ValueError if its calibration does not allow what is asked."""
    classifier = Classifier.from_pretrained(folder.path)
    settings.answers.limits(classifier)  # refused before the network is deployed
    classifier.to(device)
    return ClassAnswerer(deploy_classifier(classifier), settings.answers, settings.drift_window)


def deploy_classifier(classifier: Classifier) -> Classifier:
    """Return a classifier with the network of `deployed_network`."""
    deployed = deployed_network(classifier)
    spec, calibration = classifier.spec, classifier.calibration
    return Classifier(deployed, spec, calibration, classifier.evaluation, classifier.recipe)


def _target_answerer(folder: ModelFolder, settings: Settings, device: str) -> Answerer:
    """Make the answerer of a network of another task; ValueError if it does not allow what is asked."""
    predictor = Predictor.from_folder(folder).to(device)
    evaluation = folder.load_target_evaluation(predictor.spec)
    answerer = TargetAnswerer(predictor, evaluation, settings.answers, settings.drift_window)
    predictor.network = deployed_network(predictor)  # only now, as what is asked may be refused
    return answerer
