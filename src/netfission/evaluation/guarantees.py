"""What prediction sets, bounded abstention and p-values rest on: the scores of calibration images."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, get_args

import torch
from torch import Tensor

from netfission.evaluation.conformal import SetScore, class_scores, images_for_coverage, score_quantile
from netfission.evaluation.p_values import Detector, DetectorScore, images_for_false_alarms
from netfission.evaluation.risk_control import answers_for_risk, passing_threshold, thresholds_to_test
from netfission.utils.errors import check_choice, invalid
from netfission.utils.text import count_noun

# Matches the warning that some classes are in every prediction set.
SPARSE_CLASSES = r"\d+ of [\d,]+ classes are in every prediction set"
_MOST_PLACED = 500  # images that place the thresholds; more would place them no better


@dataclass(frozen=True)
class CalibrationScores:
    """Scores of n images that the network was neither trained nor chosen on, in an order drawn at random.

    They are of the ensemble's probabilities at temperature 1: nothing in them was fitted to these images, so
    that every image counts for prediction sets. Abstention tests its thresholds on four fifths or more of
    them; the first images, which are not tested on, place the thresholds.

    Attributes:
        labels: numbers of the classes.
        scores: name of the score → that of the label, see `netfission.evaluation.conformal.class_scores`.
        confidence: the largest probability.
        correct: whether it is that of the label.
        uncertainty: name of a detector's score → that of the image, see
            `netfission.evaluation.p_values.detector_scores`; empty in files of an earlier version.

    Raises:
        ValueError: the lists differ in length, or a score is missing.

    Example:
        >>> log_probabilities = torch.tensor([[0.9, 0.1]] * 99).log()
        >>> scores = CalibrationScores.from_log_probabilities(log_probabilities, torch.zeros(99).long())
        >>> scores.threshold(risk=0.05, delta=0.1)  # no error, so every image is answered
        0.0
        >>> quantiles = scores.quantiles(0.9, "aps", classes=["cat", "dog"])
        >>> quantiles  # the label was always the most probable class
        [0.0, 0.0]
    """

    labels: list[int]
    scores: dict[str, list[float]]
    confidence: list[float]
    correct: list[bool]
    uncertainty: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns: list[Sequence[float]] = [self.confidence, self.correct, *self.scores.values()]
        columns += self.uncertainty.values()
        if {len(column) for column in columns} != {len(self.labels)} or set(self.scores) != set(
            get_args(SetScore)
        ):
            expected = f"{len(self.labels)} values for each of {', '.join(get_args(SetScore))}"
            raise invalid("scores", expected, found="others")

    @classmethod
    def from_log_probabilities(
        cls, log_probabilities: Tensor, labels: Tensor, uncertainty: Mapping[str, Tensor] | None = None
    ) -> Self:
        """Score images, in an order that is always the same for their number.

        Args:
            log_probabilities: `(n, classes)`, of the ensemble at temperature 1.
            labels: `(n,)`, int64.
            uncertainty: scores of a detector by name, each `(n,)`; default none.
        """
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        log_probabilities, labels = log_probabilities[order].double(), labels[order]
        confidence, answers = log_probabilities.max(dim=1)
        scores = {
            name: class_scores(log_probabilities, name).gather(1, labels[:, None])[:, 0].tolist()
            for name in get_args(SetScore)
        }
        return cls(
            labels.tolist(),
            scores,
            confidence.exp().tolist(),
            (answers == labels).tolist(),
            {name: values[order].tolist() for name, values in (uncertainty or {}).items()},
        )

    def quantiles(
        self,
        coverage: float,
        score: SetScore,
        classes: Sequence[str],
        *,
        delta: float | None = None,
        class_wise: bool = False,
    ) -> list[float]:
        """Return for each class the highest score at which it is in a prediction set.

        Args:
            coverage: least share of the images whose set contains the label, in (0, 1).
            score: see `netfission.evaluation.conformal.class_scores`.
            classes: names of the classes.
            delta: probability that it is less, see `netfission.evaluation.conformal.score_quantile`.
            class_wise: whether the coverage is to hold for the images of each class (Vovk 2012: Mondrian),
                not only for all images together; with `delta`, for each class by itself.

        Returns:
            One number for each class. With `class_wise`, that of a class with too few images is infinite, so
            that it is in every set, which keeps the promise.

        Warns:
            UserWarning: some classes have too few images.

        Raises:
            ValueError: the coverage or δ is not valid, or all classes have too few images.
        """
        needed = images_for_coverage(coverage, delta)
        column = torch.tensor(self.scores[check_choice("score", score, self.scores)], dtype=torch.float64)
        if not class_wise:
            if (n := len(column)) < needed:
                expected = f"at most {_largest_coverage(n, delta)} with {count_noun(n, 'calibration image')}"
                raise invalid("coverage", expected, coverage, hint=f"{needed:,} images are enough")
            return [score_quantile(column, coverage, delta)] * len(classes)
        labels = torch.tensor(self.labels)
        quantiles = [
            score_quantile(column[labels == number], coverage, delta) for number in range(len(classes))
        ]
        unbounded = [name for name, quantile in zip(classes, quantiles, strict=True) if math.isinf(quantile)]
        if len(unbounded) == len(classes):
            n = int(labels.bincount().max())
            most, images = _largest_coverage(n, delta), count_noun(n, "calibration image")
            expected = f"at most {most} class by class with {images} of the largest class"
            raise invalid("coverage", expected, coverage, hint=f"{needed:,} images of each class are enough")
        if unbounded:
            shown = ", ".join(unbounded[:4]) + (", …" if len(unbounded) > 4 else "")
            warnings.warn(
                f"{len(unbounded)} of {len(classes):,} classes are in every prediction set, as they "
                f"have fewer than {needed} calibration images each: {shown}",
                stacklevel=2,
            )
        return quantiles

    def threshold(self, risk: float, delta: float) -> float:
        """Return the lowest confidence to answer: the error of all answers is at most the risk.

        This holds with probability 1 − δ over the choice of the calibration images.

        Args:
            risk: highest share of wrong answers, in (0, 1).
            delta: probability δ that more of the answers are wrong, in (0, 1).

        Returns:
            The threshold; 2, above every probability, if too many answers are wrong at each.

        Raises:
            ValueError: the risk or δ is not valid, or there are too few images to allow any threshold.
        """
        needed = images_for_threshold(risk, delta)
        n = len(self.labels)
        placed = _placed(n)
        if n < needed:
            least = 1 - _rounded_down(math.pow(delta, 1 / (n - placed))) if n > placed else 1
            expected = f"at least {least:.9g} with {count_noun(n, 'calibration image')}"
            hint = f"{needed:,} images without an error are enough"
            raise invalid("risk", expected, risk, hint=hint)
        confidence, correct = torch.tensor(self.confidence, dtype=torch.float64), torch.tensor(self.correct)
        # Twice as many as the least, so that one error among the first does not end the sequence.
        first = 2 * answers_for_risk(risk, delta)
        thresholds = thresholds_to_test(confidence[:placed], len(confidence) - placed, first)
        return passing_threshold(confidence[placed:], correct[placed:], thresholds, risk, delta)

    def detector(
        self,
        score: DetectorScore,
        *,
        accept_false_alarms: float | None = None,
        delta: float | None = None,
    ) -> Detector:
        """Return the detector of images that are not of the distribution of these; it counts all of them.

        Args:
            score: name of its score.
            accept_false_alarms: see `netfission.evaluation.p_values.Detector.from_scores`.
            delta: see there.

        Raises:
            ValueError: an argument is not valid, or there are too few images for this rate.
        """
        scores = torch.tensor(
            self.uncertainty[check_choice("detector", score, self.uncertainty)], dtype=torch.float64
        )
        if accept_false_alarms is not None:
            needed, n = images_for_false_alarms(accept_false_alarms, delta), len(scores)
            if n < needed:
                least = 1 - _largest_coverage(n, delta)
                expected = f"at least {least:.9g} with {count_noun(n, 'calibration image')}"
                hint = f"{needed:,} images are enough"
                raise invalid("accept_false_alarms", expected, accept_false_alarms, hint=hint)
        return Detector.from_scores(score, scores, accept_false_alarms=accept_false_alarms, delta=delta)


def images_for_threshold(risk: float, delta: float) -> int:
    """Return the smallest number of calibration images that allows a threshold, if no answer is wrong.

    Args:
        risk: highest share of wrong answers, in (0, 1).
        delta: probability that more of the answers are wrong, in (0, 1).

    Raises:
        ValueError: one of the two is outside (0, 1).

    Example:
        >>> images_for_threshold(0.05, 0.1)
        56
    """
    tested = answers_for_risk(risk, delta)
    n = tested
    while n - _placed(n) < tested:
        n += 1
    return n


def _placed(n: int) -> int:
    """Return how many of n images place the thresholds, and are not tested on."""
    return min(max(n // 5, 1), _MOST_PLACED)


def _largest_coverage(n: int, delta: float | None) -> float:
    """Return about the largest coverage that n images allow, see `images_for_coverage`."""
    return _rounded_down(n / (n + 1) if delta is None else math.pow(delta, 1 / n))


def _rounded_down(share: float) -> float:
    """Round a share of (0, 1) down to as few decimals, two or more, as leave it large enough to be of use."""
    for decimals in range(2, 9):
        scale = 10.0**decimals
        rounded = math.floor(share * scale) / scale
        if rounded > 0 and 1 - rounded <= 2 * (1 - share):
            return rounded
    return share
