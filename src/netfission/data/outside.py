"""Images whose labels are of no account: those of another data set, or of any folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from netfission.data.images import Mode
from netfission.data.sources import NAMES, TEST_NAMES, below, find_source, read_parquet
from netfission.data.splits import ArrowRecords, FileRecords, StreamedSplit

# Formats that Pillow names but cannot decode by itself.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def image_files(folder: Path) -> list[Path]:
    """The files below a folder, sorted, whose name ends as those of an image that Pillow reads.

    Folders that are linked to count as any other; files and folders whose name begins with a dot are left
    out.
    """
    return [path for path in images_and_others(folder)[0] if path.is_file()]


def images_and_others(folder: Path) -> tuple[list[Path], list[Path]]:
    """`image_files`, with what is named so and is no file or not there; and what has other names."""
    suffixes = {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NOT_DECODED
    }
    paths = sorted(below(folder))
    images = [path for path in paths if path.suffix.lower() in suffixes]
    return images, [path for path in paths if path.suffix.lower() not in suffixes]


def unlabelled(name: str, shape: tuple[int, int, int]) -> StreamedSplit:
    """The images of a data set's test split, or all of them where it has none, made to one shape.

    Args:
        name: of a data set, see `load_data`; or a folder, of parquet shards with an image column or of images
            by whatever names, `test` (or `val`, `valid`, `validation`) within it where there is one.
        shape: channels (1 or 3), height and width.

    Returns:
        The images, all with the label 0.

    Raises:
        ValueError: there is no such data set, or the folder holds no images.
        FileNotFoundError, ConnectionError: see `load_data`.
    """
    channels, *size = shape
    mode: Mode = "L" if channels == 1 else "RGB"
    records = _records(name)
    count = len(records.labels)
    unknown = replace(records, mode=mode, labels=np.zeros(count, dtype=np.int64))
    return StreamedSplit(unknown, np.arange(count), (size[0], size[1]))


def _records(name: str) -> Any:
    folder = Path(name)
    if name in NAMES or not folder.is_dir():
        source = find_source(name)
        return source.test or source.train
    if any(folder.rglob("*.parquet")):
        return _of_parquet(folder)
    inner = next((folder / test for test in TEST_NAMES if (folder / test).is_dir()), folder)
    files = image_files(inner)
    if not files:
        raise ValueError(f"{inner} holds no images")
    return FileRecords(files, np.zeros(len(files), dtype=np.int64))


def _of_parquet(folder: Path) -> ArrowRecords:
    import datasets

    splits = read_parquet(folder)
    split = splits[next((test for test in TEST_NAMES if test in splits), next(iter(splits)))]
    kinds = split.features.items()
    column = next((column for column, kind in kinds if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise ValueError(f"{folder} has no column of images, found: {', '.join(split.features)}")
    return ArrowRecords(split, column, np.zeros(len(split), dtype=np.int64))
