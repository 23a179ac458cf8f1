"""The two forms of a split, held in memory or streamed, and how rows are dealt out to splits."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from netfission.data.images import Mode, to_pixels

Rows = npt.NDArray[np.int64]


class Records(Protocol):
    """Images not decoded yet, by row."""

    @property
    def mode(self) -> Mode:
        """Pillow's name for what the pixels are turned into."""

    @property
    def labels(self) -> Rows:
        """The class of each row."""

    def open(self, row: int) -> Image.Image:
        """Open the image of a row."""

    def describe(self, row: int) -> str:
        """Name a row in messages."""


@dataclass(frozen=True)
class ArrayRecords:
    """Grey images that are an array already, `(N, H, W)` uint8."""

    images: npt.NDArray[np.uint8]
    labels: Rows
    mode: Mode = "L"

    def open(self, row: int) -> Image.Image:
        """Open the image of a row."""
        return Image.fromarray(self.images[row])

    def describe(self, row: int) -> str:
        """Name a row in messages."""
        return f"row {row}"


@dataclass(frozen=True)
class FileRecords:
    """One image file a row."""

    paths: Sequence[Path]
    labels: Rows
    mode: Mode = "RGB"

    def open(self, row: int) -> Image.Image:
        """Open the image of a row."""
        return Image.open(self.paths[row])

    def describe(self, row: int) -> str:
        """Name a row in messages."""
        return str(self.paths[row])


@dataclass(frozen=True)
class ArrowRecords:
    """Rows of a Hugging Face data set whose `column` holds encoded images."""

    dataset: Any
    column: str
    labels: Rows
    mode: Mode = "RGB"

    def open(self, row: int) -> Image.Image:
        """Open the image of a row."""
        # Straight from the memory-mapped table: ten times quicker than `dataset[row]`.
        encoded = self.dataset.data.column(self.column)[row].as_py()["bytes"]
        return Image.open(io.BytesIO(encoded))

    def describe(self, row: int) -> str:
        """Name a row in messages."""
        return f"row {row} of the {self.dataset.split} split"


class CorruptImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


def decode(records: Records, row: int, size: tuple[int, int]) -> Tensor:
    """Decode one image to `(C, H, W)` uint8, `size` being (H, W).

    See `to_pixels`. Raises CorruptImageError, naming the image.
    """
    try:
        with records.open(row) as image:
            return to_pixels(image, records.mode, size)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and many more
        raise CorruptImageError(
            f"corrupt image {records.describe(row)} ({type(error).__name__}): "
            "remove it, or pass corrupt='skip' to leave such images out"
        ) from error


@dataclass(frozen=True)
class TensorSplit:
    """A split in memory: `images` `(N, C, H, W)` uint8 and `labels` `(N,)` int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


class StreamedSplit(Dataset[tuple[Tensor, int]]):
    """A split that decodes on access: item i is an image `(C, H, W)` uint8 and its label.

    `rows` says which of the `records` belong to it, `size` is (H, W). `labels` is `(N,)` int64.
    An image that cannot be decoded raises CorruptImageError when its turn comes.
    """

    def __init__(self, records: Records, rows: Rows, size: tuple[int, int]) -> None:
        self.records = records
        self.rows = rows
        self.size = size
        self.labels = torch.from_numpy(records.labels[rows])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Decode the image at `index`."""
        image = decode(self.records, int(self.rows[index]), self.size)
        return image, int(self.labels[index])


Split = TensorSplit | StreamedSplit


def readable(records: Records, rows: Rows, size: tuple[int, int]) -> Rows:
    """Return those of `rows` that decode; decodes them all."""

    def decodes(row: int) -> bool:
        try:
            decode(records, row, size)
        except CorruptImageError:
            return False
        return True

    return rows[[decodes(int(row)) for row in rows]]


def decode_all(records: Records, rows: Rows, size: tuple[int, int], skip: bool) -> TensorSplit:
    """Decode `rows` into memory, leaving out (`skip`) or refusing what is corrupt."""
    images = torch.empty(len(rows), len(records.mode), *size, dtype=torch.uint8)
    kept: list[int] = []
    for row in rows:
        try:
            images[len(kept)] = decode(records, int(row), size)
        except CorruptImageError:
            if not skip:
                raise
        else:
            kept.append(int(row))
    return TensorSplit(images[: len(kept)], torch.from_numpy(records.labels[kept]))


def shuffled_by_class(labels: Rows, seed: int) -> list[Rows]:
    """Return, class by class, the positions of `labels` in a random order."""
    # RandomState's stream is frozen for good, so that a split is the same under every NumPy.
    order = np.random.RandomState(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def stratified_cut(labels: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Cut the positions of `labels` into the rest and a `share` of every class, each sorted.

    A class gives round(share · size) positions but keeps at least one.
    """
    rest, cut = [], []
    for positions in shuffled_by_class(labels, seed):
        count = min(int(share * len(positions) + 0.5), len(positions) - 1)
        cut.append(positions[:count])
        rest.append(positions[count:])
    return np.sort(np.concatenate(rest)), np.sort(np.concatenate(cut))
