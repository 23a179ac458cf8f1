"""Limits of a request: its size, the time it takes to arrive, and the images it may contain."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TypeVar

from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from netfission.data.formats import count_decoded_pixels, open_image, readable_formats
from netfission.utils.errors import invalid

T = TypeVar("T")
# Not all formats that Pillow reads: for some of them it starts other programs.
_SAFE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
FORMATS = tuple(name for name in _SAFE_FORMATS if name in readable_formats())
_BODIES_IN_MEMORY = 32  # of the largest size
_SMALL_BYTES = 2**14
_SMALL_PIXELS = 2**12
# Parts of a PNG file that are decompressed when it is opened, to a thousand times their size.
_COMPRESSED_PARTS = (b"zTXt", b"iTXt", b"iCCP")
_READ_ON = 4  # times the largest size: a client that is cut off while it sends does not read the error
_CLOSE = {"Connection": "close"}  # because more of the body may arrive


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        max_bytes: largest size of its body.
        max_pixels: largest number of pixels, width × height, of all its images together.
        max_images: largest number of images in a form.
        timeout_s: seconds in which it must arrive, and after that be answered.
    """

    max_bytes: int
    max_pixels: int
    max_images: int
    timeout_s: float


def refusal(
    status: int, argument: str, expected: str, found: str, headers: Mapping[str, str] | None = None
) -> HTTPException:
    """Make the error of a request that is not valid, in the words of `netfission.utils.errors.invalid`.

    Args:
        status: HTTP status code.
        argument: the part of the request that is not valid.
        expected: what is valid, as it follows "must be".
        found: what came, in words.
        headers: of the answer.

    Example:
        >>> refusal(413, "image", "at most 100 pixels", "more").detail
        'image must be at most 100 pixels, got more'
    """
    return HTTPException(status, str(invalid(argument, expected, found=found)), dict(headers or {}))


class BodyReader:
    """Reads the bodies of requests, and bounds the memory that all of them take together."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._bytes_held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read the body of a request; it counts as held until the end of the context.

        Raises:
            HTTPException: it is too large (413), too slow (408), encoded in a way that is not decoded (501),
                or there is no memory left for it (503).
        """
        body = bytearray()
        try:
            await self._receive(request, body)
            yield bytes(body)
        finally:
            self._bytes_held -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        max_bytes = self._limits.max_bytes
        too_large = partial(refusal, 413, "request body", f"at most {max_bytes:,} bytes", "more", _CLOSE)
        codings = ", ".join(request.headers.getlist("transfer-encoding"))
        if codings.lower() not in ("", "chunked"):  # httptools takes what ends in chunked
            raise refusal(501, "Transfer-Encoding", "chunked", codings, _CLOSE)
        declared = int(request.headers.get("content-length", 0))
        if declared > max_bytes and "expect" in request.headers:
            raise too_large()  # before such a client begins to send
        received = 0
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                async for chunk in request.stream():
                    received += len(chunk)
                    if received <= max_bytes:
                        self._hold(chunk, body)
                    elif received > _READ_ON * max_bytes:
                        raise too_large()
        except TimeoutError as error:
            if max(declared, received) > max_bytes:
                raise too_large() from error
            seconds = self._limits.timeout_s
            raise HTTPException(408, f"the request did not arrive within {seconds:g} s", _CLOSE) from error
        if received > max_bytes:
            raise too_large()

    def _hold(self, chunk: bytes, body: bytearray) -> None:
        if self._bytes_held + len(chunk) > _BODIES_IN_MEMORY * self._limits.max_bytes:
            raise HTTPException(
                503, "too many large requests at once; try again", _CLOSE | {"Retry-After": "1"}
            )
        self._bytes_held += len(chunk)
        body += chunk


class _FormParser(MultiPartParser):
    spool_max_size = 2**62  # in memory, where the whole body is already


async def read_form(request: Request, body: bytes, limits: Limits) -> list[bytes]:
    """Return the files in a form of type multipart/form-data.

    Raises:
        HTTPException: it is damaged or incomplete, or contains no file or too many (400).
    """

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield body

    if not body.rstrip().endswith(b"--"):
        raise refusal(400, "form", "complete", "no closing boundary")
    try:
        form = await _FormParser(request.headers, chunks(), max_files=limits.max_images).parse()
    except MultiPartException as error:
        found = f"a form that cannot be read ({error.message.rstrip('.')})"
        raise refusal(
            400, "form", f"multipart/form-data of at most {limits.max_images} files", found
        ) from error
    files = [value.file.read() for _, value in form.multi_items() if isinstance(value, UploadFile)]
    await form.close()
    if not files:
        raise refusal(400, "form", "multipart/form-data with one image file or more", "no file")
    return files


def is_small(content: bytes) -> bool:
    """Return whether decoding a file takes about as long as handing it to a thread."""
    decompressed = any(name in content for name in _COMPRESSED_PARTS)
    return len(content) <= _SMALL_BYTES and not decompressed and _count_pixels(content) <= _SMALL_PIXELS


def decode_image(content: bytes, limits: Limits, read: Callable[[Image.Image], T], name: str = "image") -> T:
    """Decode an image; nothing is decoded before its size is known.

    Args:
        content: the file.
        limits: of its size.
        read: decodes it, and returns what this function returns.
        name: of the image, for messages.

    Raises:
        HTTPException: it is not an image (415), damaged (400), or has too many pixels (413).
    """
    too_large = partial(refusal, 413, name, f"at most {limits.max_pixels:,} pixels", "more")
    try:
        image = open_image(BytesIO(content), FORMATS)
        if count_decoded_pixels(image, BytesIO(content)) <= limits.max_pixels:
            return read(image)
    except UnidentifiedImageError as error:
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise refusal(415, name, f"a file in {formats} format", "another kind of file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_large() from error
    except Exception as error:  # Pillow's decoders raise errors of every kind
        raise refusal(400, name, "an undamaged file", f"a damaged file ({error})") from error
    raise too_large()


def check_total_pixels(contents: Sequence[bytes], limits: Limits) -> None:
    """Bound the work that one request causes.

    Raises:
        HTTPException: the images that can be read have too many pixels together (413).
    """
    total = sum(map(_count_pixels, contents))
    if total > limits.max_pixels:
        raise refusal(413, "images", f"at most {limits.max_pixels:,} pixels together", f"{total:,} pixels")


def _count_pixels(content: bytes) -> int:
    """Return the number of pixels; 0 if the file is not an image, which `decode_image` refuses."""
    try:
        return count_decoded_pixels(open_image(BytesIO(content), FORMATS), BytesIO(content))
    except Exception:  # Pillow's decoders raise errors of every kind
        return 0
