"""Measure Gaussian predictions of numbers."""

import math

import torch
from torch import Tensor

from netfission.evaluation.resampling import Resampled

NOMINAL = 0.9  # coverage of the intervals that are measured


def gaussian_nll(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of numbers in nats: (log 2πσ² + (y − μ)² / σ²) / 2.

    Arguments have shapes that broadcast.

    Example:
        >>> gaussian_nll(torch.zeros(1), torch.ones(1), torch.zeros(1))  # log(2π) / 2
        tensor([0.9189])
    """
    return 0.5 * ((2 * math.pi * variance).log() + (targets - mean).square() / variance)


def gaussian_crps(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    """Return the continuous ranked probability score of Gaussian predictions, in the units of the numbers.

    With z = (y − μ) / σ it is σ (z (2 Φ(z) − 1) + 2 φ(z) − 1 / √π) (Gneiting & Raftery 2007, section 4.2).
    It is |y − μ| of a prediction without uncertainty, σ = 0.

    Arguments have shapes that broadcast.

    Example:
        >>> gaussian_crps(torch.zeros(1), torch.ones(1), torch.zeros(1))  # (√2 − 1) / √π
        tensor([0.2337])
    """
    std, error = variance.sqrt(), targets - mean
    z = error / std
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    crps = std * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))
    return torch.where(std == 0, error.abs(), crps)


def regression_metrics(mean: Tensor, variance: Tensor, targets: Tensor) -> dict[str, float]:
    """Measure predicted Gaussians.

    - `nll`: mean negative log-likelihood in nats, see `gaussian_nll`.
    - `crps`: continuous ranked probability score, see `gaussian_crps`.
    - `rmse`, `mae`: root of the mean squared, and mean absolute, error of the mean.
    - `coverage`: share of the numbers in the central interval of the Gaussian with a probability of 90 %.

    All are means over the numbers, in their own units.

    Args:
        mean: `(n, targets)`, floating point.
        variance: `(n, targets)`.
        targets: `(n, targets)`.

    Example:
        >>> metrics = regression_metrics(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([[1.0], [-1.0]]))
        >>> {name: round(value, 3) for name, value in metrics.items()}
        {'nll': 1.419, 'crps': 0.602, 'rmse': 1.0, 'mae': 1.0, 'coverage': 1.0}
    """
    from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error

    mean, variance, targets = mean.double(), variance.double(), targets.double()
    count = targets.shape[1]
    squared = mean_squared_error(mean, targets, squared=False, num_outputs=count)
    half = math.sqrt(2) * torch.erfinv(torch.tensor(NOMINAL, dtype=torch.float64)) * variance.sqrt()
    return {
        "nll": gaussian_nll(mean, variance, targets).mean().item(),
        "crps": gaussian_crps(mean, variance, targets).mean().item(),
        "rmse": squared.mean().item(),
        "mae": mean_absolute_error(mean, targets, num_outputs=count).mean().item(),
        "coverage": ((targets - mean).abs() <= half).double().mean().item(),
    }


def resampled_regression_metrics(mean: Tensor, variance: Tensor, targets: Tensor) -> Resampled:
    """Return the errors of `regression_metrics` on sets of images that are drawn from these.

    The coverage is not among them: neither a higher nor a lower one is better.

    Args:
        mean: `(n, targets)`, floating point.
        variance: `(n, targets)`.
        targets: `(n, targets)`.

    Example:
        >>> targets = torch.tensor([[1.0], [-3.0]])
        >>> of_sets = resampled_regression_metrics(torch.zeros(2, 1), torch.ones(2, 1), targets)
        >>> of_sets(torch.tensor([[1.0, 1.0], [2.0, 0.0]]).double())["mae"]  # both images, the first twice
        tensor([2., 1.], dtype=torch.float64)
    """
    mean, variance, targets = mean.double(), variance.double(), targets.double()
    errors = targets - mean
    of_images = {
        "mae": errors.abs().mean(dim=1),
        "nll": gaussian_nll(mean, variance, targets).mean(dim=1),
        "crps": gaussian_crps(mean, variance, targets).mean(dim=1),
    }

    def measure(weights: Tensor) -> dict[str, Tensor]:
        totals = weights.sum(dim=1)
        squared = weights @ errors.square() / totals.unsqueeze(1)
        means = {name: weights @ values / totals for name, values in of_images.items()}
        return {**means, "rmse": squared.sqrt().mean(dim=1)}

    return measure
