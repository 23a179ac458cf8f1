"""MIMO (Havasi et al. 2021, arXiv 2010.06610): members that share one network except its ends."""

from math import sqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig, TrainingConfig
from netfission.methods.base import BuildPlan, Loss, Method, Network, StepResult, TrainingHook
from netfission.methods.checks import check_unused, unsuitable_model
from netfission.methods.layers import (
    Layer,
    check_members,
    check_network,
    copy_with_weights,
    count_classes,
    output_channels,
    weight_layers,
)
from netfission.utils.errors import check_positive_integer, invalid


class Mimo(nn.Module):
    """A network that reads several images at once and classifies each.

    Args:
        network: concatenated images `(batch, exits * channels, height, width)` → logits
            `(batch, exits * classes)`.
        exits: number of members.
        channels: of one image.

    Example:
        >>> network = Mimo(nn.Sequential(nn.Flatten(), nn.Linear(2 * 16, 2 * 10)), exits=2, channels=1)
        >>> network(torch.rand(5, 1, 4, 4)).shape
        torch.Size([5, 2, 10])
    """

    def __init__(self, network: nn.Module, exits: int, channels: int) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self.exits = exits
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits `(batch, exits, classes)`.

        Args:
            images: `(batch, channels, height, width)`, shown to all members, or one image per member,
                concatenated: `(batch, exits * channels, height, width)`.
        """
        if images.shape[1] == self.channels:
            images = images.repeat(1, self.exits, 1, 1)
        logits: Tensor = self.network(images)
        by_exit: Tensor = logits.unflatten(1, (self.exits, -1))
        return by_exit


def draw_orders(batch: int, exits: int, repetitions: int, rho: float) -> Tensor:
    """Draw which image of a batch each member sees at each position (the authors' code).

    Args:
        batch: number of images.
        exits: number of members.
        repetitions: how often each member sees each image.
        rho: share of the positions, in [0, 1], at which all members see the same image.

    Returns:
        Numbers of images, int64 `(exits, repetitions * batch)`, drawn from the CPU's global generator.

    Example:
        >>> orders = draw_orders(batch=4, exits=3, repetitions=2, rho=0.5)
        >>> orders.shape, (orders[:, 4:] == orders[0, 4:]).all().item()
        (torch.Size([3, 8]), True)
    """
    images = torch.arange(batch).repeat(repetitions)
    common = images[torch.randperm(len(images))]
    separate, same = common.tensor_split([int(len(common) * (1 - rho))])
    return torch.stack([torch.cat([separate[torch.randperm(len(separate))], same]) for _ in range(exits)])


class MimoMethod(Method):
    """`exits` members inside one network, of which only the first and the last layer are wider.

    The first convolution reads one image per member, and the last layer gives logits per member. The images
    differ in training, and are the same in evaluation. The defaults, 4 repetitions and rho 0, are those of
    the authors' code for CIFAR (uncertainty-baselines, `baselines/cifar/mimo.py`). Distillation among members
    has no effect, since they see different images.
    """

    settings = frozenset({"repetitions", "rho"})
    joint = False
    loses_weights = "the layers read a sum of several images, and learned from single ones"
    average_source = "Havasi et al. 2021, and uncertainty-baselines' baselines/cifar/mimo.py"
    deviations = (
        "each image stands several times in a batch (repetitions, 4 unless set)",
        "each member has an order of its own of the images of a batch",
    )
    differences = (
        "each step has batch_size images, repeated 4 times (authors: 128 images, 250 epochs)",
        "weight decay is the common one, 5e-4 in the grids (authors: 6e-4)",
    )

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network.

        Raises:
            ValueError: a setting outside its range, fewer than 2 exits, or pruning.
        """
        check_positive_integer("repetitions", self.config.repetitions)
        if not 0 <= self.config.rho <= 1:
            raise invalid("rho", "a share from 0 to 1", self.config.rho)
        check_members(fission, self.config.method)

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build the model of seed `exits * seed` with wider ends.

        The first and last weights of member k are those of the model of seed `exits * seed + k`, so that
        members start with different weights. The first weights are divided by √exits, so that the sum over
        members has the variance of one.

        Raises:
            ValueError: a setting outside its range, fewer than 2 exits, or pruning. Or the
                model's first layer is not a plain convolution, or its last does not give the logits.
        """
        method, exits = self.config.method, plan.fission.exits
        self.check(plan.fission)
        models = [plan.create(exits * plan.fission.seed + number) for number in range(exits)]
        first, *_, last = weight_layers(models[0], plan, method)
        model, channels = models[0], plan.example.shape[1]
        classes = count_classes(model, plan)
        firsts = [cast(Layer, member.get_submodule(first)) for member in models]
        lasts = [cast(Layer, member.get_submodule(last)) for member in models]
        if not isinstance(firsts[0], nn.Conv2d) or (firsts[0].groups, firsts[0].in_channels) != (1, channels):
            expected = "a network whose first layer is a convolution of the images, without groups"
            raise unsuitable_model(method, expected, f"layer {first!r} ({firsts[0]})")
        if isinstance(lasts[0], nn.Conv2d) and lasts[0].groups > 1:
            expected = "a network whose last layer has no groups"
            raise unsuitable_model(method, expected, f"layer {last!r} of {lasts[0].groups} groups")
        model.set_submodule(first, _widen_first(firsts))
        model.set_submodule(last, _widen_last(lasts))
        return check_network(Mimo(model, exits, channels), plan, method, classes)

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        """Return none.

        Raises:
            ValueError: the settings ask for a reduction, which the members, one image each, do not read.
        """
        hint = "its loss is the sum over members"
        check_unused("reduction", training.reduction, None, self.config.method, hint)
        return []

    def step(self, network: Network, images: Tensor, labels: Tensor, loss_fn: Loss) -> StepResult:
        """Compute the loss of one training step, in which each member sees the images in a different order.

        The loss is the sum over members of the mean over positions (the authors' code).

        Args:
            network: a `Mimo`, or a wrapper of one with its attribute `exits`.
            images: of the batch.
            labels: of the images, hard or soft.
            loss_fn: logits and labels → a scalar.

        Returns:
            The loss, and logits `(exits * repetitions * batch, 1, classes)` with their labels.
        """
        exits: int = cast(Any, network).exits
        orders = draw_orders(len(images), exits, self.config.repetitions, self.config.rho).T.to(images.device)
        logits = network(images[orders].flatten(1, 2)).flatten(0, 1).unsqueeze(1)
        shown = labels[orders].flatten(0, 1)
        return StepResult(exits * loss_fn(logits, shown), logits, shown)


def _widen_first(layers: list[Layer]) -> nn.Module:
    """Concatenate the weights of all members' first layers along their inputs."""
    weight = torch.cat([layer.weight.detach() for layer in layers], dim=1) / sqrt(len(layers))
    bias = layers[0].bias
    return copy_with_weights(
        layers[0], weight, None if bias is None else bias.detach(), in_channels=weight.shape[1]
    )


def _widen_last(layers: list[Layer]) -> nn.Module:
    """Concatenate the weights of all members' last layers along their outputs."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    name = "out_channels" if isinstance(layers[0], nn.Conv2d) else "out_features"
    return copy_with_weights(
        layers[0],
        weight,
        torch.cat(biases) if biases else None,
        **{name: output_channels(layers[0]) * len(layers)},
    )
