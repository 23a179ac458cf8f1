"""Whether an image comes from the distribution of the calibration images: conformal p-values.

A score says how uncertain an ensemble is about an image, see
`netfission.evaluation.out_of_distribution.uncertainty_scores`. The p-value of an image is the share of
calibration images, itself counted among them, whose score is as high or higher. If it comes from their
distribution, its p-value is at most α with a probability of at most α, whatever the network and the score
(Vovk et al. 2005; Bates et al. 2023, arXiv 2104.08279). Nothing is known of other images: how often they are
detected depends on the score.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from netfission.ensemble import Average
from netfission.evaluation.conformal import images_for_coverage, score_quantile
from netfission.evaluation.out_of_distribution import uncertainty_score, uncertainty_scores
from netfission.utils.errors import check_share, invalid

DetectorScore = Literal["energy", "entropy", "maximum-probability", "mutual-information"]
# Not chosen on any images. Liu et al. 2020 (arXiv 2010.03759) find it better than the largest probability,
# and it is not rounded to equal values for images that the network is certain about.
DEFAULT_DETECTOR: DetectorScore = "energy"


def p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """Return the conformal p-value of each score: (1 + calibration scores as high or higher) / (n + 1).

    Args:
        scores: `(m,)`, floating point. One that is NaN counts as higher than all others.
        calibration: `(n,)`, floating point, in ascending order, of images that the network does not depend
            on.

    Returns:
        `(m,)`, float64, from 1 / (n + 1) to 1.

    Example:
        >>> import torch
        >>> p_values(torch.tensor([0.5, 2.5, 9.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor([1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    scores, calibration = scores.double().contiguous(), calibration.double().contiguous()
    if torch.compiler.is_compiling():  # as for a file: ONNX has no search
        higher = (calibration >= scores[:, None]).sum(dim=1)
    else:
        higher = len(calibration) - torch.searchsorted(calibration, scores)
    return (1 + higher).double() / (len(calibration) + 1)


def marked(scores: Tensor, alarm_above: float) -> Tensor:
    """Return which images a detector marks by their scores, `(m,)`, bool.

    Args:
        scores: `(m,)`, floating point. One that is NaN is marked, too.
        alarm_above: the highest score that is not marked.

    Example:
        >>> import torch
        >>> marked(torch.tensor([1.0, 2.0, float("nan")]), alarm_above=1.0)
        tensor([False,  True,  True])
    """
    return ~(scores <= alarm_above)


def detector_scores(logits: Tensor, *, average: Average) -> dict[str, Tensor]:
    """Return all scores that a detector can use, by name: those of `uncertainty_scores` at temperature 1.

    Args:
        logits: `(n, exits, classes)`, floating point, not divided by the temperature, which is fitted on the
            images of the calibration.
        average: what the ensemble averages.

    Example:
        >>> import torch
        >>> list(detector_scores(torch.zeros(1, 1, 2), average="logits"))
        ['maximum-probability', 'entropy', 'energy']
    """
    scores = uncertainty_scores(logits, 1.0, average=average)
    return {name.replace(" ", "-"): values for name, values in scores.items()}


def images_for_false_alarms(rate: float, delta: float | None = None) -> int:
    """Return the smallest number of calibration images that allows a rate of false alarms.

    Args:
        rate: share of the images of the distribution that may be marked, in (0, 1).
        delta: probability that more are marked, in (0, 1); None for the rate on average.

    Raises:
        ValueError: one of the two is outside (0, 1).

    Example:
        >>> images_for_false_alarms(0.05), images_for_false_alarms(0.05, delta=0.1)
        (19, 45)
    """
    return images_for_coverage(_unmarked(rate), delta)


def _unmarked(rate: float) -> float:
    """Return the share of the images of the distribution that must not be marked."""
    check_share("accept_false_alarms", rate, "a share of images")
    unmarked = float(1 - Fraction(str(float(rate))))
    if unmarked == 1:
        raise invalid("accept_false_alarms", "a share of images above 1e-16", rate)
    return unmarked


@dataclass(frozen=True, eq=False)
class Detector:
    """Tells images of the distribution of the calibration images from others, by one score.

    Attributes:
        score: name of the score.
        calibration: `(n,)`, float64, sorted: the scores of the calibration images.
        alarm_above: the highest score that is not marked; infinity if no image is marked.

    Example:
        >>> import torch
        >>> logits = torch.arange(99.0).reshape(99, 1, 1) * torch.tensor([1.0, -1.0])
        >>> scores = detector_scores(logits, average="logits")["energy"]
        >>> detector = Detector.from_scores("energy", scores, accept_false_alarms=0.05)
        >>> image = torch.tensor([[[0.0, 0.0]]])  # the network is less certain about none
        >>> detector.p_values(image, average="logits"), detector.marks(image, average="logits")
        (tensor([0.0200], dtype=torch.float64), tensor([True]))
    """

    score: DetectorScore
    calibration: Tensor
    alarm_above: float

    @classmethod
    def from_scores(
        cls,
        score: DetectorScore,
        scores: Tensor,
        *,
        accept_false_alarms: float | None = None,
        delta: float | None = None,
    ) -> "Detector":
        """Make the detector of a rate of false alarms.

        Args:
            score: name of the score.
            scores: `(n,)`, floating point, of calibration images.
            accept_false_alarms: share of the images of their distribution that may be marked, in (0, 1).
                Default: no image is marked.
            delta: probability, over the choice of the calibration images, that more are marked, in (0, 1).
                Default: the rate is the mean over their choice.

        Raises:
            ValueError: the rate or δ is outside (0, 1).
        """
        calibration = scores.double().sort().values
        if accept_false_alarms is None:
            return cls(score, calibration, float("inf"))
        quantile = score_quantile(calibration, _unmarked(accept_false_alarms), delta)
        return cls(score, calibration, quantile)

    def p_values(self, logits: Tensor, *, average: Average) -> Tensor:
        """Return the p-value of each image, `(m,)`, float64, see `p_values`.

        Args:
            logits: `(m, exits, classes)`, floating point, not divided by the temperature.
            average: what the ensemble averages.
        """
        return p_values(self.scores(logits, average=average), self.calibration)

    def marks(self, logits: Tensor, *, average: Average) -> Tensor:
        """Return which images are marked as out of distribution, `(m,)`, bool; arguments as of `p_values`."""
        return marked(self.scores(logits, average=average), self.alarm_above)

    def scores(self, logits: Tensor, *, average: Average) -> Tensor:
        """Return the score by which each image is ranked, `(m,)`, float64; arguments as of `p_values`."""
        return uncertainty_score(logits, self.score.replace("-", " "), 1.0, average=average)
