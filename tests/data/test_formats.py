import io
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError, features

from netfission.data import formats
from netfission.data.formats import MissingPackageError, image_suffixes, open_image, package_for
from netfission.data.images import to_pixels, why_unreadable
from netfission.data.splits import CorruptImageError, FileRecords, decode

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def with_text(content: bytes, text: str, last: bool) -> bytes:
    """A PNG file with compressed text before its pixels or after them."""
    place = content.index(b"IEND" if last else b"IDAT") - 4
    chunk = b"zTXtname\0\0" + zlib.compress(text.encode())
    whole = (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    return content[:place] + whole + content[place:]


def turned_png() -> bytes:
    """A PNG file with an orientation, text before the pixels and text after them."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    PICTURE.save(file, "PNG", exif=exif)
    return with_text(with_text(file.getvalue(), "before", last=False), "after", last=True)


def chunk_at(content: bytes, name: bytes, last: bool = False) -> tuple[int, int]:
    """The start and the end of a chunk's data."""
    start = (content.rindex if last else content.index)(name)
    return start + 4, start + 4 + int.from_bytes(content[start - 4 : start])


def pixels(content: bytes, size: tuple[int, int]) -> torch.Tensor:
    with open_image(io.BytesIO(content)) as image:
        return to_pixels(image, "RGB", size)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "jfif", "mpo", "png", "bmp", "gif", "tif", "tiff", "ppm"])
def test_usual_suffixes_are_of_images(suffix: str) -> None:
    assert f".{suffix}" in image_suffixes()


@pytest.mark.parametrize(
    "suffix", [*sorted(image_suffixes()), ".avif", ".heic", ".txt", ".csv", ".pdf", ".h5"]
)
def test_a_suffix_is_of_images_if_pillow_reads_and_decodes_it(suffix: str) -> None:
    kind = Image.registered_extensions().get(suffix, "")
    stub = kind in {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
    assert (suffix in image_suffixes()) == (not stub and (kind in Image.OPEN or kind == "MPO"))


@pytest.mark.parametrize("kind", ["webp", "avif"])
def test_formats_of_other_libraries_are_images_if_pillow_has_them(kind: str) -> None:
    assert features.check(kind) == (f".{kind}" in image_suffixes())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_pixels_are_those_that_pillow_turns(kind: str, orientation: int) -> None:
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    PICTURE.save(file, kind, exif=exif)
    reference = np.array(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
    decoded = pixels(file.getvalue(), reference.shape[:2])
    assert np.array_equal(decoded.permute(1, 2, 0), reference)


@pytest.mark.parametrize("damage", ["header", "checksum"])
def test_damaged_exif_is_no_damaged_image(damage: str) -> None:
    content = bytearray(turned_png())
    start, end = chunk_at(content, b"eXIf")
    if damage == "checksum":
        content[end] ^= 1
        with pytest.raises(UnidentifiedImageError):
            Image.open(io.BytesIO(content))
    else:
        content[start:end] = b"x" * (end - start)
        content[end : end + 4] = zlib.crc32(content[start - 4 : end]).to_bytes(4)
    assert torch.equal(pixels(content, (6, 9)), to_pixels(PICTURE, "RGB", (6, 9)))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("damage", ["checksum", "data", "length"])
def test_damaged_text_leaves_pixels_and_orientation(last: bool, damage: str) -> None:
    whole = turned_png()
    content = bytearray(whole)
    start, end = chunk_at(content, b"zTXt", last)
    if damage == "length" and last:
        del content[end - 5 :]  # the file ends within the text
    elif damage == "length":
        content[start : start + 1] = b"\xff"
    else:
        content[end if damage == "checksum" else end - 6] ^= 1
    turned = to_pixels(PICTURE.transpose(Image.Transpose.ROTATE_270), "RGB", (9, 6))
    assert torch.equal(pixels(whole, (9, 6)), turned)
    assert torch.equal(pixels(content, (9, 6)), turned)


@pytest.mark.parametrize("last", [False, True])
def test_long_text_is_no_damage(last: bool) -> None:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    content = with_text(file.getvalue(), "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), last)
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(content)).load()
    assert torch.equal(pixels(content, (6, 9)), to_pixels(PICTURE, "RGB", (6, 9)))


def test_transparency_survives_damaged_text() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b")
    file = io.BytesIO()
    Image.new("RGB", (2, 2), "black").save(file, "PNG", transparency=(0, 0, 0), pnginfo=text)
    content = bytearray(file.getvalue())
    content[chunk_at(content, b"tEXt")[1]] ^= 1
    assert (pixels(content, (2, 2)) == 255).all()


@pytest.mark.parametrize("name", [b"IDAT", b"IHDR"])
def test_damaged_pixels_stay_damaged(name: bytes) -> None:
    content = bytearray(turned_png())
    content[chunk_at(content, name)[0] + 1] ^= 255
    with pytest.raises(Exception, match=r"cannot identify|broken data stream"):
        pixels(content, (6, 9))


@pytest.mark.parametrize("name", ["a.heic", "b.jpg"])  # telephones send HEIC under both
def test_a_heic_file_names_the_package_that_reads_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(HEIC + bytes(99))
    with pytest.raises(MissingPackageError) as caught:
        open_image(tmp_path / name)
    told = "HEIC, which needs pillow-heif: pip install pillow-heif"
    assert why_unreadable(caught.value) == told
    with pytest.raises(CorruptImageError, match=rf"{name} must be a readable image, got .* \({told}\)"):
        decode(FileRecords([str(tmp_path / name)], np.array([0])), 0, (8, 8))
    assert package_for(".HEIC") == "pillow-heif"
    assert package_for(".txt") is package_for(".jpg") is None


@pytest.fixture
def pillow_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for the package, whose HEIC files hold a PNG file after their head."""

    def open_heic(file: io.BytesIO, _: str) -> Image.Image:
        with file:
            file.seek(len(HEIC))
            return PngImagePlugin.PngImageFile(io.BytesIO(file.read()))

    def register() -> None:
        Image.register_open("HEIF", open_heic, lambda head: head[4:12] == b"ftypheic")
        Image.register_extensions("HEIF", [".heic", ".heif"])

    package = types.ModuleType("pillow_heif")
    package.__spec__ = types.SimpleNamespace(name="pillow_heif")
    package.register_heif_opener = register
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    for table in (Image.OPEN, Image.EXTENSION):
        for name, value in {"HEIF": None, ".heic": None, ".heif": None}.items():
            monkeypatch.setitem(table, name, value)
            monkeypatch.delitem(table, name)
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    caches = (formats.image_suffixes, formats.readable_formats, formats._register_packages)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("pillow_heif")
def test_heic_is_read_if_the_package_is_installed(tmp_path: Path) -> None:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    (tmp_path / "a.heic").write_bytes(HEIC + file.getvalue())
    assert {".heic", ".heif"} <= image_suffixes()
    assert package_for(".heic") is None
    decoded = decode(FileRecords([str(tmp_path / "a.heic")], np.array([0])), 0, (6, 9))
    assert torch.equal(decoded, to_pixels(PICTURE, "RGB", (6, 9)))
