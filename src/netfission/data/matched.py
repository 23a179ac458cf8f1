"""Labelled images of any data set, matched to the classes and the image shape of a trained network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from netfission.data.images import Mode
from netfission.data.label_files import class_name
from netfission.data.mask_folders import MaskSplit
from netfission.data.sources import check_data_name, find_labelled, find_targets, is_named
from netfission.data.split_names import SplitName
from netfission.data.splits import Rows, StreamedSplit, readable
from netfission.data.targets import Targets, Values
from netfission.utils.errors import check_choice, did_you_mean, invalid

Part = Literal["train", "validation", "test", "all"]
_IN_WORDS = {"train": "training", "validation": "validation", "test": "test"}
Found = TypeVar("Found")

_LISTED = 10  # names of classes in a message


@dataclass(frozen=True)
class MatchedImages:
    """Images of a data set, labelled by the classes of a network.

    Attributes:
        name: name of the data set, or the full path of its folder.
        part: which of its images these are.
        splits: the images, decoded on access, with the labels that the network has for their classes.
        classes: the classes of these images, in the network's order; or the labels that one of them has, the
            numbers, or the classes of their pixels.
        left_out: number of images that cannot be read and are left out.
        unknown: labels or numbers of a table that the network does not know and that are left out.

    Example:
        >>> MatchedImages("/data/flowers", "test", [], ["daisy"], left_out=0).kind
        'test images of flowers'
    """

    name: str
    part: Part
    splits: Sequence[StreamedSplit | MaskSplit]
    classes: list[str]
    left_out: int
    unknown: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(map(len, self.splits))

    @property
    def kind(self) -> str:
        """The images in words, as they follow their number: "test images of flowers"."""
        word = "" if self.part == "all" else f"{_IN_WORDS[self.part]} "
        return f"{word}images of {Path(self.name).name}"

    def __str__(self) -> str:
        """Return the images in words, such as "all 30 images of flowers"."""
        return f"{'all ' if self.part == 'all' else ''}{len(self)} {self.kind}"


def load_matched(
    name: str,
    classes: Sequence[str],
    shape: Sequence[int],
    *,
    part: Part | None = None,
    preferred: Sequence[Part] = ("test",),
    corrupt: Literal["refuse", "skip"] = "refuse",
) -> MatchedImages:
    """Load labelled images of a data set in the shape that a network expects; nothing is held out.

    Args:
        name: see `netfission.data.load_data`.
        classes: the network's classes. Those of the data set are matched by name, in any order; they may be a
            part of the network's.
        shape: channels (1 or 3), height and width.
        part: which of the images to load; by default the first of `preferred` that the data set has, or all
            images if it has none of them.
        preferred: see `part`.
        corrupt: what to do with an image that cannot be read; `refuse` raises an error when it is accessed.

    Raises:
        ValueError: the name is unknown, the folder has another layout, there is no such part, the network
            lacks a class, or no image can be read.
        FileNotFoundError: the folder does not exist.
        ConnectionError: the hub is out of reach.

    Example:
        >>> images = load_matched("digits", [str(digit) for digit in range(9, -1, -1)], (3, 16, 16))
        >>> print(images)  # there is no test split
        all 1797 images of digits
        >>> pixels, label = images.splits[0][0]  # a zero, the last class of the network
        >>> tuple(pixels.shape), label
        ((3, 16, 16), 9)
    """
    known_classes, splits_found = find_labelled(name)
    chosen, records = choose_part(splits_found, part, preferred)
    present = sorted({int(label) for rows in records for label in np.unique(rows.labels)})
    numbers = number_classes(name, [known_classes[label] for label in present], classes)
    label_of = np.full(len(known_classes), -1)
    label_of[present] = numbers
    labelled = [(rows, label_of[rows.labels].astype(np.int64)) for rows in records]
    found_classes = [classes[number] for number in sorted(set(numbers))]
    return _matched(name, chosen, labelled, shape, found_classes, corrupt)


def load_matched_targets(
    name: str,
    names: Sequence[str],
    shape: Sequence[int],
    targets: Targets,
    *,
    part: Part | None = None,
    preferred: Sequence[Part] = ("test",),
    corrupt: Literal["refuse", "skip"] = "refuse",
) -> MatchedImages:
    """Load the images of a table with labels or numbers, in the shape that a network expects.

    Args:
        name: of the table.
        names: the network's labels or numbers. Those of the table are matched by name, in any order. Of a
            table with a column for each, columns of others are left out, also if they hold text. Of a table
            with a column of names of labels, the network must know all labels, and no image has those that
            do not occur.
        shape: channels (1 or 3), height and width.
        targets: their kind.
        part: see `load_matched`, as the following.
        preferred: see there.
        corrupt: see there.

    Raises:
        ValueError: it is no such table, there is no such part, it lacks a column of a name, it has a label
            that the network does not know, or no image can be read.
        FileNotFoundError: the table does not exist.
    """
    numbers = {class_name(known): number for number, known in enumerate(names)}
    source = find_targets(name, targets, train_required=False, wanted=numbers)
    column_of = {numbers.get(found): column for column, found in enumerate(source.classes)}
    unknown = [*source.unread, *(found for found in source.classes if found not in numbers)]
    missing = [known for number, known in enumerate(names) if number not in column_of]
    if source.listed:
        number_classes(name, source.classes, names, targets.noun)
    elif missing:
        expected = f"a table with the {targets.noun} that the network knows"
        hint = did_you_mean(missing[0], unknown)
        raise invalid("data", expected, found=f"{name} without {_listed(missing)}", hint=hint)
    chosen, records = choose_part(source.splits, part, preferred)
    labelled = [
        (
            rows,
            np.stack(
                [
                    rows.labels[:, column_of[number]]
                    if number in column_of
                    else np.zeros_like(rows.labels[:, 0])
                    for number in range(len(names))
                ],
                axis=1,
            ),
        )
        for rows in records
    ]
    counts = targets.per_name(np.concatenate([values for _, values in labelled]), names)
    present = [known for known, count in zip(names, counts, strict=True) if count] if counts else list(names)
    images = _matched(name, chosen, labelled, shape, present, corrupt)
    return replace(images, unknown=unknown)


def choose_part(
    splits: Mapping[SplitName, Found], part: Part | None, preferred: Sequence[Part]
) -> tuple[Part, list[Found]]:
    """Return the part of a data set that is chosen, and what it consists of.

    Args:
        splits: those of the data set; one training split alone counts as not split.
        part: see `load_matched`.
        preferred: see `load_matched`.

    Raises:
        ValueError: there is no such part.

    Example:
        >>> choose_part({"train": 3}, None, ["test"]), choose_part({"train": 3, "test": 1}, None, ["test"])
        (('all', [3]), ('test', [1]))
    """
    found = (
        {"all": splits["train"]}
        if list(splits) == ["train"]
        else {str(name): splits[name] for name in splits}
    )
    chosen: Part = next((split for split in preferred if split in found), "all") if part is None else part
    check_choice("split", chosen, dict.fromkeys([*found, "all"]))
    return chosen, list(found.values()) if chosen == "all" else [found[chosen]]


def _matched(
    name: str,
    part: Part,
    labelled: Sequence[tuple[Any, Values]],
    shape: Sequence[int],
    classes: list[str],
    corrupt: Literal["refuse", "skip"],
) -> MatchedImages:
    """Return images in a shape, each of some records with its labels; see `load_matched`."""
    channels, *size = shape
    mode: Mode = "L" if channels == 1 else "RGB"
    splits = []
    for rows, labels in labelled:
        relabelled = replace(rows, mode=mode, labels=labels)
        kept: Rows = np.arange(len(labels))
        if corrupt == "skip":
            kept = readable(relabelled, kept, (size[0], size[1]))
        splits.append(StreamedSplit(relabelled, kept, (size[0], size[1])))
    left_out = sum(len(labels) for _, labels in labelled) - sum(map(len, splits))
    images = MatchedImages(full_name(name), part, splits, classes, left_out)
    if not len(images):
        raise invalid("data", "a data set of readable images", found=f"{left_out} damaged ones in {name}")
    return images


def full_name(name: str) -> str:
    """Return the name of a data set, or the full path of a folder.

    Example:
        >>> full_name("digits")
        'digits'
    """
    check_data_name(name)
    return name if is_named(name) else str(Path(name).resolve())


def number_classes(name: str, names: Sequence[str], known: Sequence[str], noun: str = "classes") -> list[int]:
    """Return which of the known classes some names stand for, in whatever Unicode form they are written.

    Args:
        name: of the data set.
        names: of its classes.
        known: the network's classes.
        noun: what they are.

    Raises:
        ValueError: the network lacks a class.

    Example:
        >>> number_classes("pets", ["dog", "cat"], ["ant", "cat", "dog"])
        [2, 1]
    """
    numbers = {class_name(label): number for number, label in enumerate(known)}
    numbers |= {label: number for number, label in enumerate(known)}
    unknown = [label for label in names if label not in numbers and class_name(label) not in numbers]
    if not unknown:
        return [numbers.get(label, numbers.get(class_name(label), -1)) for label in names]
    numbered = all(name.isdecimal() for name in known)
    rule = f"{noun} are matched by name" + (", and the network's names are numbers" if numbered else "")
    hint = did_you_mean(unknown[0], known) or rule
    raise invalid(
        "data",
        f"a data set of {noun} that the network knows ({_listed(known)})",
        found=f"{name} with {_listed(unknown)}",
        hint=hint,
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")
