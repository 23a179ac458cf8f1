"""The random criterion: every weight is as likely to stay as any other."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from netfission.utils.inputs import Inputs


def random(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Sequence[tuple[Inputs, Tensor]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Score every weight with its own draw from the uniform distribution on [0, 1).

    Args:
        model: not used.
        weights: prunable parameters by name; only their shapes and devices count.
        batches: not used; may be empty.
        generator: source of all randomness. Draws are made on its own device, so a seed gives
            the same scores wherever the weights lie.

    Returns:
        Float32 scores by name, shaped like the weights, higher = keep.

    Example:
        >>> random(nn.Identity(), {"w": torch.zeros(3, 2)}, [], torch.Generator())["w"].shape
        torch.Size([3, 2])
    """
    return {
        name: torch.rand(weight.shape, generator=generator, device=generator.device).to(weight.device)
        for name, weight in weights.items()
    }
