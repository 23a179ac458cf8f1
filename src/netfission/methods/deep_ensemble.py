"""Deep Ensembles (Lakshminarayanan et al. 2017, arXiv 1612.01474): separate networks, averaged."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from netfission.config import TrainingConfig
from netfission.methods.base import SINGLE_EXIT_SETTINGS, BuildPlan, Method, TrainingHook
from netfission.methods.fission import FissionMethod
from netfission.methods.schedules import Schedule
from netfission.surgery.masks import MaskedModule


class DeepEnsemble(MaskedModule):
    """Separate networks, run in turn: images → logits `(batch, members, classes)`.

    Args:
        members: each images → logits `(batch, classes)`, or `(batch, exits, classes)`, whose exits then stand
            side by side.

    Attributes:
        active: in train mode, the one member to run; None for all of them.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.active: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits `(batch, members, classes)`."""
        members = list(self.members)
        if self.training and self.active is not None:
            members = [members[self.active]]
        logits = [member(images) for member in members]
        return torch.cat([each if each.ndim == 3 else each.unsqueeze(1) for each in logits], dim=1)


class DeepEnsembleMethod(Method):
    """`exits` networks, each from a seed of its own, trained together on the same batches or one by one.

    Nothing couples them: together, each gets the gradients, and so the weights, that it would get alone on
    those batches. One by one, each has all epochs to itself, and sees the images in an order of its own; a
    step then needs the memory of one.
    """

    settings: ClassVar[frozenset[str]] = SINGLE_EXIT_SETTINGS | {"one_by_one"}

    deviations = ("members are trained on the same batches (one_by_one: each in an order of its own)",)

    def build(self, plan: BuildPlan) -> nn.Module:
        """Members from the seeds `exits * seed`, `exits * seed + 1`, …, so that no two runs share one."""
        if plan.fission.exits < 2:
            raise ValueError(f"exits={plan.fission.exits}: a Deep Ensemble takes 2 members or more")
        first = plan.fission.exits * plan.fission.seed
        seeds = range(first, first + plan.fission.exits)
        return DeepEnsemble([FissionMethod(self.config).build(plan.with_one_exit(seed)) for seed in seeds])

    def epochs(self, asked: int, exits: int) -> int:
        """As many as asked for, for each member where they are trained one by one."""
        return asked * exits if self.config.one_by_one else asked

    def schedule(self, asked: str, exits: int) -> Schedule:
        """The whole course, for each member anew where they are trained one by one."""
        course = super().schedule(asked, exits)
        return (lambda done: course(done * exits % 1.0)) if self.config.one_by_one else course

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        """Pass from member to member where they are trained one by one.

        Raises:
            ValueError: so they are to be, on several devices.
        """
        if not self.config.one_by_one:
            return []
        if training.devices * training.machines > 1:
            raise ValueError("one_by_one=True: takes one device; members train together on several")
        return [TrainOneByOne(training.epochs)]


class TrainOneByOne(TrainingHook):
    """Trains one member after another, each for so many epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_epoch_start(self, network: nn.Module, epoch: int) -> None:
        """Say whose turn it is."""
        assert isinstance(network, DeepEnsemble)
        network.active = epoch // self.epochs
