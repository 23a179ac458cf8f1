"""How sets, bounded abstention and detectors keep on a test split what the calibration images promise."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, get_args

from torch import Tensor

from netfission.evaluation.conformal import SetScore, images_for_coverage, prediction_sets
from netfission.evaluation.guarantees import CalibrationScores, images_for_threshold
from netfission.evaluation.p_values import DetectorScore, images_for_false_alarms, marked
from netfission.evaluation.risk_control import NO_THRESHOLD

COVERAGE = 0.9  # promised of the sets that are measured
FALSE_ALARMS = 0.05  # accepted of the detectors that are measured
DELTA = 0.1  # probability that a measured bound does not hold


@dataclass(frozen=True)
class ClassSets:
    """The prediction sets of the images of one class.

    Attributes:
        n: number of images.
        covered: share of them whose set contains the class.
        size: mean number of classes in a set.
    """

    n: int
    covered: float
    size: float


@dataclass(frozen=True)
class SetQuality:
    """The prediction sets of test images.

    Attributes:
        score: by which classes enter a set, see `netfission.evaluation.conformal.class_scores`.
        coverage: promised share of the images whose set contains the label, on average.
        covered: that share of the test images.
        size: mean number of classes in a set.
        empty: share of the sets that are empty.
        classes: name → the same for the images of the class; without classes that have no image.
    """

    score: SetScore
    coverage: float
    covered: float
    size: float
    empty: float
    classes: dict[str, ClassSets]

    @property
    def least_covered(self) -> str:
        """The name of the class whose images are covered least."""
        return min(self.classes, key=lambda name: self.classes[name].covered)


@dataclass(frozen=True)
class BoundedAbstention:
    """What happens on test images if answers below a threshold with a bound are withheld.

    Attributes:
        risk: highest share of wrong answers.
        delta: probability that more of the answers are wrong.
        needed: smallest number of calibration images that allows a threshold.
        threshold: lowest confidence that is answered, at temperature 1; 2 if no image is answered, None if
            there are too few calibration images.
        answered: share of the test images that is answered.
        error: share of the answers that is wrong; 0 if nothing is answered.
    """

    risk: float
    delta: float
    needed: int
    threshold: float | None
    answered: float
    error: float


@dataclass(frozen=True)
class FalseAlarms:
    """How many test images a detector of out-of-distribution images marks, all of them falsely.

    Attributes:
        detector: name of its score, see `netfission.evaluation.p_values.detector_scores`.
        accepted: promised share of the images that is marked, at most, on average.
        marked: that share of the test images.
    """

    detector: DetectorScore
    accepted: float
    marked: float


@dataclass(frozen=True)
class Promises:
    """What was promised, and what test images show of it.

    Attributes:
        sets: by each score; empty if there are too few calibration images.
        abstentions: one for each risk.
        false_alarms: of each detector; empty if there are too few calibration images, and in files of an
            earlier version.

    Example:
        >>> import torch
        >>> log_probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8]] * 50).log()
        >>> labels = torch.tensor([0, 1] * 50)
        >>> scores = CalibrationScores.from_log_probabilities(log_probabilities, labels)
        >>> promises = Promises.from_log_probabilities(
        ...     log_probabilities, labels, ["cat", "dog"], scores, risks=[0.05, 0.01]
        ... )
        >>> [(sets.score, sets.covered, sets.size) for sets in promises.sets][0]
        ('lac', 1.0, 1.0)
        >>> [(bound.needed, bound.threshold) for bound in promises.abstentions]
        [(56, 0.0), (287, None)]
    """

    sets: list[SetQuality]
    abstentions: list[BoundedAbstention]
    false_alarms: list[FalseAlarms] = field(default_factory=list)

    @classmethod
    def from_log_probabilities(
        cls,
        log_probabilities: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        scores: CalibrationScores,
        *,
        risks: Sequence[float],
        uncertainty: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """Measure test images.

        Args:
            log_probabilities: `(n, classes)`, of the ensemble at temperature 1.
            labels: `(n,)`, int64.
            classes: their names.
            scores: of the calibration images.
            risks: highest shares of wrong answers to have a bound, each in (0, 1).
            uncertainty: scores of detectors by name, each `(n,)`; default none.
        """
        return cls(
            list(_sets(log_probabilities, labels, classes, scores)),
            list(_abstentions(log_probabilities, labels, scores, risks)),
            list(_false_alarms(uncertainty or {}, scores)),
        )


def _sets(
    log_probabilities: Tensor, labels: Tensor, classes: Sequence[str], scores: CalibrationScores
) -> Iterator[SetQuality]:
    if len(scores.labels) < images_for_coverage(COVERAGE):
        return
    for score in get_args(SetScore):
        inside = prediction_sets(log_probabilities, score, scores.quantiles(COVERAGE, score, classes))
        covered, sizes = inside.gather(1, labels[:, None])[:, 0].double(), inside.sum(dim=1).double()
        by_class = {}
        for number, name in enumerate(classes):
            of_class = labels == number
            if of_class.any():
                by_class[name] = ClassSets(
                    int(of_class.sum()), covered[of_class].mean().item(), sizes[of_class].mean().item()
                )
        empty = (sizes == 0).double().mean().item()
        yield SetQuality(score, COVERAGE, covered.mean().item(), sizes.mean().item(), empty, by_class)


def _abstentions(
    log_probabilities: Tensor, labels: Tensor, scores: CalibrationScores, risks: Sequence[float]
) -> Iterator[BoundedAbstention]:
    confidence, answers = log_probabilities.double().max(dim=1)
    for risk in risks:
        needed = images_for_threshold(risk, DELTA)
        threshold = scores.threshold(risk, DELTA) if len(scores.labels) >= needed else None
        answered = confidence.exp() >= (NO_THRESHOLD if threshold is None else threshold)
        wrong = int((answered & (answers != labels)).sum())
        count = int(answered.sum())
        yield BoundedAbstention(risk, DELTA, needed, threshold, count / len(labels), wrong / max(count, 1))


def _false_alarms(uncertainty: Mapping[str, Tensor], scores: CalibrationScores) -> Iterator[FalseAlarms]:
    if len(scores.labels) < images_for_false_alarms(FALSE_ALARMS):
        return
    for score in get_args(DetectorScore):
        if score in uncertainty and score in scores.uncertainty:
            detector = scores.detector(score, accept_false_alarms=FALSE_ALARMS)
            share = marked(uncertainty[score], detector.alarm_above).double().mean().item()
            yield FalseAlarms(score, FALSE_ALARMS, share)
