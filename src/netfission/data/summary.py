"""What was found in a data set: its classes, the images in each split, and what was left out."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

from netfission.data.split_names import splits_in
from netfission.data.tables import TABLE_SUFFIXES
from netfission.utils.errors import shortened
from netfission.utils.text import count_noun, printable

CUT = "cut from training"  # the origin of a split that the data set does not have
UNREADABLE = "unreadable"  # a reason to leave an image out
_UNEVEN = 2  # classes are uneven if the largest has this many times the images of the smallest
_NAMES_SHOWN = 6
_LONGEST_NAME = 40


@dataclass(frozen=True)
class SplitSummary:
    """The images of one split.

    Attributes:
        origin: the folder, table or split that they come from, or `CUT`; empty for a data set by name without
            splits.
        images: number of images.
        images_per_class: the same by class, in the order of the classes; or by label; none for numbers.
        in_training: number of images that are copies of training images.
        digest: 12 hexadecimal digits of the SHA-256 of the names and labels of image files, without the
            folder that all are in; None for images that have no file, and in files of older versions.

    Example:
        >>> SplitSummary("photographs/train", 7, [3, 4]).images
        7
    """

    origin: str
    images: int
    images_per_class: list[int]
    in_training: int = 0
    digest: str | None = None


@dataclass(frozen=True)
class DataSummary:
    """What was found in a data set.

    Attributes:
        data: its name, or the folder in which its splits were found.
        classes: names of the classes.
        train: the training split.
        validation: the validation split; None if the data set has none.
        test: the test split.
        left_out: reason → number of images, files or folders that are in no split.
        unused: name of a table or folder that is not used → why.
        remarks: what a user should know about the classes.
        warnings: what is probably wrong with the images, see `netfission.data.checks`.
        targets: what `classes` are names of; without `exclusive`, as labels or numbers.
        exclusive: whether each image has exactly one of them.

    Example:
        >>> train = SplitSummary("pets", 9, [3, 6])
        >>> test = SplitSummary(CUT, 2, [0, 2])
        >>> print(DataSummary("pets", ["cat", "dog"], train, None, test, {"hidden": 1}).line())
        found 11 images of 2 classes (cat, dog) in pets: 9 training, 2 test (cut from training); uneven \
classes: 3 training images of cat to 6 of dog; no test images of cat; left out: 1 hidden
    """

    data: str
    classes: list[str]
    train: SplitSummary
    validation: SplitSummary | None
    test: SplitSummary
    left_out: dict[str, int]
    unused: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    targets: str = "classes"
    exclusive: bool = True

    def text(self) -> str:
        """Return the summary as a line, and each warning as one more."""
        return "\n".join([self.line(), *(f"warning: {warning}" for warning in self.warnings)])

    def line(self) -> str:
        """Return the summary as one line, without the warnings."""
        names = listing(self.classes)
        splits = {"training": self.train, "validation": self.validation, "test": self.test}
        present = {name: split for name, split in splits.items() if split is not None}
        images = count_noun(sum(split.images for split in present.values()), "image")
        counts = ", ".join(self._count(name, split) for name, split in present.items())
        noun = self.targets.removesuffix("s") if len(self.classes) == 1 else self.targets
        kind = f"{'of' if self.exclusive else 'with'} {len(self.classes)} {noun}"
        found = f"found {images} {kind} ({names}) in {printable(self.data)}: {counts}"
        of_classes = [self._sizes(), *self._missing(), *self._alike()] if self.exclusive else []
        remarks = [*of_classes, *self.remarks]
        return "; ".join([found, *remarks, *self._left_out()])

    def to_json(self) -> str:
        """Return the summary as JSON; of classes without what says so, as earlier versions read it."""
        content = asdict(self)
        if self.exclusive:
            content = {name: value for name, value in content.items() if name not in ("targets", "exclusive")}
        return json.dumps(content, indent=2) + "\n"

    def _count(self, name: str, split: SplitSummary) -> str:
        """Name the number of images, and where they come from unless that goes without saying."""
        origin = split.origin.removeprefix(f"{self.data}{os.sep}")
        # The test images may be those of a folder `val` or `eval`.
        named = name == "validation" or origin == CUT or (name == "test" and "test" not in splits_in(origin))
        named = named or origin.lower().endswith(TABLE_SUFFIXES)
        return f"{split.images:,} {name}" + (f" ({printable(origin)})" if named else "")

    def _sizes(self) -> str:
        counts = {name: count for name, count in self._per_class(self.train).items() if count}
        smallest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        if counts[smallest] == counts[largest]:
            return f"{count_noun(counts[smallest], 'training image')} per class"
        few, many = listing([smallest]), listing([largest])
        images = count_noun(counts[smallest], "training image")
        if counts[largest] >= _UNEVEN * counts[smallest]:
            return f"uneven classes: {images} of {few} to {counts[largest]:,} of {many}"
        return f"smallest class: {few} ({images})"

    def _missing(self) -> Iterator[str]:
        """Name the classes without images, and those that the validation or the test split lacks."""
        trained = self._per_class(self.train)
        if absent := [name for name, count in trained.items() if not count]:
            yield f"no images of {count_classes(absent)}"
        for name, split in (("validation", self.validation), ("test", self.test)):
            if split is not None:
                counts = self._per_class(split)
                if missing := [label for label in counts if trained[label] and not counts[label]]:
                    yield f"no {name} images of {count_classes(missing)}"

    def _per_class(self, split: SplitSummary) -> dict[str, int]:
        return dict(zip(self.classes, split.images_per_class, strict=True))

    def _alike(self) -> Iterator[str]:
        """Name classes that differ in case or blanks alone."""
        alike: dict[str, list[str]] = {}
        for name in self.classes:
            alike.setdefault("".join(name.casefold().split()), []).append(name)
        for names in alike.values():
            if len(names) > 1:
                yield f"classes that are almost equal by name: {listing(names)}"

    def _left_out(self) -> Iterator[str]:
        counts = [f"{count:,} {reason}" for reason, count in self.left_out.items()]
        named = [f"{printable(name)} ({printable(reason)})" for name, reason in self.unused.items()]
        if counts or named:
            yield f"left out: {', '.join([*counts, *named])}"


def count_classes(names: Sequence[str]) -> str:
    """Name classes, and their number if not all of their names are shown.

    Example:
        >>> count_classes(["cat", "dog"]), count_classes([str(number) for number in range(100)])
        ('cat, dog', '100 classes (0, 1, 2, 3, …, 99)')
    """
    return listing(names) if len(names) <= _NAMES_SHOWN else f"{len(names)} classes ({listing(names)})"


def class_differences(names: Sequence[str], others: Sequence[str]) -> str:
    """Say in which classes `others` differ from `names`; in their order if in nothing else.

    Example:
        >>> class_differences(["cat", "dog"], ["cat", "Dog"])
        'without dog and with Dog'
        >>> class_differences(["cat", "dog"], ["cat"]), class_differences(["cat"], ["cat", "dog"])
        ('without dog', 'with dog besides')
    """
    missing = [name for name in names if name not in set(others)]
    more = [name for name in others if name not in set(names)]
    if missing and more:
        return f"without {count_classes(missing)} and with {count_classes(more)}"
    if missing:
        return f"without {count_classes(missing)}"
    return f"with {count_classes(more)} besides" if more else "in another order"


def listing(names: Sequence[str]) -> str:
    """List names, the middle ones of many shortened to an ellipsis.

    Example:
        >>> listing([str(number) for number in range(100)])
        '0, 1, 2, 3, …, 99'
    """
    shown = [shortened(printable(name), _LONGEST_NAME) for name in names]
    if len(shown) > _NAMES_SHOWN:
        shown[_NAMES_SHOWN - 2 : -1] = ["…"]
    return ", ".join(shown)
