"""Loading of data sets by name or path, as splits ready for `Batches`."""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from netfission.data.sources import Source, find_source
from netfission.data.splits import (
    CorruptImageError,
    Records,
    Rows,
    Split,
    StreamedSplit,
    TensorSplit,
    decode_all,
    readable,
    shuffled_by_class,
    stratified_cut,
)
from netfission.utils.errors import check_choice, check_positive_integer, invalid

MEMORY_LIMIT = 2 << 30  # bytes of decoded pixels, all splits together
_TEST_SHARE = 0.2
_PROBED_IMAGES = 64
_STATISTICS_IMAGES = 1024


@dataclass(frozen=True)
class ImageData:
    """A data set of images with one label each.

    Attributes:
        name: name or folder that it was loaded by.
        classes: names of the classes.
        shape: channels, height and width.
        mean: one number per channel, of pixels of the training split scaled to [0, 1]; computed from 1,024
            images if the split is streamed.
        std: standard deviation, as `mean`.
        train: training split.
        validation: validation split; None if no images were held out.
        test: test split.

    Example:
        >>> data = load_data("digits")
        >>> data.shape, len(data.classes), len(data.train), len(data.validation), len(data.test)
        ((1, 8, 8), 10, 1293, 145, 359)
    """

    name: str
    classes: list[str]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    validation: Split | None
    test: Split


def load_data(
    name: str,
    *,
    image_size: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
    corrupt: Literal["refuse", "skip"] = "refuse",
    limit_per_class: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> ImageData:
    """Load a data set, and split a validation set from its training images.

    If the data set has no test split, 20 % of each class become one, by a rule that no argument changes.
    Images from files are converted to RGB.

    Args:
        name: `digits` (scikit-learn's, 1×8×8, scaled to 0..255); `cifar10`, `cifar100` or `tiny-imagenet`
            (from the Hugging Face hub); or a folder. A folder holds parquet shards with a column of images
            and one of class labels, or images as `train/CLASS/*` and `test/CLASS/*` (or `val`, `valid`,
            `validation`).
        image_size: height and width in pixels; images are scaled to cover it and cropped at their centre.
            Default: unchanged, if all images have one size.
        validation: share of each class's training images to hold out, in [0, 1). A class of one image stays
            in the training split.
        seed: determines which images are held out, and which a limit keeps.
        corrupt: `refuse` raises an error at the first image that cannot be decoded; `skip` leaves such images
            out and warns of their number. A streamed data set raises the error when the image is accessed;
            skipping decodes all images once beforehand.
        limit_per_class: training images to keep of each class, without effect on the validation split; a
            smaller limit keeps a subset of what a larger one keeps. Default: all.
        memory_limit: bytes of decoded images up to which they are held in memory, default 2 GiB; larger data
            sets are decoded on access.

    Raises:
        ValueError: an argument is not valid, the name is unknown, the folder has another layout, a label is
            out of range, or an image is corrupt.
        FileNotFoundError: the folder does not exist.
        ConnectionError: the hub is out of reach.

    Example:
        >>> data = load_data("digits", image_size=16, limit_per_class=20)
        >>> data.shape, len(data.train)
        ((1, 16, 16), 200)
    """
    if image_size is not None:
        check_positive_integer("image_size", image_size)
    if not 0 <= validation < 1:
        raise invalid("validation", "a share in [0, 1)", validation)
    check_choice("corrupt", corrupt, ("refuse", "skip"))
    if limit_per_class is not None:
        check_positive_integer("limit_per_class", limit_per_class)

    source = find_source(name)
    rows = _assign_rows(source, validation, seed, limit_per_class)
    size = _common_size(source.train, name) if image_size is None else (image_size, image_size)
    channels = len(source.train.mode)
    pixels = sum(map(len, rows)) * channels * size[0] * size[1]
    sources = (source.train, source.train, source.test or source.train)
    splits = [
        _split(records, chosen, size, skip=corrupt == "skip", stream=pixels > memory_limit)
        for records, chosen in zip(sources, rows, strict=True)
    ]
    if skipped := sum(map(len, rows)) - sum(map(len, splits)):
        warnings.warn(f"left out {skipped} corrupt images of {name}", stacklevel=2)
    train, held_out, test = splits
    mean, std = _statistics(train)
    return ImageData(
        name=name,
        classes=source.classes,
        shape=(channels, *size),
        mean=mean,
        std=std,
        train=train,
        validation=held_out if validation else None,
        test=test,
    )


def _assign_rows(
    source: Source, validation: float, seed: int, limit_per_class: int | None
) -> tuple[Rows, Rows, Rows]:
    """Return the rows of the training, validation and test split, each sorted."""
    labels = source.train.labels
    if source.test is None:
        train, test = stratified_cut(labels, _TEST_SHARE, seed=0)
    else:
        train, test = np.arange(len(labels)), np.arange(len(source.test.labels))
    rest, cut = stratified_cut(labels[train], validation, seed)
    train, held_out = train[rest], train[cut]
    if validation and not len(held_out):
        hint = f"every class has fewer than {0.5 / validation:.0f} training images"
        raise invalid("validation", "0, or enough for an image of some class", validation, hint=hint)
    if limit_per_class is not None:
        kept = [group[:limit_per_class] for group in shuffled_by_class(labels[train], seed)]
        train = train[np.sort(np.concatenate(kept))]
    return train, held_out, test


def _common_size(records: Records, name: str) -> tuple[int, int]:
    """Return the height and width of the images, from a sample spread evenly over the data set."""
    count = len(records.labels)
    sizes = set()
    for row in np.linspace(0, count - 1, min(count, _PROBED_IMAGES), dtype=np.int64):
        try:
            with records.open(int(row)) as image:
                sizes.add(image.size[::-1])
        except Exception:  # a corrupt image, which is handled later
            continue
    if len(sizes) > 1:
        some = " and ".join(f"{height}×{width}" for height, width in sorted(sizes)[:2])
        hint = f"those of {name} are {some}, for example"
        raise invalid("image_size", "given if images differ in size", None, hint=hint)
    if not sizes:
        found = f"none, {records.describe(0)} being the first"
        raise CorruptImageError(str(invalid(name, "a data set of readable images", found=found)))
    return sizes.pop()


def _split(records: Records, rows: Rows, size: tuple[int, int], *, skip: bool, stream: bool) -> Split:
    if not stream:
        return decode_all(records, rows, size, skip)
    return StreamedSplit(records, readable(records, rows, size) if skip else rows, size)


def _statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, of pixels scaled to [0, 1]."""
    images = split.images if isinstance(split, TensorSplit) else _sample(split)
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ levels
    variance = share @ levels.square() - mean.square()
    # Never below one grey level, so that a channel without contrast can be divided by it.
    std = variance.clamp(min=1 / 255**2).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _sample(split: StreamedSplit) -> Tensor:
    """Decode images evenly spaced over a split."""
    count = min(len(split), _STATISTICS_IMAGES)
    return torch.stack([split[i * len(split) // count][0] for i in range(count)])
