"""The standard corruptions of photographs at five strengths, and what a network is worth under them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netfission.evaluation.evaluate import evaluate_logits
from netfission.utils.text import align_columns

STRENGTHS = (1, 2, 3, 4, 5)
LEAST_SIDE = 32  # pixels, of the library
_LIBRARY = "imagecorruptions-imaug"
_SEEDED_APART = ("impulse_noise", "glass_blur")  # the others draw from NumPy's global generator


@dataclass(frozen=True)
class UnderCorruption:
    """Figures at one strength of one corruption, or of none.

    Attributes:
        ensemble: `classification_metrics` of the ensemble, at the temperature.
        raw: the same at temperature 1.
        exits_top1: mean accuracy of the exits.
    """

    ensemble: dict[str, float]
    raw: dict[str, float]
    exits_top1: float

    @classmethod
    def from_logits(cls, logits: Tensor, labels: Tensor, temperature: float) -> "UnderCorruption":
        """Measure logits `(n, exits, classes)` against labels `(n,)`."""
        raw = evaluate_logits(logits.double(), labels)
        ensemble = evaluate_logits(logits.double() / temperature, labels).ensemble
        return cls(ensemble, raw.ensemble, fmean(metrics["top1"] for metrics in raw.exits))


@dataclass(frozen=True)
class Corruptions:
    """A network under the standard corruptions: `corruptions.json`.

    Attributes:
        n: images of the test split, the same under each.
        seed: of the choice of those images and of what is drawn at random in corrupting them.
        temperature: from a validation split; 1 without one.
        library: that the corruptions come from, with its version.
        clean: the same images as they are.
        corruptions: name → figures at strengths 1 to 5.
    """

    n: int
    seed: int
    temperature: float
    library: str
    clean: UnderCorruption
    corruptions: dict[str, list[UnderCorruption]]

    def mean(self, name: str, strength: int | None = None) -> float:
        """Of a figure of the ensemble, over all corruptions; at all strengths, or at one from 1 to 5."""
        chosen = slice(None) if strength is None else slice(strength - 1, strength)
        return fmean(each.ensemble[name] for own in self.corruptions.values() for each in own[chosen])

    def mean_exit(self) -> float:
        """Mean accuracy of the exits over all corruptions and strengths."""
        return fmean(each.exits_top1 for own in self.corruptions.values() for each in own)

    def table(self) -> str:
        """The figures as aligned plain text."""
        rows = [["accuracy %", *(f"strength {strength}" for strength in STRENGTHS), "mean"]]
        for name, own in self.corruptions.items():
            accuracies = [each.ensemble["top1"] for each in own]
            rows.append([name.replace("_", " "), *map(_percent, [*accuracies, fmean(accuracies)])])
        for title, name, cell in (
            ("mean accuracy %", "top1", _percent),
            ("mean NLL", "nll", "{:.4f}".format),
            ("mean ECE %", "ece", _percent),
        ):
            means = [self.mean(name, strength) for strength in STRENGTHS]
            rows.append([title, *map(cell, [*means, self.mean(name)])])
        clean = self.clean.ensemble
        return (
            f"{align_columns(rows)}\n{self.n} test images; as they are: "
            f"accuracy {_percent(clean['top1'])} %, NLL {clean['nll']:.4f}, ECE {_percent(clean['ece'])} %; "
            f"mean accuracy of the exits under "
            f"corruption {_percent(self.mean_exit())} %"
        )


def corruption_names() -> list[str]:
    """The 15 corruptions of Hendrycks & Dietterich (2019, arXiv 1903.12261).

    Raises:
        ValueError: the library is not installed.
    """
    names: list[str] = _library().get_corruption_names()
    return names


def library() -> str:
    """The name and version of the library that corrupts; ValueError where it is not installed."""
    _library()
    return f"{_LIBRARY} {version(_LIBRARY)}"


def corrupted(pixels: Tensor, name: str, strength: int, seed: int) -> Tensor:
    """Corrupt images, each with random numbers of its own, which depend on its place and nothing else.

    The strengths are ImageNet-C's, made for 224×224 pixels: on smaller images most of them weigh more, and
    figures are not those of CIFAR-C.

    Args:
        pixels: uint8 `(n, channels, height, width)` of 1 or 3 channels and 32 pixels or more a side. Grey
            images are corrupted as equal red, green and blue, and their mean is taken.
        name: one of `corruption_names`.
        strength: from 1 to 5.
        seed: the same gives the same.

    Returns:
        uint8, of the same shape.

    Raises:
        ValueError: the images are too small, or the library is not installed.
    """
    channels, *side = pixels.shape[1:]
    if min(side) < LEAST_SIDE:
        raise ValueError(
            f"corruptions: take images of {LEAST_SIDE}×{LEAST_SIDE} pixels or more; the run's are "
            f"{side[0]}×{side[1]}"
        )
    corrupt = _library().corrupt
    coloured = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    result = np.empty_like(coloured)
    place = corruption_names().index(name)
    with _global_generator_kept():
        for index, image in enumerate(coloured):
            own = int(np.random.SeedSequence((seed, place, strength, index)).generate_state(1)[0])
            np.random.seed(own)
            more = {"seed": own} if name in _SEEDED_APART else {}
            result[index] = corrupt(image, severity=strength, corruption_name=name, **more)
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
    try:
        import imagecorruptions
    except ImportError as error:
        raise ValueError(
            f"corruptions: need {_LIBRARY} (pip install 'netfission[corruptions]'): {error}"
        ) from error
    return imagecorruptions


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
