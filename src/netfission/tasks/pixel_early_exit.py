"""Early exit where each pixel has a class."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from netfission.data.mask_folders import VOID
from netfission.ensemble import mean_logits, predictive_entropy


class PixelEarlyExit:
    """Exits are averaged by their logits; confident is what has a low mean entropy over its pixels.

    The confidence, called certainty, is 1 less the mean over pixels of the entropy over that of equally
    probable classes: 1 if the class of every pixel is certain. The measure is the mean IoU over the classes
    that occur.

    Example:
        >>> rule = PixelEarlyExit()
        >>> output = torch.tensor([[[[9.0, 0.0]], [[0.0, 0.0]]]])  # 2 classes, the second pixel undecided
        >>> rule.confidence(output)
        tensor([0.4991])
        >>> sums = rule.counts(output, torch.tensor([[[0, 1]]])).sum(dim=0)  # class 0 at both
        >>> rule.score(sums).item()  # mean of 1/2 and 0
        0.25
    """

    name = "certainty"
    measure = "mIoU"

    def combined(self, outputs: Tensor, weights: Sequence[float] | None = None) -> Tensor:
        """Return the mean of logits."""
        return mean_logits(outputs, weights)

    def confidence(self, output: Tensor) -> Tensor:
        """Return 1 less the mean entropy, `(batch,)`."""
        entropy = predictive_entropy(output.unsqueeze(1)).mean(dim=(1, 2)) / math.log(output.shape[1])
        return (1 - entropy).clamp(min=torch.finfo(entropy.dtype).tiny)  # above 0 if nothing is known, too

    def counts(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return for each class the pixels in intersection, prediction and mask."""
        shares = torch.nn.functional.one_hot(targets.where(targets != VOID, 0), output.shape[1])
        return self._counts(output, shares.movedim(-1, 1).double(), targets)

    def expected_counts(self, output: Tensor, full: Tensor, targets: Tensor) -> Tensor:
        """Return the same, with masks that have the classes by the probabilities of the ensemble."""
        return self._counts(output, full.softmax(dim=1).double(), targets)

    def _counts(self, output: Tensor, shares: Tensor, targets: Tensor) -> Tensor:
        """Count by the share that each pixel has of each class, `(batch, classes, height, width)`."""
        labelled = (targets != VOID).flatten(1).unsqueeze(1).double()
        shares = shares.flatten(2) * labelled
        answers = output.argmax(dim=1).flatten(1).unsqueeze(1)
        intersection, predicted = (
            torch.zeros(shares.shape[:2], dtype=torch.float64, device=shares.device) for _ in range(2)
        )
        intersection.scatter_add_(1, answers.squeeze(1), shares.gather(1, answers).squeeze(1))
        predicted.scatter_add_(1, answers.squeeze(1), labelled.squeeze(1))
        return torch.cat([intersection, predicted, shares.sum(dim=2)], dim=1)

    def score(self, sums: Tensor) -> Tensor:
        """Return the mean IoU over the classes that occur."""
        intersection, predicted, labels = sums.unflatten(-1, (3, -1)).unbind(dim=-2)
        iou: Tensor = intersection / (predicted + labels - intersection)
        return iou.nanmean(dim=-1)
