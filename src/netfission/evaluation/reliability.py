"""How reliable an ensemble's probabilities are on a test split, which nothing was chosen on."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import Tensor

from netfission.config import DEFAULT_RISK
from netfission.ensemble import Average, ensemble_log_probabilities
from netfission.evaluation.calibration import (
    VALIDATION,
    Calibration,
    count_images,
    describe_scaling,
    why_guess,
)
from netfission.evaluation.metrics import CALIBRATION_BINS, classification_metrics
from netfission.evaluation.p_values import detector_scores
from netfission.evaluation.promises import Promises
from netfission.evaluation.selective import RiskCoverage, describe_risk
from netfission.utils.checksums import parse_json
from netfission.utils.text import count_noun, percent
from netfission.utils.typed import typed

RISKS = (0.01, 0.02, 0.05, 0.1, 0.2)  # target shares of wrong answers
_WORST_CLASSES = 10
_CONFUSED_WITH = 3


@dataclass(frozen=True)
class ConfidenceBin:
    """The examples whose largest probability lies between two bounds.

    Attributes:
        count: number of examples.
        confidence: their mean largest probability; 0 if the bin is empty.
        accuracy: share of them that is classified correctly; 0 if the bin is empty.
    """

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class CalibrationCurve:
    """Accuracy against confidence, of probabilities at one temperature.

    Attributes:
        metrics: `classification_metrics` of the probabilities.
        bins: 15 of equal width over the largest probability, from 0 to 1; `ece` is computed from them.
    """

    metrics: dict[str, float]
    bins: list[ConfidenceBin]

    @classmethod
    def from_log_probabilities(cls, log_probabilities: Tensor, labels: Tensor) -> Self:
        """Measure log-probabilities `(n, classes)` against labels `(n,)`.

        Example:
            >>> log_probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).log()
            >>> curve = CalibrationCurve.from_log_probabilities(log_probabilities, torch.tensor([0, 0]))
            >>> [(bin.count, round(bin.confidence, 2), bin.accuracy) for bin in curve.bins if bin.count]
            [(1, 0.7, 0.0), (1, 0.9, 1.0)]
        """
        confidence = log_probabilities.amax(dim=1).exp()
        correct = log_probabilities.argmax(dim=1) == labels
        bounds = torch.linspace(0, 1, CALIBRATION_BINS + 1)
        index = torch.bucketize(confidence.float(), bounds, right=True).sub(1).clamp(max=CALIBRATION_BINS - 1)
        counts = index.bincount(minlength=CALIBRATION_BINS)
        sums = [
            index.bincount(weights=values.double(), minlength=CALIBRATION_BINS)
            for values in (confidence, correct)
        ]
        means = (total / counts.clamp(min=1) for total in sums)
        columns = zip(counts.tolist(), *(mean.tolist() for mean in means), strict=True)
        metrics = classification_metrics(log_probabilities, labels)
        return cls(metrics, [ConfidenceBin(*values) for values in columns])


@dataclass(frozen=True)
class Abstention:
    """What happens on test images if answers below a threshold from validation images are withheld.

    Attributes:
        risk: target share of wrong answers.
        threshold: lowest confidence that is answered, see `RiskCoverage.threshold`.
        coverage: share of the images that is answered.
        error: share of the answers that is wrong; 0 if nothing is answered.
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
        n: number of its images.
        accuracy: share of them that is recognised.
        confused_with: the classes most often predicted instead → how often; at most 3.
    """

    name: str
    n: int
    accuracy: float
    confused_with: dict[str, int]


@dataclass(frozen=True)
class ReliabilityReport:
    """Calibration, abstention and confusion of an ensemble on a test split: `reliability.json`.

    Attributes:
        n: number of images.
        temperature: by which the exits' logits are divided, from a validation split; None without one.
        validation_images: number of images in that split; 0 without one.
        raw: at temperature 1.
        scaled: at the temperature; None without a validation split.
        risk_coverage: at the temperature.
        abstentions: at thresholds from the validation split; empty without one.
        worst: the classes of the lowest accuracy, lowest first; at most 10.
        flawless: whether every validation image was classified correctly, so that the temperature is a guess.
        fitted_on: what temperature and thresholds are from, in words that follow the number of images: the
            validation images, or those of another data set.
        promises: prediction sets, abstention with a bound and false alarms; None if the calibration has no
            scores.
    """

    n: int
    temperature: float | None
    validation_images: int
    raw: CalibrationCurve
    scaled: CalibrationCurve | None
    risk_coverage: RiskCoverage
    abstentions: list[Abstention]
    worst: list[WorstClass]
    flawless: bool
    fitted_on: str = VALIDATION
    promises: Promises | None = None

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        calibration: Calibration | None,
        *,
        average: Average,
    ) -> Self:
        """Measure an ensemble.

        Args:
            logits: `(n, exits, classes)`, floating point, of images that `calibration` has not seen.
            labels: `(n,)`, int64.
            classes: their names.
            calibration: from a validation split.
            average: what the ensemble averages, by its method (`Method.average_of`).

        Example:
            >>> logits = torch.tensor([[[2.0, 0.0]], [[1.0, 0.0]]])
            >>> report = ReliabilityReport.from_logits(
            ...     logits, torch.tensor([0, 1]), ["cat", "dog"], calibration=None, average="logits"
            ... )
            >>> report.worst[0]
            WorstClass(name='dog', n=1, accuracy=0.0, confused_with={'cat': 1})
        """
        logits = logits.double()
        temperature = 1.0 if calibration is None else calibration.temperature
        log_probabilities = ensemble_log_probabilities(logits / temperature, average)
        raw_log_probabilities = ensemble_log_probabilities(logits, average)
        confidence, answers = log_probabilities.max(dim=1)
        confidence = confidence.exp()
        correct = answers == labels
        return cls(
            n=len(labels),
            temperature=None if calibration is None else calibration.temperature,
            validation_images=0 if calibration is None else calibration.n,
            raw=CalibrationCurve.from_log_probabilities(raw_log_probabilities, labels),
            scaled=None
            if calibration is None
            else CalibrationCurve.from_log_probabilities(log_probabilities, labels),
            risk_coverage=RiskCoverage.from_confidence(confidence, correct),
            abstentions=[] if calibration is None else _abstentions(confidence, correct, calibration),
            worst=_worst_classes(answers, labels, classes),
            flawless=calibration is not None and calibration.flawless,
            fitted_on=VALIDATION if calibration is None else calibration.fitted_on,
            promises=None
            if calibration is None or calibration.scores is None
            else Promises.from_log_probabilities(
                raw_log_probabilities,
                labels,
                classes,
                calibration.scores,
                risks=RISKS,
                uncertainty=detector_scores(logits, average=average),
            ),
        )

    @property
    def calibrated_elsewhere(self) -> bool:
        """Whether the calibration, and what it promises, is of images of another data set."""
        return self.fitted_on != VALIDATION

    @property
    def guess(self) -> str:
        """Why the temperature is a guess; empty if it is reliable, or if the run has no temperature."""
        known = self.temperature is not None
        return why_guess(self.validation_images, flawless=self.flawless) if known else ""

    def to_json(self) -> str:
        """Return the figures as JSON text, every digit kept."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, or a run's file, which also says of which `weights` they are.

        Raises:
            ValueError: the text is not JSON, or a value is missing, unknown or of another type.
        """
        return typed(cls, parse_json(text, ("weights",)))

    def summary(self) -> str:
        """Return calibration and abstention in two lines."""
        area = f"area under the risk–coverage curve {self.risk_coverage.area:.4f}"
        if self.temperature is None or self.scaled is None:
            return f"no temperature, as no images were held out for validation\n{area}"
        scaling = describe_scaling(
            self.temperature,
            count_images(self.validation_images, self.fitted_on),
            self.raw.metrics,
            self.scaled.metrics,
            self.n,
            guess=self.guess,
        )
        abstention = next(entry for entry in self.abstentions if entry.risk == DEFAULT_RISK)
        kept = describe_risk(DEFAULT_RISK, self.fitted_on)
        if abstention.threshold > 1:
            return f"{scaling}\n{area}; no threshold of confidence keeps {kept}, so no image is answered"
        number = round(abstention.coverage * self.n)
        are = "is" if number == 1 else "are"
        answered = (
            f"{number} of {count_noun(self.n, 'image')} {are} answered ({percent(abstention.coverage, 1)} %)"
        )
        wrong = f", {percent(abstention.error, 1)} % of these answers wrong" if number else ""
        return f"{scaling}\n{area}; at the threshold that keeps {kept}, {answered}{wrong}"


def _abstentions(confidence: Tensor, correct: Tensor, calibration: Calibration) -> list[Abstention]:
    abstentions = []
    for risk in RISKS:
        threshold = calibration.risk_coverage.threshold(risk)
        answered = confidence >= threshold
        count = int(answered.sum())
        wrong = int((answered & ~correct).sum())
        abstentions.append(Abstention(risk, threshold, count / len(correct), wrong / max(count, 1)))
    return abstentions


def _worst_classes(answers: Tensor, labels: Tensor, classes: Sequence[str]) -> list[WorstClass]:
    k = len(classes)
    confusion = (labels * k + answers).bincount(minlength=k * k).view(k, k)
    counts, correct = confusion.sum(dim=1), confusion.diagonal()
    accuracy = (correct / counts.clamp(min=1)).tolist()
    present = [index for index in range(k) if counts[index]]  # the split need not hold all classes
    missed = confusion.clone().fill_diagonal_(0)
    worst = []
    for index in sorted(present, key=lambda index: accuracy[index])[:_WORST_CLASSES]:
        times, other = missed[index].sort(descending=True, stable=True)
        pairs = zip(other[:_CONFUSED_WITH].tolist(), times[:_CONFUSED_WITH].tolist(), strict=True)
        confused_with = {classes[answer]: count for answer, count in pairs if count}
        worst.append(WorstClass(classes[index], int(counts[index]), accuracy[index], confused_with))
    return worst
