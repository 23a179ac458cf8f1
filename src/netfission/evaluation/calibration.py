"""What a run's validation split says about how far its probabilities can be trusted."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Self

from torch import Tensor

from netfission.ensemble import fit_temperature
from netfission.evaluation.metrics import classification_metrics
from netfission.evaluation.selective import RiskCoverage
from netfission.utils.typed import typed


@dataclass(frozen=True)
class Calibration:
    """A temperature, and how often the ensemble is wrong at each level of confidence.

    Attributes:
        n: number of validation images.
        temperature: that all exits' logits are divided by, see `fit_temperature`.
        raw: `classification_metrics` of the ensemble on the validation split, at temperature 1.
        scaled: the same at the temperature.
        risk_coverage: at the temperature.
    """

    n: int
    temperature: float
    raw: dict[str, float]
    scaled: dict[str, float]
    risk_coverage: RiskCoverage

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: takes a number above 0")

    @classmethod
    def fit(cls, logits: Tensor, labels: Tensor) -> Self:
        """Fit it.

        Args:
            logits: `(n, exits, classes)`, floating point, of a validation split.
            labels: `(n,)`, int64.
        """
        mean = logits.double().mean(dim=1)
        temperature = fit_temperature(mean, labels)
        scaled = (mean / temperature).log_softmax(dim=1)
        return cls(
            n=len(labels),
            temperature=temperature,
            raw=classification_metrics(mean.log_softmax(dim=1), labels),
            scaled=classification_metrics(scaled, labels),
            risk_coverage=RiskCoverage.from_confidence(
                scaled.amax(dim=1).exp(), scaled.argmax(dim=1) == labels
            ),
        )

    def to_json(self) -> str:
        """The figures as JSON text."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; ValueError where it is not that."""
        return typed(cls, json.loads(text))
