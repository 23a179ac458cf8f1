"""What the baselines share that replace a network's layers."""

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from netfission.methods.base import BuildPlan
from netfission.utils.modes import in_mode

Layer = nn.Conv2d | nn.Linear  # what carries weights, in the networks that these baselines take


class BatchedMembers(nn.Module):
    """A network whose layers know the members by their place in the batch.

    The images go through it once for each member, all images of member 0 first: a batch of `(members *
    batch, ...)` rows inside.

    Args:
        network: images → logits `(batch, classes)`.
        members: how many.
        in_training: whether this is so in train mode, too. If not, each image goes through once, and the
            layers say through which member.
    """

    def __init__(self, network: nn.Module, members: int, in_training: bool) -> None:
        super().__init__()
        self.network = network
        self.members = members
        self.in_training = in_training

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits `(batch, members, classes)`; without `in_training` one member in train mode."""
        logits: Tensor
        if self.training and not self.in_training:
            logits = self.network(images)
            return logits.unsqueeze(1)
        logits = self.network(images.repeat(self.members, 1, 1, 1))
        by_member: Tensor = logits.unflatten(0, (self.members, -1))
        return by_member.transpose(0, 1)


def replace_layers(
    module: nn.Module, make: Callable[[str, nn.Module], nn.Module | None], name: str = ""
) -> nn.Module:
    """Put what `make` makes of a module in its place, in place.

    Args:
        module: what to search, from the outside in.
        make: name and module → what to put there, which is not searched; None to keep the module.
        name: of `module`.

    Returns:
        `module`, or what `make` made of it. A module that is used in two places is replaced by one.
    """
    return _replace(module, make, name, {})


def _replace(
    module: nn.Module,
    make: Callable[[str, nn.Module], nn.Module | None],
    name: str,
    done: dict[nn.Module, nn.Module],
) -> nn.Module:
    if module not in done:
        made = make(name, module)
        done[module] = module if made is None else made
        # Attention reads the weights of its layers past them, so that these cannot be replaced.
        if made is None and not isinstance(module, nn.MultiheadAttention):
            for child, part in list(module._modules.items()):
                if part is not None:
                    setattr(module, child, _replace(part, make, f"{name}.{child}" if name else child, done))
    return done[module]


def run_order(model: nn.Module, images: Tensor, *kinds: type[nn.Module]) -> list[str]:
    """Names of the modules of these kinds in the order in which they first run, in eval mode."""
    names: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: names.setdefault(name))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        with torch.no_grad(), in_mode(model, training=False):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return list(names)


def weight_layers(model: nn.Module, plan: BuildPlan, method: str) -> dict[str, Layer]:
    """The convolutions and linear layers of a model, by name, in the order in which they run.

    Raises:
        ValueError: there are fewer than two, or one computes its weight from others.
    """
    modules = dict(model.named_modules())
    layers = {
        name: cast(Layer, modules[name]) for name in run_order(model, plan.example, nn.Conv2d, nn.Linear)
    }
    if len(layers) < 2:
        raise ValueError(f"method={method}: takes a network of two convolutions or linear layers or more")
    for name, layer in layers.items():
        if is_parametrized(layer):
            raise ValueError(f"method={method}: layer {name!r} computes its weight; takes plain layers")
    return layers


def check_plan(plan: BuildPlan, method: str) -> None:
    """Refuse what no baseline of this family takes.

    Raises:
        ValueError: fewer than two members, or pruning.
    """
    if plan.fission.exits < 2:
        raise ValueError(f"exits={plan.fission.exits}: method {method} takes 2 members or more")
    if plan.fission.sparsity > 0:
        raise ValueError(f"sparsity={plan.fission.sparsity}: method {method} takes no pruning, sparsity=0")


def count_classes(model: nn.Module, plan: BuildPlan) -> int:
    """Number of classes that a model of logits `(batch, classes)` tells apart."""
    with torch.no_grad(), in_mode(model, training=False):
        logits: Tensor = model(plan.example)
    return logits.shape[1]


def check_network(network: nn.Module, plan: BuildPlan, method: str, classes: int | None = None) -> nn.Module:
    """`network`, once it has run.

    Args:
        network: what the method made.
        plan: its plan.
        method: its name.
        classes: that it must tell apart; default any number.

    Raises:
        ValueError: it does not run on the plan's images, or does not give one prediction for each member.
    """
    try:
        with torch.no_grad(), in_mode(network, training=False):
            shape = network(plan.example).shape
    except Exception as error:  # whatever the layers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"method={method}: the model does not run with its layers replaced ({reason})"
        ) from error
    asked = (len(plan.example), plan.fission.exits, classes or shape[-1])
    if tuple(shape) != asked:
        raise ValueError(
            f"method={method}: takes a model that ends in one layer of its classes; this one gives "
            f"{tuple(shape)} in place of {asked}"
        )
    return network


def make_generator(seed: int) -> torch.Generator:
    """A generator of one's own for a seed, with other numbers than the model of that seed was drawn from."""
    return torch.Generator().manual_seed((seed * 1_000_003 + 500_009) % 2**63)


def channel_dim(layer: nn.Module) -> int:
    """Along which dimension a layer reads and gives channels (convolutions) or features (linear layers)."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


def expand_along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """Values `(rows, channels)` as a tensor of `ndim` dimensions: rows first, channels along `dim`."""
    shape = [values.shape[0]] + [1] * (ndim - 1)
    shape[dim] = -1
    return values.view(shape)


def copy_with_weights(layer: Layer, weight: Tensor, bias: Tensor | None, **sizes: int) -> nn.Module:
    """A copy of a layer with other weights and attributes (`in_channels`, …)."""
    result = copy.deepcopy(layer)
    for name, size in sizes.items():
        setattr(result, name, size)
    result.weight = nn.Parameter(weight)
    result.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return result


def input_channels(layer: Layer) -> int:
    """Channels or features that a layer reads."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def output_channels(layer: Layer) -> int:
    """Channels or features that a layer gives."""
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
