"""Gaussian predictions of numbers, as outputs of a network and as moments."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from netfission.utils.errors import describe, invalid

_LEAST, _MOST = -10.0, 2.0  # logarithm of a variance, of numbers with variance 1
_MARGIN = 1e-3  # by which a logarithm stays within the bounds if outputs are found for it


def moments(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each exit's Gaussian.

    The logarithm of the variance is bounded smoothly to about (-10, 2) (Chua et al. 2018, arXiv 1805.12114,
    appendix A.1): no step divides by a variance near 0. Between the bounds its gradient is near 1; beyond
    them it falls off exponentially.

    Args:
        outputs: `(batch, exits, 2 · targets)`, floating point: the means, then the logarithms.

    Returns:
        Two tensors `(batch, exits, targets)`, float32 or wider.

    Raises:
        ValueError: the outputs have another layout.

    Example:
        >>> mean, variance = moments(torch.tensor([[[0.5, -2.0]]]))
        >>> mean, variance.log()
        (tensor([[[0.5000]]]), tensor([[[-2.0178]]]))
    """
    if outputs.ndim != 3 or not outputs.is_floating_point() or outputs.shape[2] % 2:
        raise invalid("outputs", "floats of shape (batch, exits, 2 · targets)", found=describe(outputs))
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    mean, raw = outputs.chunk(2, dim=2)
    bounded = _MOST - nn.functional.softplus(_MOST - raw)
    bounded = _LEAST + nn.functional.softplus(bounded - _LEAST)
    return mean, bounded.exp()


def mixture(
    mean: Tensor, variance: Tensor, weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the moments of the mixture of the exits' Gaussians (Lakshminarayanan et al. 2017, section 2.4).

    Its mean is μ = mean_i μ_i, and its variance mean_i (σ_i² + μ_i²) − μ² (arXiv 1612.01474): the mean of the
    exits' variances, and the variance of their means, which is the part from disagreement.

    Args:
        mean: of the exits, `(batch, exits, targets)`.
        variance: of the exits, `(batch, exits, targets)`.
        weights: a weight per exit, of any sum; default equal ones.

    Returns:
        Mean, variance and the part of the variance from disagreement, each `(batch, targets)`.

    Example:
        >>> mixture(torch.tensor([[[0.0], [2.0]]]), torch.tensor([[[1.0], [3.0]]]))
        (tensor([[1.]]), tensor([[3.]]), tensor([[1.]]))
    """
    shares = mean.new_ones(mean.shape[1]) if weights is None else mean.new_tensor(weights)
    shares = (shares / shares.sum()).view(-1, 1)
    center = (shares * mean).sum(dim=1)
    between = (shares * (mean - center.unsqueeze(1)).square()).sum(dim=1)
    return center, (shares * variance).sum(dim=1) + between, between


def gaussian_divergence(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """Return KL(N(μ, σ²) || N(m, s²)) in nats: log(s / σ) + (σ² + (μ − m)²) / (2 s²) − 1/2.

    Args:
        mean: μ, in shapes that broadcast, as the following.
        variance: σ².
        other_mean: m.
        other_variance: s².

    Example:
        >>> gaussian_divergence(torch.ones(1), torch.ones(1), torch.zeros(1), torch.ones(1))
        tensor([0.5000])
    """
    squares = (variance + (mean - other_mean).square()) / other_variance
    return ((other_variance / variance).log() + squares - 1) / 2


def outputs_of(mean: Tensor, variance: Tensor) -> Tensor:
    """Return the outputs of an exit that has given moments: the inverse of `moments`.

    Args:
        mean: `(batch, targets)`, floating point.
        variance: `(batch, targets)`; beyond the bounds of `moments` it becomes the nearest within.

    Returns:
        `(batch, 2 · targets)`.

    Example:
        >>> mean, variance = torch.tensor([[0.5]]), torch.tensor([[0.25]])
        >>> [part.squeeze().item() for part in moments(outputs_of(mean, variance).unsqueeze(1))]
        [0.5, 0.25]
    """
    bounded = variance.log().clamp(_LEAST + _MARGIN, _MOST - _MARGIN)
    raw = _LEAST + _softplus_inverse(bounded - _LEAST)
    return torch.cat([mean, _MOST - _softplus_inverse(_MOST - raw)], dim=1)


def _softplus_inverse(values: Tensor) -> Tensor:
    return values + torch.log(-torch.expm1(-values))
