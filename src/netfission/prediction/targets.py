"""Predictions of labels or numbers for image files, and their formats."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from netfission.classifier import Predictor
from netfission.data.targets import SEPARATOR
from netfission.inference.windows import Progress, Windows
from netfission.prediction.images import Failure, ReadImage, in_batches, read_image
from netfission.prediction.writers import comma_separated, six_digits
from netfission.utils.text import printable

_WIDTH = 10  # of a column of numbers in a table


@dataclass(frozen=True)
class TargetPrediction:
    """The prediction for one image.

    Attributes:
        image: the file.
        record: name → a number, or names, or target → a number; see `TargetPredictions.records`.
        maps: what follows the name of the image in that of a map's file → the map; empty without maps.

    Example:
        >>> prediction = TargetPrediction(Path("a.png"), {"labels": ["car"], "probabilities": {"car": 0.9}})
        >>> prediction.flat
        {'labels': ['car'], 'probabilities_car': 0.9}
    """

    image: Path
    record: dict[str, Any]
    maps: Mapping[str, Image.Image] = field(default_factory=dict)

    @property
    def flat(self) -> dict[str, Any]:
        """The record with one entry per cell of a table."""
        return flattened(self.record)


def flattened(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record whose values of targets have entries of their own.

    Example:
        >>> flattened({"mean": {"road": 0.5}, "coverage": 0.9})
        {'mean_road': 0.5, 'coverage': 0.9}
    """
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= (
            {f"{name}_{part}": n for part, n in value.items()} if isinstance(value, dict) else {name: value}
        )
    return flat


def predict_targets(
    predictor: Predictor,
    images: Sequence[Path | Failure],
    *,
    batch_size: int = 64,
    coverage: float | None = None,
    draw_maps: bool = False,
) -> Iterator[TargetPrediction | Failure]:
    """Predict images in their order, see `netfission.prediction.predict_images`.

    Args:
        predictor: runs on the device that it is on.
        images: files, and failures, which are yielded as they are.
        batch_size: number of images per batch, of which the task may take fewer.
        coverage: see `Predictor.predict`.
        draw_maps: whether predictions come with their maps, of a task that has some.
    """

    def predict(read: Sequence[ReadImage]) -> Iterator[TargetPrediction]:
        if read:
            pixels, sizes = torch.stack([one.pixels for one in read]), [one.size for one in read]
            found = predictor.predict(pixels, coverage=coverage, sizes=sizes)
            for row, (one, record) in enumerate(zip(read, found.records(), strict=True)):
                yield TargetPrediction(one.image, record, found.maps(row) if draw_maps else {})

    batch_size = predictor.task.batch_size(predictor.spec.shape, batch_size)
    return in_batches(predictor, images, batch_size, predict)


def predict_windows(
    predictor: Predictor,
    images: Sequence[Path | Failure],
    windows: Windows,
    *,
    batch_size: int = 64,
    draw_maps: bool = False,
    progress: Progress | None = None,
) -> Iterator[TargetPrediction | Failure]:
    """Predict photographs in their order and own sizes, window by window; one at a time is in memory.

    Photographs of up to twice Pillow's `Image.MAX_IMAGE_PIXELS` are read.

    Args:
        predictor: see `predict_targets`, as the images.
        images: files, and failures.
        windows: what `Predictor.windows` returned.
        batch_size: number of windows per batch, of which the task may take fewer.
        draw_maps: whether predictions come with their maps.
        progress: called with the number of windows of a photograph so far, and of all.
    """
    for image in images:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # of many pixels: there are windows
            read = read_image(image, predictor.own_pixels)
        if isinstance(read, Failure):
            yield read
            continue
        found = predictor.predict_windows(read.pixels, windows, batch_size=batch_size, progress=progress)
        yield TargetPrediction(read.image, found.record, found.maps() if draw_maps else {})


class TargetWriter:
    """Writes predictions as lines, without line ends.

    Args:
        columns: names of the entries of a flat record.
        images: number of characters of the longest file name, as `printable`.

    Attributes:
        for_people: see `netfission.prediction.writers.Writer`.
    """

    for_people = False

    def __init__(self, columns: Sequence[str], images: int) -> None:
        self.columns = columns
        self.images = images

    def header(self) -> Iterator[str]:
        """Return the lines before the first prediction."""
        return iter(())

    def line(self, prediction: TargetPrediction | Failure) -> str:
        """Return the line of an image."""
        raise NotImplementedError

    def footer(self) -> Iterator[str]:
        """Return the lines after the last prediction."""
        return iter(())


class TargetJsonLines(TargetWriter):
    """One JSON object per line; an image without a prediction has only `image` and `error`."""

    def line(self, prediction: TargetPrediction | Failure) -> str:
        """Return the line of an image."""
        image = {"image": str(prediction.image)}
        if isinstance(prediction, Failure):
            return json.dumps(image | {"error": prediction.error})
        return json.dumps(image | _short(prediction.record))


class TargetCsv(TargetWriter):
    """Comma-separated values; names are separated by `|`, as in a table to train on.

    Example:
        >>> writer = TargetCsv(["labels", "probabilities_car"], images=5)
        >>> print(*writer.header())
        image,labels,probabilities_car,error
        >>> record = {"labels": ["car"], "probabilities": {"car": 0.9}}
        >>> print(writer.line(TargetPrediction(Path("a.png"), record)))
        a.png,car,0.9,
    """

    def header(self) -> Iterator[str]:
        """Return the names of the columns."""
        yield comma_separated(["image", *self.columns, "error"])

    def line(self, prediction: TargetPrediction | Failure) -> str:
        """Return the line of an image."""
        if isinstance(prediction, Failure):
            return comma_separated([str(prediction.image), *[""] * len(self.columns), prediction.error])
        cells = [
            SEPARATOR.join(cell) if isinstance(cell, list) else cell
            for cell in _short(prediction.flat).values()
        ]
        return comma_separated([str(prediction.image), *cells, ""])


class TargetTable(TargetWriter):
    """Aligned columns of `printable` text; numbers with four significant digits, names last."""

    for_people = True

    def header(self) -> Iterator[str]:
        """Return the titles of the columns."""
        yield self._aligned("image", {name: name for name in self.columns})

    def line(self, prediction: TargetPrediction | Failure) -> str:
        """Return the line of an image."""
        image = printable(prediction.image)
        if isinstance(prediction, Failure):
            return f"{image:{self.images}}  error: {printable(prediction.error)}"
        return self._aligned(
            image,
            {
                name: ", ".join(value) if isinstance(value, list) else f"{value:.4g}"
                for name, value in prediction.flat.items()
            },
        )

    def _aligned(self, image: str, cells: Mapping[str, str]) -> str:
        """Return a line; the column of names of labels has no fixed width, and comes last."""
        names = printable(cells["labels"]) if "labels" in cells else ""
        numbers = [
            printable(cell).rjust(max(_WIDTH, len(printable(name))))
            for name, cell in cells.items()
            if name != "labels"
        ]
        return "  ".join([image.ljust(self.images), *numbers, names]).rstrip()


TARGET_FORMATS: dict[str, type[TargetWriter]] = {
    "table": TargetTable,
    "csv": TargetCsv,
    "jsonl": TargetJsonLines,
}


def target_writer(
    kind: str, predictor: Predictor, images: Sequence[Path | Failure], *, coverage: float | None = None
) -> TargetWriter:
    """Return the writer of a format for the predictions of a network.

    Args:
        kind: a key of `TARGET_FORMATS`.
        predictor: the network.
        images: the files to predict.
        coverage: see `Predictor.predict`.

    Raises:
        ValueError: the coverage cannot be kept.
    """
    example = torch.zeros(1, *predictor.spec.shape, dtype=torch.uint8)
    (record,) = predictor.predict(example, coverage=coverage).records()
    names = (image.image if isinstance(image, Failure) else image for image in images)
    return TARGET_FORMATS[kind](list(flattened(record)), max(len(printable(name)) for name in names))


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with its numbers rounded to six significant digits, which float32 holds."""
    short: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            short[name] = _short(value)
        else:
            short[name] = value if isinstance(value, list) else six_digits(value)
    return short
