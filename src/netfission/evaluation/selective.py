"""Selective classification: the error among confident answers, against the share of images answered."""

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from netfission.evaluation.risk_control import NO_THRESHOLD
from netfission.utils.errors import describe, invalid

_POINTS = 200


def describe_risk(risk: float, fitted_on: str) -> str:
    """Say to what a threshold for abstention keeps, as it follows "keeps".

    Args:
        risk: target share of wrong answers.
        fitted_on: the images that the threshold is from, in words.

    Example:
        >>> describe_risk(0.05, "validation images")
        'the share of wrong answers within 5 % on the validation images'
    """
    return f"the share of wrong answers within {100 * risk:g} % on the {fitted_on}"


@dataclass(frozen=True)
class RiskCoverage:
    """The risk–coverage curve: the error if only confident examples are answered (El-Yaniv & Wiener 2010).

    Attributes:
        thresholds: the lowest confidence that is answered at each point, falling.
        coverage: share of the examples with at least that confidence, rising to 1.
        risk: share of wrong answers among those.
        area: mean risk over all coverages (AURC; Geifman et al. 2019), of all examples, not of these points.
    """

    thresholds: list[float]
    coverage: list[float]
    risk: list[float]
    area: float

    @classmethod
    def from_confidence(cls, confidence: Tensor, correct: Tensor) -> "RiskCoverage":
        """Compute the curve, at 200 points or fewer.

        Args:
            confidence: `(n,)`, floating point.
            correct: `(n,)`, bool.

        Raises:
            ValueError: there are no examples, or the shapes differ.

        Example:
            >>> confidence, correct = torch.tensor([0.9, 0.7, 0.6]), torch.tensor([True, True, False])
            >>> curve = RiskCoverage.from_confidence(confidence, correct)
            >>> [round(risk, 2) for risk in curve.risk]
            [0.0, 0.0, 0.33]
        """
        if not len(confidence) or confidence.ndim != 1:
            raise invalid("confidence", "of shape (n,), with n ≥ 1", found=describe(confidence))
        if correct.shape != confidence.shape:
            raise invalid(
                "correct", f"of shape {tuple(confidence.shape)}, as confidence", found=describe(correct)
            )
        descending = confidence.double().argsort(descending=True, stable=True)
        levels, sizes = confidence.double()[descending].unique_consecutive(return_counts=True)
        block = torch.arange(len(sizes)).repeat_interleave(sizes)
        errors = torch.zeros(len(sizes), dtype=torch.float64)
        errors = errors.index_add(0, block, (~correct)[descending].double())
        answered = sizes.cumsum(0)
        risk = errors.cumsum(0) / answered
        # Examples of equal confidence have no order: each counts as the mean of them.
        one_by_one = (errors / sizes)[block].cumsum(0) / torch.arange(1, len(confidence) + 1)
        shown = torch.linspace(0, len(levels) - 1, min(_POINTS, len(levels))).round().long()
        return cls(
            levels[shown].tolist(),
            (answered[shown] / len(confidence)).tolist(),
            risk[shown].tolist(),
            one_by_one.mean().item(),
        )

    def threshold(self, risk: float) -> float:
        """Find the lowest confidence to answer for a target share of wrong answers.

        Args:
            risk: highest share of wrong answers, in [0, 1].

        Returns:
            The threshold of the largest coverage with at most that risk; 2, above every probability, if no
            point of the curve has so little risk.

        Raises:
            ValueError: `risk` is outside [0, 1].
        """
        if not isinstance(risk, Real) or not 0 <= risk <= 1:
            raise invalid("risk", "a share of wrong answers from 0 to 1", risk)
        good = [
            threshold for threshold, value in zip(self.thresholds, self.risk, strict=True) if value <= risk
        ]
        return good[-1] if good else NO_THRESHOLD
