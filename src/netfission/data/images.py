"""Conversion of images in any of Pillow's modes to the pixels that a network reads."""

from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from netfission.data.formats import MissingPackageError, load
from netfission.utils.errors import invalid

Mode = Literal["L", "RGB"]

# What turns an image upright, by the orientation in its EXIF data.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]  # which swap height and width


def to_pixels(image: Image.Image, mode: Mode, size: tuple[int, int]) -> Tensor:
    """Convert an image to pixels `(channels, height, width)` uint8.

    The image is rotated upright by its EXIF tag; damaged metadata are ignored. Transparent parts become
    white; of 16 bits the upper 8 are used. Integers of 32 bits are read as 0 to 255 if all values are in that
    range, and otherwise as of 16 bits; floating point as 0 to 1 if all values are in that range, and
    otherwise as 0 to 255. Other values are clipped. An image of another size is scaled until it covers `size`
    (bilinear, with antialiasing), and cropped at its centre.

    Args:
        image: in any of Pillow's modes.
        mode: `L` for 1 channel, `RGB` for 3.
        size: height and width.

    Raises:
        ValueError: floating-point pixels are not finite.
        OSError, SyntaxError, struct.error, …: Pillow's decoders fail.

    Example:
        >>> to_pixels(Image.new("RGBA", (20, 10)), "RGB", (8, 8)).shape
        torch.Size([3, 8, 8])
    """
    pixels = _converted(image, mode)
    if pixels.size != size[::-1]:
        pixels = ImageOps.fit(pixels, size[::-1], Image.Resampling.BILINEAR)
    return _as_tensor(pixels)


def to_pixels_within(image: Image.Image, mode: Mode, size: tuple[int, int]) -> Tensor:
    """Convert an image to pixels `(channels, height, width)` uint8, without cropping it.

    As `to_pixels`, but an image of another size is scaled to the size of `size_within`; below it and to its
    right, pixels are black.

    Args:
        image: in any of Pillow's modes.
        mode: `L` for 1 channel, `RGB` for 3.
        size: height and width.

    Raises:
        Those of `to_pixels`.

    Example:
        >>> pixels = to_pixels_within(Image.new("RGB", (20, 10), "white"), "RGB", (8, 8))
        >>> pixels.shape, pixels[0, :, 0].tolist()
        (torch.Size([3, 8, 8]), [255, 255, 255, 255, 0, 0, 0, 0])
    """
    pixels = _converted(image, mode)
    height, width = size_within((pixels.height, pixels.width), size)
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    return torch.nn.functional.pad(_as_tensor(pixels), (0, size[1] - width, 0, size[0] - height))


def size_within(size: tuple[int, int], limit: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of an image that is scaled until it fits within a limit.

    Args:
        size: height and width of the image.
        limit: largest height and width, of which one is reached.

    Example:
        >>> size_within((300, 400), (60, 60)), size_within((30, 40), (60, 60))
        ((45, 60), (45, 60))
    """
    factor = min(limit[0] / size[0], limit[1] / size[1])
    height, width = (max(1, round(factor * side)) for side in size)
    return height, width


def _converted(image: Image.Image, mode: Mode) -> Image.Image:
    return _on_white(_of_eight_bits(upright(load(image)))).convert(mode)


def _as_tensor(pixels: Image.Image) -> Tensor:
    # A copy, as tensors are writable and Pillow's pixels are not.
    channels_last = np.array(pixels).reshape(pixels.height, pixels.width, -1)
    return torch.from_numpy(channels_last).permute(2, 0, 1)


def upright(image: Image.Image) -> Image.Image:
    """Rotate an image as its EXIF tag says; `ImageOps.exif_transpose` fails if any tag is damaged."""
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width of an image that is turned upright.

    Example:
        >>> upright_size(Image.new("L", (20, 10)))
        (10, 20)
    """
    width, height = image.size
    return (width, height) if _turn(image) in _QUARTER_TURNS else (height, width)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data raise errors of every kind
        return None


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """Convert modes that Pillow would clip: grey of 16 or 32 bits at 255, and floating point at 1."""
    if image.mode.startswith("I"):
        integers = np.array(image).clip(0, 65535)
        of_eight_bits = image.mode == "I" and integers.max() <= 255  # of 32 bits, which hold either
        return Image.fromarray((integers if of_eight_bits else integers // 256).astype(np.uint8))
    if image.mode == "F":
        values = np.array(image)
        if not np.isfinite(values).all():
            raise invalid("pixels", "finite", found="NaN or infinity")
        if values.min() >= 0 and values.max() <= 1:
            return Image.fromarray((255 * values).round().astype(np.uint8))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)


def why_unreadable(error: Exception) -> str:
    """Say in one line why an image cannot be read, without naming it.

    Example:
        >>> why_unreadable(UnidentifiedImageError())
        'not an image of a known format'
    """
    if isinstance(error, MissingPackageError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__
