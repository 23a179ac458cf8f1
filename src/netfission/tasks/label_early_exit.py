"""Early exit where an image has any number of labels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from netfission.ensemble import mean_logits
from netfission.evaluation.label_metrics import UNDECIDED


class LabelEarlyExit:
    """Exits are averaged by their logits; confident is what has a low mean entropy over its labels.

    The confidence, called certainty, is 1 less the mean over labels of the entropy over log 2: 1 if every
    label is certain. The measure is the share of pairs of image and label that are right at a probability of
    1/2: unlike the mAP it is a mean over images.

    Example:
        >>> rule = LabelEarlyExit()
        >>> output = torch.tensor([[9.0, 0.0]])
        >>> rule.confidence(output)
        tensor([0.4991])
        >>> rule.score(rule.counts(output, torch.tensor([[1.0, 0.0]])).sum(dim=0)).item()
        1.0
    """

    name = "certainty"
    measure = "labels right"

    def combined(self, outputs: Tensor, weights: Sequence[float] | None = None) -> Tensor:
        """Return the mean of logits."""
        return mean_logits(outputs, weights)

    def confidence(self, output: Tensor) -> Tensor:
        """Return 1 less the mean entropy, `(batch,)`."""
        present = output.float().sigmoid()
        entropy = -(torch.xlogy(present, present) + torch.xlogy(1 - present, 1 - present)) / math.log(2)
        return (1 - entropy.mean(dim=1)).clamp(min=torch.finfo(entropy.dtype).tiny)

    def counts(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the number of labels that are right, and that of all."""
        return self._counts(output, (targets > UNDECIDED).double())

    def expected_counts(self, output: Tensor, full: Tensor, targets: Tensor) -> Tensor:
        """Return the same, with labels by the probabilities of the ensemble."""
        return self._counts(output, full.double().sigmoid())

    def _counts(self, output: Tensor, present: Tensor) -> Tensor:
        right = torch.where(output > 0, present, 1 - present)
        return torch.stack([right.sum(dim=1), torch.ones_like(right).sum(dim=1)], dim=1)

    def score(self, sums: Tensor) -> Tensor:
        """Return the share that is right."""
        return sums[..., 0] / sums[..., 1]
