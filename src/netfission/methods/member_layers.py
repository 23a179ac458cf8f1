"""What the baselines whose members share a frozen network have in common."""

import itertools
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Self, cast

import torch
from torch import Tensor, nn

from netfission.methods.base import BuildPlan
from netfission.methods.checks import unsuitable_model
from netfission.methods.layers import (
    BatchedMembers,
    check_network,
    count_classes,
    make_generator,
    replace_layers,
    weight_layers,
)
from netfission.utils.modes import in_mode


class MemberLinear(nn.Module):
    """Linear layers, one per member: features `(members * batch, inputs)` → `(members * batch, outputs)`.

    Args:
        layers: the layer of each member, all of one shape.

    Example:
        >>> MemberLinear([nn.Linear(4, 10), nn.Linear(4, 10)])(torch.rand(2 * 5, 4)).shape
        torch.Size([10, 10])
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.stack(biases)) if biases else None

    @classmethod
    def from_models(cls, models: Sequence[nn.Module], name: str) -> Self:
        """Take the layer of one name from each member's model."""
        return cls([cast(nn.Linear, model.get_submodule(name)) for model in models])

    def forward(self, features: Tensor) -> Tensor:
        """Apply each member's layer to its rows, those of member 0 first."""
        outputs = features.unflatten(0, (len(self.weight), -1)) @ self.weight.mT
        if self.bias is not None:
            outputs = outputs + self.bias.unsqueeze(1)
        joined: Tensor = outputs.flatten(0, 1)
        return joined


def build_on_frozen(
    plan: BuildPlan,
    method: str,
    find_layers: Callable[[nn.Module], Set[str]],
    change: Callable[[nn.Module, torch.Generator], nn.Module],
    weights: Callable[[nn.Module], Tensor | None],
) -> BatchedMembers:
    """Build the model of seed `exits * seed`, frozen but for weights of the members in some of its layers.

    The classifier of member k is that of the model of seed `exits * seed + k`.

    Args:
        plan: what to build.
        method: name of the method.
        find_layers: model → names of the layers that change, of which classifiers are left out.
        change: such a layer and a generator of its noise → what replaces it, or itself, changed in place.
        weights: a module → weights of the members in it, `(members, ...)`; None if it has none.

    Raises:
        ValueError: the model has no classifier or no weights that can be changed, or mixes the members.
    """
    members = plan.fission.exits
    models = [plan.create(members * plan.fission.seed + number) for number in range(members)]
    model = models[0].requires_grad_(False)
    weight_layers(model, plan, method)
    changed = find_layers(model)
    classifiers = find_classifiers(model, plan, method)
    generator = make_generator(plan.fission.seed)

    def make(name: str, module: nn.Module) -> nn.Module | None:
        if name in classifiers:
            return MemberLinear.from_models(models, name)
        return change(module, generator) if name in changed else None

    network = BatchedMembers(replace_layers(model, make), members, in_training=True)
    check_network(network, plan, method)
    found = (weights(module) for module in network.modules())
    check_separate(network, plan, method, [weight for weight in found if weight is not None])
    return network


def find_classifiers(model: nn.Module, plan: BuildPlan, method: str) -> set[str]:
    """Return the names of the linear layers that run last and give logits (LeViT has two).

    A hidden layer as wide as the classes counts as one if only classifiers follow it.

    Args:
        model: the network.
        plan: has images for the network.
        method: name of the method.

    Raises:
        ValueError: no linear layer runs last and gives logits.

    Example:
        >>> from netfission.config import FissionConfig
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> plan = BuildPlan(lambda seed: model, FissionConfig(), torch.zeros(2, 1, 8, 8))
        >>> find_classifiers(model, plan, "lora-ensemble")
        {'3'}
    """
    logits = (len(plan.example), count_classes(model, plan))
    shapes = output_shapes(model, plan.example)
    last = itertools.takewhile(lambda name: shapes[name] == logits, reversed(shapes))
    found = {name for name in last if isinstance(model.get_submodule(name), nn.Linear)}
    if not found:
        raise unsuitable_model(method, "a network that ends in a linear layer", type(model).__name__)
    return found


@torch.no_grad()
def output_shapes(model: nn.Module, images: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shape of what each layer with weights returns, in the order they first run, in eval mode.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 2))
        >>> output_shapes(model, torch.zeros(5, 1, 8, 8))
        {'1': (5, 7), '3': (5, 2)}
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        shapes.setdefault(name, tuple((output[0] if isinstance(output, tuple) else output).shape))

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: record(name, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention)
    ]
    try:
        with in_mode(model, training=False):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


@torch.no_grad()
def check_separate(network: BatchedMembers, plan: BuildPlan, method: str, weights: Iterable[Tensor]) -> None:
    """Check that weights of member 0 do not alter the features of others: rows may be in another order.

    Args:
        network: the network that the method built.
        plan: the plan that it was built from.
        method: name of the method.
        weights: of the members, each `(members, ...)`; changed, and put back.

    Raises:
        ValueError: they do.
    """
    images = torch.randn(plan.example.shape, generator=make_generator(plan.fission.seed)).to(plan.example)
    kept = [(weight, weight[0].clone()) for weight in weights]
    before = _features(network, images)
    for weight, _ in kept:
        weight[0] += 1
    after = _features(network, images)
    for weight, of_first in kept:
        weight[0] = of_first
    if not torch.allclose(before[1:], after[1:], 1e-4, 1e-5, equal_nan=True):
        expected = "a network whose attention reads batches with the images first"
        raise unsuitable_model(method, expected, "one that orders them otherwise")


def _features(network: BatchedMembers, images: Tensor) -> Tensor:
    """Return what the classifiers read, `(members, batch, ...)`; their weights may be 0."""
    found: list[Tensor] = []
    classifiers = next(module for module in network.modules() if isinstance(module, MemberLinear))
    hook = classifiers.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0]))
    try:
        with in_mode(network, training=False):
            network(images)
    finally:
        hook.remove()
    features: Tensor = found[-1].unflatten(0, (network.members, -1))
    return features
