"""Prune and regrow: which weights are removed changes while the network trains, how many are never does.

An update takes the share of the kept weights of smallest magnitude out of each layer and brings as many
removed ones back: those of largest gradient (RigL, Evci et al. 2020, arXiv 1911.11134) or any (SET, Mocanu
et al. 2018, arXiv 1707.04780).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from netfission.pruning.selection import select
from netfission.surgery.masks import masked_weights

GROWTHS = ("gradient", "random")  # by what removed weights are chosen to be brought back


def exchanged(
    kept: Tensor, magnitude: Tensor, promise: Tensor, share: float, generator: torch.Generator
) -> Tensor:
    """Another mask with exactly as many weights kept.

    Args:
        kept: bool, True where a weight is kept.
        magnitude: of the weights, shaped like `kept`; read where they are kept. The smallest go.
        promise: scores of the removed weights, shaped like `kept`; the largest come back. What goes does
            not come back at once (in RigL it may, where its gradient is large enough).
        share: of the kept weights that go, in [0, 1], rounded down; fewer where fewer are removed.
        generator: on the CPU; chooses among equals.

    Returns:
        A new bool tensor.

    Raises:
        ValueError: a score is NaN.
    """
    before = int(kept.sum())
    number = min(int(share * before), kept.numel() - before)
    stay = select({"": magnitude.masked_fill(~kept, -torch.inf)}, before - number, generator)[""]
    back = select({"": promise.masked_fill(kept, -torch.inf)}, number, generator)[""]
    return stay | back


@torch.no_grad()
def regrow(module: nn.Module, share: float, growth: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Exchange a share of the kept weights of each masked layer of `module`, in place.

    Those that go are 0 at once; those that come back start at 0 (RigL, section 3, step 4). Layers in which
    no weight is removed, or none kept, stay as they are.

    Args:
        module: with masks, see `netfission.surgery.masks.apply_masks`.
        share: of each layer's kept weights, in [0, 1], see `exchanged`.
        growth: one of `GROWTHS`. With `"gradient"` the removed weights' gradients are read from `.grad`, see
            `netfission.surgery.masks.dense_gradients`; where it is None, or in part no number, chance
            chooses.
        generator: on the CPU; the source of all randomness, so that a seed gives the same masks on any
            device.

    Returns:
        Name of each masked weight → bool tensor, True where it went or came back.
    """
    assert growth in GROWTHS
    changed = {}
    for name, weight, removed in masked_weights(module):
        if growth == "gradient" and weight.grad is not None:
            promise = weight.grad.abs().nan_to_num(0.0)  # infinite under AMP, whose scale is tried out
        else:
            promise = torch.rand(weight.shape, generator=generator).to(weight.device)
        magnitude = weight.abs().nan_to_num(torch.inf)  # a NaN is for the training to report
        kept = exchanged(~removed, magnitude, promise, share, generator)
        changed[name] = kept == removed
        removed.copy_(~kept)
        weight.masked_fill_(changed[name], 0)
    return changed


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer, module: nn.Module, places: Mapping[str, Tensor]) -> None:
    """Set to 0 what an optimiser remembers of some weights, such as their momentum.

    RigL's code does so for the weights that come back. Here those that go are forgotten as well, so that
    the memory is 0 wherever weights are removed.

    Args:
        optimizer: any that remembers element by element; memories of another shape are left alone.
        module: whose weights they are.
        places: parameter name → bool tensor of its shape, True where to forget.
    """
    for name, where in places.items():
        for memory in optimizer.state.get(module.get_parameter(name), {}).values():
            if isinstance(memory, Tensor) and memory.shape == where.shape:
                memory.masked_fill_(where, 0)
