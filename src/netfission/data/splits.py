"""The two kinds of splits, in memory or streamed, and how rows are assigned to splits."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from netfission.data.copies import Content
from netfission.data.formats import open_image
from netfission.data.images import Mode, to_pixels, why_unreadable
from netfission.utils.errors import invalid

Rows = npt.NDArray[np.int64]
Label = int | Tensor  # of one image


class Records(Protocol):
    """Images that are not decoded yet, by row."""

    @property
    def mode(self) -> Mode:
        """Pillow's mode that images are converted to."""

    @property
    def labels(self) -> Rows:
        """The class of each row; or its targets, floats `(rows, targets)`."""

    def open(self, row: int) -> Image.Image:
        """Open the image of a row."""

    def content(self, row: int) -> Content | None:
        """Return the encoded image of a row, or its file; None if the row holds no image."""

    def describe(self, row: int) -> str:
        """Name a row in messages."""


class Selection(Protocol):
    """Rows of records."""

    @property
    def records(self) -> Records:
        """The images."""

    @property
    def rows(self) -> Rows:
        """Numbers of the records."""


@dataclass(frozen=True)
class ArrayRecords:
    """Grey images in an array `(images, height, width)` uint8."""

    images: npt.NDArray[np.uint8]
    labels: Rows
    mode: Mode = "L"

    def open(self, row: int) -> Image.Image:
        """Open the image of a row."""
        return Image.fromarray(self.images[row])

    def content(self, row: int) -> Content | None:
        """Return the pixels of a row."""
        return memoryview(self.images[row].tobytes())

    def describe(self, row: int) -> str:
        """Name a row in messages."""
        return f"row {row}"


@dataclass(frozen=True)
class FileRecords:
    """One image file per row."""

    paths: Sequence[str]
    labels: Rows
    mode: Mode = "RGB"

    def open(self, row: int) -> Image.Image:
        """Open the image of a row."""
        return open_image(self.paths[row])

    def content(self, row: int) -> Content | None:
        """Return the path of a row's file."""
        return self.paths[row]

    def describe(self, row: int) -> str:
        """Name a row in messages."""
        return self.paths[row]


@dataclass(frozen=True)
class ArrowRecords:
    """Rows of a Hugging Face data set, with encoded images in one column."""

    dataset: Any
    column: str
    labels: Rows
    mode: Mode = "RGB"

    def open(self, row: int) -> Image.Image:
        """Open the image of a row."""
        # Straight from the memory-mapped table: ten times quicker than `dataset[row]`.
        value = self.dataset.data.column(self.column)[row].as_py()
        # Data sets of the hub that are made of image files name these.
        return open_image(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]))

    def content(self, row: int) -> Content | None:
        """Return the encoded image of a row; None if the row holds no image."""
        value = self.dataset.data.column(self.column)[row]
        encoded = value["bytes"].as_buffer()
        return value["path"].as_py() if encoded is None else memoryview(encoded)

    def describe(self, row: int) -> str:
        """Name a row in messages."""
        return f"row {row} of the {self.dataset.split} split"


class CorruptImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


def decode(records: Records, row: int, size: tuple[int, int]) -> Tensor:
    """Decode one image to pixels `(channels, height, width)` uint8, see `to_pixels`.

    Args:
        records: the images.
        row: of the image.
        size: height and width.

    Raises:
        CorruptImageError: it cannot be decoded.

    Example:
        >>> records = ArrayRecords(np.zeros((1, 8, 8), np.uint8), np.zeros(1, np.int64))
        >>> decode(records, 0, (16, 16)).shape
        torch.Size([1, 16, 16])
    """
    try:
        with records.open(row) as image:
            return to_pixels(image, records.mode, size)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and many more
        hint = "remove it, or set corrupt to skip to leave such images out"
        raise corrupt_image(records.describe(row), error, hint) from error


def corrupt_image(name: str, error: Exception, hint: str = "") -> CorruptImageError:
    """Return the error for an image that was there when the data set was loaded, and cannot be decoded.

    Args:
        name: of the image.
        error: what its decoder raised.
        hint: what to do about a damaged file.

    Example:
        >>> print(corrupt_image("a", FileNotFoundError()))
        a must be a readable image, got no such file any more; restore it; a training goes on with --resume
    """
    found = f"data that cannot be read ({why_unreadable(error)})"
    if isinstance(error, FileNotFoundError):
        found, hint = "no such file any more", "restore it; a training goes on with --resume"
    return CorruptImageError(str(invalid(name, "a readable image", found=found, hint=hint)))


@dataclass(frozen=True)
class TensorSplit:
    """A split in memory.

    Args:
        images: `(images, channels, height, width)` uint8.
        labels: `(images,)` int64; or targets of another kind, `(images, targets)` float32, or masks
            `(images, height, width)` uint8.
        photograph_sizes: height and width of each before it was fitted into that of the images; none if it
            fills them.

    Example:
        >>> len(TensorSplit(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.arange(5)))
        5
    """

    images: Tensor
    labels: Tensor
    photograph_sizes: Sequence[tuple[int, int]] = ()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


class DecodedSplit(Dataset[tuple[Tensor, Label]]):
    """A split that decodes images on access: the base class of all such splits.

    Attributes:
        size: height and width of the images.
        labels: of all images, as of a `TensorSplit`; `(images, 0)` if they are decoded with the images.
    """

    size: tuple[int, int]
    labels: Tensor

    @property
    def photograph_sizes(self) -> Sequence[tuple[int, int]]:
        """Those of a `TensorSplit`."""
        return ()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


class StreamedSplit(DecodedSplit):
    """A split that decodes images on access, whose labels are known.

    An item is an image `(channels, height, width)` uint8 and its label, or its targets `(targets,)`.
    Accessing an image that cannot be decoded raises CorruptImageError.

    Args:
        records: the images.
        rows: numbers of the records in this split.
        size: height and width.

    Attributes:
        labels: `(images,)` int64; or targets of another kind, `(images, targets)` float32.

    Example:
        >>> records = ArrayRecords(np.zeros((3, 8, 8), np.uint8), np.array([5, 6, 7]))
        >>> split = StreamedSplit(records, rows=np.array([0, 2]), size=(8, 8))
        >>> image, label = split[1]
        >>> image.shape, label
        (torch.Size([1, 8, 8]), 7)
    """

    def __init__(self, records: Records, rows: Rows, size: tuple[int, int]) -> None:
        self.records = records
        self.rows = rows
        self.size = size
        self.labels = torch.from_numpy(records.labels[rows])

    def __getitem__(self, index: int) -> tuple[Tensor, Label]:
        """Decode the image at `index`."""
        image = decode(self.records, int(self.rows[index]), self.size)
        return image, label_at(self.labels, index)


Split = TensorSplit | DecodedSplit


def label_at(labels: Tensor, index: int) -> Label:
    """Return the label of an image, as batches are made of: a class as int, other targets `(targets,)`.

    Example:
        >>> label_at(torch.tensor([5, 6]), 1), label_at(torch.tensor([[0.5], [1.5]]), 1)
        (6, tensor([1.5000]))
    """
    return int(labels.numpy()[index]) if labels.ndim == 1 else labels[index]  # indexing a tensor is slow


def readable(records: Records, rows: Rows, size: tuple[int, int]) -> Rows:
    """Return the rows whose image can be decoded; this decodes all of them.

    Example:
        >>> records = ArrayRecords(np.zeros((3, 8, 8), np.uint8), np.array([5, 6, 7]))
        >>> readable(records, np.arange(3), (8, 8)).tolist()
        [0, 1, 2]
    """

    def decodes(row: int) -> bool:
        try:
            decode(records, row, size)
        except CorruptImageError:
            return False
        return True

    return rows[[decodes(int(row)) for row in rows]]


def decode_all(records: Records, rows: Rows, size: tuple[int, int], skip: bool) -> TensorSplit:
    """Decode images into memory.

    Args:
        records: the images.
        rows: numbers of the images to decode.
        size: height and width.
        skip: leave out images that cannot be decoded.

    Raises:
        CorruptImageError: an image cannot be decoded, and `skip` is False.

    Example:
        >>> records = ArrayRecords(np.zeros((3, 8, 8), np.uint8), np.array([5, 6, 7]))
        >>> decode_all(records, np.array([0, 2]), (8, 8), skip=False).labels
        tensor([5, 7])
    """
    if isinstance(records, ArrayRecords) and records.images.shape[1:] == size:  # they are pixels already
        pixels, labels = records.images[rows], records.labels[rows]
        return TensorSplit(torch.from_numpy(pixels)[:, None], torch.from_numpy(labels))
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
    """Return, for each class, the positions of its labels in a random order.

    Example:
        >>> [group.tolist() for group in shuffled_by_class(np.array([0, 1, 0, 1, 0]), seed=0)]
        [[2, 0, 4], [1, 3]]
    """
    # RandomState's stream is frozen for good, so that a split is the same under every NumPy.
    order = np.random.RandomState(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def cut_size(images: int, share: float) -> int:
    """Return how many images of a class are cut off: round(share · images), but at least one stays.

    Example:
        >>> cut_size(5, 0.1), cut_size(4, 0.1), cut_size(1, 0.9)
        (1, 0, 0)
    """
    return max(0, min(int(share * images + 0.5), images - 1))


def stratified_cut(labels: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Cut the positions of labels into the rest and a share of each class, each sorted.

    Of a class, `cut_size` positions are cut off.

    Example:
        >>> rest, cut = stratified_cut(np.array([0, 0, 0, 0, 1, 1, 1, 1]), share=0.25, seed=0)
        >>> len(rest), len(cut)
        (6, 2)
    """
    rest, cut = [], []
    for positions in shuffled_by_class(labels, seed):
        count = cut_size(len(positions), share)
        cut.append(positions[:count])
        rest.append(positions[count:])
    return np.sort(np.concatenate(rest)), np.sort(np.concatenate(cut))
