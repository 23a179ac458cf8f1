"""Augmentation of whole batches, on the device they lie on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

MixKind = Literal["none", "cutmix", "mixup"]
Mix = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images; the default is nothing.

    - `crop_padding`: pixels of zeros put around the raw image before a window of the old size is
      cut out at random, per image (the paper: 4). Raw zeros: the border is black, not the mean.
    - `flip`: mirror each image left to right with probability ½.
    - `mix`: `cutmix` (Yun et al. 2019) or `mixup` (Zhang et al. 2018) within each batch, which
      makes the labels soft; `none` by default.
    - `mix_alpha`: both parameters of the Beta distribution of the mixing share; default 1.

    Raises ValueError for a negative padding, an unknown mix or an alpha that is not positive.
    """

    crop_padding: int = 0
    flip: bool = False
    mix: MixKind = "none"
    mix_alpha: float = 1.0

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding must be at least 0, got {self.crop_padding}")
        if self.mix not in get_args(MixKind):
            raise ValueError(f"mix must be one of {', '.join(get_args(MixKind))}, got {self.mix!r}")
        if not self.mix_alpha > 0:
            raise ValueError(f"mix_alpha must be positive, got {self.mix_alpha}")


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `padding` pixels into zeros, and mirror it by chance if `flip`.

    `images` is `(B, C, H, W)` of any dtype, and so is what returns. `generator` lives on the CPU
    whatever the device of the images, so that one seed means one augmentation everywhere.
    """
    batch, channels, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = torch.arange(width).expand(batch, width)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    # One gather does the crop and the flip: for each output pixel its place in the padded image.
    source = rows[:, :, None] * (width + 2 * padding) + (left + columns)[:, None, :]
    source = source.to(images.device, non_blocking=True).view(batch, 1, -1)
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, source.expand(-1, channels, -1)).view(images.shape)


def make_mix(augmentation: Augmentation, classes: int) -> Mix | None:
    """Return what mixes images `(B, C, H, W)` and labels `(B,)` int64 of a batch, or None.

    It returns the mixed images and soft labels `(B, classes)` float, and leaves PyTorch's global
    random state as it was.
    """
    if augmentation.mix == "none":
        return None
    from torchvision.transforms import v2

    kind = v2.CutMix if augmentation.mix == "cutmix" else v2.MixUp
    transform = kind(num_classes=classes, alpha=augmentation.mix_alpha)

    def mix(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seed = int(torch.randint(2**62, (), generator=generator))
        # torchvision draws from the CPU's global generator; torch.manual_seed would also reset
        # those of the accelerators, which nothing here restores.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            mixed, soft = transform(images, labels)
        return mixed, soft

    return mix
