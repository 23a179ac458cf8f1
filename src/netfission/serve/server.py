"""Serving: a network made ready, a socket, and uvicorn with time limits on connections."""

import asyncio
import logging
import socket
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
import uvicorn
from PIL import Image
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from netfission.classifier import Classifier
from netfission.inference.deploy import deploy
from netfission.network import FissionNetwork
from netfission.serve.app import Service
from netfission.serve.limits import Limits

_HEAD_S = 10.0  # for the head of a request, from a connection's beginning or its last answer
_BATCHES_AT_ONCE = 2  # one computes while Python sees to the other
_BATCHES_UNDER_WAY = 8  # of the largest size, at the least 256 images


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        host: address to listen on; the default is reached from this machine alone.
        port: to listen on; 0 for any that is free.
        device: `auto` (a GPU where there is one), `cpu` or `cuda`.
        threads: of the CPU; default what PyTorch takes.
        risk: see `Classifier.predict`.
        max_batch: images that are run at once, and that come in one form.
        max_wait_ms: that a batch waits for images that are being decoded.
        max_bytes: of a request.
        max_pixels: of the images in a request together, at most what Pillow takes for safe.
        timeout_s: for a request to come, and then to be answered.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    risk: float | None = None
    max_batch: int = 32
    max_wait_ms: float = 2.0
    max_bytes: int = 2**24
    max_pixels: int = 40_000_000
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        """Raises ValueError where a setting is not what it takes."""
        assert Image.MAX_IMAGE_PIXELS is not None
        most = {"port": 65535, "max_pixels": Image.MAX_IMAGE_PIXELS}
        for name in ("threads", "max_batch", "max_bytes", "max_pixels", "port"):
            value, least = getattr(self, name), int(name != "port")
            if value is not None and not least <= value <= most.get(name, value):
                above = f" to {most[name]}" if name in most else ""
                raise ValueError(f"{name}={value}: takes a whole number from {least}{above}")
        if not 0 <= self.max_wait_ms < float("inf"):
            raise ValueError(f"max_wait_ms={self.max_wait_ms}: takes milliseconds from 0")
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"timeout_s={self.timeout_s}: takes seconds above 0")


def serve(name: str, settings: Settings) -> None:
    """Serve a network until SIGINT or SIGTERM; what has come until then is answered.

    Prints its address once it listens.

    Args:
        name: of the network, see `Classifier.from_pretrained`.
        settings: of the server.

    Raises:
        ValueError: the network cannot be loaded, `risk` is given and it is not calibrated, the device is not
            here, or the address cannot be served on.
    """
    with listen(settings.host, settings.port) as listening:
        own = server(name, settings)
        # Of oddities in files and forms, which are others' here.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {name} on http://{shown}:{port} (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):  # which comes again once all is answered
            own.run([listening])


def server(name: str, settings: Settings) -> uvicorn.Server:
    """A server of a network, to be run once with a socket; see `serve`."""
    config = uvicorn.Config(
        _service(name, settings).application(),
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=round(settings.timeout_s) + 1,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: the host is not this machine's, or the port is in use or not for this user.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ValueError(
            f"host={host}, port={port}: cannot be served on ({error.strerror}); takes an address of this "
            "machine and a free port, or port 0 for any"
        ) from error


def _service(name: str, settings: Settings) -> Service:
    classifier = Classifier.from_pretrained(name)
    classifier.threshold(settings.risk)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: no GPU can be used here; takes auto or cpu")
    if settings.device != "cpu" and torch.cuda.is_available():
        classifier = classifier.cuda()
    threads = settings.threads or torch.get_num_threads()
    at_once = min(_BATCHES_AT_ONCE, threads)
    torch.set_num_threads(threads // at_once)  # of each, as threads made from now on take it over
    return Service(
        deployed(classifier),
        name.rstrip("/").rpartition("/")[2],
        limits=Limits(settings.max_bytes, settings.max_pixels, settings.max_batch, settings.timeout_s),
        threads=at_once,
        max_batch=settings.max_batch,
        max_wait_s=settings.max_wait_ms / 1000,
        max_under_way=max(256, _BATCHES_UNDER_WAY * settings.max_batch),
        risk=settings.risk,
    )


def deployed(classifier: Classifier) -> Classifier:
    """A classifier made faster where its network was fissioned, its logits within 1e-4 of the largest."""
    network, spec = classifier.network, classifier.spec
    if not isinstance(network, FissionNetwork):
        return classifier
    images = torch.zeros(2, *spec.shape, device=classifier.device)
    return Classifier(deploy(network, images), spec, classifier.calibration)


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]  # which class depends on what is installed
    """Closes connections on which the head of a request does not come in time; tells errors as JSON."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def send_400_response(self, msg: str) -> None:
        """Called where what came is no HTTP, which no application sees."""
        content = b'{"error":"this is no HTTP request that can be read"}'
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        self.transport.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + content)
        self.transport.close()

    def _await_head(self) -> None:
        self._forget()
        self._timer = self.loop.call_later(_HEAD_S, self._close_without, self.cycle)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _close_without(self, last: Any) -> None:
        if self.cycle is last:  # no head came since
            self.transport.close()
