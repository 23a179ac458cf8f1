"""Masksembles (Durasov et al. 2021, arXiv 2012.08334): members that differ by fixed masks on the channels."""

from math import ceil

import torch
from torch import Tensor, nn

from netfission.methods.base import BuildPlan, Method
from netfission.methods.layers import (
    BatchedMembers,
    channel_dim,
    check_network,
    check_plan,
    expand_along,
    input_channels,
    make_generator,
    replace_layers,
    weight_layers,
)

MIN_CHANNELS = 10  # channels that the authors' code makes masks for
_TRIES = 100_000


def draw_masks(channels: int, members: int, scale: float, generator: torch.Generator) -> Tensor:
    """Masks of equal size that together leave no channel out.

    Each member's mask has m ones at random among N places; the places that no mask has are dropped
    (the authors' code). N = m·scale would leave `channels` on average where m is `channels` over
    scale·(1 - (1 - 1/scale)^members); that m is taken, rounded down, and then the N that goes with it, and
    masks are drawn until they leave exactly `channels`.

    Args:
        channels: number of channels, 1 or more.
        members: number of masks, 1 or more.
        scale: from 1, with which all masks are all ones; the higher, the less they overlap.
        generator: a CPU generator.

    Returns:
        `(members, channels)`, float32, of zeros and ones.

    Raises:
        ValueError: no masks were found.
    """
    share = scale * (1 - (1 - 1 / scale) ** members)
    kept = min(channels, max(int(channels / share), ceil(channels / members)))
    places = _places(channels, members, kept)
    for _ in range(_TRIES):
        masks = torch.zeros(members, places)
        for mask in masks:
            mask[torch.randperm(places, generator=generator)[:kept]] = 1
        used = masks.any(dim=0)
        if int(used.sum()) == channels:
            return masks[:, used]
    raise ValueError(f"scale={scale}: no {members} masks of {channels} channels were found; takes another")


def _places(channels: int, members: int, kept: int) -> int:
    """Of how many places, `kept` drawn for each member, about `channels` are drawn at least once."""
    low, high = channels, 100 * channels
    while low < high:
        middle = (low + high) // 2
        if middle * (1 - (1 - kept / middle) ** members) < channels - 0.5:
            low = middle + 1
        else:
            high = middle
    return low


class Masked(nn.Module):
    """A layer that reads some channels only, each member its own.

    Args:
        layer: a convolution or linear layer.
        masks: `(members, channels)`, float, zeros and ones.
    """

    masks: Tensor

    def __init__(self, layer: nn.Module, masks: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.dim = channel_dim(layer)
        self.register_buffer("masks", masks)

    def forward(self, features: Tensor) -> Tensor:
        """Features of a batch, which is dealt out to the members as evenly as it goes, member 0 first."""
        rows = features.shape[0]  # not `len`, which an export would take for a number
        member = torch.arange(rows, device=features.device) * len(self.masks) // rows
        masks = expand_along(self.masks[member], self.dim, features.ndim)
        outputs: Tensor = self.layer(features * masks.to(features.dtype))
        return outputs


class MasksemblesMethod(Method):
    """`exits` members that share all weights, and each leave out channels of their own.

    Masks stand before every convolution and linear layer but the first to run, which reads the images, as
    in torch_uncertainty's networks. Layers of fewer than 10 channels go without: the authors' code makes no
    masks for so few. What is left is not scaled up, as in that code.
    """

    settings = frozenset({"scale"})
    deviations = ("in training each image of a batch goes through one member, not through all",)

    def build(self, plan: BuildPlan) -> nn.Module:
        """The model of the plan's seed, its weights kept, with masks drawn from the same seed.

        Raises:
            ValueError: a scale outside [1, 6], fewer than 2 exits, pruning, or a model that cannot carry
                masks.
        """
        method, members, scale = self.config.method, plan.fission.exits, self.config.scale
        if not 1 <= scale <= 6:
            raise ValueError(f"scale={scale}: takes a number from 1 (equal members) to 6")
        check_plan(plan, method)
        model = plan.create(plan.fission.seed)
        _, *inner = weight_layers(model, plan, method).values()
        channels: dict[nn.Module, int] = {
            layer: input_channels(layer) for layer in inner if input_channels(layer) >= MIN_CHANNELS
        }
        if not channels:
            raise ValueError(f"method={method}: takes a model with layers of {MIN_CHANNELS} channels or more")
        generator = make_generator(plan.fission.seed)

        def make(name: str, module: nn.Module) -> nn.Module | None:
            if module not in channels:
                return None
            return Masked(module, draw_masks(channels[module], members, scale, generator))

        return check_network(
            BatchedMembers(replace_layers(model, make), members, in_training=False), plan, method
        )
