"""Loading of data sets by name or path, as splits ready for `Batches`."""

import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from statistics import median
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from netfission.data.checks import Copies, check_colours, check_sizes, compare_splits
from netfission.data.sources import Source, find_targets
from netfission.data.split_names import SplitName
from netfission.data.splits import (
    CorruptImageError,
    FileRecords,
    Records,
    Rows,
    Selection,
    Split,
    StreamedSplit,
    TensorSplit,
    cut_size,
    decode_all,
    readable,
    shuffled_by_class,
    stratified_cut,
)
from netfission.data.summary import CUT, UNREADABLE, DataSummary, SplitSummary, count_classes
from netfission.data.targets import CLASSES, Targets, check_values, describe_counts
from netfission.utils.errors import check_choice, check_image_size, check_positive_integer, invalid

MEMORY_LIMIT = 2 << 30  # bytes of decoded pixels, all splits together
_TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1  # the default
_PROBED_IMAGES = 64
_STATISTICS_IMAGES = 1024


@dataclass(frozen=True)
class ImageData:
    """A data set of images with one label each, or with targets of another kind, see `TensorSplit`.

    Attributes:
        name: name or folder that it was loaded by.
        classes: names of the classes, or of the other targets.
        shape: channels, height and width.
        mean: one number per channel, of pixels of the training split scaled to [0, 1]; computed from 1,024
            images if the split is streamed.
        std: standard deviation, as `mean`.
        train: training split.
        validation: validation split; None if no images were held out.
        test: test split.
        summary: what was found, and what was left out.
        crops: the training split for random crops, with larger images than `shape`; None if they need none.
        numbers: with masks, the number of each class in them; None with other targets.
        pixels: with masks, the number of training pixels of each class.

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
    summary: DataSummary
    crops: Split | None = None
    numbers: list[int] | None = None
    pixels: list[int] | None = None


def load_data(
    name: str,
    *,
    image_size: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
    corrupt: Literal["refuse", "skip"] = "refuse",
    limit_per_class: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
    checks: bool = True,
    crop_scale: float | None = None,
    targets: Targets = CLASSES,
) -> ImageData:
    """Load a data set, and split a validation set from its training images.

    If the data set has no test split, 20 % of each class become one, by a rule that no argument changes.
    A validation split of its own is used as such, or as the test split if that is missing. Images from files
    are converted to RGB.

    Args:
        name: `digits` (scikit-learn's, 1×8×8, scaled to 0..255); `cifar10`, `cifar100` or `tiny-imagenet`
            (from the Hugging Face hub), or `hf/OWNER/NAME` or `hf/OWNER/NAME/CONFIG` for others there; a
            table of paths and labels (.csv, .tsv or .parquet), see `netfission.data.folders.read_table`; or a
            folder. A folder holds parquet shards with a column of images and one of labels, or image files,
            see `netfission.data.folders.read_folder`.
        image_size: height and width in pixels; images are scaled to cover it and cropped at their centre.
            Default: unchanged, if all images have one size.
        validation: share of each class's training images to hold out, in [0, 1). A class of one image stays
            in the training split. If the data set has a validation split, that replaces any share above 0.
        seed: determines which images are held out, and which a limit keeps.
        corrupt: `refuse` raises an error at the first image that cannot be decoded; `skip` leaves such images
            out and warns of their number. A streamed data set raises the error when the image is accessed;
            skipping decodes all images once beforehand.
        limit_per_class: training images to keep of each class, without effect on the validation split; a
            smaller limit keeps a subset of what a larger one keeps. Default: all.
        memory_limit: bytes of decoded images up to which they are held in memory, default 2 GiB; larger data
            sets are decoded on access.
        checks: look for what is probably wrong with the images, see `netfission.data.checks`, which reads a
            part of many files. If False, the summary has no warnings and counts no copies.
        crop_scale: smallest share of an image's area that random crops of training images keep. The training
            split is then also decoded at the size that such crops need, so that none is enlarged unless the
            image is too small itself, see `ImageData.crops`. Default no such crops.
        targets: what the images are labelled with; other than classes, in a table, see
            `netfission.data.targets`. Splits are then cut at random.

    Raises:
        ValueError: an argument is not valid, the name is unknown, the folder has another layout, a label is
            out of range, or an image is corrupt. Also if there is only one class, or if a split or class has
            no readable image.
        FileNotFoundError: the folder or table does not exist.
        ConnectionError: the hub is out of reach.

    Warns:
        UserWarning: corrupt images are left out, or a validation split replaces a share other than 0.1.

    Example:
        >>> data = load_data("digits", image_size=16, limit_per_class=20)
        >>> data.shape, len(data.train)
        ((1, 16, 16), 200)
    """
    if image_size is not None:
        check_image_size("image_size", image_size)
    if not 0 <= validation < 1:
        raise invalid("validation", "a share in [0, 1)", validation)
    check_choice("corrupt", corrupt, ("refuse", "skip"))
    if limit_per_class is not None:
        check_positive_integer("limit_per_class", limit_per_class)

    source = find_targets(name, targets)
    parts = _assign_rows(source, name, validation, seed, limit_per_class)
    size = common_size(source.train, name) if image_size is None else (image_size, image_size)
    channels = len(source.train.mode)
    pixels = sum(len(part.rows) for part in parts.values()) * channels * size[0] * size[1]
    splits = {
        split: _decode(part, size, skip=corrupt == "skip", stream=pixels > memory_limit)
        for split, part in parts.items()
    }
    crops = None
    if crop_scale is not None and (larger := _crop_size(parts["train"], size, crop_scale)) != size:
        needed = len(parts["train"].rows) * channels * larger[0] * larger[1]
        stream = pixels + needed > memory_limit
        crops = _decode(parts["train"], larger, skip=corrupt == "skip", stream=stream)
    folder = source.folder or name
    copies = Copies({}, [])
    if checks:
        copies = compare_splits(parts, source.classes if targets.exclusive else None, folder)
    summary = _summarise(source, folder, parts, splits, copies)
    _check_not_empty(source, name, parts, summary)
    if skipped := summary.left_out.get(UNREADABLE):
        warnings.warn(f"left out {skipped} corrupt images of {name}", stacklevel=2)
    unsuitable = check_values(targets, parts["train"].records.labels[parts["train"].rows], source.classes)
    train, rows = _shown(splits["train"], parts["train"])
    mean, std = _statistics(train.images)
    remarks = []
    classes = source.classes if targets.exclusive else None
    if checks:
        kind = "training" if train is splits["train"] else "sampled training"
        remarks = [
            *unsuitable,
            *copies.remarks,
            *check_sizes(parts, folder, None if image_size is None else size),
            *check_colours(train, replace(parts["train"], rows=rows), kind, classes, folder),
        ]
        for split, images in splits.items():
            if split != "train" and isinstance(images, TensorSplit):
                remarks += check_colours(images, parts[split], split, classes, folder)
    return ImageData(
        name=name,
        classes=source.classes,
        shape=(channels, *size),
        mean=mean,
        std=std,
        train=splits["train"],
        validation=splits.get("validation"),
        test=splits["test"],
        summary=replace(summary, warnings=remarks),
        crops=crops,
    )


def find_splits(
    name: str,
    *,
    validation: float = VALIDATION_SHARE,
    seed: int = 0,
    limit_per_class: int | None = None,
    targets: Targets = CLASSES,
    source: Source | None = None,
) -> Mapping[SplitName, Selection]:
    """Find the images of each split as `load_data` does with these arguments, without decoding them.

    Args:
        name: see `load_data`, as the next three.
        validation: share of the training images.
        seed: of the choice of validation images.
        limit_per_class: of training images.
        targets: what the images are labelled with; not masks.
        source: the data set, if it was found before.

    Example:
        >>> {split: len(images.rows) for split, images in find_splits("digits").items()}
        {'train': 1293, 'validation': 145, 'test': 359}
    """
    return _assign_rows(source or find_targets(name, targets), name, validation, seed, limit_per_class)


@dataclass(frozen=True)
class _Part:
    """The rows of a split before they are decoded, and where they come from."""

    records: Records
    rows: Rows
    origin: str


def _assign_rows(
    source: Source, name: str, validation: float, seed: int, limit_per_class: int | None
) -> dict[SplitName, _Part]:
    """Return the rows of each split, sorted; without the validation split if its share is 0."""
    labels = source.targets.strata(source.train.labels)
    train, test = np.arange(len(labels)), np.arange(0)
    if source.test is None:
        train, test = stratified_cut(labels, _TEST_SHARE, seed=0)
        if not len(test):
            share = validation if source.validation is None else 0
            least = _least_images(share, of_test=True)
            expected = f"a data set with a test split, or with at least {least} images{_of_class(source)}"
            without = _least_images(0, of_test=True)
            hint = f"so many because of validation={validation:g}" if least > without else ""
            most = int(np.bincount(labels).max())
            found = f"at most {most} per class" if source.targets.exclusive else str(most)
            raise invalid(name, expected, found=found, hint=hint)
    own_validation = source.validation is not None
    rest, cut = stratified_cut(labels[train], 0 if own_validation else validation, seed)
    train, held_out = train[rest], train[cut]
    if validation and not own_validation and not len(held_out):
        raise _nothing_held_out(source, name, validation, int(np.bincount(labels[train]).max()))
    if limit_per_class is not None:
        kept = [group[:limit_per_class] for group in shuffled_by_class(labels[train], seed)]
        train = train[np.sort(np.concatenate(kept))]
    parts: dict[SplitName, _Part] = {"train": _Part(source.train, train, source.origins.get("train", name))}
    if validation:
        parts["validation"] = _part(source, "validation", source.validation, held_out)
    if own_validation and validation not in (0, VALIDATION_SHARE):
        message = f"validation={validation} has no effect, as {name} has a validation split"
        warnings.warn(message, stacklevel=3)
    parts["test"] = _part(source, "test", source.test, test)
    return parts


def _nothing_held_out(source: Source, name: str, validation: float, most: int) -> ValueError:
    """Return the error for a share that no class has enough training images for; the largest has `most`."""
    of_class, share = _of_class(source), f"{validation:g}"
    needed = f"{_least_images(validation, of_test=source.test is None)} images{of_class}"
    if most == 1:
        expected = f"a data set with a validation split, or with at least {needed}"
        hint = f"so many because of validation={share}"
        return invalid(name, expected, found="only 1 training image" + of_class, hint=hint)
    expected = f"at least {ceil(500 / most) / 1000:g} to hold out any of {most} training images{of_class}"
    return invalid("validation", expected, validation, hint=f"or add images: {share} takes {needed}")


def _least_images(validation: float, *, of_test: bool) -> int:
    """Return the smallest number of images of a class of which some are held out.

    Args:
        validation: share of the training images; 0 if none is to be held out for validation.
        of_test: whether a test split is cut from them before.
    """
    images = ceil(0.5 / validation) - 1 if validation else 1  # of the training split; a few too few
    if of_test:
        images = int(images / (1 - _TEST_SHARE)) - 1
    while True:
        images += 1
        of_training = images - (test := cut_size(images, _TEST_SHARE) if of_test else 0)
        if (test or not of_test) and (cut_size(of_training, validation) or not validation):
            return images


def _of_class(source: Source) -> str:
    return " of a class" if source.targets.exclusive else ""


def _part(source: Source, split: SplitName, own: Records | None, cut: Rows) -> _Part:
    """Return a split of the data set's own, or else rows that are cut from the training split."""
    if own is None:
        return _Part(source.train, cut, CUT)
    return _Part(own, np.arange(len(own.labels)), source.origins[split])


def _summarise(
    source: Source,
    folder: str,
    parts: Mapping[SplitName, _Part],
    splits: Mapping[SplitName, Split],
    copies: Copies,
) -> DataSummary:
    def summary(split: SplitName) -> SplitSummary:
        labels = splits[split].labels.numpy()
        per_class = source.targets.per_name(labels, source.classes)
        copied, digest = copies.in_training.get(split, 0), digest_of_files(parts[split])
        return SplitSummary(parts[split].origin, len(labels), per_class, copied, digest)

    from_train = sum(len(part.rows) for part in parts.values() if part.records is source.train)
    unused = 0 if source.validation is None or "validation" in parts else len(source.validation.labels)
    left_out = source.left_out | {
        UNREADABLE: sum(len(part.rows) - len(splits[split]) for split, part in parts.items()),
        "above the limit per class": len(source.train.labels) - from_train,
        "of the validation split, which is not used": unused,
    }
    train = summary("train")
    counted = "" if source.targets.exclusive else describe_counts(source.classes, train.images_per_class)
    return DataSummary(
        data=folder,
        classes=source.classes,
        train=train,
        validation=summary("validation") if "validation" in parts else None,
        test=summary("test"),
        left_out={reason: count for reason, count in left_out.items() if count},
        unused=source.unused,
        remarks=[*source.remarks, *filter(None, [counted])],
        targets=source.targets.noun,
        exclusive=source.targets.exclusive,
    )


def digest_of_files(images: Selection) -> str | None:
    """Return a short hash of the names and labels of image files; None for images that have no file.

    The folder that all are in does not count, so that it may move.

    Example:
        >>> records = FileRecords(["a/1.png", "a/2.png"], np.array([0, 1]))
        >>> moved = FileRecords(["b/c/1.png", "b/c/2.png"], np.array([0, 1]))
        >>> splits = [StreamedSplit(files, np.arange(2), (8, 8)) for files in (records, moved)]
        >>> digest_of_files(splits[0]) == digest_of_files(splits[1])
        True
    """
    if not isinstance(images.records, FileRecords):
        return None
    rows = images.rows.tolist()
    names = [images.records.paths[row].replace(os.sep, "/") for row in rows]
    start = os.path.commonprefix(names).rfind("/") + 1  # noqa: RUF071 (cut after a folder)
    labels = images.records.labels[images.rows].tolist()
    text = "\n".join(f"{name[start:]}\t{label}" for name, label in zip(names, labels, strict=True))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]


def _check_not_empty(
    source: Source, name: str, parts: Mapping[SplitName, _Part], summary: DataSummary
) -> None:
    """Refuse splits without an image, and classes without a training image though they have others."""
    for split, part in parts.items():
        if not getattr(summary, split).images:
            kind = "training" if split == "train" else split
            rows = part.rows.tolist()
            found = f"{len(rows)} unreadable, the first {part.records.describe(rows[0])}" if rows else "none"
            raise invalid(name, f"a data set with readable {kind} images", found=found)
    if not source.targets.exclusive:
        return
    present = set().union(*(np.unique(part.records.labels[part.rows]).tolist() for part in parts.values()))
    trained = summary.train.images_per_class
    if untrained := [source.classes[label] for label in sorted(present) if not trained[label]]:
        expected = "a data set with a readable training image of every class that has images"
        found = f"none of {count_classes(untrained)}"
        if nowhere := [label for number, label in enumerate(source.classes) if number not in present]:
            found += f", and no image at all of {count_classes(nowhere)}"
        raise invalid(name, expected, found=found, hint="add some, or remove the class")


def common_size(records: Records, name: str) -> tuple[int, int]:
    """Return the height and width of the images, from a sample spread evenly over the data set.

    Args:
        records: the images.
        name: of the data set, for messages.

    Raises:
        ValueError: sizes differ, or no image of the sample can be read.

    Example:
        >>> from netfission.data.sources import find_source
        >>> common_size(find_source("digits").train, "digits")
        (8, 8)
    """
    sizes = set(_probe_sizes(records))
    if len(sizes) > 1:
        some = " and ".join(f"{height}×{width}" for height, width in sorted(sizes)[:2])
        hint = f"those of {name} are {some}, for example"
        raise invalid("image_size", "given if images differ in size", None, hint=hint)
    if not sizes:
        found = f"none, {records.describe(0)} being the first"
        raise CorruptImageError(str(invalid(name, "a data set of readable images", found=found)))
    return sizes.pop()


def _probe_sizes(records: Records) -> list[tuple[int, int]]:
    """Return the height and width of some images, spread evenly; without those that cannot be read."""
    count = len(records.labels)
    sizes = []
    for row in np.linspace(0, count - 1, min(count, _PROBED_IMAGES), dtype=np.int64):
        try:
            with records.open(int(row)) as image:
                width, height = image.size
                sizes.append((height, width))
        except Exception:  # a corrupt image, which is handled later
            continue
    return sizes


def _decode(part: _Part, size: tuple[int, int], *, skip: bool, stream: bool) -> TensorSplit | StreamedSplit:
    records, rows = part.records, part.rows
    if not stream:
        return decode_all(records, rows, size, skip)
    return StreamedSplit(records, readable(records, rows, size) if skip else rows, size)


def _crop_size(part: _Part, size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return the size of training images whose smallest crops have `size`, unless most images are smaller.

    Args:
        part: the training images.
        size: height and width of the crops.
        scale: smallest share of an image's area that a crop keeps.
    """
    shapes = _probe_sizes(part.records)
    own = median(min(height / size[0], width / size[1]) for height, width in shapes) if shapes else 1.0
    factor = max(1.0, min(scale**-0.5, own))
    return ceil(factor * size[0]), ceil(factor * size[1])


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, of pixels scaled to [0, 1]."""
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ levels
    variance = share @ levels.square() - mean.square()
    # Never below one grey level, so that a channel without contrast can be divided by it.
    std = variance.clamp(min=1 / 255**2).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _shown(split: TensorSplit | StreamedSplit, part: _Part) -> tuple[TensorSplit, Rows]:
    """Return a split in memory and its rows; of a streamed one, images evenly spaced over it."""
    if isinstance(split, TensorSplit):
        return split, part.rows
    count = min(len(split), _STATISTICS_IMAGES)
    positions = [i * len(split) // count for i in range(count)]
    images = torch.stack([split[position][0] for position in positions])
    return TensorSplit(images, split.labels[positions]), split.rows[positions]
