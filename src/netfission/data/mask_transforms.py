"""Random changes of a photograph and its mask alike, by torchvision."""

import math
from typing import Any

import torch
from torch import Tensor

from netfission.utils.errors import invalid
from netfission.utils.seeds import seeded


class MaskTransform:
    """Scale, crop, mirror and recolour a photograph; its mask is scaled, cropped and mirrored with it.

    What a crop has beyond the photograph is black, and void in the mask. PyTorch's global random state does
    not change.

    Args:
        size: height and width of the result.
        scale: smallest and largest factor by which the photograph is scaled before it is cropped.
        flip: mirror left to right with probability ½.
        color_jitter: largest relative change of brightness, contrast and saturation, in [0, 1].
        void: the number of pixels without a class.

    Raises:
        ValueError: a setting is not valid.

    Example:
        >>> transform = MaskTransform((16, 16), color_jitter=0.2)
        >>> pixels, mask = torch.zeros(3, 24, 32, dtype=torch.uint8), torch.ones(24, 32, dtype=torch.int64)
        >>> pixels, mask = transform(pixels, mask, seed=0)
        >>> pixels.shape, mask.shape, mask.dtype
        (torch.Size([3, 16, 16]), torch.Size([16, 16]), torch.int64)
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: bool = True,
        color_jitter: float = 0.0,
        void: int = 255,
    ) -> None:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise invalid("size", "a positive height and width", size)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] < math.inf:
            raise invalid("scale", "two positive factors, the smaller first", scale)
        if not 0 <= color_jitter <= 1:
            raise invalid("color_jitter", "in [0, 1]", color_jitter)
        fill: dict[Any, int] = {tv_tensors.Image: 0, tv_tensors.Mask: void}
        jitter = [v2.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []
        crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)
        self._steps = v2.Compose([*jitter, crop, *([v2.RandomHorizontalFlip()] if flip else [])])
        self._scale = scale

    def __call__(self, pixels: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Transform a pair; the seed determines the result.

        Args:
            pixels: `(3, height, width)` uint8.
            mask: `(height, width)` int64, of the same height and width.
            seed: of all random choices.

        Returns:
            Pixels uint8 and mask int64, of the size that was set, in memory of their own.

        Raises:
            ValueError: the mask is of another size than the photograph.
        """
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import InterpolationMode, functional

        if mask.shape != pixels.shape[-2:]:
            expected = f"of the photograph's size ({pixels.shape[-2]}×{pixels.shape[-1]})"
            raise invalid("mask", expected, found="×".join(map(str, mask.shape)))
        with seeded(seed):
            factor = float(torch.empty(()).uniform_(*self._scale))
            size = [max(1, round(factor * side)) for side in pixels.shape[-2:]]
            image = functional.resize_image(pixels, size, antialias=True)
            # `resize` takes "nearest" for a mask, which shifts it by half a pixel if it is halved.
            classes = functional.resize_image(mask[None], size, InterpolationMode.NEAREST_EXACT)[0]
            image, classes = self._steps(tv_tensors.Image(image), tv_tensors.Mask(classes))
        return image.as_subclass(Tensor).clone(), classes.as_subclass(Tensor).clone()
