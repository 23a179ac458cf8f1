"""Augmentation of whole batches, on the device they lie on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from netfission.utils.errors import check_choice, check_within, invalid
from netfission.utils.seeds import seeded

MixKind = Literal["none", "cutmix", "mixup"]
Balance = Literal["none", "weights", "sampler"]
Mix = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Augmentation:
    """Settings of the augmentation of training images; by default they stay as they are.

    Args:
        crop_padding: pixels of zeros added around the raw image before a window of the old size is cropped at
            random, per image (the paper: 4). Raw zeros: the border is black, not the mean.
        crop_scale: smallest share of the image's area that a crop of random size and shape keeps; it is
            resized to the size of the image. Default no such crops.
        flip: mirror each image left to right with probability ½.
        rand_augment: magnitude of RandAugment (Cubuk et al. 2020), from 0 to 30, with two operations per
            image; default none.
        color_jitter: largest relative change of brightness, contrast and saturation, in [0, 1].
        erase: probability that a random rectangle of the normalised image becomes 0, the mean.
        mix: `cutmix` (Yun et al. 2019) or `mixup` (Zhang et al. 2018) within each batch, which makes the
            labels soft; default `none`.
        mix_alpha: both parameters of the Beta distribution of the mixing share, from 0.1 to 1000; default 1.
        label_smoothing: share of each label that is spread over all classes, in [0, 1); default 0.

    Raises:
        ValueError: the padding is negative, the mix unknown, alpha not positive, or the smoothing no share.

    Example:
        >>> Augmentation(crop_padding=4, flip=True).mix
        'none'
        >>> Augmentation(mix="cutout")
        Traceback (most recent call last):
        ValueError: mix must be one of none, cutmix, mixup, got 'cutout'; did you mean cutmix?
    """

    crop_padding: int = 0
    crop_scale: float | None = None
    flip: bool = False
    rand_augment: int | None = None
    color_jitter: float = 0.0
    erase: float = 0.0
    mix: MixKind = "none"
    mix_alpha: float = 1.0
    label_smoothing: float = 0.0

    @property
    def changes_photographs(self) -> bool:
        """Whether images are changed one by one, see `PhotographTransform`."""
        return self.crop_scale is not None or self.rand_augment is not None or self.color_jitter > 0

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.crop_padding < 0:
            raise invalid("crop_padding", "an integer of at least 0", self.crop_padding)
        check_choice("mix", self.mix, get_args(MixKind))
        check_within("mix_alpha", self.mix_alpha, 0.1, 1000)  # others are not drawn correctly in float32
        if not 0 <= self.label_smoothing < 1:
            raise invalid("label_smoothing", "a share in [0, 1)", self.label_smoothing)


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `padding` pixels into zeros, and mirror it at random if `flip`.

    Args:
        images: `(batch, channels, height, width)` of any dtype, on any device.
        padding: largest shift in each direction.
        flip: mirror each image with probability ½.
        generator: on the CPU, so that one seed means one augmentation on every device.

    Returns:
        Images of the same shape and dtype.

    Example:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> crop_and_flip(images, padding=1, flip=True, generator=torch.Generator()).shape
        torch.Size([2, 3, 8, 8])
    """
    batch, channels, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = torch.arange(width).expand(batch, width)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    # One gather does the crop and the flip: for each output pixel its index in the padded image.
    source = rows[:, :, None] * (width + 2 * padding) + (left + columns)[:, None, :]
    source = source.to(images.device, non_blocking=True).view(batch, 1, -1)
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, source.expand(-1, channels, -1)).view(images.shape)


class PhotographTransform:
    """The random crops, RandAugment and colour jitter of an augmentation, by torchvision, of one image.

    PyTorch's global random state does not change.

    Args:
        augmentation: the settings; see `changes_photographs`.
        size: height and width of the result.

    Example:
        >>> transform = PhotographTransform(Augmentation(crop_scale=0.5, rand_augment=9), (16, 16))
        >>> image = torch.zeros(3, 32, 24, dtype=torch.uint8)
        >>> transform(image, seed=0).shape
        torch.Size([3, 16, 16])
    """

    def __init__(self, augmentation: Augmentation, size: tuple[int, int]) -> None:
        from torchvision.transforms import v2

        steps: list[Callable[[Tensor], Tensor]] = []
        if augmentation.crop_scale is not None:
            steps.append(v2.RandomResizedCrop(size, scale=(augmentation.crop_scale, 1.0), antialias=True))
        if augmentation.rand_augment is not None:
            steps.append(v2.RandAugment(num_ops=2, magnitude=augmentation.rand_augment))
        if strength := augmentation.color_jitter:
            steps.append(v2.ColorJitter(strength, strength, strength))
        self._steps = steps

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Transform pixels `(channels, height, width)` uint8; the seed determines the result."""
        with seeded(seed):  # torchvision draws from the global generator
            for step in self._steps:
                image = step(image)
        return image


def erase(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Set a random rectangle of each image to 0 with a probability (Zhong et al. 2020).

    A rectangle covers 2 to 33 % of the image. PyTorch's global random state does not change.

    Args:
        images: `(batch, channels, height, width)`, normalised.
        probability: of each image.
        generator: on the CPU.

    Returns:
        Images of the same shape and dtype.

    Example:
        >>> images = torch.ones(4, 3, 16, 16)
        >>> bool((erase(images, 1.0, torch.Generator()) == 0).flatten(1).any(1).all())
        True
    """
    from torchvision.transforms import v2

    transform = v2.RandomErasing(p=probability)
    with seeded(int(torch.randint(2**62, (), generator=generator))):
        return torch.stack([transform(image) for image in images])


def soften(labels: Tensor, classes: int, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Return soft labels: smoothed, and times the weight of their class.

    With hard labels, the cross-entropy of the result is that of `torch.nn.functional.cross_entropy` with
    `label_smoothing` and the factor `weights[label]` per image.

    Args:
        labels: `(batch,)` int64, or soft `(batch, classes)` float.
        classes: number of classes.
        smoothing: share of each label that is spread over all classes, in [0, 1).
        weights: `(classes,)` float, on the device of the labels; default 1 for all.

    Returns:
        `(batch, classes)` float32.

    Example:
        >>> soften(torch.tensor([0]), 2, smoothing=0.2)
        tensor([[0.9000, 0.1000]])
        >>> soften(torch.tensor([0]), 2, weights=torch.tensor([3.0, 1.0]))
        tensor([[3., 0.]])
    """
    soft = labels if labels.is_floating_point() else F.one_hot(labels, classes).float()
    factor = 1.0 if weights is None else (soft @ weights)[:, None]
    return factor * ((1 - smoothing) * soft + smoothing / classes)


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return weights inverse to the sizes of the classes, whose mean over the labels is 1.

    Args:
        labels: `(images,)` int64.
        classes: number of classes; one without an image has the weight 0.

    Returns:
        `(classes,)` float32.

    Example:
        >>> class_weights(torch.tensor([0, 0, 0, 1]), 2)
        tensor([0.6667, 2.0000])
    """
    counts = labels.bincount(minlength=classes)
    share = len(labels) / (counts > 0).sum()
    return torch.where(counts > 0, share / counts, 0.0)


def make_mix(augmentation: Augmentation, classes: int) -> Mix | None:
    """Make the function that mixes the images of a batch and their labels; None if nothing is mixed.

    The function maps images `(batch, channels, height, width)` float, labels `(batch,)` int64 and a generator
    to mixed images and soft labels `(batch, classes)` float. PyTorch's global random state does not change.

    Example:
        >>> mix = make_mix(Augmentation(mix="mixup"), classes=10)
        >>> images, labels = mix(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]), torch.Generator())
        >>> labels.shape
        torch.Size([4, 10])
    """
    if augmentation.mix == "none":
        return None
    from torchvision.transforms import v2

    kind = v2.CutMix if augmentation.mix == "cutmix" else v2.MixUp
    transform = kind(num_classes=classes, alpha=augmentation.mix_alpha)

    def mix(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        with seeded(int(torch.randint(2**62, (), generator=generator))):
            mixed, soft = transform(images, labels)
        return mixed, soft

    return mix
