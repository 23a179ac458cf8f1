"""The magnitude criterion: large weights stay."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from netfission.utils.inputs import Inputs


def magnitude(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Sequence[tuple[Inputs, Tensor]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Score every weight with its absolute value (Han et al. 2015, arXiv 1506.02626).

    Args:
        model: not used.
        weights: prunable parameters by name.
        batches: not used; may be empty.
        generator: not used.

    Returns:
        `|w|` by name, shaped and typed like the weights, higher = keep.

    Example:
        >>> magnitude(nn.Identity(), {"w": torch.tensor([-2.0, 1.0])}, [], torch.Generator())
        {'w': tensor([2., 1.])}
    """
    return {name: weight.abs() for name, weight in weights.items()}
