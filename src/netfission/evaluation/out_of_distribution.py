"""How well an ensemble's doubt tells images unlike those it was trained on from those like them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from netfission.ensemble import ensemble_log_probabilities, mutual_information, predictive_entropy
from netfission.utils.text import align_columns


@dataclass(frozen=True)
class Detection:
    """How well one score tells two sets apart.

    Attributes:
        auroc: chance that an image from outside has a higher score than one from the test split, equal
            scores counting half; 0.5 for a score that tells nothing.
        aupr: average precision with images from outside as the positives; their share for such a score.
        fpr95: share of the images from outside that pass where 95 % of the test split do.
    """

    auroc: float
    aupr: float
    fpr95: float

    @classmethod
    def from_scores(cls, inside: Tensor, outside: Tensor) -> "Detection":
        """Compare scores `(n,)` and `(m,)`, floating point, higher for more unlike.

        Raises:
            ValueError: one of them is empty.
        """
        from torchmetrics.functional.classification import (  # here, since it brings matplotlib with it
            binary_auroc,
            binary_average_precision,
            binary_specificity_at_sensitivity,
        )

        if not len(inside) or not len(outside):
            raise ValueError(
                f"inside has {len(inside)} scores and outside {len(outside)}; they take one or more"
            )
        scores = torch.cat([inside, outside])
        is_outside = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
        # torchmetrics squashes what is outside [0, 1] by a sigmoid in float32, which makes scores equal.
        levels, rank = scores.unique(return_inverse=True)
        rank = rank.double() / max(len(levels) - 1, 1)
        passed, _ = binary_specificity_at_sensitivity(1 - rank, 1 - is_outside, min_sensitivity=0.95)
        return cls(
            auroc=binary_auroc(rank, is_outside).item(),
            aupr=binary_average_precision(rank, is_outside).item(),
            fpr95=1 - passed.item(),
        )


@dataclass(frozen=True)
class OutOfDistribution:
    """Detection of one set of images, an entry of `ood.json`.

    Attributes:
        data: name or folder of the images from outside.
        inside: images of the test split.
        outside: images from outside.
        temperature: of the scores but the energy.
        scores: how well each score tells them apart, see `uncertainty_scores`.
    """

    data: str
    inside: int
    outside: int
    temperature: float
    scores: dict[str, Detection]

    @classmethod
    def from_logits(
        cls, data: str, inside: Tensor, outside: Tensor, temperature: float
    ) -> "OutOfDistribution":
        """Compare logits `(n, exits, classes)` and `(m, exits, classes)`; see `uncertainty_scores`."""
        own, other = uncertainty_scores(inside, temperature), uncertainty_scores(outside, temperature)
        scores = {name: Detection.from_scores(own[name], other[name]) for name in own}
        return cls(data, len(inside), len(outside), temperature, scores)

    def table(self) -> str:
        """The figures as aligned plain text."""
        rows = [[self.data, "AUROC %", "AUPR %", "FPR95 %"]]
        for name, own in self.scores.items():
            rows.append([name, *(f"{100 * value:.2f}" for value in (own.auroc, own.aupr, own.fpr95))])
        base = 100 * self.outside / (self.inside + self.outside)
        return (
            f"{align_columns(rows)}\n{self.outside} images from outside, the positives of AUPR "
            f"({base:.1f} % by chance), and {self.inside} of the test split"
        )


def uncertainty_scores(logits: Tensor, temperature: float) -> dict[str, Tensor]:
    """Scores that are higher for images an ensemble is less sure of.

    Args:
        logits: `(n, exits, classes)`, floating point, not divided by the temperature.
        temperature: that they are divided by, for all scores but the energy.

    Returns:
        `(n,)` each, float64: `maximum probability`, the ensemble's, as its negative logarithm (Hendrycks &
        Gimpel 2017); `entropy` of its probabilities; `mutual information` of class and exit, where there are
        several exits; and `energy`, −log Σ exp of the exits' mean logits, which are what the ensemble's
        probabilities are the softmax of (Liu et al. 2020, arXiv 2010.03759, equation 3, at their T = 1).
    """
    logits = logits.double()
    scaled = logits / temperature
    scores: dict[str, Callable[[], Tensor]] = {
        "maximum probability": lambda: -ensemble_log_probabilities(scaled).amax(dim=1),
        "entropy": lambda: predictive_entropy(scaled),
        "mutual information": lambda: mutual_information(scaled),
        "energy": lambda: -logits.mean(dim=1).logsumexp(dim=1),
    }
    if logits.shape[1] == 1:
        del scores["mutual information"]
    return {name: score() for name, score in scores.items()}
