"""Images that are published in corrupted form: CIFAR-10-C, CIFAR-100-C, and others of their layouts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from netfission.data.images import Mode, to_pixels
from netfission.data.sources import has_parquet, hub_place, read_parquet
from netfission.data.splits import ArrowRecords, decode
from netfission.utils.errors import first_line, invalid
from netfission.utils.hub import load_from_hub
from netfission.utils.text import printable

# The 15 of Hendrycks & Dietterich 2019 (arXiv 1903.12261); four more in the folders are for validation.
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
)  # fmt: skip
STRENGTHS = (1, 2, 3, 4, 5)
_LAYOUT = "a folder of CIFAR-10-C or CIFAR-100-C as published, with labels.npy and an array per corruption"
_COLUMNS = ("label", "corruption_name", "corruption_level")


class CorruptedImages(Protocol):
    """Images of each corruption at each strength, read on access."""

    @property
    def title(self) -> str:
        """Where they are from."""

    @property
    def labels(self) -> Tensor:
        """`(n,)`, int64, in the order of the network's classes; of every corruption and strength."""

    def pixels(self, name: str, strength: int, rows: Tensor) -> Tensor:
        """Return images of one corruption, uint8 `(rows, channels, height, width)`.

        Args:
            name: one of `CORRUPTIONS`.
            strength: from 1 to 5.
            rows: `(rows,)`, int64, numbers of the images.
        """


@dataclass(frozen=True)
class CorruptedArrays:
    """`CorruptedImages` of a folder of arrays.

    Attributes:
        folder: with an array `(5 * n, height, width, 3)` per corruption, by strength.
        labels: see `CorruptedImages`.
        shape: channels, height and width that images are converted to.
    """

    folder: Path
    labels: Tensor
    shape: tuple[int, int, int]

    @property
    def title(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def pixels(self, name: str, strength: int, rows: Tensor) -> Tensor:
        """Return images of one corruption, see `CorruptedImages`."""
        images = _array(self.folder / f"{name}.npy")
        chosen = np.asarray(images[(strength - 1) * len(self.labels) + rows.numpy()])
        channels, height, width = self.shape
        if (channels, height, width) == (3, *chosen.shape[1:3]):
            return torch.from_numpy(chosen).permute(0, 3, 1, 2).contiguous()
        mode = _mode(channels)
        return torch.stack([to_pixels(Image.fromarray(image), mode, (height, width)) for image in chosen])


@dataclass(frozen=True)
class CorruptedTable:
    """`CorruptedImages` of a table with a row per image.

    Attributes:
        title: see `CorruptedImages`.
        labels: see there.
        records: all images of the table.
        rows: corruption and strength → rows of the table, `(n,)`, in the order of the labels.
        size: height and width that images are converted to.
    """

    title: str
    labels: Tensor
    records: ArrowRecords
    rows: dict[tuple[str, int], npt.NDArray[np.int64]]
    size: tuple[int, int]

    def pixels(self, name: str, strength: int, rows: Tensor) -> Tensor:
        """Return images of one corruption, see `CorruptedImages`."""
        chosen = self.rows[name, strength][rows.numpy()].tolist()
        return torch.stack([decode(self.records, row, self.size) for row in chosen])


def open_corrupted(name: str, classes: Sequence[str], shape: tuple[int, int, int]) -> CorruptedImages:
    """Open corrupted images, whose labels number the classes in alphabetical order.

    They do so in CIFAR-10-C and CIFAR-100-C. Classes whose names are numbers are in the order of these.

    Args:
        name: a folder with `labels.npy` and `NAME.npy` of the 15 corruptions; or a data set of the hub,
            `hf/OWNER/NAME`, or a folder of parquet files, with an image column and the columns `label`,
            `corruption_name` and `corruption_level` (1 to 5).
        classes: names of the network's classes; each has images.
        shape: channels, height and width of the network's images.

    Raises:
        ValueError: the images have another layout, or labels of other classes.
        FileNotFoundError: there is no such folder.
        ConnectionError: the hub is out of reach.
    """
    folder = Path(name)
    if place := hub_place(name):
        return _open_table(load_from_hub(*place), "/".join(filter(None, place)), name, classes, shape)
    if not folder.is_dir():
        raise FileNotFoundError(f"corrupted must be {_LAYOUT}, got {printable(folder)}, which does not exist")
    if has_parquet(folder):
        return _open_table(read_parquet(folder), folder.resolve().name, name, classes, shape)
    return _open_arrays(folder, classes, shape)


def _open_table(
    splits: Any, title: str, where: str, classes: Sequence[str], shape: tuple[int, int, int]
) -> CorruptedTable:
    import datasets

    table = splits[next(iter(splits))]
    kinds = table.features.items()
    image = next((column for column, kind in kinds if isinstance(kind, datasets.Image)), None)
    if image is None or len(splits) > 1 or not set(_COLUMNS) <= set(table.features):
        expected = f"one table with a column of images and the columns {', '.join(_COLUMNS)}"
        found = f"{where} with {len(splits)} splits" if len(splits) > 1 else f"{where} with {_columns(table)}"
        raise invalid("corrupted", expected, found=found)
    labels, names, strengths = (_values(table, column) for column in _COLUMNS)
    if labels.dtype.kind == "U":
        labels = _alphabetical(labels, classes)
    if labels.dtype.kind not in "iu":
        raise invalid("label", "a column of class numbers", found=f"{where} with {_columns(table)}")
    rows = {}
    for corruption in CORRUPTIONS:
        of_name = names == corruption
        for strength in STRENGTHS:
            chosen = np.flatnonzero(of_name & (strengths == strength))
            # In a table that was shuffled, the images of each corruption are in another order.
            rows[corruption, strength] = chosen[labels[chosen].argsort(kind="stable")]
    first = labels[rows[CORRUPTIONS[0], STRENGTHS[0]]]
    for (corruption, strength), chosen in rows.items():
        if not len(chosen) or not np.array_equal(labels[chosen], first):
            expected = "a table of the same images for each of the 15 corruptions at strengths 1 to 5"
            found = f"{where} with {len(chosen)} of {corruption} at {strength}, and {len(first)} of the first"
            raise invalid("corrupted", expected, found=found)
    channels, height, width = shape
    records = ArrowRecords(table, image, labels, _mode(channels))
    return CorruptedTable(title, _class_numbers(first, classes), records, rows, (height, width))


def _values(table: Any, column: str) -> npt.NDArray[Any]:
    """Return the values of a column; names, if it has class labels with names."""
    values = np.asarray(table.with_format("numpy")[column][:])
    names = getattr(table.features[column], "names", None)
    return values if names is None else np.asarray(names)[values]


def _alphabetical(names: npt.NDArray[Any], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the numbers of classes in the order that the published labels have."""
    order = _published_order(classes)
    if unknown := sorted(set(names.tolist()) - set(classes)):
        raise invalid("label", "of the network's classes", found=f"{unknown[0]!r} and others")
    number_of = {classes[row]: number for number, row in enumerate(order)}
    return np.array([number_of[name] for name in names.tolist()])


def _columns(table: Any) -> str:
    return "columns " + ", ".join(f"{name} ({type(kind).__name__})" for name, kind in table.features.items())


def _open_arrays(folder: Path, classes: Sequence[str], shape: tuple[int, int, int]) -> CorruptedArrays:
    missing = [name for name in ("labels", *CORRUPTIONS) if not (folder / f"{name}.npy").is_file()]
    if missing:
        raise invalid("corrupted", _LAYOUT, found=f"{folder} without {missing[0]}.npy")
    labels = np.asarray(_array(folder / "labels.npy"))
    strengths = len(STRENGTHS)
    n, rest = divmod(len(labels), strengths) if labels.ndim == 1 else (0, 1)
    if not n or rest or labels.dtype.kind not in "iu" or (labels.reshape(strengths, n) != labels[:n]).any():
        found = f"{folder}, whose labels.npy is {_described(labels)}"
        raise invalid("corrupted", f"{_LAYOUT}; labels are the same at each strength", found=found)
    numbers = _class_numbers(labels[:n], classes)
    for name in CORRUPTIONS:
        images = _array(folder / f"{name}.npy")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[::3] != (len(labels), 3):
            expected = f"an array of uint8 {(len(labels), 'height', 'width', 3)}".replace("'", "")
            raise invalid(f"{name}.npy", expected, found=_described(images))
    return CorruptedArrays(folder, numbers, shape)


def _class_numbers(labels: npt.NDArray[Any], classes: Sequence[str]) -> Tensor:
    """Return labels, which number the classes in alphabetical order, in the network's order."""
    present = np.unique(labels)
    if len(present) != len(classes) or (present != np.arange(len(classes))).any():
        found = f"{len(present)} labels from {present[0]} to {present[-1]}"
        raise invalid("corrupted", f"images of the network's {len(classes)} classes", found=found)
    order = _published_order(classes)
    return torch.tensor(order)[labels.astype(np.int64)]


def _published_order(classes: Sequence[str]) -> list[int]:
    """Return the rows of classes in alphabetical order, or in that of numbers if their names are numbers."""
    numbered = all(name.isdecimal() for name in classes)
    return sorted(range(len(classes)), key=lambda row: (int(classes[row]) if numbered else 0, classes[row]))


def _mode(channels: int) -> Mode:
    return "L" if channels == 1 else "RGB"


def _array(file: Path) -> npt.NDArray[np.generic]:
    """Map an array into memory; one that wants to run code is refused."""
    try:
        array: npt.NDArray[np.generic] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise invalid(str(file), "an array of NumPy", found=f"another file ({first_line(error)})") from error
    return array


def _described(array: npt.NDArray[np.generic]) -> str:
    return f"{array.dtype} {array.shape}"
