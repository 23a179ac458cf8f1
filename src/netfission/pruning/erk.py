"""The Erdős–Rényi-kernel criterion: a layer's density follows from its shape alone."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from netfission.utils.inputs import Inputs


def erk(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Sequence[tuple[Inputs, Tensor]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Score weights so that one global top-k yields the densities of RigL's ERK.

    A layer l of N_l weights has the raw density `r_l = (sum of its dimensions) / (product of its
    dimensions)`. It keeps `round(ε r_l N_l)` weights, or all of them if ε r_l >= 1. One ε for all layers
    meets the budget (Evci et al. 2020, arXiv 1911.11134, section 3).

    Every weight draws a rank in its layer, `u = (rank + 0.5) / N_l`, and scores `r_l / u`. A top-k keeps it
    if u < ε r_l, where 1/ε is the lowest score kept. Ranks are a permutation, not independent draws, which
    makes the counts exact, but for rounding.

    Weights that are zero already rank last, so that pruning in several rounds ends at the same
    densities as pruning at once.

    Args:
        model: not used.
        weights: prunable parameters by name; only their shapes, zeros and devices count.
        batches: not used; may be empty.
        generator: source of all randomness, drawn from on its own device.

    Returns:
        Float64 scores by name, shaped like the weights, higher = keep.

    Example:
        >>> weights = {"small": torch.ones(2, 2), "large": torch.ones(20, 20)}
        >>> scores = erk(nn.Identity(), weights, [], torch.Generator().manual_seed(0))
        >>> {name: int((score > 4).sum()) for name, score in scores.items()}  # one threshold for both
        {'small': 1, 'large': 10}
    """
    return {name: _score(weight, generator) for name, weight in weights.items()}


def _score(weight: Tensor, generator: torch.Generator) -> Tensor:
    alive = weight.flatten().to(generator.device) != 0
    living, removed = int(alive.sum()), int((~alive).sum())
    ranks = torch.empty(weight.numel(), dtype=torch.float64, device=generator.device)
    ranks[alive] = _permutation(living, generator)
    ranks[~alive] = _permutation(removed, generator) + living
    score = sum(weight.shape) / (ranks + 0.5)  # r_l / u, with the layer's size cancelled
    return score.view(weight.shape).to(weight.device)


def _permutation(n: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(n, generator=generator, device=generator.device)
    return order.to(torch.float64)
