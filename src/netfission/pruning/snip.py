"""The SNIP criterion: weights stay whose removal would move the loss most."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from netfission.pruning.derivatives import draw_seed, gradient, sum_over_batches
from netfission.utils.inputs import Inputs


def snip(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Sequence[tuple[Inputs, Tensor]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Score every weight with its connection sensitivity `|w · ∂L/∂w|`.

    It equals `|∂L/∂c|` for a mask c = 1 multiplied onto w (Lee et al. 2019, arXiv 1810.02340,
    equation 6; their normalisation by the sum changes no order and is left out). L is the
    cross-entropy, summed over the images of all batches, in train mode.

    Args:
        model: maps images to logits `(batch, classes)`. It is left unchanged, buffers and modes included.
        weights: prunable parameters by name, with which the model is run.
        batches: at least one pair of images `(batch, channels, height, width)`, float, and labels
            `(batch,)`, int64. Moved to the weights' device.
        generator: seeds dropout; the global generators end as they were.

    Returns:
        Scores by name, shaped and typed like the weights, higher = keep; 0 for a weight that the
        loss does not depend on.

    Raises:
        ValueError: `batches` holds a label outside the model's classes.
    """
    seed = draw_seed(generator)
    gradients = sum_over_batches(gradient, model, weights, batches, seed)
    return {
        name: (weight * gradient).abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
