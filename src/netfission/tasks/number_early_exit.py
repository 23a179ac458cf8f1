"""Early exit where an image has numbers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from netfission.tasks.gaussians import mixture, moments, outputs_of


class NumberEarlyExit:
    """Exits are averaged by the mixture of their Gaussians; confident is what has small deviations.

    The confidence, called precision, is 1 / (1 + s) by the mean s of the predicted standard deviations of
    the numbers, each over the standard deviation of its number among the training images. The measure is 1
    less the mean absolute error over that standard deviation: a point more is an error that is smaller by
    1 % of it.

    Args:
        shift: of the numbers, their mean among the training images, `(targets,)`.
        factor: their standard deviation there, `(targets,)`.

    Example:
        >>> rule = NumberEarlyExit(torch.tensor([0.3]), torch.tensor([0.1]))
        >>> output = torch.tensor([[0.0, 0.0]])  # the mean of training images, and their deviation
        >>> round(rule.confidence(output).item(), 2)
        0.52
        >>> counts = rule.counts(output, torch.tensor([[0.35]]))  # half a deviation off
        >>> round(rule.score(counts.sum(dim=0)).item(), 4)
        0.5
    """

    name = "precision"
    measure = "1 − MAE/σ"

    def __init__(self, shift: Tensor, factor: Tensor) -> None:
        self.shift = shift.double()
        self.factor = factor.double()

    def combined(self, outputs: Tensor, weights: Sequence[float] | None = None) -> Tensor:
        """Return the outputs of an exit with mean and variance of the mixture."""
        center, variance, _ = mixture(*moments(outputs), weights)
        return outputs_of(center, variance)

    def confidence(self, output: Tensor) -> Tensor:
        """Return 1 / (1 + mean relative standard deviation), `(batch,)`."""
        _, variance = moments(output.unsqueeze(1))
        return 1 / (1 + variance.sqrt().mean(dim=(1, 2)))

    def counts(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the relative errors, and the number of numbers."""
        mean, _ = self._moments(output)
        scaled = (targets.double() - self.shift.to(targets.device)) / self.factor.to(targets.device)
        return self._counts((mean - scaled).abs())

    def expected_counts(self, output: Tensor, full: Tensor, targets: Tensor) -> Tensor:
        """Return the same, with numbers by the Gaussian of the ensemble: means of a folded Gaussian."""
        (mean, _), (center, variance) = self._moments(output), self._moments(full)
        std, off = variance.sqrt(), (mean - center).abs()
        z = off / (math.sqrt(2) * std)
        return self._counts(std * math.sqrt(2 / math.pi) * (-z.square()).exp() + off * torch.erf(z))

    def _moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = moments(output.double().unsqueeze(1))
        return mean.squeeze(1), variance.squeeze(1)

    def _counts(self, errors: Tensor) -> Tensor:
        return torch.stack([errors.sum(dim=1), torch.ones_like(errors).sum(dim=1)], dim=1)

    def score(self, sums: Tensor) -> Tensor:
        """Return 1 less the mean relative error."""
        return 1 - sums[..., 0] / sums[..., 1]
