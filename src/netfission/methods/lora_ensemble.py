"""LoRA-Ensemble (Mühlematter et al. 2024, arXiv 2405.14438): members that differ by low-rank attention."""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig
from netfission.methods.base import BuildPlan, Method
from netfission.methods.checks import unsuitable_model
from netfission.methods.layers import check_members
from netfission.methods.member_layers import build_on_frozen
from netfission.surgery.heads import FewerHeads, divides, heads_of, runs_directly
from netfission.utils.errors import check_positive_integer

GAIN = 10.0  # of Xavier's uniform distribution, from which A is drawn (the authors' settings for CIFAR-100)


class LowRank(nn.Module):
    """The low-rank part of linear layers for each member: features x → B A x, which starts at 0.

    Args:
        inputs: number of features that the layers read.
        outputs: number of features that each layer gives.
        parts: number of layers that read the same features; each has its own A and B.
        members: number of members; a batch holds equally many rows of each, those of member 0 first.
        rank: of each product.
        like: a tensor of the type and device of the weights.
        generator: draws the matrices A; the matrices B are 0.

    Example:
        >>> change = LowRank(4, 2, 3, members=2, rank=1, like=torch.zeros(1), generator=torch.Generator())
        >>> change(torch.rand(2 * 5, 7, 4)).shape
        torch.Size([10, 7, 6])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        parts: int,
        members: int,
        rank: int,
        like: Tensor,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        bound = GAIN * sqrt(6 / (inputs + rank))
        drawn = torch.empty(members, parts, rank, inputs).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(drawn.to(like))
        self.b = nn.Parameter(torch.zeros(members, parts, outputs, rank).to(like))

    def forward(self, features: Tensor) -> Tensor:
        """Map features `(members * batch, ..., inputs)` to `(members * batch, ..., parts * outputs)`."""
        members, parts, rank, _ = self.a.shape
        rows = features.unflatten(0, (members, -1)).flatten(1, -2)  # (members, rows, inputs)
        low = (rows @ self.a.flatten(1, 2).mT).unflatten(-1, (parts, rank)).transpose(1, 2)
        changes = (low @ self.b.mT).transpose(1, 2)  # (members, rows, parts, outputs)
        joined: Tensor = changes.reshape(*features.shape[:-1], -1)
        return joined


class LowRankLinear(nn.Module):
    """A frozen linear layer with a low-rank change for each member: `layer(x) + B A x`.

    A layer that gives queries, keys and values at once counts as three, as its width shows.

    Args:
        layer: the layer.
        members: number of members.
        rank: of each change.
        generator: see `LowRank`.

    Example:
        >>> layer = LowRankLinear(nn.Linear(4, 12), members=2, rank=1, generator=torch.Generator())
        >>> layer(torch.rand(2 * 5, 7, 4)).shape, layer.change.b.shape
        (torch.Size([10, 7, 12]), torch.Size([2, 3, 4, 1]))
    """

    def __init__(self, layer: nn.Linear, members: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        inputs, outputs = layer.in_features, layer.out_features
        parts = outputs // inputs if outputs % inputs == 0 else 1
        self.change = LowRank(inputs, outputs // parts, parts, members, rank, layer.weight, generator)

    def forward(self, features: Tensor) -> Tensor:
        """Map features of `members * batch` rows to those of the same rows."""
        outputs: Tensor = self.layer(features) + self.change(features)
        return outputs


class LowRankAttention(FewerHeads):
    """A frozen `nn.MultiheadAttention` with low-rank changes of its four projections for each member."""

    @classmethod
    def convert(
        cls, attention: nn.MultiheadAttention, members: int, rank: int, generator: torch.Generator
    ) -> None:
        """Make an attention one of this class, in place."""
        cls.change(attention)
        width, weight = attention.embed_dim, attention.in_proj_weight
        attention.changes = nn.ModuleList(
            LowRank(width, width, 1, members, rank, weight, generator) for _ in range(3)
        )
        attention.out_proj = LowRankLinear(attention.out_proj, members, rank, generator)  # type: ignore[assignment]

    def project(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """See `FewerHeads.project`."""
        changes: Sequence[nn.Module] = self.changes  # type: ignore[assignment]
        return [
            projected + change(features)
            for projected, change, features in zip(super().project(inputs), changes, inputs, strict=True)
        ]


class LoraEnsembleMethod(Method):
    """`exits` members that share a frozen network, each with its own changes of attention and classifier.

    The queries, keys, values and outputs of each attention get a change of rank `rank` per member, and each
    member has a classifier of its own. All other weights stay as they are, so that the network should start
    from trained ones. As in the authors' settings for CIFAR-100, a matrix A is drawn from Xavier's uniform
    distribution with gain 10, and B starts at 0. At the start each member is thus the network itself.

    Attention is what `netfission.surgery.heads.heads_of` finds, with linear layers, and
    `nn.MultiheadAttention`.
    """

    settings = frozenset({"rank"})
    average_source = "the authors' code (github.com/prs-eth/LoRA-Ensemble, train_evaluate.py)"
    reduction = "mean"
    needs_weights = "all but attention and classifiers stays frozen"
    differences = (
        "one member per exit (authors: 16)",
        "the optimiser is the common one (authors: AdamW of rate 1e-4 without decay, gradients clipped at 1)",
    )

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network.

        Raises:
            ValueError: a rank below 1, fewer than 2 exits, or pruning.
        """
        check_positive_integer("rank", self.config.rank)
        check_members(fission, self.config.method)

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build the model of seed `exits * seed` with low-rank changes.

        The classifier of member k is that of the model of seed `exits * seed + k`. Batch norms of the
        network, if it has some, keep taking statistics.

        Raises:
            ValueError: a rank below 1, fewer than 2 exits, pruning, or a model without attention.
        """
        method, members, rank = self.config.method, plan.fission.exits, self.config.rank
        self.check(plan.fission)

        def find_layers(model: nn.Module) -> set[str]:
            projections = _projections(model)
            if not projections:
                expected = "a network with attention of linear layers"
                raise unsuitable_model(method, expected, f"{type(model).__name__} without it")
            return {name for name, module in model.named_modules() if module in projections}

        def change(module: nn.Module, generator: torch.Generator) -> nn.Module:
            if isinstance(module, nn.MultiheadAttention):
                LowRankAttention.convert(module, members, rank, generator)
                return module
            assert isinstance(module, nn.Linear)
            return LowRankLinear(module, members, rank, generator)

        return build_on_frozen(
            plan,
            method,
            find_layers,
            change,
            lambda module: module.b if isinstance(module, LowRank) else None,
        )


def _projections(model: nn.Module) -> set[nn.Module]:
    """Return the linear layers of all attention, and each `nn.MultiheadAttention` as a whole."""
    found: set[nn.Module] = set()
    for module in model.modules():
        heads = heads_of(module)
        if isinstance(module, nn.MultiheadAttention) and divides(module):
            found.add(module)
        elif heads is not None:
            parts = [part for name, part in module.named_children() if runs_directly(module, name)]
            layers = [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]
            found |= {layer for layer in layers if layer.in_features > heads}  # others mix heads
    return found
