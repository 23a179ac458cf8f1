"""What is asked of answers, in the same words by every command and by the requests to a server."""

from dataclasses import dataclass

from netfission.classifier.classifier import Classifier
from netfission.classifier.predictions import AnswerLimits
from netfission.evaluation.conformal import SetScore
from netfission.evaluation.p_values import DetectorScore
from netfission.utils.errors import invalid


@dataclass(frozen=True)
class AnswerSettings:
    """The settings of `Classifier.limits`, of which any may be left out.

    Attributes:
        risk: accepted share of wrong answers; default `Classifier.default_risk`, unless `delta` bounds
            something else: the default risk may have no bound.
        delta: probability that risk, coverage or rate of false alarms does not hold.
        coverage: least share of the images whose prediction set contains the label.
        score: by which classes enter a set; default `lac`.
        class_wise: whether the coverage is to hold for each class.
        accept_false_alarms: share of images of the distribution that may be marked as out of distribution.
        detector: score that p-values are of; default `energy`.

    Raises:
        ValueError: there are settings of sets without a coverage.

    Example:
        >>> AnswerSettings(score="aps")
        Traceback (most recent call last):
        ValueError: score must be left out without a coverage, got 'aps'
    """

    risk: float | None = None
    delta: float | None = None
    coverage: float | None = None
    score: SetScore | None = None
    class_wise: bool = False
    accept_false_alarms: float | None = None
    detector: DetectorScore | None = None

    def __post_init__(self) -> None:
        for name in ("score", "class_wise"):
            if self.coverage is None and (value := getattr(self, name)):
                raise invalid(name, "left out without a coverage", value)

    def limits(self, classifier: Classifier) -> AnswerLimits:
        """Return what keeps a classifier's answers to these settings.

        Raises:
            ValueError: see `Classifier.limits`.
        """
        bounds_others = self.delta is not None and (self.coverage, self.accept_false_alarms) != (None, None)
        default_risk = None if bounds_others else classifier.default_risk
        return classifier.limits(
            risk=default_risk if self.risk is None else self.risk,
            delta=self.delta,
            coverage=self.coverage,
            score=self.score or "lac",
            class_wise=self.class_wise,
            accept_false_alarms=self.accept_false_alarms,
            detector=self.detector,
        )
