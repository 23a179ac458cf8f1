"""Prune and regrow: during training the set of removed weights changes, their number does not.

An update removes a share of each layer's kept weights, those of smallest magnitude, and brings as many
removed weights back: those of largest gradient (RigL, Evci et al. 2020, arXiv 1911.11134) or random ones
(SET, Mocanu et al. 2018, arXiv 1707.04780).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from netfission.pruning.selection import select
from netfission.surgery.masks import masked_weights

GROWTHS = ("gradient", "random")  # how removed weights are chosen to come back


def exchanged(
    kept: Tensor, magnitude: Tensor, growth_scores: Tensor, share: float, generator: torch.Generator
) -> Tensor:
    """Return another mask that keeps exactly as many weights.

    Args:
        kept: bool, True where a weight is kept.
        magnitude: magnitudes of the weights, shaped like `kept`. Of the kept weights, the smallest are
            removed.
        growth_scores: shaped like `kept`. Of the removed weights, those with the largest scores come back. A
            weight removed now does not come back at once (in RigL it may, if its gradient is large enough).
        share: share of the kept weights to remove, in [0, 1], rounded down; at most as many weights as were
            removed before.
        generator: a CPU generator; it chooses among equal scores.

    Returns:
        A new bool tensor.

    Raises:
        ValueError: a score is NaN.

    Example:
        >>> kept = torch.tensor([True, True, False, False])
        >>> magnitude, growth_scores = torch.tensor([0.1, 0.9, 0, 0]), torch.tensor([0, 0, 0.2, 0.3])
        >>> exchanged(kept, magnitude, growth_scores, share=0.5, generator=torch.Generator())
        tensor([False,  True, False,  True])
    """
    before = int(kept.sum())
    number = min(int(share * before), kept.numel() - before)
    stay = select({"": magnitude.masked_fill(~kept, -torch.inf)}, before - number, generator)[""]
    back = select({"": growth_scores.masked_fill(kept, -torch.inf)}, number, generator)[""]
    return stay | back


@torch.no_grad()
def regrow(
    module: nn.Module,
    share: float,
    growth: str,
    generator: torch.Generator,
    gradients: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Exchange a share of the kept weights of each masked layer of `module`, in place.

    Removed weights become 0, and weights that come back start at 0 (RigL, section 3, step 4). Layers in
    which all weights are kept, or none, do not change.

    Args:
        module: a module with masks, see `netfission.surgery.masks.apply_masks`.
        share: share of each layer's kept weights, in [0, 1], see `exchanged`.
        growth: one of `GROWTHS`. With `"gradient"`, the removed weights that come back are those of the
            largest gradient; chance chooses in a layer without gradient, or among NaN.
        generator: a CPU generator, so that a seed gives the same masks on any device.
        gradients: name of a masked weight → its gradient, see `gradients_of`; default its `.grad`.

    Returns:
        Name of each masked weight → bool tensor, True where an element was removed or came back.
    """
    assert growth in GROWTHS
    changed = {}
    if gradients is None:
        gradients = gradients_of(module)
    for name, weight, removed in masked_weights(module):
        if growth == "gradient" and name in gradients:
            growth_scores = gradients[name].abs().nan_to_num(0.0)  # infinite if AMP tries too large a scale
        else:
            growth_scores = torch.rand(weight.shape, generator=generator).to(weight.device)
        magnitude = weight.abs().nan_to_num(torch.inf)  # the training reports a NaN
        kept = exchanged(~removed, magnitude, growth_scores, share, generator)
        changed[name] = kept == removed
        removed.copy_(~kept)
        weight.masked_fill_(changed[name], 0)
    return changed


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the gradients of the masked weights that have one, by name.

    Within `netfission.surgery.masks.dense_gradients`, they include those of removed weights.
    """
    return {
        name: weight.grad.clone() for name, weight, _ in masked_weights(module) if weight.grad is not None
    }


@torch.no_grad()
def reset_state(optimizer: torch.optim.Optimizer, module: nn.Module, changed: Mapping[str, Tensor]) -> None:
    """Set an optimiser's state of some weights, such as their momentum, to 0.

    RigL's code resets the state of the weights that come back. This function resets removed weights too, so
    that the state of every removed weight is 0.

    Args:
        optimizer: an optimiser with state per element; state of another shape is not changed.
        module: the module that holds the weights.
        changed: parameter name → bool tensor of its shape, True where to reset the state.
    """
    for name, mask in changed.items():
        for state in optimizer.state.get(module.get_parameter(name), {}).values():
            if isinstance(state, Tensor) and state.shape == mask.shape:
                state.masked_fill_(mask, 0)
