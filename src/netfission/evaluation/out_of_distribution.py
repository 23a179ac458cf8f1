"""How well an ensemble's uncertainty distinguishes out-of-distribution images from test images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from netfission.ensemble import (
    Average,
    ensemble_log_probabilities,
    mean_logits,
    mutual_information,
    predictive_entropy,
    weights_of,
)
from netfission.utils.errors import invalid
from netfission.utils.text import align_columns, percent


@dataclass(frozen=True)
class Detection:
    """How well one score distinguishes out-of-distribution images; they are the positives.

    Attributes:
        auroc: probability that an out-of-distribution image has a higher score than a test image, with equal
            scores counted half; 0.5 for a score without information.
        aupr: average precision; the share of out-of-distribution images for a score without information.
        fpr95: share of the out-of-distribution images below the threshold that 95 % of the test images are
            below.
    """

    auroc: float
    aupr: float
    fpr95: float

    @classmethod
    def from_scores(cls, in_distribution: Tensor, out_of_distribution: Tensor) -> "Detection":
        """Compare scores of two sets of images.

        Args:
            in_distribution: `(n,)`, floating point.
            out_of_distribution: `(m,)`, floating point; higher scores are detected as such.

        Raises:
            ValueError: one of them is empty.

        Example:
            >>> Detection.from_scores(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5]))
            Detection(auroc=1.0, aupr=1.0, fpr95=0.0)
        """
        from torchmetrics.functional.classification import (  # here, as it imports matplotlib
            binary_auroc,
            binary_average_precision,
            binary_specificity_at_sensitivity,
        )

        for name, values in (
            ("in_distribution", in_distribution),
            ("out_of_distribution", out_of_distribution),
        ):
            if not len(values):
                raise invalid(name, "at least one score", found="none")
        scores = torch.cat([in_distribution, out_of_distribution])
        positive = torch.cat([torch.zeros(len(in_distribution)), torch.ones(len(out_of_distribution))]).long()
        # torchmetrics squashes what is outside [0, 1] by a sigmoid in float32, which makes scores equal.
        levels, rank = scores.unique(return_inverse=True)
        rank = rank.double() / max(len(levels) - 1, 1)
        specificity, _ = binary_specificity_at_sensitivity(1 - rank, 1 - positive, min_sensitivity=0.95)
        return cls(
            auroc=binary_auroc(rank, positive).item(),
            aupr=binary_average_precision(rank, positive).item(),
            fpr95=1 - specificity.item(),
        )


@dataclass(frozen=True)
class OutOfDistribution:
    """Detection of one set of out-of-distribution images, an entry of `ood.json`.

    Attributes:
        data: name or folder of the out-of-distribution images.
        in_distribution: number of test images.
        out_of_distribution: number of out-of-distribution images.
        temperature: of all scores but the energy.
        scores: how well each score distinguishes the two, see `uncertainty_scores`, and after them each
            detector by features, see `netfission.evaluation.feature_detectors.fit_detector`.
        training_images: number of images that those detectors were fitted to; None without one.
        library: name and version of what they are from; None without one.
        weights: digest of the network, see `netfission.classifier.folder.state_sha256`; empty if not known.
    """

    data: str
    in_distribution: int
    out_of_distribution: int
    temperature: float
    scores: dict[str, Detection]
    training_images: int | None = None
    library: str | None = None
    weights: str = ""

    @classmethod
    def from_scores(
        cls,
        data: str,
        in_distribution: Mapping[str, Tensor],
        out_of_distribution: Mapping[str, Tensor],
        temperature: float,
    ) -> "OutOfDistribution":
        """Compare two sets of images by all scores of their uncertainty.

        Args:
            data: see `OutOfDistribution`.
            in_distribution: name → scores `(n,)`, such as of `uncertainty_scores`.
            out_of_distribution: the same names → scores `(m,)`.
            temperature: see `OutOfDistribution`.

        Raises:
            ValueError: there are no scores of one of them.
        """
        scores = {
            name: Detection.from_scores(test, out_of_distribution[name])
            for name, test in in_distribution.items()
        }
        test, other = next(iter(in_distribution.values())), next(iter(out_of_distribution.values()))
        return cls(data, len(test), len(other), temperature, scores)

    def with_detectors(
        self, scores: Mapping[str, tuple[Tensor, Tensor]], *, training_images: int, library: str
    ) -> Self:
        """Return this comparison with those of further detectors after it.

        Args:
            scores: name → scores of test images and of out-of-distribution images, in the order of
                `from_scores`.
            training_images: see `OutOfDistribution`, as `library`.

        Raises:
            ValueError: a score is not finite.
        """
        for name, of_both in scores.items():
            if wrong := sum(int((~values.isfinite()).sum()) for values in of_both):
                raise invalid(
                    "feature_detectors", "left out here", name, hint=f"{wrong} of its scores are not finite"
                )
        further = {name: Detection.from_scores(*of_both) for name, of_both in scores.items()}
        return replace(self, scores=self.scores | further, training_images=training_images, library=library)

    def table(self) -> str:
        """Return the figures as aligned plain text."""
        rows = [[self.data, "AUROC %", "AUPR %", "FPR95 %"]]
        for name, detection in self.scores.items():
            values = (detection.auroc, detection.aupr, detection.fpr95)
            rows.append([name, *(percent(value) for value in values)])
        base = 100 * self.out_of_distribution / (self.in_distribution + self.out_of_distribution)
        fitted = f"; {self.library} fitted to {self.training_images} training images" if self.library else ""
        return (
            f"{align_columns(rows)}\n{self.out_of_distribution} out-of-distribution images, the positives "
            f"of AUPR ({base:.1f} % by chance), and {self.in_distribution} test images{fitted}"
        )


def uncertainty_scores(logits: Tensor, temperature: float, *, average: Average) -> dict[str, Tensor]:
    """Score images by how uncertain an ensemble is about them.

    The scores are `maximum probability`, the ensemble's, as its negative logarithm (Hendrycks & Gimpel 2017);
    `entropy` of its probabilities; `mutual information` of class and exit, if there are several exits; and
    `energy`, −log Σ exp of the exits' mean logits (Liu et al. 2020, arXiv 2010.03759, equation 3, T = 1).

    Args:
        logits: `(n, exits, classes)`, floating point, not divided by the temperature.
        temperature: by which they are divided, for all scores but the energy.
        average: what the ensemble averages, for the first two scores. The energy is that of mean logits, by
            the weights if there are any.

    Returns:
        Name → scores `(n,)`, float64, higher for images that the ensemble is less certain about.

    Example:
        >>> scores = uncertainty_scores(torch.zeros(1, 3, 2), temperature=1.0, average="logits")
        >>> {name: round(score.item(), 4) for name, score in scores.items()}
        {'maximum probability': 0.6931, 'entropy': 0.6931, 'mutual information': 0.0, 'energy': -0.6931}
    """
    names = [name for name in _SCORES if name != "mutual information" or logits.shape[1] > 1]
    return {name: uncertainty_score(logits, name, temperature, average=average) for name in names}


def uncertainty_score(logits: Tensor, name: str, temperature: float, *, average: Average) -> Tensor:
    """Return one of the scores of `uncertainty_scores`, whose other arguments it has.

    Args:
        logits: `(n, exits, classes)`, floating point, not divided by the temperature.
        name: of the score.
        temperature: by which the logits are divided, for all scores but the energy.
        average: what the ensemble averages.

    Returns:
        `(n,)`, float64.

    Example:
        >>> uncertainty_score(torch.zeros(1, 3, 2), "energy", temperature=1.0, average="logits")
        tensor([-0.6931], dtype=torch.float64)
    """
    return _SCORES[name](logits.double(), temperature, average)


_SCORES: dict[str, Callable[[Tensor, float, Average], Tensor]] = {
    "maximum probability": lambda logits, temperature, average: (
        -ensemble_log_probabilities(logits / temperature, average).amax(dim=1)
    ),
    "entropy": lambda logits, temperature, average: predictive_entropy(logits / temperature, average),
    "mutual information": lambda logits, temperature, average: mutual_information(logits / temperature),
    "energy": lambda logits, temperature, average: -mean_logits(logits, weights_of(average)).logsumexp(dim=1),
}
