"""What is probably wrong with the images of a data set: equal ones that should differ, and empty ones."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from netfission.data.copies import find_equal
from netfission.data.split_names import SplitName
from netfission.data.splits import Records, Selection, TensorSplit
from netfission.data.summary import count_classes
from netfission.utils.text import count_noun, printable

IN_WORDS: dict[SplitName, str] = {"train": "training", "validation": "validation", "test": "test"}
# Splits that should share no image.
_DISJOINT: tuple[tuple[SplitName, SplitName], ...] = (
    ("validation", "train"),
    ("test", "train"),
    ("validation", "test"),
)
_PROBED = 1000  # images whose size is read
_SMALLEST = 4  # pixels; an image that is smaller in both directions shows nothing
_LONGEST = 20  # times its width
_ENLARGED = 1.5  # times; what is enlarged less looks alike
_PROBED_PIXELS = 16  # pixels of an image that are compared first


@dataclass(frozen=True, slots=True)
class _Image:
    """One image of a part of the data."""

    part: str
    records: Records
    row: int

    @property
    def label(self) -> int:
        return int(self.records.labels[self.row])

    @property
    def targets(self) -> tuple[float, ...]:
        """The class, or the other targets."""
        return tuple(self.records.labels[self.row].reshape(-1).tolist())

    def name(self, folder: str) -> str:
        """Name the image; a file by its path in the folder of the data set."""
        name = self.records.describe(self.row)
        return printable(name.removeprefix(f"{folder}/") if folder else name)


def _find_equal(
    parts: Mapping[str, Iterable[Selection]], kind: Callable[[_Image], object]
) -> list[list[_Image]]:
    """Group images of the same content, of all parts together; without groups of a single kind."""
    images = (
        _Image(part, selection.records, int(row))
        for part, selections in parts.items()
        for selection in selections
        for row in selection.rows
    )
    return find_equal(
        images,
        lambda image: image.records.content(image.row),
        lambda group: len({kind(image) for image in group}) > 1,
    )


@dataclass(frozen=True)
class Copies:
    """Images of the same content, byte for byte.

    Attributes:
        in_training: split → number of its images that are copies of training images.
        remarks: what a user should know about them.

    Example:
        >>> Copies({"test": 1}, ["1 of 5 test images has the same content as a training image"]).in_training
        {'test': 1}
    """

    in_training: Mapping[SplitName, int]
    remarks: list[str]


def compare_splits(
    splits: Mapping[SplitName, Selection], classes: Sequence[str] | None, folder: str
) -> Copies:
    """Find images that are in two splits or two classes.

    Args:
        splits: the images of each split.
        classes: names of the classes; None if the images have other targets.
        folder: folder of the data set; file names are relative to it.

    Example:
        >>> import numpy as np
        >>> from netfission.data.splits import ArrayRecords, StreamedSplit
        >>> records = ArrayRecords(np.ones((2, 8, 8), np.uint8), np.array([0, 1]))
        >>> train, test = (StreamedSplit(records, np.array([row]), (8, 8)) for row in (0, 1))
        >>> for remark in compare_splits({"train": train, "test": test}, ["cat", "dog"], "").remarks:
        ...     print(remark)
        1 of 1 test image has the same content as a training image, such as row 1 and row 0
        2 images have the content of an image of another class, such as row 0 (cat) and row 1 (dog)
    """
    groups = _find_equal(
        {split: [selection] for split, selection in splits.items()}, lambda image: (image.part, image.targets)
    )
    in_training: dict[SplitName, int] = {}
    remarks = []
    for split, other in _DISJOINT:
        shared = [group for group in groups if {split, other} <= {image.part for image in group}]
        copies = [image for group in shared for image in group if image.part == split]
        if not copies:
            continue
        if other == "train":
            in_training[split] = len(copies)
        original = next(image for image in shared[0] if image.part == other)
        of_all = f"{len(copies):,} of {count_noun(len(splits[split].rows), f'{IN_WORDS[split]} image')}"
        remarks.append(
            f"{of_all} {_have(len(copies))} the same content as a {IN_WORDS[other]} image, such as "
            f"{copies[0].name(folder)} and {original.name(folder)}"
        )
    mixed = [group for group in groups if len({image.targets for image in group}) > 1]
    if mixed:
        first = mixed[0][0]
        second = next(image for image in mixed[0] if image.targets != first.targets)
        names = [image.name(folder) for image in (first, second)]
        differing = "with other targets"
        if classes is not None:
            names = [f"{image.name(folder)} ({printable(classes[image.label])})" for image in (first, second)]
            differing = "of another class"
        number = sum(map(len, mixed))
        remarks.append(
            f"{number:,} images have the content of an image {differing}, such as {' and '.join(names)}"
        )
    return Copies(in_training, remarks)


def check_sizes(
    splits: Mapping[SplitName, Selection], folder: str, size: tuple[int, int] | None = None
) -> list[str]:
    """Find images that are tiny, extremely long, or to be enlarged, among at most 1,000 images.

    Only their headers are read.

    Args:
        splits: the images of each split.
        folder: folder of the data set; file names are relative to it.
        size: height and width that images are scaled to; default their own.

    Example:
        >>> import numpy as np
        >>> from netfission.data.splits import ArrayRecords, StreamedSplit
        >>> records = ArrayRecords(np.ones((2, 1, 90), np.uint8), np.array([0, 1]))
        >>> check_sizes({"train": StreamedSplit(records, np.arange(2), (8, 8))}, "")
        ['2 images are more than 20 times as long as wide, such as row 0 (90×1); only their middle is used']
    """
    total = sum(len(selection.rows) for selection in splits.values())
    step = -(-total // _PROBED) or 1
    tiny, long, small = [], [], []
    for split, selection in splits.items():
        for row in selection.rows[::step]:
            image = _Image(split, selection.records, int(row))
            try:
                with selection.records.open(image.row) as opened:
                    width, height = opened.size
            except Exception:  # decoders raise many types; unreadable images are refused elsewhere
                continue
            if max(width, height) < _SMALLEST:
                tiny.append(f"{image.name(folder)} ({width}×{height})")
            elif max(width, height) > _LONGEST * min(width, height):
                long.append(f"{image.name(folder)} ({width}×{height})")
            elif size is not None and max(size[0] / height, size[1] / width) > _ENLARGED:
                small.append(f"{image.name(folder)} ({width}×{height})")
    noun = "image" if step == 1 else "probed image"
    remarks = []
    if tiny:
        least = f"smaller than {_SMALLEST}×{_SMALLEST} pixels"
        remarks.append(f"{count_noun(len(tiny), noun)} {_are(len(tiny))} {least}, such as {tiny[0]}")
    if long:
        shape = f"more than {_LONGEST} times as long as wide"
        middle = f"only {'its' if len(long) == 1 else 'their'} middle is used"
        remarks.append(
            f"{count_noun(len(long), noun)} {_are(len(long))} {shape}, such as {long[0]}; {middle}"
        )
    if small and size is not None:
        times = f"more than {_ENLARGED} times, to {size[1]}×{size[0]} pixels"
        remarks.append(
            f"{count_noun(len(small), noun)} {_are(len(small))} enlarged {times}, such as {small[0]}"
        )
    return remarks


def check_colours(
    images: TensorSplit, selection: Selection, kind: str, classes: Sequence[str] | None, folder: str
) -> list[str]:
    """Find images of a single colour.

    Args:
        images: the decoded images.
        selection: where they come from; of another length if some are unreadable, and then none is named.
        kind: what they are in words, such as "training".
        classes: names of the classes; None if the images have other targets.
        folder: folder of the data set; file names are relative to it.

    Returns:
        At most one remark: the number of such images, and the classes of which no other image is there.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from netfission.data.splits import ArrayRecords, StreamedSplit
        >>> images = TensorSplit(torch.full((1, 1, 8, 8), 7, dtype=torch.uint8), torch.tensor([0]))
        >>> records = ArrayRecords(images.images[0].numpy(), np.array([0]))
        >>> origin = StreamedSplit(records, np.array([0]), (8, 8))
        >>> check_colours(images, origin, "training", ["cat", "dog"], "")
        ['1 of 1 training image is of a single colour, such as row 0; no other training images of cat']
    """
    pixels = images.images.flatten(2)
    some = pixels[..., :: max(1, pixels.shape[-1] // _PROBED_PIXELS)]
    likely = _is_constant(some).nonzero().flatten()
    plain = likely[_is_constant(pixels[likely])]
    if not len(plain):
        return []
    of_all = count_noun(len(images), f"{kind} image")
    remark = f"{len(plain):,} of {of_all} {_are(len(plain))} of a single colour"
    if len(selection.rows) == len(images):
        first = _Image(kind, selection.records, int(selection.rows[plain[0]]))
        remark += f", such as {first.name(folder)}"
    if classes is None:
        return [remark]
    counts, plain_counts = (
        labels.bincount(minlength=len(classes)).tolist() for labels in (images.labels, images.labels[plain])
    )
    pairs = zip(classes, counts, plain_counts, strict=True)
    whole = [name for name, count, plain_count in pairs if count == plain_count > 0]
    return [remark + (f"; no other {kind} images of {count_classes(whole)}" if whole else "")]


def _is_constant(pixels: Tensor) -> Tensor:
    """Return for each of `(n, channels, pixels)` whether all pixels are equal."""
    return (pixels == pixels[..., :1]).all(2).all(1)


def count_copies(
    images: Iterable[Selection], originals: Iterable[Selection], folder: str = ""
) -> tuple[int, str]:
    """Count the images that have the same content as one of others.

    Args:
        images: the images in question.
        originals: the images that they may be copies of.
        folder: folder of the images in question; the file name that is returned is relative to it.

    Returns:
        The number of such images, and the name of the first; an empty name if the number is 0.

    Example:
        >>> import numpy as np
        >>> from netfission.data.splits import ArrayRecords, StreamedSplit
        >>> records = ArrayRecords(np.ones((1, 8, 8), np.uint8), np.array([0]))
        >>> split = StreamedSplit(records, np.array([0]), (8, 8))
        >>> count_copies([split], [split])
        (1, 'row 0')
    """
    groups = _find_equal({"image": images, "original": originals}, lambda image: image.part)
    copies = [image for group in groups for image in group if image.part == "image"]
    return len(copies), copies[0].name(folder) if copies else ""


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _have(number: int) -> str:
    return "has" if number == 1 else "have"
