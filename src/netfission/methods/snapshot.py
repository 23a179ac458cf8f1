"""One training, several networks of it: Snapshot Ensembles and Fast Geometric Ensembling."""

import copy
from collections.abc import Sequence
from math import ceil, cos, pi
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from netfission.config import MethodConfig, TrainingConfig
from netfission.methods.base import SINGLE_EXIT_SETTINGS, BuildPlan, Method, TrainingHook
from netfission.methods.fission import FissionMethod
from netfission.methods.schedules import SCHEDULES, Schedule
from netfission.surgery.masks import MaskedModule


class Snapshots(MaskedModule):
    """A network in training beside earlier states of itself.

    In train mode, images → logits `(batch, 1, classes)` of the network in training alone. In eval mode
    `(batch, exits, classes)`: the snapshots in the order they were taken, then the network in training, once
    for each that is still to come.

    Attributes:
        current: the network in training; at the end the last of the ensemble.
        slots: `exits - 1` frozen networks of the same structure; those not yet taken hold its first weights.
        taken: how many of the slots hold a snapshot; an int64 scalar, part of the state dict.

    Args:
        network: images → logits `(batch, 1, classes)`.
        exits: number of predictions, at least 1.
    """

    taken: Tensor

    def __init__(self, network: nn.Module, exits: int) -> None:
        super().__init__()
        self.current = network
        self.slots = nn.ModuleList(copy.deepcopy(network).requires_grad_(False) for _ in range(exits - 1))
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))
        self.number_taken = 0  # `taken`, to be read without waiting for the device
        self.register_load_state_dict_post_hook(_read_taken)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits `(batch, 1, classes)` in train mode, `(batch, exits, classes)` in eval mode."""
        logits: Tensor = self.current(images)
        if self.training:
            return logits
        before = [self.slots[number](images) for number in range(self.number_taken)]
        to_come = len(self.slots) - self.number_taken
        return torch.cat([*before, *[logits] * (1 + to_come)], dim=1)

    @torch.no_grad()
    def take(self) -> None:
        """Copy the network as it is, with its masks and batch-norm statistics, into the next slot."""
        self.slots[self.number_taken].load_state_dict(self.current.state_dict())
        self.number_taken += 1
        self.taken.fill_(self.number_taken)


def _read_taken(module: nn.Module, _incompatible_keys: Any) -> None:
    assert isinstance(module, Snapshots)
    module.number_taken = int(module.taken)


class TakeSnapshots(TrainingHook):
    """Takes each snapshot after the optimiser's step that ends its cycle.

    Which are due follows from the number of steps done, which are taken is part of the network's state: so
    each is taken once, however many batches a step takes and wherever a run was killed and resumed.

    Args:
        ends: shares of the training done at which snapshots are due, rising, in (0, 1).
    """

    def __init__(self, ends: Sequence[float]) -> None:
        self.ends = tuple(ends)
        self.steps: list[int] = []

    def on_train_start(self, total_steps: int, epochs: int) -> None:
        """Turn shares into steps.

        Raises:
            ValueError: the training is so short that snapshots would be the same.
        """
        # Rounded first, since a share of a whole number of steps may lie a hair above it.
        self.steps = [ceil(round(end * total_steps, 6)) for end in self.ends]
        if len({*self.steps, total_steps}) <= len(self.steps):
            raise ValueError(
                f"epochs={epochs}: {total_steps} steps are too few for {len(self.steps) + 1} different "
                "snapshots"
            )

    def on_batch_end(self, network: nn.Module, steps_done: int) -> None:
        """Take what is due."""
        assert isinstance(network, Snapshots)
        while network.number_taken < sum(step <= steps_done for step in self.steps):
            network.take()


class SingleTrainingMethod(Method):
    """What the methods share: one network trained as long as a single one, and its snapshots.

    Batch-norm statistics are those that each snapshot had when it was taken: its weights are ones that were
    trained with, not averages, so that none have to be measured anew.
    """

    settings: ClassVar[frozenset[str]] = SINGLE_EXIT_SETTINGS

    def build(self, plan: BuildPlan) -> nn.Module:
        """`Snapshots` of the single network, pruned if asked.

        Raises:
            ValueError: `exits` is below 2.
        """
        exits = plan.fission.exits
        if exits < 2:
            raise ValueError(f"exits={exits}: method={self.config.method} takes 2 snapshots or more")
        return Snapshots(FissionMethod(self.config).build(plan.with_one_exit()), exits)

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        """What takes the snapshots.

        Raises:
            ValueError: an average of weights is asked for.
        """
        if training.ema is not None:
            raise ValueError(
                f"ema={training.ema}: does not go with method={self.config.method}, whose snapshots it would "
                "average with each other"
            )
        return [TakeSnapshots(self.ends(exits))]

    def ends(self, exits: int) -> list[float]:
        """The shares of the training after which the first `exits - 1` snapshots are taken."""
        raise NotImplementedError


class SnapshotMethod(SingleTrainingMethod):
    """Snapshot Ensembles (Huang et al. 2017, arXiv 1704.00109).

    The training is `exits` cycles of equal length, each with a rate that falls from the peak to 0 along half
    a cosine (their equation 2); a snapshot is taken at the end of each. Equation 2 rounds the length of a
    cycle up to whole steps, so that the last one may stop short of its end; here cycles start at the first
    step after each `exits`-th of the training, which is the same wherever that is a whole number of steps.
    """

    deviations = (
        "one network is trained; its learning rate restarts once an exit, whatever schedule is asked for",
    )

    def schedule(self, asked: str, exits: int) -> Schedule:
        """Cosine cycles; what is asked for plays no part."""

        def restarting(progress: float) -> float:
            # Rounded, since a product may lie a hair below the whole number at which the next cycle starts.
            in_cycle = round(progress * exits, 9) % 1
            return 0.5 * (cos(pi * in_cycle) + 1)

        return restarting

    def ends(self, exits: int) -> list[float]:
        """The ends of the cycles."""
        return [number / exits for number in range(1, exits)]


class FastGeometricMethod(SingleTrainingMethod):
    """Fast Geometric Ensembling (FGE; Garipov et al. 2018, arXiv 1802.10026).

    The training follows the schedule asked for, and leaves it for its last part (`cycling`), in which the
    rate goes linearly down from a half to a tenth of the peak and up again; a snapshot is taken at each low.
    Share and rates are those with which the authors repeat their CIFAR-100 results of WRN-28-10 and
    PreResNet-164 (github.com/timgaripov/dnn-mode-connectivity, README: the last 40 of 200 epochs, rates 0.05
    and 0.01 where training starts with 0.1). There a cycle is 2 epochs long and the number of snapshots
    follows; here there are `exits` of them, and the training ends at the last low, so that a cycle takes
    `cycling / (exits - 1/2)` of it.
    """

    settings = SINGLE_EXIT_SETTINGS | {"cycling"}
    deviations = ("one network is trained; for the last part of the training its learning rate cycles",)
    high = 0.5
    low = 0.1

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        if not 0 < config.cycling <= 1:
            raise ValueError(f"cycling={config.cycling}: takes a share of the epochs, above 0 and up to 1")

    def schedule(self, asked: str, exits: int) -> Schedule:
        """What is asked for, then triangular cycles."""
        start = 1 - self.config.cycling
        length = self.config.cycling / (exits - 0.5)

        def cycling(progress: float) -> float:
            if progress < start:
                return SCHEDULES[asked](progress)
            in_cycle = (progress - start) / length % 1
            from_low = abs(2 * in_cycle - 1)  # 1 at both ends of a cycle, 0 in its middle
            return from_low * self.high + (1 - from_low) * self.low

        return cycling

    def ends(self, exits: int) -> list[float]:
        """The middles of the cycles, where the rate is low."""
        start = 1 - self.config.cycling
        length = self.config.cycling / (exits - 0.5)
        return [start + (number + 0.5) * length for number in range(exits - 1)]
