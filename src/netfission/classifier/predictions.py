"""Predictions of an ensemble for images: classes, confidence, uncertainty, and each exit's share in them."""

from dataclasses import dataclass, field

from torch import Tensor

from netfission.ensemble import (
    Average,
    as_logits,
    disagreement,
    ensemble_log_probabilities,
    ensemble_probabilities,
    mutual_information,
    predictive_entropy,
)
from netfission.evaluation.conformal import SetScore, prediction_sets
from netfission.evaluation.p_values import Detector


@dataclass(frozen=True)
class AnswerLimits:
    """What is asked of answers, and the numbers from the calibration that keep to it.

    Attributes:
        risk: highest share of wrong answers; None if the ensemble never abstains.
        delta: probability that risk or coverage does not hold; None if the risk is that on the images of the
            calibration, without a bound, and the coverage is a mean.
        threshold: confidence below which the ensemble abstains; with `delta` that at temperature 1.
        coverage: least share of the images whose prediction set contains the label; None without sets.
        score: by which classes enter a set.
        quantiles: for each class the highest score at which it is in a set; empty without sets.
        class_wise: whether the coverage is that of the images of each class; with `delta`, each class has it
            with that probability by itself.
        accept_false_alarms: share of the images of the calibration's distribution that may be marked as out
            of distribution; None if no image is marked.
        detector: gives the p-values; None without calibration images.

    Example:
        >>> import torch
        >>> limits = AnswerLimits(coverage=0.9, score="lac", quantiles=[1.0, 1.0])
        >>> limits.sets(torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log())
        tensor([[ True, False],
                [ True,  True]])
    """

    risk: float | None = None
    delta: float | None = None
    threshold: float | None = None
    coverage: float | None = None
    score: SetScore = "lac"
    quantiles: list[float] = field(default_factory=list)
    class_wise: bool = False
    accept_false_alarms: float | None = None
    detector: Detector | None = None

    def sets(self, log_probabilities: Tensor) -> Tensor | None:
        """Return which classes are in the prediction sets, `(n, classes)`, bool; None without a coverage.

        Args:
            log_probabilities: `(n, classes)`, of the ensemble at temperature 1.
        """
        if self.coverage is None:
            return None
        return prediction_sets(log_probabilities, self.score, self.quantiles)

    def answers(self, log_probabilities: Tensor) -> Tensor | None:
        """Return the classes that bound and sets are of, `(n,)`, int64; None without either.

        Args:
            log_probabilities: `(n, classes)`, of the ensemble at temperature 1.
        """
        promised = self.delta is not None or self.coverage is not None
        return log_probabilities.argmax(dim=1) if promised else None

    def withheld(self, log_probabilities: Tensor) -> Tensor | None:
        """Return which answers the bound withholds, `(n,)`, bool; None without a bound.

        Args:
            log_probabilities: `(n, classes)`, of the ensemble at temperature 1.
        """
        if self.delta is None or self.threshold is None:
            return None
        return ~(log_probabilities.amax(dim=1).exp() >= self.threshold)  # NaN is withheld, too

    def p_values(self, logits: Tensor, average: Average) -> Tensor | None:
        """Return the p-values of images, `(n,)`, float64; None without a detector.

        Args:
            logits: `(n, exits, classes)`, at temperature 1.
            average: what the ensemble averages.
        """
        return None if self.detector is None else self.detector.p_values(logits, average=average)

    def marks(self, logits: Tensor, average: Average) -> Tensor | None:
        """Return which images are marked as out of distribution, `(n,)`, bool; None without an accepted rate.

        Arguments are those of `p_values`.
        """
        if self.detector is None or self.accept_false_alarms is None:
            return None
        return self.detector.marks(logits, average=average)


@dataclass(frozen=True)
class Predictions:
    """Predictions for a batch of images, all derived from the exits' logits.

    Attributes:
        logits: `(n, exits, classes)`, float32 or wider, already divided by the temperature.
        threshold: the confidence below which the ensemble abstains, in [0, 1]; None if it never abstains, or
            if `withheld` says where it does.
        average: what the ensemble averages over the exits, by its method: logits or probabilities.
        sets: which classes are in the prediction set of each image, `(n, classes)`, bool; None without a
            coverage.
        withheld: whether each answer is withheld to keep to a bounded risk, `(n,)`, bool; None without one.
        answers: the classes, `(n,)`, int64, that a bound or the sets are of: those at temperature 1, which
            can differ if probabilities are averaged; None for the most probable ones at this temperature.
        p_values: how likely an image of the calibration's distribution has a score as high, `(n,)`, float64,
            see `netfission.evaluation.p_values`; None without calibration images.
        out_of_distribution: whether each image is marked as out of distribution, `(n,)`, bool; None without
            an accepted rate of false alarms.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [0.0, 2.0]]])
        >>> predictions = Predictions(logits, threshold=0.85, average="logits")
        >>> predictions.classes, predictions.votes.tolist()
        (tensor([0, 1]), [[0, 1], [1, 1]])
        >>> predictions.disagreement, predictions.abstains
        (tensor([1., 0.]), tensor([ True, False]))
    """

    logits: Tensor
    threshold: float | None = None
    average: Average = field(kw_only=True)
    sets: Tensor | None = None
    withheld: Tensor | None = None
    answers: Tensor | None = None
    p_values: Tensor | None = None
    out_of_distribution: Tensor | None = None

    def __post_init__(self) -> None:
        as_logits(self.logits)

    @classmethod
    def from_logits(
        cls, logits: Tensor, temperature: float, limits: AnswerLimits, *, average: Average
    ) -> "Predictions":
        """Derive predictions that keep to limits.

        Args:
            logits: `(n, exits, classes)`, float32, not divided by the temperature.
            temperature: divisor of the logits.
            limits: see `netfission.Classifier.limits`.
            average: what the ensemble averages over the exits.
        """
        raw = None  # nothing is of the probabilities at temperature 1
        if limits.delta is not None or limits.coverage is not None:
            raw = ensemble_log_probabilities(logits.double(), average)
        return cls(
            logits / temperature,
            limits.threshold if limits.delta is None else None,
            average=average,
            sets=None if raw is None else limits.sets(raw),
            withheld=None if raw is None else limits.withheld(raw),
            answers=None if raw is None else limits.answers(raw),
            p_values=limits.p_values(logits, average),
            out_of_distribution=limits.marks(logits, average),
        )

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def probabilities(self) -> Tensor:
        """The ensemble's probabilities, `(n, classes)`."""
        return ensemble_probabilities(self.logits, self.average)

    @property
    def exit_probabilities(self) -> Tensor:
        """Each exit's probabilities, `(n, exits, classes)`."""
        return self.logits.softmax(dim=2)

    @property
    def classes(self) -> Tensor:
        """The ensemble's most probable class, `(n,)`, int64; `answers` if they are given."""
        return self.probabilities.argmax(dim=1) if self.answers is None else self.answers

    @property
    def confidence(self) -> Tensor:
        """The probability of that class, `(n,)`."""
        return self.probabilities.gather(1, self.classes[:, None])[:, 0]

    @property
    def votes(self) -> Tensor:
        """Each exit's most probable class, `(n, exits)`, int64."""
        return self.logits.argmax(dim=2)

    @property
    def disagreement(self) -> Tensor:
        """Share of the pairs of exits with different votes, `(n,)`, in [0, 1]."""
        return disagreement(self.logits)

    @property
    def entropy(self) -> Tensor:
        """Entropy of `probabilities`, `(n,)`, in nats: the total uncertainty."""
        return predictive_entropy(self.logits, self.average)

    @property
    def mutual_information(self) -> Tensor:
        """Mutual information of class and exit, `(n,)`, in nats: uncertainty due to the exits.

        It is defined by the mean of the exits' probabilities, whatever `average` is.
        """
        return mutual_information(self.logits)

    @property
    def abstains(self) -> Tensor | None:
        """Whether the ensemble abstains, `(n,)`, bool; None if no risk was asked for."""
        if self.withheld is not None:
            return self.withheld
        return None if self.threshold is None else self.confidence < self.threshold
