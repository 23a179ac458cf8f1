"""Masksembles (Durasov et al. 2021, arXiv 2012.08334): members that differ by fixed masks on the channels."""

from math import ceil

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig
from netfission.methods.base import BuildPlan, Method
from netfission.methods.checks import unsuitable_model
from netfission.methods.layers import (
    BatchedMembers,
    channel_dim,
    check_members,
    check_network,
    expand_along,
    input_channels,
    make_generator,
    replace_layers,
    weight_layers,
)
from netfission.utils.errors import invalid

MIN_CHANNELS = 10  # the authors' code makes no masks for fewer
_TRIES = 100_000


def draw_masks(channels: int, members: int, scale: float, generator: torch.Generator) -> Tensor:
    """Draw masks of equal size that together cover all channels.

    Each member's mask has m ones at random positions among N; positions in no mask are dropped (the authors'
    code). With N = m·scale, `channels` positions are left on average if
    m = channels / (scale·(1 - (1 - 1/scale)^members)). This m is rounded down, N follows from it, and masks
    are drawn until exactly `channels` positions are left.

    Args:
        channels: number of channels, at least 1.
        members: number of masks, at least 1.
        scale: at least 1, which gives masks of ones only; the higher, the less the masks overlap.
        generator: a CPU generator.

    Returns:
        `(members, channels)`, float32, of zeros and ones.

    Raises:
        ValueError: no such masks were found.

    Example:
        >>> masks = draw_masks(16, members=3, scale=2.0, generator=torch.Generator().manual_seed(0))
        >>> masks.shape, masks.any(dim=0).all().item()
        (torch.Size([3, 16]), True)
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
    expected = f"one at which {members} masks of {channels} channels can be drawn"
    raise invalid("scale", expected, scale, hint="try a slightly different value")


def _places(channels: int, members: int, kept: int) -> int:
    """Find the number of places of which about `channels` are drawn, if each member draws `kept`."""
    low, high = channels, 100 * channels
    while low < high:
        middle = (low + high) // 2
        if middle * (1 - (1 - kept / middle) ** members) < channels - 0.5:
            low = middle + 1
        else:
            high = middle
    return low


class Masked(nn.Module):
    """A layer that reads only some channels, which differ between members.

    Args:
        layer: a convolution or linear layer.
        masks: `(members, channels)`, float, zeros and ones.

    Example:
        >>> layer = Masked(nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        >>> _ = nn.init.ones_(layer.layer.weight)
        >>> layer(torch.ones(4, 2)).flatten().tolist()  # rows of member 0, then of member 1
        [1.0, 1.0, 2.0, 2.0]
    """

    masks: Tensor

    def __init__(self, layer: nn.Module, masks: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.dim = channel_dim(layer)
        self.register_buffer("masks", masks)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layer; the rows of the batch are assigned evenly to the members, member 0 first."""
        rows = features.shape[0]  # not `len`, which an export would record as a constant
        member = torch.arange(rows, device=features.device) * len(self.masks) // rows
        masks = expand_along(self.masks[member], self.dim, features.ndim)
        outputs: Tensor = self.layer(features * masks.to(features.dtype))
        return outputs


class MasksemblesMethod(Method):
    """`exits` members that share all weights, and each leave out different channels.

    There is a mask before each convolution and linear layer except the first to run, which reads the images,
    as in torch_uncertainty's networks. Layers of fewer than 10 channels have none, since the authors' code
    makes no masks for so few. The remaining channels are not scaled up, as in that code.
    """

    settings = frozenset({"scale"})
    joint = False
    loses_weights = "each layer reads the channels of a mask, without those that it learned from"
    average_source = "Durasov et al. 2021, and torch-uncertainty's ClassificationRoutine"
    deviations = ("in training each image of a batch goes through one member, as in the authors' code",)
    differences = ("one member per exit (authors: 4, which keeps 53 % of the channels; 3 keep 56 to 57 %)",)

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network.

        Raises:
            ValueError: a scale outside [1, 6], fewer than 2 exits, or pruning.
        """
        if not 1 <= self.config.scale <= 6:
            raise invalid("scale", "a number from 1 (equal members) to 6", self.config.scale)
        check_members(fission, self.config.method)

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build the model of the plan's seed, with its weights, and add masks drawn from the same seed.

        Raises:
            ValueError: a scale outside [1, 6], fewer than 2 exits, pruning, or an unsuitable model.
        """
        method, members, scale = self.config.method, plan.fission.exits, self.config.scale
        self.check(plan.fission)
        model = plan.create(plan.fission.seed)
        _, *inner = weight_layers(model, plan, method).values()
        channels: dict[nn.Module, int] = {
            layer: input_channels(layer) for layer in inner if input_channels(layer) >= MIN_CHANNELS
        }
        if not channels:
            expected = f"a network with inner layers of {MIN_CHANNELS} channels or more"
            raise unsuitable_model(method, expected, "none")
        generator = make_generator(plan.fission.seed)

        def make(name: str, module: nn.Module) -> nn.Module | None:
            if module not in channels:
                return None
            return Masked(module, draw_masks(channels[module], members, scale, generator))

        return check_network(
            BatchedMembers(replace_layers(model, make), members, in_training=False), plan, method
        )
