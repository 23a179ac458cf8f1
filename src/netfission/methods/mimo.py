"""MIMO (Havasi et al. 2021, arXiv 2010.06610): members that share one network, apart from its ends."""

from math import sqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from netfission.methods.base import BuildPlan, Loss, Method, Network, StepResult
from netfission.methods.layers import (
    Layer,
    check_network,
    check_plan,
    copy_with_weights,
    count_classes,
    output_channels,
    weight_layers,
)


class Mimo(nn.Module):
    """A network that reads several images at once and tells what is on each.

    Args:
        network: images side by side `(batch, exits * channels, height, width)` → logits
            `(batch, exits * classes)`.
        exits: number of members.
        channels: of one image.
    """

    def __init__(self, network: nn.Module, exits: int, channels: int) -> None:
        super().__init__()
        self.network = network
        self.exits = exits
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits `(batch, exits, classes)`.

        Args:
            images: `(batch, channels, height, width)`, which all members are shown, or an image for each
                member side by side, `(batch, exits * channels, height, width)`.
        """
        if images.shape[1] == self.channels:
            images = images.repeat(1, self.exits, 1, 1)
        logits: Tensor = self.network(images)
        each: Tensor = logits.unflatten(1, (self.exits, -1))
        return each


def draw_orders(batch: int, exits: int, repetitions: int, rho: float) -> Tensor:
    """Which image of a batch each member is shown at each place (the authors' code).

    Args:
        batch: number of images.
        exits: number of members.
        repetitions: how often each image is shown to each member.
        rho: share of the places, in [0, 1], where all members are shown the same image.

    Returns:
        int64 `(exits, repetitions * batch)`, drawn from the global generator of the CPU.
    """
    places = torch.arange(batch).repeat(repetitions)
    common = places[torch.randperm(len(places))]
    own, same = common.tensor_split([int(len(common) * (1 - rho))])
    return torch.stack([torch.cat([own[torch.randperm(len(own))], same]) for _ in range(exits)])


class MimoMethod(Method):
    """`exits` members inside one network, of which only the first and the last layer are wider.

    The first convolution reads an image for each member, the last layer gives logits for each. In training
    the images differ, in evaluation they are all the one asked about. The defaults, 4 repetitions and rho
    0, are those of the authors' code for CIFAR (uncertainty-baselines, `baselines/cifar/mimo.py`).
    Distillation among members, where asked for, is of no effect: they see different images.
    """

    settings = frozenset({"repetitions", "rho"})
    deviations = (
        "each image stands several times in a batch (repetitions, 4 unless set)",
        "each member has an order of its own of the images of a batch",
    )

    def build(self, plan: BuildPlan) -> nn.Module:
        """The model of seed `exits * seed` with its ends widened.

        The first and last weights of member k are those of the model of seed `exits * seed + k`, so that
        members start apart; the first ones over √exits, so that the sum over members varies as one does.

        Raises:
            ValueError: a setting outside its range, fewer than 2 exits, pruning, or a model whose first
                layer is no plain convolution, or whose last does not give the logits.
        """
        method, exits = self.config.method, plan.fission.exits
        if self.config.repetitions < 1:
            raise ValueError(f"repetitions={self.config.repetitions}: takes a whole number from 1")
        if not 0 <= self.config.rho <= 1:
            raise ValueError(f"rho={self.config.rho}: takes a share from 0 to 1")
        check_plan(plan, method)
        models = [plan.create(exits * plan.fission.seed + number) for number in range(exits)]
        first, *_, last = weight_layers(models[0], plan, method)
        model, channels = models[0], plan.example.shape[1]
        classes = count_classes(model, plan)
        firsts = [cast(Layer, each.get_submodule(first)) for each in models]
        lasts = [cast(Layer, each.get_submodule(last)) for each in models]
        if not isinstance(firsts[0], nn.Conv2d) or (firsts[0].groups, firsts[0].in_channels) != (1, channels):
            raise ValueError(
                f"method={method}: layer {first!r}: takes a first layer that convolves the images"
            )
        if isinstance(lasts[0], nn.Conv2d) and lasts[0].groups > 1:
            raise ValueError(f"method={method}: layer {last!r}: takes a last layer without groups")
        model.set_submodule(first, _reads_each(firsts))
        model.set_submodule(last, _tells_each(lasts))
        return check_network(Mimo(model, exits, channels), plan, method, classes)

    def step(self, network: Network, images: Tensor, labels: Tensor, loss_fn: Loss) -> StepResult:
        """One training step on several places for each image, each member in its own order.

        The loss is the sum over members of the mean over places (the authors' code).

        Args:
            network: a `Mimo`, or what trains one: has `exits`.
            images: of the batch.
            labels: theirs, hard or soft.
            loss_fn: the common loss.

        Returns:
            Logits `(exits * places, 1, classes)` with the labels that go with them.
        """
        exits: int = cast(Any, network).exits
        orders = draw_orders(len(images), exits, self.config.repetitions, self.config.rho).T.to(images.device)
        logits = network(images[orders].flatten(1, 2)).flatten(0, 1).unsqueeze(1)
        shown = labels[orders].flatten(0, 1)
        return StepResult(exits * loss_fn(logits, shown), logits, shown)


def _reads_each(layers: list[Layer]) -> nn.Module:
    """The first layer, with all members' weights side by side."""
    weight = torch.cat([layer.weight.detach() for layer in layers], dim=1) / sqrt(len(layers))
    bias = layers[0].bias
    return copy_with_weights(
        layers[0], weight, None if bias is None else bias.detach(), in_channels=weight.shape[1]
    )


def _tells_each(layers: list[Layer]) -> nn.Module:
    """The last layer, with all members' weights one below the other."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    name = "out_channels" if isinstance(layers[0], nn.Conv2d) else "out_features"
    return copy_with_weights(
        layers[0],
        weight,
        torch.cat(biases) if biases else None,
        **{name: output_channels(layers[0]) * len(layers)},
    )
