"""The standard corruptions of photographs at five strengths, and a network's metrics on corrupted images."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netfission.data.corrupted import CORRUPTIONS, STRENGTHS
from netfission.ensemble import Average
from netfission.evaluation.evaluate import evaluate_logits
from netfission.utils.errors import invalid
from netfission.utils.extras import extra
from netfission.utils.text import align_columns, decimal, percent

MIN_SIDE = 32  # pixels, required by the library
_LIBRARY = "imagecorruptions-imaug"
_OWN_SEED = ("impulse_noise", "glass_blur")  # the others draw from NumPy's global generator


@dataclass(frozen=True)
class CorruptionMetrics:
    """Metrics at one strength of one corruption, or without corruption.

    Attributes:
        ensemble: `classification_metrics` of the ensemble, at the temperature.
        raw: the same at temperature 1.
        exits_top1: mean accuracy of the exits.
    """

    ensemble: dict[str, float]
    raw: dict[str, float]
    exits_top1: float

    @classmethod
    def from_logits(
        cls, logits: Tensor, labels: Tensor, temperature: float, *, average: Average
    ) -> "CorruptionMetrics":
        """Measure logits `(n, exits, classes)` against labels `(n,)`; `average`: of the ensemble.

        Example:
            >>> logits, labels = torch.zeros(4, 2, 3), torch.zeros(4).long()
            >>> metrics = CorruptionMetrics.from_logits(logits, labels, temperature=1.0, average="logits")
            >>> metrics.exits_top1
            1.0
        """
        raw = evaluate_logits(logits.double(), labels, average=average)
        ensemble = evaluate_logits(logits.double() / temperature, labels, average=average).ensemble
        return cls(ensemble, raw.ensemble, fmean(metrics["top1"] for metrics in raw.exits))


@dataclass(frozen=True)
class Corruptions:
    """Metrics of a network under the standard corruptions: `corruptions.json`.

    Attributes:
        n: number of images, the same under each corruption.
        seed: of the choice of those images and of random numbers in the corruptions.
        temperature: from a validation split; 1 without one.
        library: name and version of the library that corrupts, or the folder of images as published.
        clean: metrics of the same images without corruption; of the test split for images as published.
        corruptions: name → metrics at strengths 1 to 5.
    """

    n: int
    seed: int
    temperature: float
    library: str
    clean: CorruptionMetrics
    corruptions: dict[str, list[CorruptionMetrics]]

    def to_json(self) -> str:
        """Return the figures as JSON text, every digit kept."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def mean(self, name: str, strength: int | None = None) -> float:
        """Average a metric of the ensemble over all corruptions.

        Args:
            name: of the metric.
            strength: from 1 to 5; default all strengths.
        """
        chosen = slice(None) if strength is None else slice(strength - 1, strength)
        return fmean(
            metrics.ensemble[name] for strengths in self.corruptions.values() for metrics in strengths[chosen]
        )

    def mean_exit(self) -> float:
        """Average the accuracy of the exits over all corruptions and strengths."""
        return fmean(metrics.exits_top1 for strengths in self.corruptions.values() for metrics in strengths)

    def table(self) -> str:
        """Return the figures as aligned plain text."""
        rows = [["accuracy %", *(f"strength {strength}" for strength in STRENGTHS), "mean"]]
        for name, strengths in self.corruptions.items():
            accuracies = [metrics.ensemble["top1"] for metrics in strengths]
            rows.append([name.replace("_", " "), *map(percent, [*accuracies, fmean(accuracies)])])
        for title, name, cell in (
            ("mean accuracy %", "top1", percent),
            ("mean NLL", "nll", partial(decimal, digits=4)),
            ("mean ECE %", "ece", percent),
        ):
            means = [self.mean(name, strength) for strength in STRENGTHS]
            rows.append([title, *map(cell, [*means, self.mean(name)])])
        clean = self.clean.ensemble
        return (
            f"{align_columns(rows)}\n{self.n} images, {self.library}; without corruption: "
            f"accuracy {percent(clean['top1'])} %, NLL {decimal(clean['nll'], 4)}, "
            f"ECE {percent(clean['ece'])} %; "
            f"mean accuracy of the exits under corruption {percent(self.mean_exit())} %"
        )


def library_version() -> str:
    """Return the name and version of the library that corrupts.

    Raises:
        MissingExtraError: the library is not installed.
    """
    _library()
    return f"{_LIBRARY} {version(_LIBRARY)}"


def corrupt_images(pixels: Tensor, name: str, strength: int, seed: int) -> Tensor:
    """Corrupt images, each with random numbers that depend on the seed and its index alone.

    The strengths are those of ImageNet-C, made for 224×224 pixels. On smaller images most of them are
    stronger, and results are not comparable with CIFAR-C.

    Args:
        pixels: uint8 `(n, channels, height, width)`, with 1 or 3 channels and at least 32×32 pixels. Grey
            images are corrupted as equal red, green and blue; the result is the mean of the three.
        name: one of `netfission.data.corrupted.CORRUPTIONS`.
        strength: from 1 to 5.
        seed: of the random numbers.

    Returns:
        The corrupted images, uint8, of the same shape.

    Raises:
        ValueError: the images are too small.
        MissingExtraError: the library is not installed.
    """
    channels, *side = pixels.shape[1:]
    if min(side) < MIN_SIDE:
        raise invalid(
            "pixels",
            f"at least {MIN_SIDE}×{MIN_SIDE} per image for corruptions",
            found=f"{side[0]}×{side[1]}",
        )
    corrupt = _library().corrupt
    coloured = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    result = np.empty_like(coloured)
    number = CORRUPTIONS.index(name)
    with _global_generator_kept():
        for index, image in enumerate(coloured):
            image_seed = int(np.random.SeedSequence((seed, number, strength, index)).generate_state(1)[0])
            np.random.seed(image_seed)
            options = {"seed": image_seed} if name in _OWN_SEED else {}
            result[index] = corrupt(image, severity=strength, corruption_name=name, **options)
    changed = torch.from_numpy(result).permute(0, 3, 1, 2)
    return changed if channels == 3 else changed.float().mean(dim=1, keepdim=True).round().byte()


@contextmanager
def _global_generator_kept() -> Iterator[None]:
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


def _library() -> Any:
    with extra("corruptions", "evaluation under corruptions"):
        import imagecorruptions
    return imagecorruptions
