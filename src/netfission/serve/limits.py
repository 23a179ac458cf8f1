"""What a request may bring: how many bytes, in what time, and which images."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from torch import Tensor

# Not all that Pillow reads: for some formats it starts other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_BODIES_AT_ONCE = 32  # of the largest size, in memory
_SMALL_BYTES = 2**14
_SMALL_PIXELS = 2**12
_INFLATED = (
    b"zTXt",
    b"iTXt",
    b"iCCP",
)  # in a PNG file, when it is opened: to a thousand times its size
_READ_ON = 4  # times the largest size: a client that is cut off while it sends does not see why
_CLOSE = {"Connection": "close"}  # as more of the body may come


@dataclass(frozen=True)
class Limits:
    """What is borne of a request.

    Attributes:
        max_bytes: in its body.
        max_pixels: of the images in a request together, width × height each.
        max_images: in a form.
        timeout_s: seconds in which it must have come, and in which it is answered from then.
    """

    max_bytes: int
    max_pixels: int
    max_images: int
    timeout_s: float


class Bodies:
    """Reads the bodies of requests, of which so many at once are kept in memory and no more."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, held until the end of the context.

        Raises:
            HTTPException: it is too large (413), too slow (408), or no memory is left for it (503).
        """
        body = bytearray()
        try:
            await self._receive(request, body)
            yield bytes(body)
        finally:
            self._held -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        most = self._limits.max_bytes
        too_large = HTTPException(413, f"the request takes more than {most:,} bytes", _CLOSE)
        told = int(request.headers.get("content-length", 0))
        if told > most and "expect" in request.headers:
            raise too_large  # before such a client begins to send
        received = 0
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                async for chunk in request.stream():
                    received += len(chunk)
                    if received <= most:
                        self._hold(chunk, body)
                    elif received > _READ_ON * most:
                        raise too_large
        except TimeoutError as error:
            if max(told, received) > most:
                raise too_large from error
            seconds = self._limits.timeout_s
            raise HTTPException(408, f"the request took more than {seconds:g} s to arrive", _CLOSE) from error
        if received > most:
            raise too_large

    def _hold(self, chunk: bytes, body: bytearray) -> None:
        if self._held + len(chunk) > _BODIES_AT_ONCE * self._limits.max_bytes:
            raise HTTPException(503, "too many large requests at once", _CLOSE | {"Retry-After": "1"})
        self._held += len(chunk)
        body += chunk


class _Form(MultiPartParser):
    spool_max_size = 2**62  # in memory, which the whole body is in already


async def files_of(request: Request, body: bytes, limits: Limits) -> list[bytes]:
    """The files in a form of type multipart/form-data.

    Raises:
        HTTPException: it is malformed or cut off, or holds no file or too many (400).
    """

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield body

    if not body.rstrip().endswith(b"--"):
        raise HTTPException(400, "the form is cut off: its last boundary is missing")
    try:
        form = await _Form(request.headers, chunks(), max_files=limits.max_images).parse()
    except MultiPartException as error:
        raise HTTPException(400, f"the form cannot be read: {error.message}") from error
    files = [value.file.read() for _, value in form.multi_items() if isinstance(value, UploadFile)]
    await form.close()
    if not files:
        raise HTTPException(400, "the form holds no file; takes one image or more")
    return files


def is_small(content: bytes) -> bool:
    """Whether to decode a file takes about as long as to hand it to a thread."""
    inflated = any(name in content for name in _INFLATED)
    return len(content) <= _SMALL_BYTES and not inflated and _pixels(content) <= _SMALL_PIXELS


def decoded(content: bytes, limits: Limits, pixels: Callable[[Image.Image], Tensor]) -> Tensor:
    """The pixels of an image; nothing is decoded before its size is known.

    Args:
        content: a file.
        limits: of its size.
        pixels: what decodes it.

    Raises:
        HTTPException: it is no image (415), damaged (400), or has too many pixels (413).
    """
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
        if image.width * image.height <= limits.max_pixels:
            return pixels(image)
    except UnidentifiedImageError as error:
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise HTTPException(415, f"this is no image; takes a file in {formats} format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(limits) from error
    except Exception as error:  # Pillow's decoders raise errors of every kind
        raise HTTPException(400, f"the image is damaged: {' '.join(str(error).split())}") from error
    raise _too_many_pixels(limits)


def check_pixels(contents: Sequence[bytes], limits: Limits) -> None:
    """Bound the work that one request makes.

    Raises:
        HTTPException: the images that can be read have too many pixels together (413).
    """
    if sum(map(_pixels, contents)) > limits.max_pixels:
        raise HTTPException(413, f"the images have more than {limits.max_pixels:,} pixels together")


def _pixels(content: bytes) -> int:
    """How many an image has; 0 where it is none, of which `decoded` tells what is wrong."""
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
    except Exception:  # Pillow's decoders raise errors of every kind
        return 0
    return image.width * image.height


def _too_many_pixels(limits: Limits) -> HTTPException:
    return HTTPException(413, f"the image has more than {limits.max_pixels:,} pixels")
