"""What a cascade needs of a task whose images do not have one class each."""

from typing import Protocol

from torch import Tensor

from netfission.inference.cascade import StoppingRule


class EarlyExit(StoppingRule, Protocol):
    """How exits make one output, how confident it is, and how it is scored.

    Attributes:
        name: of the confidence.
        measure: what a cascade may lose points of, a share of 1 that is higher if better, in words.
    """

    measure: str

    def counts(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return counts that add up over images, float64 `(batch, counts)`.

        Args:
            output: of one exit, or of an ensemble as `combined` returns it, `(batch, outputs, …)`.
            targets: of the batch, on the same device.
        """

    def expected_counts(self, output: Tensor, full: Tensor, targets: Tensor) -> Tensor:
        """Return the counts that are expected if targets are drawn from what an ensemble predicts.

        Args:
            output: see `counts`.
            full: the output that stands for the ensemble of all exits.
            targets: only what is not scored at all is read from them.
        """

    def score(self, sums: Tensor) -> Tensor:
        """Return the measure by sums of counts, `(…, counts)` → `(…)`."""
