"""Outputs of a network of maps for images that are larger than what it takes at once, window by window.

Windows of one size cover the image and overlap. Where they do, outputs are averaged, and the middle of a
window weighs more than its edge, where the network sees nothing of what lies beside: the sliding windows of
MMSegmentation (`mode="slide"`), with the Gaussian weights of nnU-Net (Isensee et al. 2021, Nature Methods
18, 203) and of MONAI's `sliding_window_inference`. By default these hold the outputs of the whole image and
their weights. Here rows are passed on as soon as no further window covers them, so that memory grows with the
width of an image, and not with its height.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from netfission.utils.errors import check_positive_integer, describe, invalid

OVERLAP = 0.25  # the default
_WIDTH = 1 / 8  # standard deviation of the weights, as a share of the window's side

Progress = Callable[[int, int], object]  # number of windows so far, and of all


@dataclass(frozen=True)
class Windows:
    """Windows that cover an image of any size.

    Those along a side are evenly spaced, from edge to edge. An image that is smaller than a window is covered
    by one, with black pixels below it and to its right.

    Attributes:
        size: height and width of a window, in pixels.
        overlap: least share of its side that a window has in common with the next, in [0, 1); default 0.25.
            The time grows with 1 / (1 − overlap)².

    Raises:
        ValueError: the size or the overlap is not valid.

    Example:
        >>> windows = Windows((90, 120), overlap=0.25)
        >>> windows.starts((180, 240))
        ([0, 45, 90], [0, 60, 120])
        >>> windows.count((180, 240)), windows.count((90, 120)), windows.count((10, 10))
        (9, 1, 1)
    """

    size: tuple[int, int]
    overlap: float = OVERLAP

    def __post_init__(self) -> None:
        if not isinstance(self.size, tuple | list) or len(self.size) != 2:
            raise invalid("window", "a height and a width", self.size)
        for side in self.size:
            check_positive_integer("window", side)
        if not isinstance(self.overlap, int | float) or not 0 <= self.overlap < 1:
            raise invalid("overlap", "a share in [0, 1)", self.overlap)

    def starts(self, size: tuple[int, int]) -> tuple[list[int], list[int]]:
        """Return the first row of the windows of an image, and their first column, both rising.

        Args:
            size: height and width of the image.
        """
        rows, columns = (self._starts(*sides) for sides in zip(size, self.size, strict=True))
        return rows, columns

    def count(self, size: tuple[int, int]) -> int:
        """Return the number of windows of an image of this height and width."""
        rows, columns = self.starts(size)
        return len(rows) * len(columns)

    def _starts(self, length: int, side: int) -> list[int]:
        free = length - side
        if free <= 0:
            return [0]
        steps = math.ceil(free / max(1, math.floor(side * (1 - self.overlap))))
        return [round(step * free / steps) for step in range(steps + 1)]


def stitched(
    run: Callable[[Tensor], Tensor],
    pixels: Tensor,
    windows: Windows,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Yield the outputs for an image, in strips of rows from top to bottom.

    The weight of a pixel of a window is a Gaussian of its distance from the middle, with a standard deviation
    of an eighth of the side, over the sum of those of all windows there. So the outputs of a pixel that a
    single window covers are the network's own, bit by bit.

    Memory is that of the image, of a batch of windows, and of the outputs for one row of windows, as wide as
    the image.

    Args:
        run: pixels `(n, channels, height, width)` of windows → outputs `(n, …, height, width)`, floats.
        pixels: of the image, `(channels, height, width)`, of any dtype that `run` accepts.
        windows: where they are.
        batch_size: number of windows that `run` takes at once; they are of one row of windows.
        progress: called after each batch.

    Yields:
        Outputs `(1, …, rows, width)`, on the device of what `run` returns.

    Raises:
        ValueError: the image is not valid, or the network's maps are not of the size of a window.

    Example:
        >>> image = torch.arange(48.0).view(1, 6, 8)
        >>> strips = list(stitched(lambda pixels: 2 * pixels, image, Windows((4, 4), overlap=0.5)))
        >>> [strip.shape[2] for strip in strips], torch.allclose(torch.cat(strips, dim=2)[0], 2 * image)
        ([2, 4], True)
    """
    if pixels.ndim != 3 or not pixels.numel():
        expected = "of shape (channels, height, width), none of them 0"
        raise invalid("pixels", expected, found=describe(pixels))
    check_positive_integer("batch_size", batch_size)
    height, width = pixels.shape[1:]
    rows, columns = windows.starts((height, width))
    row_weights, column_weights = (
        _weights(starts, side) for starts, side in zip((rows, columns), windows.size, strict=True)
    )
    side_by_side = columns[-1] + windows.size[1]
    below, beside = rows[-1] + windows.size[0] - height, side_by_side - width
    padded = F.pad(pixels, (0, beside, 0, below)) if below or beside else pixels
    done, total = 0, windows.count((height, width))
    band: Tensor | None = None
    for top, next_top, of_row in zip(rows, [*rows[1:], height], row_weights, strict=True):
        strip = padded[:, top : top + windows.size[0]]
        for first in range(0, len(columns), batch_size):
            lefts = columns[first : first + batch_size]
            batch = torch.stack([strip[:, :, left : left + windows.size[1]] for left in lefts])
            outputs = run(batch)
            _check_size(outputs, windows.size)
            if band is None:
                band = outputs.new_zeros(*outputs.shape[1:-1], side_by_side)
            for left, output, of_column in zip(lefts, outputs, column_weights[first:], strict=False):
                weights = (of_row[:, None] * of_column).to(band)
                band[..., left : left + windows.size[1]] += output * weights
            done += len(lefts)
            if progress is not None:
                progress(done, total)
        assert band is not None
        yield band[None, ..., : next_top - top, :width].clone()
        rest = band[..., next_top - top :, :].clone()
        band.zero_()
        band[..., : rest.shape[-2], :] = rest


def _weights(starts: list[int], side: int) -> list[Tensor]:
    """Return the weights of the pixels along a side of each window, `(side,)` float64.

    Of windows in a grid, the weights of a pixel are the products of those of its row and its column, as are
    their sums. So each side is divided by its own sum.
    """
    middle = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) / (_WIDTH * side)
    gaussian = torch.exp(-(middle.square()) / 2)
    sums = torch.zeros(starts[-1] + side, dtype=torch.float64)
    for start in starts:
        sums[start : start + side] += gaussian
    return [gaussian / sums[start : start + side] for start in starts]


def _check_size(outputs: Tensor, size: tuple[int, int]) -> None:
    if outputs.ndim < 3 or tuple(outputs.shape[-2:]) != tuple(size):
        expected = f"a size of which the network gives maps, {size[0]}×{size[1]} as it is given"
        raise invalid("window", expected, found=f"outputs of shape {tuple(outputs.shape)}")
