"""What an ensemble answers for images: its class, how sure it is, and what its exits say."""

from dataclasses import dataclass

from torch import Tensor

from netfission.ensemble import (
    as_logits,
    disagreement,
    ensemble_probabilities,
    mutual_information,
    predictive_entropy,
)


@dataclass(frozen=True)
class Predictions:
    """Predictions for a batch of images; all else follows from these logits.

    Attributes:
        logits: `(n, exits, classes)`, float32 or wider, divided by the temperature already.
        threshold: the probability below which the ensemble abstains, in [0, 1]; None where none was chosen.
    """

    logits: Tensor
    threshold: float | None = None

    def __post_init__(self) -> None:
        as_logits(self.logits)

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def probabilities(self) -> Tensor:
        """Of the ensemble, `(n, classes)`."""
        return ensemble_probabilities(self.logits)

    @property
    def exit_probabilities(self) -> Tensor:
        """Probabilities of each exit, `(n, exits, classes)`."""
        return self.logits.softmax(dim=2)

    @property
    def classes(self) -> Tensor:
        """The most probable class, `(n,)`, int64."""
        return self.probabilities.argmax(dim=1)

    @property
    def confidence(self) -> Tensor:
        """The probability of that class, `(n,)`."""
        return self.probabilities.amax(dim=1)

    @property
    def votes(self) -> Tensor:
        """The class that each exit takes for the most probable, `(n, exits)`, int64."""
        return self.logits.argmax(dim=2)

    @property
    def disagreement(self) -> Tensor:
        """Share of the pairs of exits with different votes, `(n,)`, in [0, 1]."""
        return disagreement(self.logits)

    @property
    def entropy(self) -> Tensor:
        """Of the ensemble's probabilities, `(n,)`, in nats: its total doubt."""
        return predictive_entropy(self.logits)

    @property
    def mutual_information(self) -> Tensor:
        """Of class and exit, `(n,)`, in nats: the doubt that comes of the exits' differences."""
        return mutual_information(self.logits)

    @property
    def abstains(self) -> Tensor | None:
        """Where the ensemble is less sure than the threshold asks, `(n,)`, bool; None without one."""
        return None if self.threshold is None else self.confidence < self.threshold
