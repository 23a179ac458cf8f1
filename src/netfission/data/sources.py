"""Where data sets come from: scikit-learn, the hub, parquet shards, folders of images."""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from netfission.data.files import find_images, walk_files, why_not_entered
from netfission.data.splits import ArrayRecords, ArrowRecords, FileRecords, Records, Rows
from netfission.utils.errors import did_you_mean, first_line, invalid
from netfission.utils.hub import load_from_hub
from netfission.utils.text import as_text

HUB_NAMES = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}
NAMES = ("digits", *HUB_NAMES)
# In this order: the first that a data set has is its test split.
TEST_NAMES = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class Source:
    """A data set as it was found.

    Attributes:
        classes: names of the classes.
        train: the training images.
        test: the test images; None if the data set has no test split.
    """

    classes: list[str]
    train: Records
    test: Records | None


def find_source(name: str) -> Source:
    """Find a data set by name or path.

    Raises:
        ValueError: the name is unknown, or the folder has another layout.
        FileNotFoundError: the folder does not exist.
        ConnectionError: the hub is out of reach.

    Example:
        >>> source = find_source("digits")
        >>> len(source.classes), len(source.train.labels), source.test
        (10, 1797, None)
    """
    check_data_name(name)
    if name == "digits":
        return _digits()
    if name in HUB_NAMES:
        return source_from_arrow(load_from_hub(HUB_NAMES[name]), name)
    folder = Path(name)
    parquet = any(folder.rglob("*.parquet"))
    return _from_parquet(folder) if parquet else _from_image_folder(folder)


def check_data_name(name: str, argument: str = "data", others: Sequence[str] = ()) -> None:
    """Check that a name is that of a data set, a folder that exists, or one of `others`.

    Args:
        name: what was given.
        argument: name of the argument, for the message.
        others: further valid names.

    Raises:
        ValueError: it is a file or an unknown name.
        FileNotFoundError: the folder does not exist.

    Example:
        >>> check_data_name("invert", "ood", ["inverted"])
        Traceback (most recent call last):
        ValueError: ood must be one of digits, cifar10, cifar100, tiny-imagenet, inverted, or a folder, \
got 'invert'; did you mean inverted?
    """
    names = [*NAMES, *others]
    if name in names or Path(name).is_dir():
        return
    if Path(name).exists():
        raise invalid(argument, "the name of a data set or a folder", found=f"the file {name}")
    if os.sep in name or "/" in name:
        raise FileNotFoundError(f"data folder {name} does not exist")
    raise invalid(argument, f"one of {', '.join(names)}, or a folder", name, hint=did_you_mean(name, names))


def fingerprint(name: str) -> str | None:
    """Return a hash of the names and sizes of the files in a folder of data; their content is not read.

    Returns:
        12 hexadecimal digits; None for a data set by name, or if the folder does not exist.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     before = fingerprint(folder)
        ...     Path(folder, "image.png").touch()
        ...     print(before == fingerprint(folder))
        False
    """
    folder = Path(name)
    if name in NAMES or not folder.is_dir():
        return None
    files = sorted(path for path in walk_files(folder) if path.is_file())
    listing = "\n".join(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in files)
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()[:12]


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    classes = [str(target) for target in digits.target_names]
    return Source(classes, ArrayRecords(images, digits.target.astype(np.int64)), test=None)


def _from_parquet(folder: Path) -> Source:
    return source_from_arrow(read_parquet(folder), str(folder))


def read_parquet(folder: Path) -> Any:
    """Read a folder of parquet shards as a `datasets.DatasetDict`.

    Raises:
        ValueError: they cannot be read.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        with _bars_on_terminals():
            return datasets.load_dataset(str(folder.resolve()))
    except (DatasetGenerationError, ValueError) as error:
        found = f"damaged ones ({first_line(error.__cause__ or error)})"
        raise invalid(str(folder), "a folder of readable parquet files", found=found) from error


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Hide Hugging Face's progress bars unless standard error is a terminal."""
    import datasets

    hide = datasets.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def source_from_arrow(splits: Any, where: str) -> Source:
    """Build a source from a `datasets.DatasetDict`.

    Args:
        splits: with columns of images and class labels.
        where: name of the data set, for messages.

    Raises:
        ValueError: a split or column is missing, the splits differ, or a label is out of range.
    """
    if "train" not in splits:
        raise invalid(where, "a data set with a train split", found=f"the splits {', '.join(splits)}")
    train = splits["train"]
    image, label = _columns(train.features, where)
    classes = list(train.features[label].names)
    test = next((splits[name] for name in TEST_NAMES if name in splits), None)
    if test is not None and test.features != train.features:
        expected = "a data set whose splits have the same columns and class names"
        raise invalid(where, expected, found="different ones")

    def records(split: Any) -> ArrowRecords:
        labels = _labels(split, label, len(classes), where)
        return ArrowRecords(split, image, labels)

    return Source(classes, records(train), None if test is None else records(test))


def _columns(features: Any, where: str) -> tuple[str, str]:
    """Return the names of the image and of the label column."""
    from datasets import ClassLabel, Image

    def column(kind: type, preferred: Sequence[str]) -> str:
        found = [name for name, feature in features.items() if isinstance(feature, kind)]
        candidates = [name for name in preferred if name in found] or found
        if not candidates:
            listing = ", ".join(f"{name} ({type(f).__name__})" for name, f in features.items())
            raise invalid(where, f"a data set with a column of type {kind.__name__}", found=listing)
        return candidates[0]

    return column(Image, ("image", "img")), column(ClassLabel, ("fine_label", "label"))


def _labels(split: Any, column: str, classes: int, where: str) -> Rows:
    values = split.data.column(column).fill_null(-1)  # what the hub writes for "no label"
    labels = np.array(values, dtype=np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise invalid(
            where,
            f"a data set with {column} from 0 to {classes - 1}",
            found=f"{labels[bad[0]]} in row {bad[0]} of the {split.split} split",
            hint=f"{len(bad)} of {len(labels)} labels are out of range",
        )
    return labels


def _from_image_folder(folder: Path) -> Source:
    """Read `train/CLASS/*` with `test|val/CLASS/*`, or `CLASS/*` alone."""
    if not (folder / "train").is_dir():
        classes, train = _read_class_folders(folder)
        return Source(classes, train, test=None)
    classes, train = _read_class_folders(folder / "train")
    test_folder = next((folder / name for name in TEST_NAMES if (folder / name).is_dir()), None)
    if test_folder is None:
        return Source(classes, train, test=None)
    test_classes, test = _read_class_folders(test_folder)
    if unmatched := sorted(set(classes) ^ set(test_classes)):
        expected = f"a folder with the same class folders as {folder / 'train'}"
        raise invalid(str(test_folder), expected, found=f"{', '.join(unmatched)} in only one of them")
    return Source(classes, train, test)


def _read_class_folders(folder: Path) -> tuple[list[str], FileRecords]:
    """List the image files below each class folder."""
    classes = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and why_not_entered(path) is None
    )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = find_images(folder / name).images
        if not found:
            raise invalid(str(folder / name), "a class folder with images", found="no image file")
        paths += found
        labels += [label] * len(found)
    if not classes:
        expected = "a folder of parquet files, or of images as CLASS/* or train/CLASS/*"
        raise invalid(str(folder), expected, found="no class folder")
    classes = [as_text(name) for name in classes]
    return classes, FileRecords(paths, np.array(labels, dtype=np.int64))
