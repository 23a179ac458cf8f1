"""BatchEnsemble (Wen et al. 2020, arXiv 2002.06715): members that differ by rank-1 factors."""

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig
from netfission.methods.base import BuildPlan, Method
from netfission.methods.checks import unsuitable_model
from netfission.methods.layers import (
    BatchedMembers,
    Layer,
    channel_dim,
    check_members,
    check_network,
    expand_along,
    input_channels,
    make_generator,
    output_channels,
    replace_layers,
    weight_layers,
)

DEVIATION = 0.5  # standard deviation of the fast weights, around 1


class RankOne(nn.Module):
    """A layer with weight `W ∘ (s rᵀ)` for each member (section 3.1): `layer(x ∘ r) ∘ s + b`.

    Args:
        layer: a convolution or linear layer. The members share its weight; each member's bias starts at the
            layer's, if it has one.
        members: number of members; a batch holds equally many rows of each, those of member 0 first.
        generator: draws the fast weights r and s from the normal distribution of mean 1 and deviation 0.5,
            as the authors do for CIFAR (uncertainty-baselines, `random_sign_init=-0.5`) and as
            torch_uncertainty does.

    Example:
        >>> layer = RankOne(nn.Linear(4, 2), members=3, generator=torch.Generator())
        >>> layer(torch.rand(3 * 5, 4)).shape
        torch.Size([15, 2])
    """

    def __init__(self, layer: Layer, members: int, generator: torch.Generator) -> None:
        super().__init__()
        self.members = members
        self.dim = channel_dim(layer)
        like = layer.weight.detach()

        def fast(channels: int) -> nn.Parameter:
            drawn = torch.empty(members, channels).normal_(1, DEVIATION, generator=generator)
            return nn.Parameter(drawn.to(like))

        self.layer = layer
        self.r = fast(input_channels(layer))
        self.s = fast(output_channels(layer))
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().repeat(members, 1))
        layer.bias = None

    def forward(self, features: Tensor) -> Tensor:
        """Map features of `members * batch` rows to those of the same rows."""
        rows = features.unflatten(0, (self.members, -1))
        outputs = self.layer((rows * self._along(self.r, rows)).flatten(0, 1))
        rows = outputs.unflatten(0, (self.members, -1))
        rows = rows * self._along(self.s, rows)
        if self.bias is not None:
            rows = rows + self._along(self.bias, rows)
        joined: Tensor = rows.flatten(0, 1)
        return joined

    def _along(self, values: Tensor, rows: Tensor) -> Tensor:
        # rows: (members, batch, channels, height, width) or (members, batch, ..., features)
        return expand_along(values.to(rows.dtype), self.dim if self.dim < 0 else self.dim + 1, rows.ndim)


class BatchEnsembleMethod(Method):
    """`exits` members that share all weights and norms, and each have their own factors and biases.

    Each member learns each image of a batch, and batch norms take their statistics over the features of all
    members, as in the authors' code. The training is the common one, which differs from that code twice. Fast
    weights decay like all weights; there they do not. They learn at the same rate as all weights; there at
    half of it (`fast_weight_lr_multiplier=0.5`).
    """

    loses_weights = "random factors multiply the inputs and outputs of every layer"
    average_source = "Wen et al. 2020, and uncertainty-baselines' baselines/cifar/batchensemble.py"
    reduction = "mean"
    revision = 1  # the loss is the mean over members
    deviations = (
        "fast weights learn at the full rate and decay, where the paper's code halves it and does not",
    )
    differences = (
        "each step has batch_size images, which every member learns (authors: 128 images, 250 or 375 epochs)",
        "one member per exit (authors: 4)",
    )

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network.

        Raises:
            ValueError: fewer than 2 exits, or pruning.
        """
        check_members(fission, self.config.method)

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build the model of the plan's seed, with its weights, and add fast weights to each layer.

        Raises:
            ValueError: fewer than 2 exits, pruning, or a model with layers that cannot have fast weights.
        """
        method, members = self.config.method, plan.fission.exits
        self.check(plan.fission)
        model = plan.create(plan.fission.seed)
        weight_layers(model, plan, method)
        generator = make_generator(plan.fission.seed)

        def make(name: str, module: nn.Module) -> nn.Module | None:
            if isinstance(module, nn.MultiheadAttention):
                found = f"layer {name!r} (MultiheadAttention), which cannot have fast weights"
                raise unsuitable_model(method, "made of convolutions and linear layers", found)
            return RankOne(module, members, generator) if isinstance(module, nn.Conv2d | nn.Linear) else None

        return check_network(
            BatchedMembers(replace_layers(model, make), members, in_training=True), plan, method
        )
