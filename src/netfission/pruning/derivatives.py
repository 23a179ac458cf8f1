"""Derivatives of a model's loss, for the criteria that need them; the model is left unchanged."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from netfission.utils.errors import invalid
from netfission.utils.inputs import Inputs, map_inputs
from netfission.utils.modes import in_mode
from netfission.utils.seeds import seeded


def sum_over_batches(
    derive: Callable[[Tensor, list[Tensor]], Sequence[Tensor]],
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Sequence[tuple[Inputs, Tensor]],
    seed: int,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Sum `derive(loss, leaves)` over the batches, in the order of `weights`.

    `loss` is the cross-entropy of the logits / temperature, summed over the batch, so that each image
    has the same weight in a large and in a small batch. The model runs in train mode with `leaves` (the
    weights, which require gradients) and with copies of its buffers; `seed` determines dropout.
    """
    assert batches, "prune() has checked"
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    device = next(iter(leaves.values())).device
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    tensors |= {name: value.clone() for name, value in model.named_buffers()}
    tensors |= leaves
    total: list[Tensor] = []
    with in_mode(model, training=True), seeded(seed, device), torch.enable_grad():
        for images, labels in batches:
            logits = functional_call(model, tensors, (_on(device, images),))
            _check_labels(labels, classes=logits.shape[1])
            loss = F.cross_entropy(logits / temperature, labels.to(device), reduction="sum")
            parts = derive(loss, list(leaves.values()))
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else list(parts)
    return total


def _on(device: torch.device, images: Inputs) -> Inputs:
    moved: Inputs = map_inputs(lambda tensor: tensor.to(device), images)
    return moved


def gradient(loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
    """Return the gradient of `loss` by each leaf; zeros if the loss does not depend on it."""
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


def draw_seed(generator: torch.Generator) -> int:
    """Draw a seed for one pass over the batches."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def _check_labels(labels: Tensor, classes: int) -> None:
    """Check that the logits have every class of the labels; on a GPU a wrong one would end the process."""
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        found = f"{int(outside[0])} ({len(outside)} of {labels.numel()} labels out of range)"
        raise invalid("labels of batches", f"class indices from 0 to {classes - 1}", found=found)
