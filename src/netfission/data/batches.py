"""Batches ready for the network: normalised, augmented, on the device."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from netfission.data.augment import (
    Augmentation,
    Balance,
    PhotographTransform,
    class_weights,
    crop_and_flip,
    erase,
    make_mix,
    soften,
)
from netfission.data.splits import CorruptImageError, Label, Split, TensorSplit, label_at
from netfission.utils.errors import check_positive_integer, invalid
from netfission.utils.interrupts import no_interrupts

# Streams of random numbers, one per purpose: those of one epoch never overlap.
_ORDER, _AUGMENTATION, _WORKERS, _PHOTOGRAPHS = range(4)


class Normalisation:
    """Function from pixels uint8 to floats with zero mean and unit variance in each channel.

    Args:
        mean: one number per channel, of pixels scaled to [0, 1].
        std: one number per channel, of pixels scaled to [0, 1].
        device: of the pixels.

    Example:
        >>> normalise = Normalisation(mean=[0.5], std=[0.25])
        >>> normalise(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)).unique()
        tensor([2.])
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"
    ) -> None:
        self._offset = 255 * torch.tensor(mean, device=device).view(-1, 1, 1)
        self._scale = 1 / (255 * torch.tensor(std, device=device).view(-1, 1, 1))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise pixels `(batch, channels, height, width)` uint8 to float32."""
        return pixels.float().sub_(self._offset).mul_(self._scale)


def decode_batches(
    split: Dataset[tuple[Tensor, Label]], batch_size: int, *, workers: int = 0, **settings: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an iterator over the batches of a streamed split: pixels uint8, and labels.

    Args:
        split: the images and labels, such as a `StreamedSplit`.
        batch_size: images per batch.
        workers: processes that decode, which Ctrl-C does not reach; default 0, in this process.
        settings: of `torch.utils.data.DataLoader`.

    Raises:
        CorruptImageError: an image cannot be decoded; raised by the iterator.

    Example:
        >>> from netfission.data.splits import ArrayRecords, StreamedSplit
        >>> records = ArrayRecords(np.zeros((3, 8, 8), np.uint8), np.array([5, 6, 7]))
        >>> split = StreamedSplit(records, np.arange(3), (8, 8))
        >>> [labels.tolist() for images, labels in decode_batches(split, 2)]
        [[5, 6], [7]]
    """
    loader = DataLoader(split, batch_size, num_workers=workers, **settings)
    with no_interrupts():
        batches = iter(loader)  # starts the workers
    return _with_plain_errors(batches)


def _with_plain_errors(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches; name what is wrong with an image in one line, whichever process decoded it."""
    try:
        yield from batches
    except ValueError as error:
        kind, text = type(error), str(error)
        if kind not in (ValueError, CorruptImageError) or " in DataLoader worker" not in text:
            raise
        # torch wraps what a worker raises in the text of its traceback, whose last line is the message
        last = text.strip().splitlines()[-1]
        raise kind(last.rpartition(f"{kind.__name__}: ")[2]) from None


PairTransform = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class _TransformedSplit(Dataset[tuple[Tensor, Label]]):
    """A split whose images are transformed one by one.

    An item is asked for by its position in the epoch and its row. The position determines the transform, so
    that it does not depend on which worker applies it.

    Args:
        split: the images.
        transform: image, label and seed → image and label.
        seed: position → seed.
    """

    def __init__(
        self,
        split: Split,
        transform: Callable[[Tensor, Any, int], tuple[Tensor, Label]],
        seed: Callable[[int], int],
    ) -> None:
        self.split = split
        self.transform = transform
        self.seed = seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Label]:
        position, row = place
        if isinstance(self.split, TensorSplit):
            image, label = self.split.images[row], label_at(self.split.labels, row)
        else:
            image, label = self.split[row]
        return self.transform(image, label, self.seed(position))


class _OfImages:
    """A transform of an image that leaves its label as it is."""

    def __init__(self, transform: PhotographTransform) -> None:
        self.transform = transform

    def __call__(self, image: Tensor, label: Label, seed: int) -> tuple[Tensor, Label]:
        return self.transform(image, seed), label


class Batches:
    """Iterable over a split in batches: images `(batch, channels, height, width)` float32 and labels.

    Labels are `(batch,)` int64, or `(batch, classes)` float if images are mixed, labels are smoothed or
    classes have weights; targets of another kind are as the split has them, masks in int64. Images are
    normalised to `(pixel / 255 - mean) / std`, after augmentation.

    A split in memory is kept on `device` as uint8, and whole batches are gathered, augmented and normalised
    there. A streamed split is decoded by worker processes. If the augmentation has transforms for
    photographs, the workers apply them to each image, of a split in memory, too.

    The seed and the epoch determine order and augmentation. Set the epoch by `set_epoch` (it starts at 0);
    iteration does not advance it. PyTorch's global random state is neither used nor changed.

    Args:
        split: the images and labels.
        batch_size: images per batch.
        mean: one number per channel, of pixels scaled to [0, 1].
        std: one number per channel, of pixels scaled to [0, 1].
        classes: number of classes.
        device: of the batches.
        shuffle: draw a new order in each epoch; default the order of the split.
        drop_last: leave out the last batch if it is not full.
        augment: default no augmentation.
        balance: of uneven classes, with `shuffle`: `weights` scales labels by `class_weights`, `sampler`
            draws as many images as there are with replacement, each class equally often; default `none`.
        seed: of order and augmentation.
        rank: number of this process, whose share is every `world_size`-th row of one common order.
        world_size: number of processes. With `shuffle`, some rows are repeated so that all shares are equal,
            since gradients are averaged; without, no row is repeated, since results are counted.
        workers: processes that decode a streamed split, or transform photographs; default 0, in this process.
        crop_size: height and width that random crops are resized to; default that of the images.
        transform: image, target and seed → both, which the workers change together; default none.

    Raises:
        ValueError: the batch size is not positive, the rank is not below `world_size`, mean and std differ in
            length, or `drop_last` leaves no batch.

    Example:
        >>> split = TensorSplit(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10))
        >>> batches = Batches(split, 4, mean=[0.5], std=[0.25], classes=10)
        >>> [tuple(images.shape) for images, labels in batches]
        [(4, 1, 8, 8), (4, 1, 8, 8), (2, 1, 8, 8)]
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        classes: int,
        device: torch.device | str = "cpu",
        shuffle: bool = False,
        drop_last: bool = False,
        augment: Augmentation | None = None,
        balance: Balance = "none",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        crop_size: tuple[int, int] | None = None,
        transform: PairTransform | None = None,
    ) -> None:
        check_positive_integer("batch_size", batch_size)
        if not 0 <= rank < world_size:
            raise invalid("rank", f"at least 0 and below world_size={world_size}", rank)
        if len(mean) != len(std):
            raise invalid("std", f"of the same length as mean ({len(mean)})", found=str(len(std)))
        self.split = split
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.augment = augment or Augmentation()
        self.balance = balance
        self.classes = classes
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self._transform: Callable[[Tensor, Any, int], tuple[Tensor, Label]] | None = transform
        if transform is None and self.augment.changes_photographs:
            own = split.images.shape[2:] if isinstance(split, TensorSplit) else split.size
            self._transform = _OfImages(PhotographTransform(self.augment, crop_size or (own[0], own[1])))
        self.epoch = 0
        if drop_last and len(self) == 0:
            expected = f"at most {self._share()} with drop_last, the images of this process"
            raise invalid("batch_size", expected, batch_size)
        self._normalise = Normalisation(mean, std, self.device)
        self._mix = make_mix(self.augment, classes)
        weights = None if balance == "none" else class_weights(split.labels, classes)
        self._drawn = weights if balance == "sampler" else None
        self._weights = weights.to(self.device) if weights is not None and balance == "weights" else None
        self._held = (
            TensorSplit(split.images.to(self.device), split.labels.to(self.device))
            if isinstance(split, TensorSplit) and self._transform is None
            else None
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, counted from 0; it determines order and augmentation."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches in this process's share."""
        full, left = divmod(self._share(), self.batch_size)
        return full + (left > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the current epoch."""
        order = self._order()
        generator = self._generator(_AUGMENTATION, self.rank)
        raw = self._gathered(order) if self._held else self._streamed(order)
        for images, labels in raw:
            yield self._finish(images, labels, generator)

    def _share(self) -> int:
        """Return the number of rows in this process's share."""
        rows = len(self.split)
        return len(range(0 if self.shuffle else self.rank, rows, self.world_size))

    def _order(self) -> Tensor:
        """Return the rows of this process's share, in order."""
        rows = len(self.split)
        order = torch.arange(rows)
        if self.shuffle:
            order = self._shuffled(self._generator(_ORDER))
            order = order[torch.arange(self._share() * self.world_size) % rows]
        return order[self.rank :: self.world_size]

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        rows = len(self.split)
        if self._drawn is None:
            return torch.randperm(rows, generator=generator)
        weights = self._drawn[self.split.labels].double()
        return torch.multinomial(weights, rows, replacement=True, generator=generator)

    def _generator(self, stream: int, rank: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(stream, rank))

    def _seed(self, *numbers: int) -> int:
        words = np.random.SeedSequence((self.seed, self.epoch, *numbers))
        return int(words.generate_state(1, np.uint64)[0])

    def _gathered(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._held is not None
        chunks = order.to(self.device).split(self.batch_size)
        for rows in chunks[: len(self)]:
            yield self._held.images[rows], self._held.labels[rows]

    def _streamed(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        split: Split | _TransformedSplit = self.split
        sampler: list[Any] = order.tolist()
        if self._transform is not None:
            seed = partial(self._seed, _PHOTOGRAPHS, self.rank)
            split = _TransformedSplit(self.split, self._transform, seed)
            sampler = list(enumerate(sampler))
        assert isinstance(split, Dataset)
        decoded = decode_batches(
            split,
            self.batch_size,
            workers=self.workers,
            sampler=sampler,
            drop_last=self.drop_last,
            pin_memory=self.device.type == "cuda",
            generator=self._generator(_WORKERS, self.rank),  # else it draws from the global one
        )
        for images, labels in decoded:
            yield (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )

    def _finish(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augment the raw pixels, normalise, erase, mix, soften the labels; masks become int64."""
        if labels.dtype == torch.uint8:
            labels = labels.long()
        padding, flip = self.augment.crop_padding, self.augment.flip
        if padding or flip:
            images = crop_and_flip(images, padding, flip, generator)
        normalised = self._normalise(images)
        if self.augment.erase:
            normalised = erase(normalised, self.augment.erase, generator)
        if self._mix:
            normalised, labels = self._mix(normalised, labels, generator)
        if self.augment.label_smoothing or self._weights is not None:
            labels = soften(labels, self.classes, self.augment.label_smoothing, self._weights)
        return normalised, labels
