"""Maps of photographs of any size: joined from strips, and measured in the photograph's own size."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from netfission.evaluation.pixels import PixelScores

_PIXELS_AT_ONCE = 2**20  # whose probabilities are measured together


class Strip(Protocol):
    """The prediction for some rows of a photograph."""

    def maps(self, row: int) -> dict[str, Image.Image]:
        """Return the maps of an image of the batch, by name."""

    def records(self) -> list[dict[str, Any]]:
        """Return the record of each image of the batch."""


@dataclass(frozen=True)
class PhotographPrediction:
    """The prediction for one photograph, at its own resolution.

    Attributes:
        record: shares of its pixels, and means over them, as in `PixelPredictions.records`.
        class_map: see `netfission.tasks.segmentation.PixelPredictions.class_map`.
        uncertainty_map: see `netfission.tasks.segmentation.PixelPredictions.uncertainty_map`.

    Example:
        >>> grey = Image.new("L", (4, 2))
        >>> PhotographPrediction({"entropy": 0.0}, grey, grey).maps()["-uncertainty"].size
        (4, 2)
    """

    record: dict[str, Any]
    class_map: Image.Image
    uncertainty_map: Image.Image

    def maps(self) -> dict[str, Image.Image]:
        """Return what follows the name of the photograph in that of a map's file → the map."""
        return {"": self.class_map, "-uncertainty": self.uncertainty_map}


def joined(strips: Iterable[Strip], size: tuple[int, int]) -> PhotographPrediction:
    """Join the predictions for strips of a photograph, each a batch of one image of the photograph's width.

    Args:
        strips: from top to bottom.
        size: height and width of the photograph.
    """
    height, width = size
    whole: dict[str, Image.Image] = {}
    record: dict[str, Any] = {}
    top = 0
    for strip in strips:
        (part,) = strip.records()
        rows = 0
        for name, drawn in strip.maps(0).items():
            if name not in whole:
                whole[name] = Image.new(drawn.mode, (width, height))
                if (palette := drawn.getpalette()) is not None:
                    whole[name].putpalette(palette)
            whole[name].paste(drawn, (0, top))
            rows = drawn.height
        record = _added(record, part, rows / height)
        top += rows
    return PhotographPrediction(record, whole[""], whole["-uncertainty"])


def _added(record: Mapping[str, Any], part: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Return a record to which that of a part is added, times its share of the pixels."""
    return {
        name: _added(record.get(name, {}), value, share)
        if isinstance(value, dict)
        else record.get(name, 0.0) + share * value
        for name, value in part.items()
    }


class MapScores:
    """Measures maps of photographs in their own size.

    Args:
        classes: number of classes.
        void: label of the pixels that do not count.
    """

    def __init__(self, classes: int, void: int) -> None:
        self._scores = PixelScores(classes, void)

    def add(self, probabilities: Tensor, mask: Tensor) -> None:
        """Count a photograph.

        Args:
            probabilities: `(classes, height, width)`, floating point.
            mask: `(height, width)`, int64.
        """
        for rows in _strips(*mask.shape):
            part = probabilities[:, rows]
            # As float32 holds no logarithm of 0, which interpolation may leave.
            logarithms = part.clamp(min=torch.finfo(part.dtype).tiny).log()
            self._scores.add(logarithms[None], mask[None, rows])

    def result(self) -> dict[str, float]:
        """Return the measures, see `netfission.evaluation.pixels.PixelScores.result`."""
        return self._scores.result()


def _strips(height: int, width: int) -> Iterator[slice]:
    rows = max(1, _PIXELS_AT_ONCE // width)
    return (slice(top, top + rows) for top in range(0, height, rows))
