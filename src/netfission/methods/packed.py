"""Packed-Ensembles (Laurent et al. 2023, arXiv 2210.09184): small networks side by side in grouped layers."""

import copy
from math import ceil, sqrt
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from netfission.config import FissionConfig
from netfission.methods.base import BuildPlan, Method
from netfission.methods.checks import check_unused, unsuitable_model
from netfission.methods.layers import (
    Layer,
    check_members,
    check_network,
    copy_with_weights,
    count_classes,
    input_channels,
    make_generator,
    output_channels,
    replace_layers,
    weight_layers,
)
from netfission.utils.errors import check_positive, check_positive_integer, invalid

MIN_GROUP_CHANNELS = 64  # gamma makes no smaller groups, as in torch_uncertainty's PackedConv2d


class PackedLinear(nn.Module):
    """Linear layers side by side: features `(..., groups * inputs)` → `(..., groups * outputs)`.

    Args:
        weight: `(groups, outputs, inputs)`.
        bias: `(groups * outputs,)`, or None.

    Example:
        >>> PackedLinear(torch.rand(3, 2, 4), None)(torch.rand(5, 3 * 4)).shape
        torch.Size([5, 6])
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, features: Tensor) -> Tensor:
        """Apply one layer per group of features."""
        groups = features.unflatten(-1, (len(self.weight), -1))
        outputs = torch.einsum("...gi,goi->...go", groups, self.weight).flatten(-2)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)


class Packed(nn.Module):
    """A network of members side by side: images → logits `(batch, members, classes)`.

    Args:
        network: images → `(batch, members * classes)`.
        members: number of members.

    Example:
        >>> network = Packed(nn.Sequential(nn.Flatten(), nn.Linear(16, 3 * 10)), members=3)
        >>> network(torch.rand(5, 1, 4, 4)).shape
        torch.Size([5, 3, 10])
    """

    def __init__(self, network: nn.Module, members: int) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self.members = members

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits `(batch, members, classes)`."""
        logits: Tensor = self.network(images)
        by_member: Tensor = logits.unflatten(1, (self.members, -1))
        return by_member


class _Packing:
    """Makes the layers of all members from those of the network.

    Args:
        members: number of members.
        alpha: width of all members together, relative to the network.
        gamma: groups of each member's convolutions.
        generator: draws the weights.
    """

    def __init__(self, members: int, alpha: float, gamma: int, generator: torch.Generator) -> None:
        self.members = members
        self.alpha = alpha
        self.gamma = gamma
        self.generator = generator
        self.rounded = False  # whether any width was rounded up

    def width(self, channels: int) -> int:
        """Return alpha · channels, rounded up to a multiple of members · groups."""
        unit = self.members * self.gamma
        exact = round(channels * self.alpha, 6)  # 3 · 1.1 is not above 3.3
        width = ceil(exact / unit) * unit
        self.rounded |= width != exact
        return width

    def layer(self, name: str, layer: Layer, first: bool, last: bool) -> nn.Module:
        """Make a layer of all members; the first reads the images once, the last gives all logits."""
        inputs, outputs = input_channels(layer), output_channels(layer)
        wide_in = inputs if first else self.width(inputs)
        wide_out = self.members * outputs if last else self.width(outputs)
        groups = 1 if first else self._groups(name, layer, wide_in, wide_out, last)
        bias = None if layer.bias is None else self._drawn(layer.bias, (wide_out,), 1.0)
        # The outputs keep the variance that they have in the network, whatever rule its weights follow.
        inputs_per_unit = layer.weight[0].numel() // layer.weight.shape[1] * (wide_in // groups)
        scale = sqrt(layer.weight[0].numel() / inputs_per_unit)
        if isinstance(layer, nn.Linear):
            shape = (groups, wide_out // groups, wide_in // groups)
            weight = self._drawn(layer.weight, shape, scale)
            return PackedLinear(weight, bias)
        weight = self._drawn(layer.weight, (wide_out, wide_in // groups, *layer.kernel_size), scale)
        return copy_with_weights(
            layer, weight, bias, in_channels=wide_in, out_channels=wide_out, groups=groups
        )

    def norm(self, norm: _BatchNorm) -> nn.Module:
        """Make a batch norm of all members, which repeats the values of the network's."""
        result = copy.deepcopy(norm)
        result.num_features = self.width(norm.num_features)
        channels = torch.arange(result.num_features) % norm.num_features
        for name, parameter in norm.named_parameters(recurse=False):
            setattr(result, name, nn.Parameter(parameter.detach()[channels]))
        for name, buffer in norm.named_buffers(recurse=False):
            if buffer.ndim:
                setattr(result, name, buffer[channels])
        return result

    def _groups(self, name: str, layer: Layer, inputs: int, outputs: int, last: bool) -> int:
        if isinstance(layer, nn.Linear):
            return self.members
        if layer.groups == layer.in_channels > 1:  # depthwise, so the members are separate anyway
            groups = inputs
        else:
            least = self.members * layer.groups
            parts = 1 if last else self.gamma
            while parts > 1 and (inputs % (least * parts) or inputs // (least * parts) < MIN_GROUP_CHANNELS):
                parts -= 1
            groups = least * parts
        if inputs % groups or outputs % groups:
            raise unsuitable_model(
                "packed",
                f"a network whose layers can have {groups} groups",
                f"layer {name!r} of {inputs} input and {outputs} output channels",
                hint="choose another alpha or number of exits",
            )
        return groups

    def _drawn(self, like: Tensor, shape: tuple[int, ...], scale: float) -> Tensor:
        """Draw normal numbers with the mean of `like`, and its deviation times `scale`."""
        values = like.detach()
        drawn = torch.empty(shape).normal_(generator=self.generator)
        return values.mean() + scale * values.std(correction=0) * drawn.to(values)


class PackedMethod(Method):
    """`exits` members, each a narrower network of the same layout, run as one network of grouped layers.

    All layers are alpha times as wide as the network's, and members share the channels evenly; a width that
    cannot be divided evenly is rounded up. gamma applies to all convolutions but the first, down to groups of
    64 channels, as in torch_uncertainty's layers. Its networks also leave gamma off the first convolution of
    each residual block. The loss is the mean over members, as there: each gets 1 / `exits` of the gradient
    that it would get alone.
    """

    settings = frozenset({"alpha", "gamma"})
    loses_weights = "its members start from new weights"
    average_source = "Laurent et al. 2023, and torch-uncertainty's ClassificationRoutine"
    reduction = "mean"
    revision = 1  # the loss is the mean over members
    differences = ("gamma is 1 unless set (authors: 2, which changes no layer of cifar-resnet18-w16)",)

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network.

        Raises:
            ValueError: a setting outside its range, fewer than 2 exits, or pruning.
        """
        check_positive("alpha", self.config.alpha)
        check_positive_integer("gamma", self.config.gamma)
        check_members(fission, self.config.method)

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build members with new normal weights, scaled like those of the model of the plan's seed.

        Raises:
            ValueError: a setting outside its range, fewer than 2 exits, or pruning. Or the model is
            pretrained,
                has other layers than convolutions, batch norms and linear layers, or mixes channels.
        """
        method, members = self.config.method, plan.fission.exits
        self.check(plan.fission)
        model = plan.create(plan.fission.seed)
        first, *_, last = weight_layers(model, plan, method)
        _check_not_pretrained(model, plan)
        classes = count_classes(model, plan)
        packing = _Packing(members, self.config.alpha, self.config.gamma, make_generator(plan.fission.seed))

        def make(name: str, module: nn.Module) -> nn.Module | None:
            if isinstance(module, nn.Conv2d | nn.Linear):
                return packing.layer(name, module, first=name == first, last=name == last)
            if isinstance(module, _BatchNorm):
                return packing.norm(module)
            if any(True for _ in module.parameters(recurse=False)):
                expected = "made of convolutions, batch norms and linear layers"
                raise unsuitable_model(method, expected, f"layer {name!r} ({type(module).__name__})")
            return None

        network = Packed(replace_layers(model, make), members)
        try:
            check_network(network, plan, method, classes)
        except ValueError as error:
            if not packing.rounded:
                raise
            expected = "a divisor of the model's widths with method=packed"
            raise invalid("exits", expected, members, hint=f"try 2 or 4 ({error})") from error
        _check_separate(network, first, plan)
        return network


def _check_not_pretrained(model: nn.Module, plan: BuildPlan) -> None:
    """Raise ValueError if the weights do not come from the seed, since no member could keep them."""
    other = plan.create(plan.fission.seed + 1)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    varied = [not torch.equal(one, two) for one, two in pairs if one.ndim > 1]
    if sum(varied) * 2 < len(varied):
        check_unused("pretrained", True, False, "packed", PackedMethod.loses_weights)


@torch.no_grad()
def _check_separate(network: Packed, first: str, plan: BuildPlan) -> None:
    """Raise ValueError if a member's features change with another member's first weights.

    This finds concatenated or shuffled channels and norms over all channels, whatever computes them.
    """
    probe = copy.deepcopy(network).eval()
    for module in probe.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            module.weight.fill_(1)  # a weight of 0 would let nothing through
    images = torch.randn(plan.example[:1].shape, generator=make_generator(plan.fission.seed))
    weight = cast(Tensor, probe.network.get_submodule(first).weight)
    before = _features(probe, images)
    for member, member_weight in enumerate(weight.unflatten(0, (probe.members, -1))):
        member_weight.neg_()
        after = _features(probe, images)
        member_weight.neg_()
        others = [other for other in range(probe.members) if other != member]
        for name, features in before.items():
            if not torch.allclose(features[others], after[name][others], 1e-4, 1e-5, equal_nan=True):
                raise unsuitable_model(
                    "packed",
                    "a network that keeps channels in order, without concatenating or shuffling them",
                    f"layer {name!r}, where members read one another's channels",
                )


def _features(network: Packed, images: Tensor) -> dict[str, Tensor]:
    """Return the outputs `(members, ...)` of each layer with weights, in the order in which they run."""
    features: dict[str, Tensor] = {}

    def keep(name: str, outputs: Tensor) -> None:
        dim = 1 if outputs.ndim == 4 else outputs.ndim - 1
        features[name] = outputs.unflatten(dim, (network.members, -1)).movedim(dim, 0)

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, outputs, name=name: keep(name, outputs))
        for name, module in network.network.named_modules()
        if isinstance(module, nn.Conv2d | PackedLinear)
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    return features
