"""Images without labels: those of another data set, or of any folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from netfission.data.files import FileTree
from netfission.data.folders import find_test_folder
from netfission.data.images import Mode
from netfission.data.sources import NAMES, find_source, has_parquet, hub_place, read_parquet
from netfission.data.split_names import test_name
from netfission.data.splits import ArrowRecords, FileRecords, StreamedSplit
from netfission.utils.errors import invalid
from netfission.utils.hub import load_from_hub


def load_unlabelled(name: str, shape: tuple[int, int, int]) -> StreamedSplit:
    """Load the images of a data set's test split, or all its images if it has none, in one shape.

    Args:
        name: a data set as in `load_data`; any with images on the hub, `hf/OWNER/NAME` or
            `hf/OWNER/NAME/CONFIG`; or a folder: parquet shards with an image column, or image files
            by any names. Of a table, or within a folder of files, the test split is used if it exists, or
            else the validation split.
        shape: channels (1 or 3), height and width.

    Returns:
        The images, decoded on access, all with the label 0.

    Raises:
        ValueError: the data set is unknown, or the folder holds no images.
        FileNotFoundError, ConnectionError: see `load_data`.

    Example:
        >>> split = load_unlabelled("digits", (3, 32, 32))
        >>> image, label = split[0]
        >>> tuple(image.shape), label
        ((3, 32, 32), 0)
    """
    channels, *size = shape
    mode: Mode = "L" if channels == 1 else "RGB"
    records = _find_records(name)
    count = len(records.labels)
    unknown = replace(records, mode=mode, labels=np.zeros(count, dtype=np.int64))
    return StreamedSplit(unknown, np.arange(count), (size[0], size[1]))


def _find_records(name: str) -> Any:
    folder = Path(name)
    if place := hub_place(name):
        return _image_records(load_from_hub(*place), name)
    if name in NAMES or not folder.is_dir():
        splits = find_source(name, train_required=False).splits
        return splits[next(split for split in ("test", "validation", "train") if split in splits)]
    tree = FileTree()
    if has_parquet(folder, tree):
        return _image_records(read_parquet(folder), str(folder))
    inner = find_test_folder(folder, tree)
    files = tree.images(inner).images
    if not files:
        raise invalid(str(inner), "a folder with images", found="no image file")
    return FileRecords(files, np.zeros(len(files), dtype=np.int64))


def _image_records(splits: Any, where: str) -> ArrowRecords:
    import datasets

    split = splits[test_name(splits) or next(iter(splits))]
    kinds = split.features.items()
    column = next((column for column, kind in kinds if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise invalid(
            where, "parquet files with a column of images", found=f"columns {', '.join(split.features)}"
        )
    return ArrowRecords(split, column, np.zeros(len(split), dtype=np.int64))
