"""Predictions of an ensemble for images: classes, confidence, uncertainty, and each exit's share in them."""

from dataclasses import dataclass, field

from torch import Tensor

from netfission.ensemble import (
    Average,
    as_logits,
    disagreement,
    ensemble_probabilities,
    mutual_information,
    predictive_entropy,
)


@dataclass(frozen=True)
class Predictions:
    """Predictions for a batch of images, all derived from the exits' logits.

    Attributes:
        logits: `(n, exits, classes)`, float32 or wider, already divided by the temperature.
        threshold: the confidence below which the ensemble abstains, in [0, 1]; None if it never abstains.
        average: what the ensemble averages over the exits, by its method: logits or probabilities.

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

    def __post_init__(self) -> None:
        as_logits(self.logits)

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
        """The ensemble's most probable class, `(n,)`, int64."""
        return self.probabilities.argmax(dim=1)

    @property
    def confidence(self) -> Tensor:
        """The probability of that class, `(n,)`."""
        return self.probabilities.amax(dim=1)

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
        """Whether the confidence is below the threshold, `(n,)`, bool; None without a threshold."""
        return None if self.threshold is None else self.confidence < self.threshold
