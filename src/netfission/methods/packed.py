"""Packed-Ensembles (Laurent et al. 2023, arXiv 2210.09184): small networks side by side in grouped layers."""

import copy
from math import ceil, sqrt
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from netfission.methods.base import BuildPlan, Method
from netfission.methods.layers import (
    Layer,
    check_network,
    check_plan,
    copy_with_weights,
    count_classes,
    input_channels,
    make_generator,
    output_channels,
    replace_layers,
    weight_layers,
)

MIN_GROUP_CHANNELS = 64  # channels; gamma makes no smaller ones, as in torch_uncertainty's PackedConv2d


class PackedLinear(nn.Module):
    """Linear layers side by side: features `(..., groups * inputs)` → `(..., groups * outputs)`.

    Args:
        weight: `(groups, outputs, inputs)`.
        bias: `(groups * outputs,)`, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, features: Tensor) -> Tensor:
        """Each group's features through its own layer."""
        groups = features.unflatten(-1, (len(self.weight), -1))
        outputs = torch.einsum("...gi,goi->...go", groups, self.weight).flatten(-2)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)


class Packed(nn.Module):
    """A network of members side by side: images → logits `(batch, members, classes)`.

    Args:
        network: images → `(batch, members * classes)`.
        members: how many.
    """

    def __init__(self, network: nn.Module, members: int) -> None:
        super().__init__()
        self.network = network
        self.members = members

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits `(batch, members, classes)`."""
        logits: Tensor = self.network(images)
        each: Tensor = logits.unflatten(1, (self.members, -1))
        return each


class _Packing:
    """How wide each layer becomes, and what weights it gets.

    Args:
        members: M.
        alpha: the members together are so many times as wide as the network.
        gamma: groups that each member's convolutions are divided into.
        generator: draws the weights.
    """

    def __init__(self, members: int, alpha: float, gamma: int, generator: torch.Generator) -> None:
        self.members = members
        self.alpha = alpha
        self.gamma = gamma
        self.generator = generator
        self.rounded = False  # whether a width was

    def width(self, channels: int) -> int:
        """Of a layer of `channels`: alpha times as many, rounded up to what members and groups share out."""
        unit = self.members * self.gamma
        asked = round(channels * self.alpha, 6)  # 3 · 1.1 is not above 3.3
        width = ceil(asked / unit) * unit
        self.rounded |= width != asked
        return width

    def layer(self, name: str, layer: Layer, first: bool, last: bool) -> nn.Module:
        """A layer of all members; the first reads the images once, the last gives each member's logits."""
        inputs, outputs = input_channels(layer), output_channels(layer)
        wide_in = inputs if first else self.width(inputs)
        wide_out = self.members * outputs if last else self.width(outputs)
        groups = 1 if first else self._groups(name, layer, wide_in, wide_out, last)
        bias = None if layer.bias is None else self._drawn(layer.bias, (wide_out,), 1.0)
        # The same variance of the outputs as in the network, whatever rule its weights are drawn by.
        of_each = layer.weight[0].numel() // layer.weight.shape[1] * (wide_in // groups)
        scale = sqrt(layer.weight[0].numel() / of_each)
        if isinstance(layer, nn.Linear):
            shape = (groups, wide_out // groups, wide_in // groups)
            weight = self._drawn(layer.weight, shape, scale)
            return PackedLinear(weight, bias)
        weight = self._drawn(layer.weight, (wide_out, wide_in // groups, *layer.kernel_size), scale)
        return copy_with_weights(
            layer, weight, bias, in_channels=wide_in, out_channels=wide_out, groups=groups
        )

    def norm(self, norm: _BatchNorm) -> nn.Module:
        """A batch norm of all members, its values those of the network's over again."""
        result = copy.deepcopy(norm)
        result.num_features = self.width(norm.num_features)
        places = torch.arange(result.num_features) % norm.num_features
        for name, parameter in norm.named_parameters(recurse=False):
            setattr(result, name, nn.Parameter(parameter.detach()[places]))
        for name, buffer in norm.named_buffers(recurse=False):
            if buffer.ndim:
                setattr(result, name, buffer[places])
        return result

    def _groups(self, name: str, layer: Layer, inputs: int, outputs: int, last: bool) -> int:
        if isinstance(layer, nn.Linear):
            return self.members
        if layer.groups == layer.in_channels > 1:  # each channel for itself, so each member's, too
            groups = inputs
        else:
            each = self.members * layer.groups
            parts = 1 if last else self.gamma
            while parts > 1 and (inputs % (each * parts) or inputs // (each * parts) < MIN_GROUP_CHANNELS):
                parts -= 1
            groups = each * parts
        if inputs % groups or outputs % groups:
            raise ValueError(
                f"method=packed: layer {name!r} of {inputs} channels in and {outputs} out cannot have "
                f"{groups} groups; takes an alpha and exits that its groups go with"
            )
        return groups

    def _drawn(self, like: Tensor, shape: tuple[int, ...], scale: float) -> Tensor:
        """Normal numbers with the mean and, times `scale`, the deviation of the network's own."""
        own = like.detach()
        drawn = torch.empty(shape).normal_(generator=self.generator)
        return own.mean() + scale * own.std(correction=0) * drawn.to(own)


class PackedMethod(Method):
    """`exits` members, each a narrower network of the plan's layout, run as one network of grouped layers.

    All layers are alpha times as wide as the network's, and each member has its share of the channels.
    Where a width cannot be shared out evenly, it is rounded up. gamma concerns convolutions but the
    first, down to groups of 64 channels, as in torch_uncertainty's layers; its networks leave gamma off
    the first convolution of each residual block, too. Each member gets its own cross-entropy's gradient,
    as a network would alone.
    """

    settings = frozenset({"alpha", "gamma"})

    def build(self, plan: BuildPlan) -> nn.Module:
        """Members with fresh weights: normal, scaled from what the model of the plan's seed has.

        Raises:
            ValueError: a setting outside its range, fewer than 2 exits, pruning, a pretrained model, or one
                with other layers than convolutions, batch norms and linear layers, or in which members
                would read one another's channels.
        """
        method, members = self.config.method, plan.fission.exits
        if not self.config.alpha > 0:
            raise ValueError(f"alpha={self.config.alpha}: takes a number above 0")
        if self.config.gamma < 1:
            raise ValueError(f"gamma={self.config.gamma}: takes a whole number from 1")
        check_plan(plan, method)
        model = plan.create(plan.fission.seed)
        first, *_, last = weight_layers(model, plan, method)
        _refuse_pretrained(model, plan)
        classes = count_classes(model, plan)
        packing = _Packing(members, self.config.alpha, self.config.gamma, make_generator(plan.fission.seed))

        def make(name: str, module: nn.Module) -> nn.Module | None:
            if isinstance(module, nn.Conv2d | nn.Linear):
                return packing.layer(name, module, first=name == first, last=name == last)
            if isinstance(module, _BatchNorm):
                return packing.norm(module)
            if any(True for _ in module.parameters(recurse=False)):
                raise ValueError(
                    f"method={method}: layer {name!r} ({type(module).__name__}) cannot be shared out; takes "
                    "a network of convolutions, batch norms and linear layers"
                )
            return None

        network = Packed(replace_layers(model, make), members)
        try:
            check_network(network, plan, method, classes)
        except ValueError as error:
            if not packing.rounded:
                raise
            raise ValueError(f"{error}; exits={members} does not divide its widths, try 2 or 4") from error
        _refuse_mixing(network, first, plan)
        return network


def _refuse_pretrained(model: nn.Module, plan: BuildPlan) -> None:
    """ValueError where the weights do not come from the seed: no member could keep them."""
    other = plan.create(plan.fission.seed + 1)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    varied = [not torch.equal(one, two) for one, two in pairs if one.ndim > 1]
    if sum(varied) * 2 < len(varied):
        raise ValueError("pretrained=True: method packed starts from fresh weights of its own; takes False")


@torch.no_grad()
def _refuse_mixing(network: Packed, first: str, plan: BuildPlan) -> None:
    """ValueError where a member's features change with another's first weights.

    Concatenated or shuffled channels and norms over all of them are found so, whatever computes them.
    """
    probe = copy.deepcopy(network).eval()
    for module in probe.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            module.weight.fill_(1)  # where it starts at 0, nothing would come through
    images = torch.randn(plan.example[:1].shape, generator=make_generator(plan.fission.seed))
    weight = cast(Tensor, probe.network.get_submodule(first).weight)
    before = _features(probe, images)
    for member, own in enumerate(weight.unflatten(0, (probe.members, -1))):
        own.neg_()
        after = _features(probe, images)
        own.neg_()
        others = [other for other in range(probe.members) if other != member]
        for name, features in before.items():
            if not torch.allclose(features[others], after[name][others], 1e-4, 1e-5, equal_nan=True):
                raise ValueError(
                    f"method=packed: at layer {name!r} members read one another's channels; takes a network "
                    "that does not concatenate, shuffle or norm channels across"
                )


def _features(network: Packed, images: Tensor) -> dict[str, Tensor]:
    """What each weight layer gives, in the order in which they run: `(members, ...)`."""
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
