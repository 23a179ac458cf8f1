"""How far a network's probabilities can be trusted on images that nothing was chosen on."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from netfission.evaluation.calibration import Calibration
from netfission.evaluation.metrics import CALIBRATION_BINS, classification_metrics
from netfission.evaluation.selective import RiskCoverage

RISKS = (0.01, 0.02, 0.05, 0.1, 0.2)
_WORST = 10
_TAKEN_FOR = 3


@dataclass(frozen=True)
class Bin:
    """The examples whose largest probability lies between two bounds.

    Attributes:
        count: how many they are.
        confidence: their mean largest probability; 0 where there are none.
        accuracy: share of them that is right; 0 where there are none.
    """

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """Probabilities at one temperature.

    Attributes:
        metrics: `classification_metrics` of them.
        bins: 15 of equal width over the largest probability, from 0 to 1: those that `ece` is made of.
    """

    metrics: dict[str, float]
    bins: list[Bin]

    @classmethod
    def from_log_probabilities(cls, log_probabilities: Tensor, labels: Tensor) -> Self:
        """Measure log-probabilities `(n, classes)` against labels `(n,)`."""
        confidence = log_probabilities.amax(dim=1).exp()
        correct = log_probabilities.argmax(dim=1) == labels
        bounds = torch.linspace(0, 1, CALIBRATION_BINS + 1)
        place = torch.bucketize(confidence.float(), bounds, right=True).sub(1).clamp(max=CALIBRATION_BINS - 1)
        counts = place.bincount(minlength=CALIBRATION_BINS)
        sums = [
            place.bincount(weights=values.double(), minlength=CALIBRATION_BINS)
            for values in (confidence, correct)
        ]
        means = (total / counts.clamp(min=1) for total in sums)
        bins = zip(counts.tolist(), *(mean.tolist() for mean in means), strict=True)
        return cls(classification_metrics(log_probabilities, labels), [Bin(*each) for each in bins])


@dataclass(frozen=True)
class Abstention:
    """What a threshold chosen on validation images came to on others.

    Attributes:
        risk: share of wrong answers that was to be borne.
        threshold: the least confidence to answer, see `RiskCoverage.threshold`.
        coverage: share of the images that was answered.
        error: share of those that was wrong; 0 where nothing was answered.
    """

    risk: float
    threshold: float
    coverage: float
    error: float


@dataclass(frozen=True)
class WorstClass:
    """A class that is often missed.

    Attributes:
        name: of the class.
        n: its images.
        accuracy: share of them that is recognised.
        taken_for: names of the classes it is most often taken for, with how often; at most 3.
    """

    name: str
    n: int
    accuracy: float
    taken_for: dict[str, int]


@dataclass(frozen=True)
class ReliabilityReport:
    """Calibration, abstention and confusion of an ensemble on a test split: `reliability.json`.

    Attributes:
        n: number of images.
        temperature: that the exits' mean logits are divided by, from a validation split; None without one.
        validation: images of that split; 0 without one.
        raw: at temperature 1.
        scaled: at the temperature; None without one.
        risk_coverage: at the temperature.
        abstentions: at thresholds from the validation split; empty without one.
        worst: the classes of the lowest accuracy, lowest first; at most 10.
        flawless: whether it was right on every validation image; how sure it may be is a guess then.
    """

    n: int
    temperature: float | None
    validation: int
    raw: Reliability
    scaled: Reliability | None
    risk_coverage: RiskCoverage
    abstentions: list[Abstention]
    worst: list[WorstClass]
    flawless: bool = False

    @classmethod
    def from_logits(
        cls, logits: Tensor, labels: Tensor, classes: Sequence[str], calibration: Calibration | None
    ) -> Self:
        """Measure an ensemble by its exits' mean logits.

        Args:
            logits: `(n, exits, classes)`, floating point, of images that `calibration` has not seen.
            labels: `(n,)`, int64.
            classes: their names.
            calibration: from a validation split.
        """
        mean = logits.double().mean(dim=1)
        log_probabilities = (mean / (1.0 if calibration is None else calibration.temperature)).log_softmax(1)
        confidence, answers = log_probabilities.max(dim=1)
        confidence = confidence.exp()
        correct = answers == labels
        return cls(
            n=len(labels),
            temperature=None if calibration is None else calibration.temperature,
            validation=0 if calibration is None else calibration.n,
            raw=Reliability.from_log_probabilities(mean.log_softmax(dim=1), labels),
            scaled=None
            if calibration is None
            else Reliability.from_log_probabilities(log_probabilities, labels),
            risk_coverage=RiskCoverage.from_confidence(confidence, correct),
            abstentions=[] if calibration is None else _abstentions(confidence, correct, calibration),
            worst=_worst(answers, labels, classes),
            flawless=calibration is not None and calibration.raw["top1"] == 1,
        )

    def to_json(self) -> str:
        """The figures as JSON text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; ValueError where it is not that."""
        try:
            content = json.loads(text)
            scaled = content["scaled"]
            own = {
                "raw": _reliability(content["raw"]),
                "scaled": None if scaled is None else _reliability(scaled),
                "risk_coverage": RiskCoverage(**content["risk_coverage"]),
                "abstentions": [Abstention(**each) for each in content["abstentions"]],
                "worst": [WorstClass(**each) for each in content["worst"]],
            }
            return cls(**content | own)
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"text is not what Trust.to_json writes: {error}") from None

    def summary(self) -> str:
        """Calibration and abstention in two lines."""
        area = f"area under the risk–coverage curve {self.risk_coverage.area:.4f}"
        if self.temperature is None or self.scaled is None:
            return f"no temperature, as no images were held out for validation\n{area}"
        raw, scaled = self.raw.metrics, self.scaled.metrics
        own = next(each for each in self.abstentions if each.risk == 0.05)
        guess = ", too few for one to be wrong, so a guess" if self.flawless else ""
        return (
            f"temperature {self.temperature:.3f}, from {self.validation} validation images{guess}: "
            f"NLL {raw['nll']:.4f} → {scaled['nll']:.4f}, ECE {100 * raw['ece']:.2f} → "
            f"{100 * scaled['ece']:.2f} %\n{area}; answering where at most 5 % of the validation images' "
            f"answers were wrong: {100 * own.coverage:.1f} % of the images, {100 * own.error:.1f} % wrong"
        )


def _abstentions(confidence: Tensor, correct: Tensor, calibration: Calibration) -> list[Abstention]:
    abstentions = []
    for risk in RISKS:
        threshold = calibration.risk_coverage.threshold(risk)
        answered = confidence >= threshold
        count = int(answered.sum())
        wrong = int((answered & ~correct).sum())
        abstentions.append(Abstention(risk, threshold, count / len(correct), wrong / max(count, 1)))
    return abstentions


def _worst(answers: Tensor, labels: Tensor, classes: Sequence[str]) -> list[WorstClass]:
    k = len(classes)
    confusion = (labels * k + answers).bincount(minlength=k * k).view(k, k)
    counts, right = confusion.sum(dim=1), confusion.diagonal()
    accuracy = (right / counts.clamp(min=1)).tolist()
    shown = [index for index in range(k) if counts[index]]  # the split need not hold all classes
    missed = confusion.clone().fill_diagonal_(0)
    worst = []
    for index in sorted(shown, key=lambda index: accuracy[index])[:_WORST]:
        number, other = missed[index].sort(descending=True, stable=True)
        pairs = zip(other[:_TAKEN_FOR].tolist(), number[:_TAKEN_FOR].tolist(), strict=True)
        taken_for = {classes[taken]: times for taken, times in pairs if times}
        worst.append(WorstClass(classes[index], int(counts[index]), accuracy[index], taken_for))
    return worst


def _reliability(content: dict[str, Any]) -> Reliability:
    return Reliability(content["metrics"], [Bin(**each) for each in content["bins"]])
