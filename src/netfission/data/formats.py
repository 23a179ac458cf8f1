"""The formats of image files: which can be read, what the others need, and how a file is opened."""

import io
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import Image, UnidentifiedImageError, features

# Formats that Pillow names but cannot decode by itself.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Formats that Pillow decodes if it was built with another library: the name that it gives this feature.
_FEATURES = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
# The packages that add formats, by the ends of file names.
_PACKAGES = {
    ".avif": "pillow>=11.3",
    ".heic": "pillow-heif",
    ".heif": "pillow-heif",
    ".hif": "pillow-heif",
    ".jxl": "pillow-jxl-plugin",
}
# Brands of the ISO base media file format, in which HEIC files are written.
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_EXIF = 2**16  # bytes, as in JPEG
_TILE_SIDES = (322, 323)  # tags of a TIFF file: width and height of a tile
_WHOLE_NUMBERS = {1: 1, 3: 2, 4: 4, 16: 8}  # types of the values of tags in TIFF, and their bytes


class MissingPackageError(UnidentifiedImageError):
    """An image of a format that needs another package; the message says which."""


@cache
def image_suffixes() -> frozenset[str]:
    """Return the ends of the names of files that can be read, in lower case.

    These are what the installed Pillow decodes, and HEIC if pillow-heif is installed.

    Example:
        >>> {".jpg", ".jfif", ".png", ".webp"} <= image_suffixes(), ".txt" in image_suffixes()
        (True, False)
    """
    known = readable_formats()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in known)


@cache
def readable_formats() -> frozenset[str]:
    """Return Pillow's names of the formats that can be read.

    Example:
        >>> "JPEG" in readable_formats(), "EPS" in readable_formats()
        (True, False)
    """
    _register_packages()
    known = {kind for kind in Image.OPEN if kind not in _NOT_DECODED}
    missing = {kind for kind in known & set(_FEATURES) if not features.check(_FEATURES[kind])}
    return frozenset(known - missing | {"MPO"})  # which is several JPEG images in one file


def package_for(suffix: str) -> str | None:
    """Return the package that reads files whose name has this end, if that is known and it is missing.

    Example:
        >>> package_for(".png") is None
        True
    """
    return None if suffix.lower() in image_suffixes() else _PACKAGES.get(suffix.lower())


def open_image(file: str | Path | BinaryIO, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Open an image file, as `PIL.Image.open`; its pixels are read later.

    A PNG file whose metadata are damaged is opened without them.

    Args:
        file: a path, or an open file that can be sought.
        formats: names of the formats to try; default all.

    Raises:
        MissingPackageError: the format needs a package that is not installed.
        UnidentifiedImageError: it is not an image.
        OSError, …: Pillow's.

    Example:
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (20, 10)).save(file, "PNG")
        >>> open_image(file).size
        (20, 10)
    """
    _register_packages()
    try:
        return Image.open(file, formats=formats)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and many more
        if isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError):
            raise
        with open(file, "rb") if isinstance(file, str | Path) else nullcontext(file) as opened:
            if _is_heic(opened):
                package = _PACKAGES[".heic"]
                raise MissingPackageError(f"HEIC, which needs {package}: pip install {package}") from error
            pixels_only = _without_metadata(opened)
        if pixels_only is None:
            raise
    return Image.open(pixels_only, formats=formats)


def load(image: Image.Image) -> Image.Image:
    """Read the pixels of an image that was opened; of a PNG file with damaged metadata, without these.

    Raises:
        OSError, SyntaxError, struct.error, …: Pillow's decoders fail.
    """
    file: BinaryIO | None = getattr(image, "fp", None)
    try:
        image.load()
    except Exception:  # decoders raise errors of every kind
        pixels_only = None if file is None or file.closed else _without_metadata(file)
        if pixels_only is None:
            raise
    else:
        return image
    whole = Image.open(pixels_only)
    whole.load()
    return whole


def count_decoded_pixels(image: Image.Image, file: BinaryIO) -> int:
    """Return how many pixels decoding an image takes memory for.

    They are its own, or those of a tile of a TIFF file, which may be far larger than the image.

    Args:
        image: as `open_image` returns it.
        file: its file, which can be sought.

    Example:
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (20, 10)).save(file, "PNG")
        >>> count_decoded_pixels(open_image(file), file)
        200
    """
    pixels = image.width * image.height
    return max(pixels, _count_tile_pixels(file)) if image.format == "TIFF" else pixels


def _count_tile_pixels(file: BinaryIO) -> int:
    """Return the pixels of a tile of the first image in a TIFF file; 1 if it has none.

    If a tag stands there several times, libtiff takes the first and Pillow the last: here the largest counts.
    """
    file.seek(0)
    head = file.read(16)
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    is_big = 43 in head[2:4]  # BigTIFF
    file.seek(int.from_bytes(head[8:] if is_big else head[4:8], order))
    entries = int.from_bytes(file.read(8 if is_big else 2), order)
    width = 8 if is_big else 4  # bytes of a value
    sides = dict.fromkeys(_TILE_SIDES, 1)
    for _ in range(entries):
        entry = file.read(2 * width + 4)  # tag, type, number of values, value
        if len(entry) < 2 * width + 4:
            break
        tag, kind = int.from_bytes(entry[:2], order), int.from_bytes(entry[2:4], order)
        if tag in sides:
            size = _WHOLE_NUMBERS.get(kind, width + 1)
            value = entry[-width:][:size]
            # A value that does not fit stands elsewhere: no program writes a side so.
            sides[tag] = max(sides[tag], int.from_bytes(value, order) if size <= width else 2**32)
    return sides[_TILE_SIDES[0]] * sides[_TILE_SIDES[1]]


def _is_heic(file: BinaryIO) -> bool:
    file.seek(0)
    head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:] in _HEIC_BRANDS


def _without_metadata(file: BinaryIO) -> io.BytesIO | None:
    """Return a PNG file without the chunks that its pixels do not depend on; None if it is another file.

    Undamaged EXIF data are kept, since they hold the orientation.
    """
    file.seek(0)
    if file.read(len(_PNG_SIGNATURE)) != _PNG_SIGNATURE:
        return None
    needed = (chunk for chunk in _chunks(file.read()) if _is_needed(chunk))
    return io.BytesIO(_PNG_SIGNATURE + b"".join(needed))


def _chunks(content: bytes) -> Iterator[bytes]:
    """Yield the chunks of a PNG file, each with its length (4 bytes), name (4), data and checksum (4)."""
    start = 0
    while start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4])
        yield content[start:end]
        start = end


def _is_needed(chunk: bytes) -> bool:
    name = chunk[4:8]
    if name == b"eXIf":
        return len(chunk) <= _MAX_EXIF and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
    return name[:1].isupper() or name == b"tRNS"  # which makes pixels transparent


@cache
def _register_packages() -> None:
    Image.preinit()  # first, as formats are tried in the order in which they are known: JPEG and PNG early
    Image.init()
    if find_spec("pillow_heif"):
        import_module("pillow_heif").register_heif_opener()
