"""The SynFlow criterion: weights stay that carry much of the flow from input to output."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from netfission.utils.errors import invalid
from netfission.utils.inputs import Inputs
from netfission.utils.modes import in_mode


def synflow(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Sequence[tuple[Inputs, Tensor]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Score every weight with its synaptic flow `|θ · ∂R/∂θ|`, once.

    R is the sum of the outputs of the network with |every parameter and buffer|, run in eval mode
    on one image of ones (Tanaka et al. 2020, arXiv 2006.05467, equation 3 and algorithm 1).
    The algorithm prunes in 100 rounds, each with new scores; the rounds are the caller's.
    Computed in float64: the flow of a WRN-28-10 is beyond float32.

    Args:
        model: maps images to logits `(batch, classes)`. It is left unchanged, modes included.
        weights: prunable parameters by name, with which the model is run.
        batches: at least one pair (images, labels); only the shape of the first image is used.
        generator: not used.

    Returns:
        Float64 scores by name, shaped like the weights, higher = keep; 0 for a weight that no
        flow reaches.
    """
    assert batches, "prune() has checked"
    leaves = {name: _magnitude(weight).requires_grad_() for name, weight in weights.items()}
    tensors = {
        name: _magnitude(value)
        for name, value in (*model.named_parameters(), *model.named_buffers())
        if name not in leaves
    }
    device = next(iter(leaves.values())).device
    images = batches[0][0]
    if not isinstance(images, Tensor):
        raise invalid("batches", "of images, a tensor each, for synflow", found=type(images).__name__)
    ones = torch.ones((1, *images.shape[1:]), dtype=torch.float64, device=device)
    with in_mode(model, training=False), torch.enable_grad():
        flow = functional_call(model, tensors | leaves, (ones,)).sum()
        gradients = torch.autograd.grad(flow, list(leaves.values()), materialize_grads=True)
    return {
        name: (leaf.detach() * gradient).abs_()
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


def _magnitude(value: Tensor) -> Tensor:
    """Absolute value in float64; counters and indices stay as they are (in a copy)."""
    value = value.detach()
    return value.abs().to(torch.float64) if value.is_floating_point() else value.clone()
