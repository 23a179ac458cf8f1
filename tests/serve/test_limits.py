import io
import struct
import zlib

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.exceptions import HTTPException

from netfission.data.images import to_pixels
from netfission.serve.limits import FORMATS, Limits, check_total_pixels, decode_image, is_small

LIMITS = Limits(max_bytes=10**6, max_pixels=10**6, max_images=4, timeout_s=1.0)


def pixels(image: Image.Image) -> torch.Tensor:
    return to_pixels(image, "RGB", (8, 8))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is as large."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format_", ["AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_common_formats_are_read(format_, make_image):
    if format_ not in FORMATS:
        pytest.skip("this Pillow does not read it")
    content = make_image(size=(12, 9), format_=format_, mode="RGB")
    assert decode_image(content, LIMITS, pixels).shape == (3, 8, 8)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"<svg/>", b"\x89PNG\r\n"],
)
def test_what_is_no_image_is_415(content):
    with pytest.raises(
        HTTPException,
        match=r"415: image must be a file in (AVIF, )?BMP, GIF, .* or WEBP format, got another kind of file$",
    ):
        decode_image(content, LIMITS, pixels)


@pytest.mark.parametrize("format_", ["BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_a_truncated_image_is_refused_in_one_line(format_, make_image):
    content = make_image(size=(200, 100), format_=format_, mode="RGB")
    with pytest.raises(HTTPException) as caught:
        decode_image(content[: len(content) // 2], LIMITS, pixels)
    assert caught.value.status_code in (400, 415)
    assert "\n" not in caught.value.detail
    assert "0x" not in caught.value.detail  # an address in memory


@pytest.mark.parametrize("side", [1001, 10_000, 40_000])
def test_a_decompression_bomb_is_not_decoded(side):
    def never(image: Image.Image) -> torch.Tensor:
        raise AssertionError("decoded")

    with pytest.raises(HTTPException, match=r"413: image must be at most 1,000,000 pixels, got more$"):
        decode_image(bomb(side, side), LIMITS, never)


def tiled(*sides: tuple[int, int], order: str = "<", big: bool = False) -> bytes:
    """A compressed TIFF of 64 × 64 pixels that says how wide and high its tiles are, once or twice."""
    tags = [(256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(tag, side) for pair in sides for tag, side in zip((322, 323), pair, strict=True)]
    content = zlib.compress(bytes(64 * 64))
    start = 16 if big else 8
    end = start + (8 if big else 2) + (len(tags) + 2) * (20 if big else 12) + (8 if big else 4)
    tags += [(324, end), (325, len(content))]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42)
    head += struct.pack(f"{order}HHQ", 8, 0, start) if big else struct.pack(f"{order}I", start)
    head += struct.pack(f"{order}{'Q' if big else 'H'}", len(tags))
    kind = 16 if big else 4
    for tag, value in sorted(tags, key=lambda entry: entry[0]):
        head += struct.pack(f"{order}HH{'QQ' if big else 'II'}", tag, kind, 1, value)
    return head + bytes(8 if big else 4) + content


@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True)])
def test_a_tile_larger_than_the_image_counts(order, big):
    content = tiled((64, 64), order=order, big=big)
    assert decode_image(content, LIMITS, pixels).shape == (3, 8, 8)
    assert is_small(content)
    for sides in ([(1024, 1024)], [(1024, 1024), (64, 64)]):  # of which libtiff takes the first
        content = tiled(*sides, order=order, big=big)
        assert not is_small(content)
        with pytest.raises(HTTPException, match=r"413: image must be at most 1,000,000 pixels, got more$"):
            decode_image(content, LIMITS, pixels)
        with pytest.raises(HTTPException, match=r"413: images must be at most"):
            check_total_pixels([content], LIMITS)


def test_as_many_pixels_as_may_be_are_read(make_image):
    content = make_image(size=(1000, 1000), mode="L")
    assert decode_image(content, LIMITS, pixels).shape == (3, 8, 8)


def test_what_is_small_has_few_bytes_and_few_pixels(make_image):
    assert is_small(make_image(size=(64, 64), mode="L"))
    assert not is_small(bomb(65, 64))
    assert not is_small(make_image(size=(64, 64), mode="L") + bytes(2**14))
    comment = PngInfo()
    comment.add_text("much", "." * 2**20, zip=True)  # 1 kB, inflated when the file is opened
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "PNG", pnginfo=comment)
    assert not is_small(file.getvalue())


def test_pixels_are_counted_over_all_images_of_a_request():
    other_format = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2000 1000\n"  # which is refused
    check_total_pixels([bomb(1000, 999), b"hello", other_format], LIMITS)
    with pytest.raises(
        HTTPException, match=r"413: images must be at most 1,000,000 pixels together, got 1,001,500 pixels$"
    ):
        check_total_pixels([bomb(1000, 999), bomb(50, 50)], LIMITS)
