"""Where data sets come from: scikit-learn, the hub, parquet shards, folders and tables of images."""

import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from netfission.data.files import FileTree, inside, path_order, walk_files
from netfission.data.folders import FolderContents, LabelledImages, read_folder, read_rows, read_table
from netfission.data.label_files import TABLE_FILES, read_label_file
from netfission.data.split_names import SplitName, assign_splits
from netfission.data.splits import ArrayRecords, ArrowRecords, FileRecords, Records, Rows
from netfission.data.targets import CLASSES, Targets, parse
from netfission.utils.errors import did_you_mean, first_line, invalid
from netfission.utils.hub import load_from_hub
from netfission.utils.text import printable

HUB_NAMES = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}
NAMES = ("digits", *HUB_NAMES)
# Parquet files of several are named so: train-00000-of-00002.parquet, also with a hash behind.
_LABELS = ("int", "uint", "string", "bool")  # types of columns that can number or name classes
_SHARD = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\b")


@dataclass(frozen=True)
class Source:
    """A data set as it was found.

    Attributes:
        classes: names of the classes.
        splits: the images of each split.
        folder: the folder in which the splits were found; empty for a data set by name.
        origins: split → the folder, table or split that its images come from.
        left_out: reason → number of files, folders or images that are in no split.
        unused: name of a table or folder that is not used → why.
        remarks: what a user should know about the classes.
        targets: what the images are labelled with; `classes` are the names of these targets.
        listed: whether `classes` are those that occur, of a table that lists the labels of each image.
        unread: names of columns of a table that are left out, as others are wanted.
    """

    classes: list[str]
    splits: Mapping[SplitName, Records]
    folder: str = ""
    origins: dict[SplitName, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    targets: Targets = CLASSES
    listed: bool = False
    unread: list[str] = field(default_factory=list)

    @property
    def train(self) -> Records:
        """The training images, of a data set that was found with them."""
        return self.splits["train"]

    @property
    def validation(self) -> Records | None:
        """The validation images; None if the data set has no such split."""
        return self.splits.get("validation")

    @property
    def test(self) -> Records | None:
        """The test images; None if the data set has no test split."""
        return self.splits.get("test")


def find_source(name: str, *, train_required: bool = True) -> Source:
    """Find a data set by name or path.

    Args:
        name: see `netfission.data.load_data`.
        train_required: refuse a data set without a training split, or of a single class.

    Raises:
        ValueError: the name is unknown, or the folder or table has another layout.
        FileNotFoundError: the folder or table does not exist.
        ConnectionError: the hub is out of reach.

    Example:
        >>> source = find_source("digits")
        >>> len(source.classes), len(source.train.labels), source.test
        (10, 1797, None)
    """
    source = _find_source(name, train_required)
    if train_required and len(source.classes) < 2:
        raise invalid(name, "a data set of at least 2 classes", found=f"1 ({source.classes[0]})")
    return source


def find_targets(
    name: str, targets: Targets, *, train_required: bool = True, wanted: Collection[str] = ()
) -> Source:
    """Find a data set whose images are labelled with targets of a kind; other than classes, in a table.

    Args:
        name: see `netfission.data.load_data`.
        targets: their kind.
        train_required: see `find_source`.
        wanted: the columns of targets that are read if the table has one of them, in the form of
            `class_name`; default all.

    Raises:
        ValueError: it is no such table, or see `find_source`.
        FileNotFoundError: the folder or table does not exist.
        ConnectionError: the hub is out of reach.

    Example:
        >>> find_targets("digits", CLASSES).classes[:3]
        ['0', '1', '2']
    """
    if targets.read is None:
        return find_source(name, train_required=train_required)
    check_data_name(name)
    path = Path(name)
    if path.is_file():
        found = targets.read(path, wanted)
        names, listed, unread = found.names, found.listed, found.unread
        contents = read_rows(path, found.rows, train_required=train_required)
    elif path.is_dir() and targets.read_folder is not None:
        read = partial(targets.read, wanted=wanted)
        folder = targets.read_folder(path, read, train_required=train_required)
        names, listed, unread, contents = folder.names, folder.listed, folder.unread, folder.contents
    else:
        expected = targets.expected.format(", ".join(TABLE_FILES))
        raise invalid("data", f"{expected} for this task", name)

    def records(part: LabelledImages) -> FileRecords:
        images = sorted(part.labels, key=path_order)
        rows = [parse(part.labels[image]) for image in images]
        return FileRecords(images, np.array(rows, dtype=np.float32))

    return replace(_of_files(contents, names, records, targets), listed=listed, unread=unread)


def _find_source(name: str, train_required: bool) -> Source:
    check_data_name(name)
    if name == "digits":
        return _digits()
    if name in HUB_NAMES:
        return source_from_arrow(load_from_hub(HUB_NAMES[name]), name)
    if place := hub_place(name):
        return source_from_arrow(load_from_hub(*place), name, train_required=train_required)
    path = Path(name)
    if path.is_file():
        return _from_files(read_table(path, train_required=train_required))
    tree = FileTree()
    if has_parquet(path, tree):
        return _from_parquet(path, train_required)
    return _from_files(read_folder(path, train_required=train_required, tree=tree))


def find_labelled(name: str) -> tuple[list[str], Mapping[SplitName, Records]]:
    """Find the classes of a data set, and the images of each split; it need not have a training split.

    Raises:
        Those of `find_source`.

    Example:
        >>> classes, splits = find_labelled("digits")
        >>> {split: len(images.labels) for split, images in splits.items()}
        {'train': 1797}
    """
    source = find_source(name, train_required=False)
    return source.classes, source.splits


def has_parquet(folder: Path, tree: FileTree | None = None) -> bool:
    """Return whether a folder holds parquet shards; hidden files do not count.

    Args:
        folder: the folder.
        tree: lists the folder; default a new one.

    Example:
        >>> has_parquet(Path("no such folder"))
        False
    """
    return any(path.endswith(".parquet") for path in (tree or FileTree()).others(folder))


def check_data_name(name: str, argument: str = "data", others: Sequence[str] = ()) -> None:
    """Check that a name is that of a data set, a folder or table that exists, or one of `others`.

    Args:
        name: what was given.
        argument: name of the argument, for the message.
        others: further valid names.

    Raises:
        ValueError: it is another file or an unknown name.
        FileNotFoundError: the folder or table does not exist.

    Example:
        >>> check_data_name("invert", "ood", ["inverted"])
        Traceback (most recent call last):
        ValueError: ood must be one of digits, cifar10, cifar100, tiny-imagenet, inverted, hf/OWNER/NAME, \
or a folder, got 'invert'; did you mean inverted?
    """
    names = [*NAMES, *others]
    path = Path(name)
    is_table = path.suffix.lower() in TABLE_FILES
    if name in names or hub_place(name) or (name and path.is_dir()) or (is_table and path.is_file()):
        return
    if name and path.exists():
        suffixes = ", ".join(TABLE_FILES)
        expected = f"the name of a data set, a folder, or a table of paths and labels ({suffixes})"
        raise invalid(argument, expected, found=f"the file {name}")
    if is_table:
        raise FileNotFoundError(f"data table {printable(name)} does not exist")
    if os.sep in name or "/" in name:
        raise FileNotFoundError(f"data folder {printable(name)} does not exist")
    expected = f"one of {', '.join(names)}, hf/OWNER/NAME, or a folder"
    raise invalid(argument, expected, name, hint=did_you_mean(name, names))


def hub_place(name: str) -> tuple[str, str | None] | None:
    """Return the repository and the configuration of a data set `hf/OWNER/NAME` or `hf/OWNER/NAME/CONFIG`.

    Returns:
        The repository `OWNER/NAME`, and the configuration, or None in its place if the name has none.
        None alone if the name has another form or is that of a folder that exists.

    Example:
        >>> hub_place("hf/ylecun/mnist"), hub_place("hf/ufldl-stanford/svhn/cropped_digits")
        (('ylecun/mnist', None), ('ufldl-stanford/svhn', 'cropped_digits'))
        >>> hub_place("digits")
    """
    prefix, *parts = name.split("/")
    if prefix != "hf" or len(parts) not in (2, 3) or not all(parts) or Path(name).exists():
        return None
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def is_named(name: str) -> bool:
    """Return whether a data set goes by a name, here or on the hub, and not by where its files are.

    Example:
        >>> is_named("cifar10"), is_named("hf/ylecun/mnist"), is_named("photographs")
        (True, True, False)
    """
    return name in NAMES or hub_place(name) is not None


def fingerprint(name: str, targets: Targets = CLASSES) -> str | None:
    """Return a hash of the names and sizes of the files in a folder of data; their content is not read.

    Of a table, the hash is that of its rows, and of the names and sizes of the files that they name.

    Args:
        name: of the data set, or the folder or table.
        targets: what a table holds.

    Returns:
        12 hexadecimal digits; None for a data set by name, or if the folder or table does not exist.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     before = fingerprint(folder)
        ...     Path(folder, "image.png").touch()
        ...     print(before == fingerprint(folder))
        False
    """
    folder = Path(name)
    if name in NAMES or not folder.exists():
        return None
    if folder.is_file():
        rows = read_label_file(folder) if targets.read is None else targets.read(folder).rows
        lines = [f"{r.file} {r.label} {r.split} {_size(os.path.join(folder.parent, r.file))}" for r in rows]
    else:
        start = len(inside(folder))
        sizes = ((path, _size(path)) for path in sorted(walk_files(folder), key=path_order))
        lines = [f"{path[start:].replace(os.sep, '/')} {size}" for path, size in sizes if size is not None]
    listing = "\n".join(lines)
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()[:12]


def _size(path: str) -> int | None:
    """Return the bytes of a file; None if there is no file at the path."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null character in the path
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _digits() -> Source:
    records = _digit_records()
    return Source([str(label) for label in np.unique(records.labels)], {"train": records})


@cache
def _digit_records() -> ArrayRecords:
    """Read scikit-learn's digits; once, as parsing their table takes longer than the rest of loading them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)
    for array in (images, labels):
        array.flags.writeable = False
    return ArrayRecords(images, labels)


def _from_parquet(folder: Path, train_required: bool) -> Source:
    _check_all_shards(folder)
    source = source_from_arrow(read_parquet(folder), str(folder), train_required=train_required)
    return replace(source, folder=str(folder))


def _check_all_shards(folder: Path) -> None:
    """Refuse a folder that lacks shards, by the numbers in the names of the others."""
    shards = [Path(path) for path in walk_files(folder) if path.endswith(".parquet")]
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

    for path in map(Path, sorted(walk_files(folder), key=path_order)):
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

    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    hide = datasets.is_progress_bar_enabled() and not on_terminal
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


def source_from_arrow(splits: Any, where: str, *, train_required: bool = True) -> Source:
    """Build a source from a `datasets.DatasetDict`.

    Args:
        splits: with columns of images and class labels.
        where: name of the data set, for messages.
        train_required: refuse a data set without a training split.

    Raises:
        ValueError: a split or column is missing, the splits differ, or a label is out of range.
    """
    names = assign_splits(splits, where, train_required=train_required)
    features = splits[next(iter(names.values()))].features
    image, label = _image_column(features, where), _label_column(features, where)
    if any(splits[name].features != features for name in names.values()):
        expected = "a data set whose splits have the same columns and class names"
        raise invalid(where, expected, found="different ones")
    labels = {split: splits[name].data.column(label) for split, name in names.items()}
    classes = getattr(features[label], "names", None)
    if classes is None:
        classes, labels = _numbered(labels)
    return Source(
        [str(name) for name in classes],
        {
            split: ArrowRecords(
                splits[name], image, _labels(labels[split], label, len(classes), f"the {name} split", where)
            )
            for split, name in names.items()
        },
        origins={split: f"the {name} split" for split, name in names.items()},
        left_out={f"of the {name} split": len(splits[name]) for name in splits if name not in names.values()},
    )


def _image_column(features: Any, where: str) -> str:
    """Return the name of the column of images."""
    from datasets import Image

    found = [name for name, kind in features.items() if isinstance(kind, Image)]
    if not found:
        raise invalid(where, "a data set with a column of type Image", found=_listing(features))
    return next((name for name in ("image", "img") if name in found), found[0])


def _label_column(features: Any, where: str) -> str:
    """Return the name of the column of class labels; else of numbers or text, by its name."""
    from datasets import ClassLabel, Value

    preferred = ("fine_label", "label")
    found = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    if found:
        return next((name for name in preferred if name in found), found[0])
    for name in (*preferred, "labels", "class", "target"):
        kind = features.get(name)
        if isinstance(kind, Value) and kind.dtype.removeprefix("large_").startswith(_LABELS):
            return name
    expected = "a data set with a column of type ClassLabel, or one named label of numbers or text"
    raise invalid(where, expected, found=_listing(features))


def _listing(features: Any) -> str:
    return ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())


def _numbered(labels: Mapping[SplitName, Any]) -> tuple[list[Any], dict[SplitName, Any]]:
    """Return the values of labels in their order, and the labels as numbers of these."""
    import pyarrow as pa

    distinct = {value for column in labels.values() for value in column.unique().to_pylist()} - {None}
    classes = sorted(distinct)
    values = pa.array(classes, type=next(iter(labels.values())).type)
    return classes, {split: pa.compute.index_in(column, values) for split, column in labels.items()}


def _labels(values: Any, column: str, classes: int, split: str, where: str) -> Rows:
    labels = np.array(values.fill_null(-1), dtype=np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if not len(bad):
        return labels
    expected = f"a data set with {column} from 0 to {classes - 1}"
    label = str(labels[bad[0]]) if values[int(bad[0])].is_valid else f"no {column}"
    found = f"{label} in row {bad[0]} of {split}"
    reason = "missing or out of range" if values.null_count else "out of range"
    hint = f"{len(bad)} of {len(labels)} labels are {reason}"
    raise invalid(where, expected, found=found, hint=hint)


def _from_files(contents: FolderContents) -> Source:
    """Return what a folder or a table of image files holds."""
    numbers = {name: number for number, name in enumerate(contents.classes)}

    def records(part: LabelledImages) -> FileRecords:
        of_class = part.labels
        if part.match:
            of_class = {image: of_class[image] for image in sorted(of_class, key=path_order)}
        images = list(of_class)
        labels = np.fromiter(map(numbers.__getitem__, of_class.values()), np.int64, len(images))
        if (np.diff(labels) >= 0).all():  # as of class folders
            return FileRecords(images, labels)
        by_class = np.argsort(labels, kind="stable")
        return FileRecords([images[row] for row in by_class.tolist()], labels[by_class])

    return _of_files(contents, contents.classes, records)


def _of_files(
    contents: FolderContents,
    names: list[str],
    records: Callable[[LabelledImages], FileRecords],
    targets: Targets = CLASSES,
) -> Source:
    return Source(
        names,
        {split: records(part) for split, part in contents.splits.items()},
        str(contents.folder),
        {split: str(part.origin) for split, part in contents.splits.items()},
        contents.left_out,
        contents.unused,
        contents.remarks,
        targets,
    )
