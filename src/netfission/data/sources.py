"""Where data sets come from: scikit-learn, the hub, parquet shards, folders of images."""

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from netfission.data.files import walk_files
from netfission.data.folders import FolderContents, LabelledImages, read_folder
from netfission.data.split_names import SplitName, assign_splits
from netfission.data.splits import ArrayRecords, ArrowRecords, FileRecords, Records, Rows
from netfission.utils.errors import did_you_mean, first_line, invalid
from netfission.utils.hub import load_from_hub

HUB_NAMES = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}
NAMES = ("digits", *HUB_NAMES)
# Parquet files of several are named so: train-00000-of-00002.parquet, also with a hash behind.
_SHARD = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\b")


@dataclass(frozen=True)
class Source:
    """A data set as it was found.

    Attributes:
        classes: names of the classes.
        train: the training images.
        validation: the validation images; None if the data set has no such split.
        test: the test images; None if the data set has no test split.
        folder: the folder in which the splits were found; empty for a data set by name.
        origins: split → the folder, table or split that its images come from.
        left_out: reason → number of files, folders or images that are in no split.
        unused: name of a table or folder that is not used → why.
        remarks: what a user should know about the classes.
    """

    classes: list[str]
    train: Records
    validation: Records | None = None
    test: Records | None = None
    folder: str = ""
    origins: dict[SplitName, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


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
    return _from_parquet(folder) if has_parquet(folder) else _from_image_folder(folder)


def find_labelled(name: str) -> tuple[list[str], dict[SplitName, Records]]:
    """Find the classes of a data set, and the images of each split; it need not have a training split.

    Raises:
        Those of `find_source`.

    Example:
        >>> classes, splits = find_labelled("digits")
        >>> {split: len(images.labels) for split, images in splits.items()}
        {'train': 1797}
    """
    check_data_name(name)
    folder = Path(name)
    if name not in NAMES:
        if has_parquet(folder):
            _check_all_shards(folder)
            return _arrow_records(read_parquet(folder), str(folder), train_required=False)
        return _file_records(read_folder(folder, train_required=False))
    source = find_source(name)
    splits: dict[SplitName, Records | None] = {
        "train": source.train,
        "validation": source.validation,
        "test": source.test,
    }
    return source.classes, {split: records for split, records in splits.items() if records is not None}


def has_parquet(folder: Path) -> bool:
    """Return whether a folder holds parquet shards.

    Example:
        >>> has_parquet(Path("no such folder"))
        False
    """
    return any(path.suffix == ".parquet" for path in walk_files(folder))


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
    return Source(classes, ArrayRecords(images, digits.target.astype(np.int64)))


def _from_parquet(folder: Path) -> Source:
    _check_all_shards(folder)
    return replace(source_from_arrow(read_parquet(folder), str(folder)), folder=str(folder))


def _check_all_shards(folder: Path) -> None:
    """Refuse a folder that lacks shards, by the numbers in the names of the others."""
    shards = [path for path in walk_files(folder) if path.suffix == ".parquet"]
    found: dict[tuple[Path, str, int], set[int]] = {}
    for path in shards:
        if numbered := _SHARD.match(path.name):
            name, number, total = numbered.groups()
            found.setdefault((path.parent, name, int(total)), set()).add(int(number))
    for (_, name, total), numbers in sorted(found.items()):
        if missing := sorted(set(range(total)) - numbers):
            first = f"{name}-{missing[0]:05}-of-{total:05}"
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise invalid(
                str(folder),
                f"a folder of all {total} parquet files of {name}",
                found=f"{len(numbers)}, without {first}{others}",
                hint="add the rest, or rename the others if they are all that you want",
            )


def read_parquet(folder: Path) -> Any:
    """Read a folder of parquet shards as a `datasets.DatasetDict`.

    Raises:
        ValueError: they cannot be read.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        with _quiet_datasets():
            return datasets.load_dataset(str(folder.resolve()))
    except (DatasetGenerationError, ValueError) as error:
        found = _find_damage(folder) or f"damaged ones ({first_line(error.__cause__ or error)})"
        raise invalid(str(folder), "a folder of readable parquet files with rows", found=found) from error


def _find_damage(folder: Path) -> str:
    """Name the first parquet file that cannot be read or has no rows; an empty string if all are sound."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    for path in sorted(walk_files(folder)):
        if path.suffix == ".parquet":
            try:
                if read_metadata(path).num_rows == 0:
                    return f"0 rows in {path.relative_to(folder)}"
            except (OSError, ArrowException) as error:
                return f"damaged content in {path.relative_to(folder)} ({first_line(error)})"
    return ""


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Hide Hugging Face's progress bars unless standard error is a terminal, and its log of errors."""
    import datasets

    hide = datasets.is_progress_bar_enabled() and not sys.stderr.isatty()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised, too
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
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
    classes, records = _arrow_records(splits, where)
    names = assign_splits(splits, where)
    others = {f"of the {name} split": len(splits[name]) for name in splits if name not in names.values()}
    return Source(
        classes,
        records["train"],
        records.get("validation"),
        records.get("test"),
        origins={split: f"the {name} split" for split, name in names.items()},
        left_out=others,
    )


def _arrow_records(
    splits: Any, where: str, *, train_required: bool = True
) -> tuple[list[str], dict[SplitName, Records]]:
    """Return the classes of a `datasets.DatasetDict`, and the records of each split."""
    names = assign_splits(splits, where, train_required=train_required)
    features = splits[next(iter(names.values()))].features
    image, label = _columns(features, where)
    classes = list(features[label].names)
    if any(splits[name].features != features for name in names.values()):
        expected = "a data set whose splits have the same columns and class names"
        raise invalid(where, expected, found="different ones")
    return classes, {
        split: ArrowRecords(splits[name], image, _labels(splits[name], label, len(classes), where))
        for split, name in names.items()
    }


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
    values = split.data.column(column)
    labels = np.array(values.fill_null(-1), dtype=np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if not len(bad):
        return labels
    expected = f"a data set with {column} from 0 to {classes - 1}"
    label = str(labels[bad[0]]) if values[int(bad[0])].is_valid else f"no {column}"
    found = f"{label} in row {bad[0]} of the {split.split} split"
    reason = "missing or out of range" if values.null_count else "out of range"
    hint = f"{len(bad)} of {len(labels)} labels are {reason}"
    raise invalid(where, expected, found=found, hint=hint)


def _from_image_folder(folder: Path) -> Source:
    contents = read_folder(folder)
    classes, records = _file_records(contents)
    origins = {split: str(part.origin) for split, part in contents.splits.items()}
    return Source(
        classes,
        records["train"],
        records.get("validation"),
        records.get("test"),
        str(contents.folder),
        origins,
        contents.left_out,
        contents.unused,
        contents.remarks,
    )


def _file_records(contents: FolderContents) -> tuple[list[str], dict[SplitName, Records]]:
    """Return the classes of a folder, and the records of each split."""
    numbers = {name: number for number, name in enumerate(contents.classes)}

    def records(part: LabelledImages) -> FileRecords:
        rows = sorted((numbers[label], image) for image, label in part.labels.items())
        labels = np.array([number for number, _ in rows], dtype=np.int64)
        return FileRecords([image for _, image in rows], labels)

    return contents.classes, {split: records(part) for split, part in contents.splits.items()}
