"""The magnitude criterion: large weights stay."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def magnitude(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Score every weight with its absolute value (Han et al. 2015, arXiv 1506.02626).

    Args:
        model: Not looked at.
        weights: Prunable parameters by name.
        batches: Not looked at; may be empty.
        generator: Not drawn from.

    Returns:
        `|w|` by name, shaped and typed like the weights, higher = keep.
    """
    return {name: weight.abs() for name, weight in weights.items()}
