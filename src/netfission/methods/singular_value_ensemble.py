"""Singular Value Ensemble (Turkoglu et al. 2026, arXiv 2601.22068): members by singular values."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig
from netfission.methods.base import BuildPlan, Method
from netfission.methods.checks import unsuitable_model
from netfission.methods.layers import check_members
from netfission.methods.member_layers import build_on_frozen, find_classifiers, output_shapes
from netfission.surgery.heads import FewerHeads, divides

NOISE = 0.01  # standard deviation at the start, of singular values relative to theirs, and of biases


class SingularValueLinear(nn.Module):
    """A linear layer per member, of shared frozen singular vectors: `W_m = U diag(s_m) V^T`.

    In train mode the weights are computed once per batch; in eval mode, in which batches may be small, the
    factors are applied to each row in turn.

    Args:
        layer: the layer, whose weight is decomposed.
        members: number of members; a batch holds equally many rows of each, those of member 0 first.
        generator: draws the noise that the members' singular values and biases start with.

    Example:
        >>> layer = SingularValueLinear(nn.Linear(4, 12), members=2, generator=torch.Generator())
        >>> layer(torch.rand(2 * 5, 7, 4)).shape, layer.values.shape
        (torch.Size([10, 7, 12]), torch.Size([2, 4]))
    """

    def __init__(self, layer: nn.Linear, members: int, generator: torch.Generator) -> None:
        super().__init__()
        weight = layer.weight.detach()
        left, values, right = (
            part.to(weight) for part in torch.linalg.svd(weight.double(), full_matrices=False)
        )
        self.left = nn.Parameter(left, requires_grad=False)
        self.right = nn.Parameter(right, requires_grad=False)

        def noise(like: Tensor) -> Tensor:
            return NOISE * torch.randn(members, *like.shape, generator=generator).to(like)

        self.values = nn.Parameter((values * (1 + noise(values))).clamp(min=0))
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach() + noise(bias.detach()))

    def weight(self) -> Tensor:
        """Return the weight of each member, `(members, outputs, inputs)`."""
        weight: Tensor = (self.left * self.values.clamp(min=0).unsqueeze(1)) @ self.right
        return weight

    def forward(self, features: Tensor) -> Tensor:
        """Map features `(members * batch, ..., inputs)` to `(members * batch, ..., outputs)`."""
        rows = features.unflatten(0, (len(self.values), -1)).flatten(1, -2)  # (members, rows, inputs)
        if self.training:
            outputs = rows @ self.weight().mT
        else:
            outputs = ((rows @ self.right.mT) * self.values.clamp(min=0).unsqueeze(1)) @ self.left.mT
        if self.bias is not None:
            outputs = outputs + self.bias.unsqueeze(1)
        joined: Tensor = outputs.reshape(*features.shape[:-1], -1)
        return joined


class SingularValueAttention(FewerHeads):
    """An `nn.MultiheadAttention` whose four projections have singular values per member."""

    @classmethod
    def convert(cls, attention: nn.MultiheadAttention, members: int, generator: torch.Generator) -> None:
        """Make an attention one of this class, in place."""
        cls.change(attention)
        weights = attention.in_proj_weight.detach().chunk(3)
        bias = attention.in_proj_bias
        biases = [None] * 3 if bias is None else bias.detach().chunk(3)
        layers = [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        attention.projections = nn.ModuleList(
            SingularValueLinear(layer, members, generator) for layer in layers
        )
        attention.register_parameter("in_proj_weight", None)
        attention.register_parameter("in_proj_bias", None)
        attention.out_proj = SingularValueLinear(attention.out_proj, members, generator)  # type: ignore[assignment]

    def project(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """See `FewerHeads.project`."""
        projections: Sequence[nn.Module] = self.projections  # type: ignore[assignment]
        return [layer(features) for layer, features in zip(projections, inputs, strict=True)]


class SingularValueEnsembleMethod(Method):
    """`exits` members that share the singular vectors of a trained network's linear layers.

    The weight of each linear layer is decomposed, `W = U diag(s) V^T`, and each member learns singular values
    `s_m` and biases of its own, and a classifier. All else stays frozen, so that the network should start
    from trained weights. As in the authors' code, singular values start 1 % from those of the network.

    The layers are those that run once per image or token, of attention and of MLPs, and the projections of
    `nn.MultiheadAttention`.
    """

    average = "logits"
    average_source = "the authors' code (github.com/moturkoglu/Singular-Value-Ensemble, train.py)"
    reduction = "mean"
    needs_weights = "all but singular values, biases and classifiers stays frozen"
    differences = (
        "one member per exit (authors: 4)",
        "classifiers start as those of the model do (authors: normal of standard deviation 0.01)",
        "the optimiser is the common one (authors: AdamW of rate 1e-3, gradients clipped at 1)",
    )

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network.

        Raises:
            ValueError: fewer than 2 exits, or pruning.
        """
        check_members(fission, self.config.method)

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build the model of seed `exits * seed` with singular values per member.

        The classifier of member k is that of the model of seed `exits * seed + k`.

        Raises:
            ValueError: fewer than 2 exits, pruning, or a model without linear layers beside its classifier.
        """
        method, members = self.config.method, plan.fission.exits
        self.check(plan.fission)

        def find_layers(model: nn.Module) -> set[str]:
            classifiers = find_classifiers(model, plan, method)
            inner = _layers_per_image(model, plan.example, method) - classifiers
            if not inner:
                expected = "a network with linear layers beside its classifier"
                raise unsuitable_model(method, expected, f"{type(model).__name__} without them")
            return inner

        def change(module: nn.Module, generator: torch.Generator) -> nn.Module:
            if isinstance(module, nn.MultiheadAttention):
                SingularValueAttention.convert(module, members, generator)
                return module
            assert isinstance(module, nn.Linear)
            return SingularValueLinear(module, members, generator)

        def weights(module: nn.Module) -> Tensor | None:
            return module.values if isinstance(module, SingularValueLinear) else None

        return build_on_frozen(plan, method, find_layers, change, weights)


def _layers_per_image(model: nn.Module, images: Tensor, method: str) -> set[str]:
    """Return the names of linear layers that run on more rows if there are more images, and of attention.

    Others, such as those that compute a bias of positions (Swin v2), run once whatever the members.

    Raises:
        ValueError: a linear layer has the images in another dimension than the first.
    """
    few, many = (output_shapes(model, batch) for batch in (images, images.repeat(2, 1, 1, 1)))
    found = set()
    for name, shape in few.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention):
            per_image = divides(module)
        else:
            per_image = isinstance(module, nn.Linear) and many[name] != shape
            if per_image and many[name][0] != 2 * shape[0]:
                expected = "a network whose layers read batches with the images first"
                raise unsuitable_model(method, expected, f"one whose layer {name!r} reads them otherwise")
        if per_image:
            found.add(name)
    return found


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer of a weight `(outputs, inputs)` and a bias `(outputs,)`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)  # type: ignore[assignment]
    return layer
