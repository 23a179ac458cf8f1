"""What a report shows of a class for each pixel."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from netfission.data.mask_folders import VOID
from netfission.ensemble import Average, ensemble_log_probabilities
from netfission.tasks.figures import (
    PALE,
    Bars,
    ConfidenceBins,
    Example,
    InspectedImages,
    Inspection,
    Panel,
    Reliability,
    lowest,
    picture,
)
from netfission.utils.text import percent

_CHOSEN = {"worst": 0.0, "lower quartile": 0.25, "median": 0.5, "upper quartile": 0.75, "best": 1.0}


def iou_bars(by_target: Mapping[str, Mapping[str, float]], n: int) -> Bars:
    """Return a bar for the IoU of each class."""
    values, which = lowest({name: measures.get("iou") for name, measures in by_target.items()})
    return Bars(
        "iou",
        "Intersection over union of each class",
        f"Over all pixels of the {n:,} test images: pixels that have the class and are "
        f"predicted so, over those that have it or are predicted so.{which}",
        values,
        "IoU, %",
    )


def inspect_pixels(
    images: InspectedImages,
    predict: Callable[[Tensor], Any],
    numbers: Sequence[int],
    palette: Sequence[int],
    *,
    average: Average,
    temperature: float | None,
) -> Inspection:
    """Return the reliability over pixels, and photographs with their masks and maps.

    Args:
        images: of the test split.
        predict: outputs → `netfission.tasks.segmentation.PixelPredictions`.
        numbers: of the classes in masks.
        palette: 256 times red, green and blue.
        average: what the ensemble averages.
        temperature: of the calibration; None without one.
    """
    temperatures = {"reliability": 1.0} | ({} if temperature is None else {"reliability-scaled": temperature})
    bins = {name: ConfidenceBins() for name in temperatures}
    shares = []  # of right pixels, per photograph
    for outputs, masks in images.batches():
        for name, divisor in temperatures.items():
            confidence, classes = ensemble_log_probabilities(outputs / divisor, average).exp().max(dim=1)
            right, labelled = classes == masks, masks != VOID
            bins[name].add(confidence[labelled], right[labelled])
        shares += [
            (hits[counted].double().mean().item() if counted.any() else None)
            for hits, counted in zip(right, labelled, strict=True)
        ]
    order = sorted((share, number) for number, share in enumerate(shares) if share is not None)
    if not order:
        return Inspection(without=f"None of {len(shares):,} test images has a labelled pixel.")
    examples = []
    for name, place in _CHOSEN.items():
        share, number = order[round(place * (len(order) - 1))]
        pixels, outputs, masks = images.one(number)
        lines = [f"test image {images.row(number) + 1}"]
        title = f"{name}: {percent(share, 1)} % of the pixels are right"
        examples.append(
            Example(title, lines, _panels(pixels[0], predict(outputs), masks[0], numbers, palette))
        )
    seen = f"the labelled pixels of {len(shares):,} test images"
    figures = [
        _reliability(name, found, divisor, seen)
        for (name, divisor), found in zip(temperatures.items(), bins.values(), strict=True)
    ]
    return Inspection(
        figures,
        examples=examples,
        rule="The photographs at the minimum, the quartiles and the maximum of the share of labelled pixels "
        f"that are classified correctly, of {len(order):,} test images. Uncertainty: the entropy of "
        "the prediction, black if it is certain, white if all classes are equally probable.",
        legend={"void": _color(VOID, palette)},
    )


def _reliability(name: str, bins: ConfidenceBins, temperature: float, seen: str) -> Reliability:
    scaled = "" if temperature == 1 else f" Logits are divided by the temperature {temperature:.3f}."
    title = "Reliability before scaling" if name == "reliability" else "Reliability after scaling"
    meaning = (
        "Bars that end on the dashed line are calibrated: of the pixels with a confidence of 80 %, 80 % "
    )
    return Reliability(
        name,
        title,
        f"{meaning}are correct. Over {seen}.{scaled} {PALE}",
        bins.result(),
        "confidence: largest probability, %",
        "accuracy, %",
        "pixels, %",
    )


def _panels(
    pixels: Tensor, predictions: Any, mask: Tensor, numbers: Sequence[int], palette: Sequence[int]
) -> list[Panel]:
    """Return photograph, mask, classes and uncertainty."""
    table = torch.full((256,), VOID, dtype=torch.uint8)
    table[: len(numbers)] = torch.tensor(numbers, dtype=torch.uint8)
    truth = Image.fromarray(table[mask].numpy())
    truth.putpalette(list(palette))
    return [
        Panel("photograph", picture(pixels)),
        Panel("mask", truth, smooth=False),
        Panel("predicted", predictions.class_map(0), smooth=False),
        Panel("uncertainty", predictions.uncertainty_map(0)),
    ]


def _color(number: int, palette: Sequence[int]) -> str:
    return f"#{bytes(palette[3 * number : 3 * number + 3]).hex()}"
