"""What a report shows of a task: figures as plain data, tables, and test images with their predictions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from netfission.evaluation.metrics import CALIBRATION_BINS
from netfission.evaluation.reliability import ConfidenceBin

FEW = 10  # predictions in a bin, below which their accuracy is unreliable
PALE = f"Pale bars hold fewer than {FEW}."
_MOST_BARS = 40  # in one figure


@dataclass(frozen=True)
class FigureData:
    """A figure that a report draws.

    Attributes:
        name: of its file.
        title: of the figure.
        meaning: how to read it, in one or two sentences.
    """

    name: str
    title: str
    meaning: str


@dataclass(frozen=True)
class Bars(FigureData):
    """A bar for each of some targets.

    Attributes:
        values: name → a share in [0, 1]; None if it is not defined.
        label: of the axis.
    """

    values: Mapping[str, float | None]
    label: str


@dataclass(frozen=True)
class Reliability(FigureData):
    """How often predictions are right, by their confidence.

    Attributes:
        bins: of equal width over the confidence, from 0 to 1.
        confidence: what that is, for the axis.
        frequency: what is compared with it, for the axis.
        counted: what the bins hold, for the axis.
    """

    bins: Sequence[ConfidenceBin]
    confidence: str
    frequency: str
    counted: str

    @property
    def ece(self) -> float:
        """The expected calibration error of the bins, in [0, 1]."""
        total = sum(one.count for one in self.bins)
        return sum(one.count * abs(one.confidence - one.accuracy) for one in self.bins) / total


@dataclass(frozen=True)
class Scatter(FigureData):
    """Predicted against true numbers, with intervals.

    Attributes:
        truth: of each image.
        predicted: of each image.
        low: lower end of each interval.
        high: upper end of each interval.
        number: name of the number.
    """

    truth: Sequence[float]
    predicted: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    number: str


@dataclass(frozen=True)
class Coverage(FigureData):
    """How often numbers are in intervals, by the probability that the intervals state.

    Attributes:
        stated: probabilities, rising.
        observed: title of a line → the shares of numbers in the intervals.
    """

    stated: Sequence[float]
    observed: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: of the table.
        meaning: how to read it.
        columns: titles; the first is that of the names of rows.
        rows: cells as text.
    """

    title: str
    meaning: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Panel:
    """A picture, and what it shows.

    Attributes:
        title: in a word or two.
        image: of any size.
        smooth: whether pixels between those of the image may be interpolated.
    """

    title: str
    image: Image.Image
    smooth: bool = True


@dataclass(frozen=True)
class Example:
    """A test image with its prediction.

    Attributes:
        title: why it is shown, or what it is.
        lines: of text below.
        panels: pictures side by side.
    """

    title: str
    lines: Sequence[str]
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Inspection:
    """What a look at test images gives.

    Attributes:
        figures: to draw.
        tables: to show.
        examples: images.
        rule: by which the images are chosen, in a sentence.
        without: what is said if there are no images, in a sentence.
        legend: title → color of what is in the pictures, such as `#800000`.
    """

    figures: Sequence[FigureData] = ()
    tables: Sequence[Table] = ()
    examples: Sequence[Example] = ()
    rule: str = ""
    without: str = "No image is shown: all are predicted correctly."
    legend: Mapping[str, str] = field(default_factory=dict)


class InspectedImages(Protocol):
    """Test images, and the network that runs on them."""

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield outputs `(batch, exits, outputs, …)` and targets of all images, in their order."""

    def row(self, number: int) -> int:
        """Return the row of an image in its split, from 0."""

    def one(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return pixels, uint8, outputs and targets of an image, each as a batch of one."""


class ConfidenceBins:
    """Counts predictions by confidence, in 15 bins of equal width from 0 to 1, batch by batch.

    Example:
        >>> bins = ConfidenceBins()
        >>> bins.add(torch.tensor([0.7, 0.9]), torch.tensor([False, True]))
        >>> [(one.count, round(one.confidence, 2), one.accuracy) for one in bins.result() if one.count]
        [(1, 0.7, 0.0), (1, 0.9, 1.0)]
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(CALIBRATION_BINS, dtype=torch.int64)
        self._sums = torch.zeros(2, CALIBRATION_BINS, dtype=torch.float64)

    def add(self, confidence: Tensor, right: Tensor) -> None:
        """Count predictions.

        Args:
            confidence: of each, in [0, 1].
            right: whether each is right, of the same shape.
        """
        index = (confidence.flatten() * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        self._counts += index.bincount(minlength=CALIBRATION_BINS)
        for total, values in zip(self._sums, (confidence, right), strict=True):
            total += index.bincount(weights=values.flatten().double(), minlength=CALIBRATION_BINS)

    def result(self) -> list[ConfidenceBin]:
        """Return the bins, from the lowest confidence."""
        means = (self._sums / self._counts.clamp(min=1)).tolist()
        return [ConfidenceBin(*values) for values in zip(self._counts.tolist(), *means, strict=True)]


def lowest(values: Mapping[str, float | None]) -> tuple[dict[str, float | None], str]:
    """Return the values for one figure of bars, and a sentence that says which they are.

    Returns:
        All values if there are at most 40, else the 40 lowest of those that are defined; and the sentence,
        with a blank before it, empty for all.

    Example:
        >>> lowest({"road": 0.5, "sky": None})
        ({'road': 0.5, 'sky': None}, '')
    """
    if len(values) <= _MOST_BARS:
        return dict(values), ""
    known = sorted((value, name) for name, value in values.items() if value is not None)[:_MOST_BARS]
    return {name: value for value, name in known}, f" The {len(known)} lowest of {len(values):,}."


def picture(pixels: Tensor) -> Image.Image:
    """Return an image of pixels, uint8 `(channels, height, width)`.

    Example:
        >>> picture(torch.zeros(3, 4, 6, dtype=torch.uint8)).size
        (6, 4)
    """
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
