"""What the baselines that replace a network's layers have in common."""

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from netfission.config import FissionConfig
from netfission.methods.base import BuildPlan
from netfission.methods.checks import check_several_exits, check_unused, unsuitable_model
from netfission.utils.errors import first_line
from netfission.utils.modes import in_mode

Layer = nn.Conv2d | nn.Linear  # the layers with weights that these baselines replace


class BatchedMembers(nn.Module):
    """A network that computes all members in one batch of `members * batch` rows.

    The images are repeated once per member, all images for member 0 first. The layers of the network know the
    member of a row by its position in the batch.

    Args:
        network: images → logits `(batch, classes)`.
        members: number of members.
        in_training: repeat the images in train mode, too. If False, each image goes through once in train
            mode, and the layers assign it to a member.

    Example:
        >>> network = BatchedMembers(nn.Sequential(nn.Flatten(), nn.Linear(4, 10)), 3, in_training=False)
        >>> images = torch.rand(5, 1, 2, 2)
        >>> network.eval()(images).shape, network.train()(images).shape
        (torch.Size([5, 3, 10]), torch.Size([5, 1, 10]))
    """

    def __init__(self, network: nn.Module, members: int, in_training: bool) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self.members = members
        self.in_training = in_training

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits `(batch, members, classes)`, or `(batch, 1, classes)`, see `in_training`."""
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
    """Replace modules of a network, in place.

    Args:
        module: the network to search, from the outside in.
        make: name and module → the replacement, which is not searched; None to keep the module.
        name: of `module`.

    Returns:
        `module`, or its replacement, in the mode of what it replaces. A module that is used twice is replaced
        by one.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> replace_layers(network, lambda name, part: nn.GELU() if isinstance(part, nn.ReLU) else None)
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): GELU(approximate='none')
        )
    """
    return _replace(module, make, name, {})


def _replace(
    module: nn.Module,
    make: Callable[[str, nn.Module], nn.Module | None],
    name: str,
    done: dict[nn.Module, nn.Module],
) -> nn.Module:
    if module not in done:
        replacement = make(name, module)
        done[module] = module if replacement is None else replacement.train(module.training)
        # Attention reads the weights of its layers directly, so that these cannot be replaced.
        if replacement is None and not isinstance(module, nn.MultiheadAttention):
            for child, part in list(module._modules.items()):
                if part is not None:
                    setattr(module, child, _replace(part, make, f"{name}.{child}" if name else child, done))
    return done[module]


def run_order(model: nn.Module, images: Tensor, *kinds: type[nn.Module]) -> list[str]:
    """Return the names of modules in the order in which they first run, in eval mode.

    Args:
        model: the network to run.
        images: its input.
        kinds: types of the modules to list.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> run_order(model, torch.rand(1, 4), nn.Linear)
        ['0', '2']
    """
    return list(dict.fromkeys(_all_runs(model, images, *kinds)))


def last_to_run(model: nn.Module, images: Tensor, *kinds: type[nn.Module]) -> str:
    """Return the name of the module of these types that runs last, in eval mode; see `run_order`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(dim=1))
        >>> last_to_run(model, torch.rand(1, 4), nn.Linear)
        '2'
    """
    return _all_runs(model, images, *kinds)[-1]


def _all_runs(model: nn.Module, images: Tensor, *kinds: type[nn.Module]) -> list[str]:
    names: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: names.append(name))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        with torch.no_grad(), in_mode(model, training=False):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return names


def weight_layers(model: nn.Module, plan: BuildPlan, method: str) -> dict[str, Layer]:
    """Return the convolutions and linear layers of a model, by name, in the order in which they run.

    Raises:
        ValueError: there are fewer than two, or one computes its weight from others.

    Example:
        >>> from netfission.config import FissionConfig
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> plan = BuildPlan(lambda seed: model, FissionConfig(), torch.zeros(1, 1, 8, 8))
        >>> list(weight_layers(model, plan, "packed"))
        ['0', '3']
    """
    modules = dict(model.named_modules())
    layers = {
        name: cast(Layer, modules[name]) for name in run_order(model, plan.example, nn.Conv2d, nn.Linear)
    }
    if len(layers) < 2:
        expected = "a network of at least two convolutions or linear layers"
        raise unsuitable_model(method, expected, f"{len(layers)} of them")
    for name, layer in layers.items():
        if is_parametrized(layer):
            found = f"layer {name!r}, which computes its weight"
            raise unsuitable_model(method, "made of layers with plain weights", found)
    return layers


def check_members(fission: FissionConfig, method: str) -> None:
    """Check the settings that all baselines of this kind share.

    Raises:
        ValueError: fewer than two members, or pruning.

    Example:
        >>> check_members(FissionConfig(sparsity=0.5), "mimo")
        Traceback (most recent call last):
        ValueError: sparsity must be 0.0 with method=mimo, got 0.5; it does not prune
    """
    check_several_exits(fission.exits, method)
    check_unused("sparsity", fission.sparsity, 0.0, method, "it does not prune")


def count_classes(model: nn.Module, plan: BuildPlan) -> int:
    """Return the number of classes of a model, images → logits `(batch, classes)`."""
    with torch.no_grad(), in_mode(model, training=False):
        logits: Tensor = model(plan.example)
    return logits.shape[1]


def check_network(network: nn.Module, plan: BuildPlan, method: str, classes: int | None = None) -> nn.Module:
    """Return `network` if it runs and gives one prediction per member.

    Args:
        network: the network that the method built.
        plan: the plan that it was built from.
        method: name of the method.
        classes: number of classes that the network must have; default any.

    Raises:
        ValueError: the network fails on the plan's example, or gives logits of another shape.

    Example:
        >>> plan = BuildPlan(lambda seed: nn.Identity(), FissionConfig(exits=3), torch.zeros(2, 1, 8, 8))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.Unflatten(1, (3, 10)))
        >>> check_network(network, plan, "mimo", classes=10) is network
        True
    """
    try:
        with torch.no_grad(), in_mode(network, training=False):
            shape = network(plan.example).shape
    except Exception as error:  # whatever the layers raise
        found = f"an error when it ran ({first_line(error)})"
        raise unsuitable_model(method, "able to run with its layers replaced", found) from error
    expected = (len(plan.example), plan.fission.exits, classes or shape[-1])
    if tuple(shape) != expected:
        found = f"logits of shape {tuple(shape)} where {expected} are needed"
        raise unsuitable_model(method, "a network whose last layer gives the logits", found)
    return network


def make_generator(seed: int) -> torch.Generator:
    """Make a CPU generator from a seed, whose numbers differ from those that the model was drawn from.

    Example:
        >>> first, again = (torch.rand(2, generator=make_generator(0)) for _ in range(2))
        >>> torch.equal(first, again)
        True
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + 500_009) % 2**63)


def channel_dim(layer: nn.Module) -> int:
    """Return the dimension of a layer's channels (of convolutions) or features (of linear layers)."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


def expand_along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """View values `(rows, channels)` as a tensor of `ndim` dimensions: rows first, channels along `dim`.

    Example:
        >>> expand_along(torch.zeros(2, 5), dim=1, ndim=4).shape
        torch.Size([2, 5, 1, 1])
    """
    shape = [values.shape[0]] + [1] * (ndim - 1)
    shape[dim] = -1
    return values.view(shape)


def copy_with_weights(layer: Layer, weight: Tensor, bias: Tensor | None, **sizes: int) -> nn.Module:
    """Copy a layer, with other weights and attributes (`in_channels`, …).

    Example:
        >>> copy_with_weights(nn.Linear(4, 2), torch.zeros(3, 4), None, out_features=3)
        Linear(in_features=4, out_features=3, bias=False)
    """
    result = copy.deepcopy(layer)
    for name, size in sizes.items():
        setattr(result, name, size)
    result.weight = nn.Parameter(weight)
    result.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return result


def input_channels(layer: Layer) -> int:
    """Return the number of channels or features that a layer reads."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def output_channels(layer: Layer) -> int:
    """Return the number of channels or features that a layer gives."""
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
