"""From an image in any of Pillow's modes to pixels as a network takes them."""

from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Mode = Literal["L", "RGB"]


def to_pixels(image: Image.Image, mode: Mode, size: tuple[int, int]) -> Tensor:
    """Turn an image into `(C, H, W)` uint8, `size` being (H, W).

    It is turned upright by its EXIF tag. What is transparent lies on white; 16 bits become 8 by their
    upper byte. Floating point is taken to run from 0 to 1 where no value lies outside, and else to 255, where
    it is clipped. An image of another size is scaled until it covers `size` (bilinear, with antialiasing),
    and its centre is taken.

    Raises ValueError for floating point that is not finite, and whatever Pillow's decoders raise: OSError,
    SyntaxError, struct.error and others.
    """
    upright = ImageOps.exif_transpose(image)
    pixels = _on_white(_of_eight_bits(upright)).convert(mode)
    if pixels.size != size[::-1]:
        pixels = ImageOps.fit(pixels, size[::-1], Image.Resampling.BILINEAR)
    # A copy, as tensors are writable and Pillow's pixels are not.
    channels_last = np.array(pixels).reshape(*size, -1)
    return torch.from_numpy(channels_last).permute(2, 0, 1)


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which Pillow would clip at 255, and floating point to 1, which it would cut off."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.array(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode == "F":
        values = np.array(image)
        if not np.isfinite(values).all():
            raise ValueError("it has pixels that are no finite numbers")
        if values.min() >= 0 and values.max() <= 1:
            return Image.fromarray((255 * values).round().astype(np.uint8))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)


def why_unreadable(error: Exception) -> str:
    """What kept an image from being read, in one line that does not name it."""
    if isinstance(error, UnidentifiedImageError):
        return "is no image that can be read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__
