"""What is probably wrong with the images of a data set: those that are equal though they should differ."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from netfission.data.copies import find_equal
from netfission.data.split_names import SplitName
from netfission.data.splits import Records, Selection
from netfission.utils.text import count_noun, printable

IN_WORDS: dict[SplitName, str] = {"train": "training", "validation": "validation", "test": "test"}
# Splits that should share no image.
_DISJOINT: tuple[tuple[SplitName, SplitName], ...] = (
    ("validation", "train"),
    ("test", "train"),
    ("validation", "test"),
)


@dataclass(frozen=True, slots=True)
class _Image:
    """One image of a part of the data."""

    part: str
    records: Records
    row: int

    @property
    def label(self) -> int:
        return int(self.records.labels[self.row])

    def name(self, folder: str) -> str:
        """Name the image; a file by its path in the folder of the data set."""
        name = self.records.describe(self.row)
        return printable(name.removeprefix(f"{folder}/") if folder else name)


def _find_equal(parts: Mapping[str, Iterable[Selection]]) -> list[list[_Image]]:
    """Group images of the same content, of all parts together."""
    images = (
        _Image(part, selection.records, int(row))
        for part, selections in parts.items()
        for selection in selections
        for row in selection.rows
    )
    return find_equal(images, lambda image: image.records.content(image.row))


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


def compare_splits(splits: Mapping[SplitName, Selection], classes: Sequence[str], folder: str) -> Copies:
    """Find images that are in two splits or two classes.

    Args:
        splits: the images of each split.
        classes: names of the classes.
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
    groups = _find_equal({split: [selection] for split, selection in splits.items()})
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
    mixed = [group for group in groups if len({image.label for image in group}) > 1]
    if mixed:
        first = mixed[0][0]
        second = next(image for image in mixed[0] if image.label != first.label)
        names = [f"{image.name(folder)} ({printable(classes[image.label])})" for image in (first, second)]
        number = sum(map(len, mixed))
        remarks.append(
            f"{number:,} images have the content of an image of another class, such as {' and '.join(names)}"
        )
    return Copies(in_training, remarks)


def count_copies(
    images: Iterable[Selection], originals: Iterable[Selection], folder: str = ""
) -> tuple[int, str]:
    """Count the images that have the same content as one of others.

    Args:
        images: the images in question.
        originals: the images that they may be copies of.
        folder: folder of the images in question; the file name that is returned is relative to it.

    Returns:
        The number, and the name of the first such image; empty if there is none.

    Example:
        >>> import numpy as np
        >>> from netfission.data.splits import ArrayRecords, StreamedSplit
        >>> records = ArrayRecords(np.ones((1, 8, 8), np.uint8), np.array([0]))
        >>> split = StreamedSplit(records, np.array([0]), (8, 8))
        >>> count_copies([split], [split])
        (1, 'row 0')
    """
    groups = _find_equal({"image": images, "original": originals})
    shared = [group for group in groups if {image.part for image in group} == {"image", "original"}]
    copies = [image for group in shared for image in group if image.part == "image"]
    return len(copies), copies[0].name(folder) if copies else ""


def _have(number: int) -> str:
    return "has" if number == 1 else "have"
