"""Where data sets come from: scikit-learn, the hub, parquet shards, folders of images."""

import difflib
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from netfission.data.splits import ArrayRecords, ArrowRecords, FileRecords, Records, Rows
from netfission.utils.hub import load_from_hub

HUB_NAMES = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}
NAMES = ("digits", *HUB_NAMES)
# In this order: the first that a data set has is its test split.
TEST_NAMES = ("test", "val", "valid", "validation")
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Source:
    """A data set as it was found; `test` is None where it has no split of its own for it."""

    classes: list[str]
    train: Records
    test: Records | None


def find_source(name: str) -> Source:
    """Find a data set by name or path.

    Raises ValueError for an unknown name or a folder that does not hold what it should,
    FileNotFoundError for a missing folder and ConnectionError for a hub out of reach.
    """
    if name == "digits":
        return _digits()
    if name in HUB_NAMES:
        return _from_arrow(load_from_hub(HUB_NAMES[name]), name)
    folder = Path(name)
    if folder.is_dir():
        parquet = any(folder.rglob("*.parquet"))
        return _from_parquet(folder) if parquet else _from_image_folder(folder)
    if folder.exists():
        raise ValueError(f"data must be a name or a folder, got the file {name}")
    if os.sep in name or "/" in name:
        raise FileNotFoundError(f"data folder {name} does not exist")
    nearest = difflib.get_close_matches(name, NAMES, cutoff=0.4) or NAMES
    raise ValueError(
        f"unknown data set {name!r}: nearest known names: {', '.join(nearest)}; "
        f"known are {', '.join(NAMES)} and folders"
    )


def fingerprint(name: str) -> str | None:
    """What tells a folder of data from another of the same name: of its files' names and sizes, no content.

    None for a data set by name, and where there is no such folder.
    """
    folder = Path(name)
    if name in NAMES or not folder.is_dir():
        return None
    files = sorted(path for path in walk_files(folder) if path.is_file())
    listing = "\n".join(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in files)
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()[:12]


def walk_files(folder: Path) -> Iterator[Path]:
    """All below a folder that is no folder, but for what names that begin with a dot hide.

    Folders that are linked to count as any other, each once however many links lead to it.
    """
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        own = os.path.realpath(place)
        shown = [] if own in seen else [name for name in folders if not name.startswith(".")]
        # In an order of their own, and by their own names before those of links to them.
        links = {name for name in shown if Path(place, name).is_symlink()}
        folders[:] = sorted(set(shown) - links) + sorted(links)
        yield from (Path(place, name) for name in names if own not in seen and not name.startswith("."))
        seen.add(own)


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    classes = [str(target) for target in digits.target_names]
    return Source(classes, ArrayRecords(images, digits.target.astype(np.int64)), test=None)


def _from_parquet(folder: Path) -> Source:
    return _from_arrow(read_parquet(folder), str(folder))


def read_parquet(folder: Path) -> Any:
    """The `DatasetDict` of a folder of parquet shards; ValueError where they cannot be read."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        with _bars_on_terminals():
            return datasets.load_dataset(str(folder.resolve()))
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"cannot read the parquet files of {folder}: {reason}") from error


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Without Hugging Face's progress bars where standard error is kept or read by a program."""
    import datasets

    hide = datasets.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def _from_arrow(splits: Any, where: str) -> Source:
    """Build a source from a `DatasetDict`."""
    if "train" not in splits:
        raise ValueError(f"{where} has no train split, found: {', '.join(splits)}")
    train = splits["train"]
    image, label = _columns(train.features, where)
    classes = list(train.features[label].names)
    test = next((splits[name] for name in TEST_NAMES if name in splits), None)
    if test is not None and test.features != train.features:
        raise ValueError(f"the splits of {where} differ in their columns or class names")

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
            raise ValueError(f"{where} has no {kind.__name__} column, found: {listing}")
        return candidates[0]

    return column(Image, ("image", "img")), column(ClassLabel, ("fine_label", "label"))


def _labels(split: Any, column: str, classes: int, where: str) -> Rows:
    values = split.data.column(column).fill_null(-1)  # the hub's own mark for "no label"
    labels = np.array(values, dtype=np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(labels)} labels in the {split.split} split of {where} are out of "
            f"range: row {bad[0]} holds {labels[bad[0]]}, {column} takes 0 to {classes - 1}"
        )
    return labels


def _from_image_folder(folder: Path) -> Source:
    """Read `train/CLASS/*` with `test|val/CLASS/*`, or `CLASS/*` alone."""
    if not (folder / "train").is_dir():
        classes, train = _scan(folder)
        return Source(classes, train, test=None)
    classes, train = _scan(folder / "train")
    test_folder = next((folder / name for name in TEST_NAMES if (folder / name).is_dir()), None)
    if test_folder is None:
        return Source(classes, train, test=None)
    test_classes, test = _scan(test_folder)
    if odd := sorted(set(classes) ^ set(test_classes)):
        raise ValueError(
            f"the class folders of {folder / 'train'} and {test_folder} differ: "
            f"only one of them has {', '.join(odd)}"
        )
    return Source(classes, train, test)


def _scan(folder: Path) -> tuple[list[str], FileRecords]:
    """List the image files below each class folder."""
    classes = sorted(d.name for d in folder.iterdir() if d.is_dir() and d.name[0] != ".")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = (p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        found = sorted(files)
        if not found:
            raise ValueError(f"class folder {folder / name} holds no images")
        paths += found
        labels += [label] * len(found)
    if not classes:
        raise ValueError(
            f"{folder} holds no class folders: takes parquet files, or images as CLASS/* or train/CLASS/*"
        )
    return classes, FileRecords(paths, np.array(labels, dtype=np.int64))
