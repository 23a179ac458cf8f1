"""Data sets by name or path, as splits ready for `Batches`."""

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

MEMORY_LIMIT = 2 << 30  # bytes of decoded pixels, all splits together
_TEST_SHARE = 0.2
_PROBED_IMAGES = 64
_STATISTICS_IMAGES = 1024


@dataclass(frozen=True)
class ImageData:
    """A data set of images with one label each.

    `shape` is (channels, height, width); `mean` and `std` hold one number per channel, of pixels
    scaled to [0, 1], from the training split (from 1,024 of its images where it is streamed).
    `validation` is None where none was asked for.
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
    """Load a data set and cut a validation split from its training images.

    `name` is `digits` (scikit-learn's, 1×8×8, scaled to 0..255), `cifar10`, `cifar100` or
    `tiny-imagenet` (from the Hugging Face hub), or a folder: parquet shards with an image and a
    class label column, or images as `train/CLASS/*` and `test/CLASS/*` (or `val`, `valid`,
    `validation`). Without a test split of its own, 20 % of every class become one by a rule that
    no argument changes. Images from files are RGB, whatever they were.

    - `image_size`: height and width in pixels; images are scaled to cover it and cut about their
      centre. Default: as they are, which takes images of one size.
    - `validation`: share of each class's training images to hold out, in [0, 1), default 0.1. A
      class of one image stays in the training split.
    - `seed`: decides which images are held out, and which a limit keeps.
    - `corrupt`: `refuse` (default) raises at the first image that cannot be decoded; `skip` leaves
      such images out and warns with their number. A streamed data set is refused only when the
      image's turn comes; skipping decodes all of it once beforehand.
    - `limit_per_class`: training images to keep of each class, after the validation split was cut
      and without effect on it; a smaller limit keeps a subset of what a larger one keeps.
    - `memory_limit`: bytes of decoded images up to which they are held in memory, default 2 GiB;
      larger data sets are decoded on access.

    Raises ValueError (arguments out of range, unknown name, unfit folder, labels out of range,
    corrupt image), FileNotFoundError (no such folder) or ConnectionError (hub out of reach).
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be in [0, 1), got {validation}")
    if corrupt not in ("refuse", "skip"):
        raise ValueError(f"corrupt must be refuse or skip, got {corrupt!r}")
    if limit_per_class is not None and limit_per_class < 1:
        raise ValueError(f"limit_per_class must be at least 1, got {limit_per_class}")

    source = find_source(name)
    rows = _deal_out(source, validation, seed, limit_per_class)
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


def _deal_out(
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
        raise ValueError(
            f"validation={validation} leaves no image to validate on: "
            f"every class has fewer than {0.5 / validation:.0f} training images"
        )
    if limit_per_class is not None:
        kept = [group[:limit_per_class] for group in shuffled_by_class(labels[train], seed)]
        train = train[np.sort(np.concatenate(kept))]
    return train, held_out, test


def _common_size(records: Records, name: str) -> tuple[int, int]:
    """Return the (height, width) that images have, judged by a few from all over the data set."""
    count = len(records.labels)
    sizes = set()
    for row in np.linspace(0, count - 1, min(count, _PROBED_IMAGES), dtype=np.int64):
        try:
            with records.open(int(row)) as image:
                sizes.add(image.size[::-1])
        except Exception:  # a corrupt image: whether it is refused is decided later
            continue
    if len(sizes) > 1:
        some = " and ".join(f"{height}×{width}" for height, width in sorted(sizes)[:2])
        raise ValueError(f"image_size must be given: images of {name} differ in size ({some})")
    if not sizes:
        raise CorruptImageError(f"corrupt image {records.describe(0)}: none of {name} can be read")
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
