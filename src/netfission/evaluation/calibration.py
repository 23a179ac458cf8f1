"""Calibrate an ensemble's probabilities on a validation split."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

from torch import Tensor

from netfission.ensemble import Average, ensemble_log_probabilities, fit_temperature
from netfission.evaluation.guarantees import CalibrationScores
from netfission.evaluation.metrics import classification_metrics
from netfission.evaluation.p_values import detector_scores
from netfission.evaluation.selective import RiskCoverage
from netfission.utils.checksums import parse_json
from netfission.utils.errors import check_positive
from netfission.utils.text import count_noun, decimal, percent
from netfission.utils.typed import typed

VALIDATION = "validation images"  # held out of a run's own data set
# Of simulated predictions, the temperature that is fitted to 100 images varies by 10 to 13 % (standard
# deviation of its logarithm over 200 fits), to 20 images by 21 to 25 %: logits of 10 classes are drawn from
# normal distributions with standard deviations of 2, 3, 4 and 5, and labels from their softmax, so that 52 to
# 78 % are right.
FEW_IMAGES = 100


def count_images(number: int, kind: str) -> str:
    """Write a number of images with the words for them, in the singular if it is 1.

    Args:
        number: of the images.
        kind: the images in words, as `Calibration.fitted_on` has them.

    Example:
        >>> count_images(1, "validation images"), count_images(1200, "test images of pets")
        ('1 validation image', '1,200 test images of pets')
    """
    before, _, after = kind.partition("images")
    return f"{count_noun(number, f'{before}image')}{after}"


def why_guess(images: int, *, flawless: bool) -> str:
    """Say why a temperature is only a guess; empty if it is reliable.

    Args:
        images: number of images that it was fitted on.
        flawless: whether all of them were classified correctly.

    Example:
        >>> why_guess(5, flawless=False), why_guess(500, flawless=True), why_guess(500, flawless=False)
        ('too few for more than a guess', 'all classified correctly, so it is a guess', '')
    """
    if flawless:
        return "all classified correctly, so it is a guess"
    return "too few for more than a guess" if images < FEW_IMAGES else ""


def describe_scaling(
    temperature: float,
    fitted_on: str,
    raw: Mapping[str, float],
    scaled: Mapping[str, float],
    n: int,
    *,
    guess: str,
) -> str:
    """Say what a temperature is from, and how it changes likelihood and calibration.

    Args:
        temperature: by which logits are divided.
        fitted_on: the images that it is from, in words.
        raw: `classification_metrics` at temperature 1.
        scaled: the same at the temperature.
        n: number of images that the metrics are of.
        guess: why the temperature is a guess, see `why_guess`.

    Example:
        >>> raw, scaled = {"nll": 0.5, "ece": 0.09}, {"nll": 0.4, "ece": 0.03}
        >>> print(describe_scaling(1.5, "800 test images", raw, scaled, n=200, guess=""))
        temperature 1.500, from 800 test images; on these 200 images: NLL 0.5000 → 0.4000, ECE 9.00 → 3.00 %
    """
    from_images = f"{fitted_on}, {guess}" if guess else fitted_on
    these = "this image" if n == 1 else f"these {n} images"
    return (
        f"temperature {temperature:.3f}, from {from_images}; on {these}: "
        f"NLL {decimal(raw['nll'], 4)} → {decimal(scaled['nll'], 4)}, "
        f"ECE {percent(raw['ece'])} → {percent(scaled['ece'])} %"
    )


@dataclass(frozen=True)
class Calibration:
    """The temperature of an ensemble, and its error at each level of confidence.

    Attributes:
        n: number of images.
        temperature: by which all exits' logits are divided, see `fit_temperature`.
        raw: `classification_metrics` of the ensemble on these images, at temperature 1.
        scaled: the same at the temperature.
        risk_coverage: error against the share of images answered, at the temperature.
        fitted_on: the images in words, as they follow their number.
        average: what the ensemble averages.
        scores: what prediction sets, bounded abstention and p-values rest on; None if the network depends on
            these images, which would void the bounds, and in files of an earlier version.
        dependence: how the network depends on these images, in words; empty if it does not.
        weights: SHA-256 of the network's weights, as hexadecimal digits, see
            `netfission.classifier.folder.state_sha256`; empty if they are in no file yet, and in files of an
            earlier version.
        overlap: which of these images are test images of the run, in words; empty if none is.

    Raises:
        ValueError: the temperature is not a positive number.
    """

    n: int
    temperature: float
    raw: dict[str, float]
    scaled: dict[str, float]
    risk_coverage: RiskCoverage
    fitted_on: str = VALIDATION
    average: Average = "logits"
    scores: CalibrationScores | None = None
    dependence: str = ""
    weights: str = ""
    overlap: str = ""

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)

    @classmethod
    def fit(cls, logits: Tensor, labels: Tensor, *, average: Average, dependence: str = "") -> Self:
        """Fit the temperature and measure the ensemble.

        Args:
            logits: `(n, exits, classes)`, floating point, of a validation split.
            labels: `(n,)`, int64.
            average: what the ensemble averages, by its method (`Method.average_of`).
            dependence: how the network depends on these images, in words, as if the best epoch of a training
                was chosen on them; there are no scores then.

        Example:
            >>> import torch
            >>> generator = torch.Generator().manual_seed(0)
            >>> logits = torch.randn(500, 1, 3, generator=generator)
            >>> labels = logits[:, 0].softmax(dim=1).multinomial(1, generator=generator)[:, 0]
            >>> calibration = Calibration.fit(5 * logits, labels, average="logits")
            >>> round(calibration.temperature)  # the logits are too large by this factor
            5
        """
        logits = logits.double()
        temperature = fit_temperature(logits, labels, average)
        raw = ensemble_log_probabilities(logits, average)
        scaled = ensemble_log_probabilities(logits / temperature, average)
        return cls(
            n=len(labels),
            temperature=temperature,
            raw=classification_metrics(raw, labels),
            scaled=classification_metrics(scaled, labels),
            risk_coverage=RiskCoverage.from_confidence(
                scaled.amax(dim=1).exp(), scaled.argmax(dim=1) == labels
            ),
            average=average,
            scores=None
            if dependence
            else CalibrationScores.from_log_probabilities(
                raw, labels, detector_scores(logits, average=average)
            ),
            dependence=dependence,
        )

    @property
    def digest(self) -> str:
        """SHA-256 of all that answers depend on, as hexadecimal digits; exported files hold it."""
        text = json.dumps([self.temperature, asdict(self.risk_coverage), self.scores and asdict(self.scores)])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def flawless(self) -> bool:
        """Whether every image was classified correctly, so that the temperature is a guess."""
        return self.raw["top1"] == 1

    @property
    def guess(self) -> str:
        """Why the temperature is a guess, see `why_guess`."""
        return why_guess(self.n, flawless=self.flawless)

    @property
    def images(self) -> str:
        """The images that it was fitted on, and their number."""
        return count_images(self.n, self.fitted_on)

    def summary(self) -> str:
        """Return the temperature and its effect on these images in one line."""
        return describe_scaling(
            self.temperature, self.images, self.raw, self.scaled, self.n, guess=self.guess
        )

    def to_json(self) -> str:
        """Return the figures as JSON text, every digit kept."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is not JSON, or a value is missing, unknown or of another type.
        """
        return typed(cls, parse_json(text))
