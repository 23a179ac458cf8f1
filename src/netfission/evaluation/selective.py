"""Answering only where sure: the error among the answers, against the share of images answered."""

from dataclasses import dataclass

import torch
from torch import Tensor

_POINTS = 200


@dataclass(frozen=True)
class RiskCoverage:
    """Error among the surest examples, for ever more of them (El-Yaniv & Wiener 2010).

    Attributes:
        thresholds: the least confidence that is answered at each point, falling.
        coverage: share of the examples that are as sure as that, rising to 1.
        risk: share of those that are wrong.
        area: mean risk over all coverages (AURC; Geifman et al. 2019), of all examples, not of these points.
    """

    thresholds: list[float]
    coverage: list[float]
    risk: list[float]
    area: float

    @classmethod
    def from_confidence(cls, confidence: Tensor, correct: Tensor) -> "RiskCoverage":
        """Trace the curve, at 200 points at most.

        Args:
            confidence: `(n,)`, floating point, higher for surer.
            correct: `(n,)`, bool.

        Raises:
            ValueError: there are no examples, or the shapes differ.
        """
        if not len(confidence) or confidence.shape != correct.shape or confidence.ndim != 1:
            raise ValueError(
                f"confidence has shape {tuple(confidence.shape)} and correct {tuple(correct.shape)}; "
                "they take (n,) each, of one example or more"
            )
        surest_first = confidence.double().argsort(descending=True, stable=True)
        levels, sizes = confidence.double()[surest_first].unique_consecutive(return_counts=True)
        block = torch.arange(len(sizes)).repeat_interleave(sizes)
        errors = torch.zeros(len(sizes), dtype=torch.float64)
        errors = errors.index_add(0, block, (~correct)[surest_first].double())
        answered = sizes.cumsum(0)
        risk = errors.cumsum(0) / answered
        # Equally sure examples come in no order: each counts as the mean of them.
        one_by_one = (errors / sizes)[block].cumsum(0) / torch.arange(1, len(confidence) + 1)
        shown = torch.linspace(0, len(levels) - 1, min(_POINTS, len(levels))).round().long()
        return cls(
            levels[shown].tolist(),
            (answered[shown] / len(confidence)).tolist(),
            risk[shown].tolist(),
            one_by_one.mean().item(),
        )

    def threshold(self, risk: float) -> float:
        """The least confidence to answer so that the error among as many answers as can be is at most `risk`.

        Above every probability, so that nothing is answered, where no point of the curve is that good.

        Raises:
            ValueError: `risk` is outside [0, 1].
        """
        if not 0 <= risk <= 1:
            raise ValueError(f"risk={risk}: takes a share of wrong answers, from 0 to 1")
        good = [threshold for threshold, own in zip(self.thresholds, self.risk, strict=True) if own <= risk]
        return good[-1] if good else 2.0
