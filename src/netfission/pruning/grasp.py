"""The GraSP criterion: weights stay whose removal would weaken the gradient flow."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from netfission.pruning.derivatives import draw_seed, gradient, sum_over_batches
from netfission.utils.inputs import Inputs

TEMPERATURE = 200.0


def grasp(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Sequence[tuple[Inputs, Tensor]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Score every weight with the signed product `θ ⊙ Hg`; the largest stay.

    Removing a weight changes the gradient's squared norm by about `-2 θ ⊙ Hg`, so what scores
    high carries the gradient flow (Wang et al. 2020, arXiv 2002.07376, equation 8, whose sign is
    the opposite, and who remove the largest). g is the gradient and H the Hessian, by the prunable
    weights, of the cross-entropy of the logits / 200. It is summed over the images of all batches, in
    train mode. Both passes see the same dropout, so that H belongs to the same loss as g.

    Args:
        model: maps images to logits `(batch, classes)`. It is left unchanged, buffers and modes included.
        weights: prunable parameters by name, with which the model is run.
        batches: at least one pair of images `(batch, channels, height, width)`, float, and labels
            `(batch,)`, int64. Moved to the weights' device.
        generator: seeds dropout; the global generators end as they were.

    Returns:
        Signed scores by name, shaped and typed like the weights, higher = keep; 0 for a weight
        that the loss does not depend on.

    Raises:
        ValueError: `batches` holds a label outside the model's classes.
    """
    seed = draw_seed(generator)

    def hessian_product(loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
        slopes = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        flow = sum((torch.sum(a * b) for a, b in zip(slopes, g, strict=True)), loss.new_zeros(()))
        return torch.autograd.grad(flow, leaves, materialize_grads=True)

    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        g = sum_over_batches(gradient, model, weights, batches, seed, TEMPERATURE)
        products = sum_over_batches(hessian_product, model, weights, batches, seed, TEMPERATURE)
    return {name: weight * product for (name, weight), product in zip(weights.items(), products, strict=True)}
