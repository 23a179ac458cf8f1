"""Several networks from one training: Snapshot Ensembles and Fast Geometric Ensembling."""

import copy
from collections.abc import Sequence
from math import ceil, cos, pi
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig, MethodConfig, TrainingConfig
from netfission.methods.base import SINGLE_EXIT_SETTINGS, BuildPlan, Method, TrainingHook
from netfission.methods.checks import check_several_exits, check_unused
from netfission.methods.fission import FissionMethod
from netfission.methods.schedules import Schedule
from netfission.surgery.masks import MaskedModule
from netfission.utils.errors import invalid


class Snapshots(MaskedModule):
    """A network in training together with earlier states of itself.

    In train mode it maps images to logits `(batch, 1, classes)` of the network in training alone. In eval
    mode it maps them to `(batch, exits, classes)`. The snapshots come first, in the order in which they were
    taken. Then comes the network in training, repeated for each snapshot that is still missing.

    Attributes:
        current: the network in training; the last member of the ensemble at the end.
        slots: `exits - 1` frozen networks of the same structure; unused ones hold the first weights.
        taken: number of slots that hold a snapshot; an int64 scalar, part of the state dict.

    Args:
        network: images → logits `(batch, 1, classes)`.
        exits: number of predictions, at least 1.

    Example:
        >>> network = Snapshots(nn.Sequential(nn.Linear(4, 10), nn.Unflatten(1, (1, 10))), exits=3)
        >>> network.take()
        >>> int(network.taken), network.eval()(torch.rand(5, 4)).shape
        (1, torch.Size([5, 3, 10]))
    """

    taken: Tensor

    def __init__(self, network: nn.Module, exits: int) -> None:
        super().__init__()
        self.current = network
        self.training = network.training
        self.slots = nn.ModuleList(copy.deepcopy(network).requires_grad_(False) for _ in range(exits - 1))
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))
        self.number_taken = 0  # `taken`, to be read without waiting for the device
        self.register_load_state_dict_post_hook(_read_taken)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits; see the class for their shape in train and eval mode."""
        logits: Tensor = self.current(images)
        if self.training:
            return logits
        earlier = [self.slots[number](images) for number in range(self.number_taken)]
        missing = len(self.slots) - self.number_taken
        return torch.cat([*earlier, *[logits] * (1 + missing)], dim=1)

    @torch.no_grad()
    def take(self) -> None:
        """Copy the network, with its masks and batch-norm statistics, into the next slot."""
        self.slots[self.number_taken].load_state_dict(self.current.state_dict())
        self.number_taken += 1
        self.taken.fill_(self.number_taken)


def _read_taken(module: nn.Module, _incompatible_keys: Any) -> None:
    assert isinstance(module, Snapshots)
    module.number_taken = int(module.taken)


class TakeSnapshots(TrainingHook):
    """Takes each snapshot after the optimiser's step that ends its cycle.

    The number of snapshots that are due follows from the steps done; the number taken is part of the
    network's state. So each is taken once, also if a step has several batches or a run is resumed.

    Args:
        ends: increasing shares of the training, in (0, 1), after which snapshots are due.

    Example:
        >>> hook = TakeSnapshots([0.5])
        >>> hook.on_train_start(total_steps=30, epochs=3)
        >>> network = Snapshots(nn.Linear(4, 10), exits=2)
        >>> hook.on_batch_end(network, steps_done=15)
        >>> int(network.taken)
        1
    """

    def __init__(self, ends: Sequence[float]) -> None:
        self.ends = tuple(ends)
        self.steps: list[int] = []

    def on_train_start(self, total_steps: int, epochs: int) -> None:
        """Convert shares to steps.

        Raises:
            ValueError: the training is so short that snapshots would be the same.
        """
        # Rounded first, since a share of an integer number of steps may lie slightly above it.
        self.steps = [ceil(round(end * total_steps, 6)) for end in self.ends]
        if len({*self.steps, total_steps}) <= len(self.steps):
            expected = f"enough for {len(self.steps) + 1} different snapshots"
            raise invalid("epochs", expected, found=f"{epochs} ({total_steps} steps)")

    def on_batch_end(self, network: nn.Module, steps_done: int) -> None:
        """Take the snapshots that are due."""
        assert isinstance(network, Snapshots)
        while network.number_taken < sum(step <= steps_done for step in self.steps):
            network.take()


class SingleTrainingMethod(Method):
    """Base of the methods that train one network as long as a single one, and keep snapshots of it.

    Each snapshot keeps its batch-norm statistics. Its weights were trained with them, and are not averages,
    so that the statistics need not be computed again.
    """

    settings: ClassVar[frozenset[str]] = SINGLE_EXIT_SETTINGS
    joint = False
    may_stop_early = False

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network.

        Raises:
            ValueError: fewer than 2 exits.
        """
        check_several_exits(fission.exits, self.config.method)

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build `Snapshots` of the single network, pruned if the settings say so.

        Raises:
            ValueError: fewer than 2 exits, or what `netfission.fission` refuses.
        """
        self.check(plan.fission)
        return Snapshots(FissionMethod(self.config).build(plan.with_one_exit()), plan.fission.exits)

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        """Take the snapshots.

        Raises:
            ValueError: the training averages weights.
        """
        check_unused("ema", training.ema, None, self.config.method, "it would average the snapshots")
        return [TakeSnapshots(self.ends(exits))]

    def ends(self, exits: int) -> list[float]:
        """Return the shares of the training after which the first `exits - 1` snapshots are taken."""
        raise NotImplementedError


class SnapshotMethod(SingleTrainingMethod):
    """Snapshot Ensembles (Huang et al. 2017, arXiv 1704.00109).

    The training has `exits` cycles of equal length. In each, the rate falls from the peak to 0 along half a
    cosine (their equation 2), and a snapshot is taken at its end. Equation 2 rounds the length of a cycle up
    to an integer, so that the last cycle may be cut short. Here a cycle starts at the first step after each
    `exits`-th of the training, which is the same if that is an integer number of steps.
    """

    follows_schedule = False
    average_source = "the authors' code (github.com/gaohuang/SnapshotEnsemble, test_ensemble.lua)"
    deviations = (
        "one network is trained; its learning rate restarts once an exit, whatever schedule is asked for",
    )
    differences = (
        "one snapshot per exit (authors: M = 5, of cycles of 40 epochs)",
        "the rate restarts at the common peak, 0.1 in the grids (authors: 0.2)",
    )

    def schedule(self, training: TrainingConfig, exits: int) -> Schedule:
        """Return cosine cycles, whatever the schedule in the settings."""

        def restarting(progress: float) -> float:
            # Rounded, since a product may lie slightly below the integer at which the next cycle starts.
            in_cycle = round(progress * exits, 9) % 1
            return 0.5 * (cos(pi * in_cycle) + 1)

        return restarting

    def ends(self, exits: int) -> list[float]:
        """Return the ends of the cycles."""
        return [number / exits for number in range(1, exits)]


class FastGeometricMethod(SingleTrainingMethod):
    """Fast Geometric Ensembling (FGE; Garipov et al. 2018, arXiv 1802.10026).

    The training follows the schedule in the settings except for its last part, the share `cycling`. There the
    rate falls linearly from a half to a tenth of the peak and rises again, in cycles; a snapshot is taken at
    each low. Share and rates are those of the authors' CIFAR-100 results for WRN-28-10 and PreResNet-164: the
    last 40 of 200 epochs, and rates of 0.05 and 0.01 if training starts with 0.1. See the README of
    github.com/timgaripov/dnn-mode-connectivity.

    In the authors' code a cycle is 2 epochs long, which gives the number of snapshots. Here there are `exits`
    snapshots and the training ends at the last low, so that a cycle is `cycling / (exits - 1/2)` of it.
    """

    settings = SINGLE_EXIT_SETTINGS | {"cycling"}
    average_source = "the authors' code (github.com/timgaripov/dnn-mode-connectivity, fge.py)"
    deviations = ("one network is trained; for the last part of the training its learning rate cycles",)
    high = 0.5
    low = 0.1
    differences = (
        "one snapshot per exit (authors: 20)",
        "cycles of cycling / (exits - 1/2) of the training: 1.6 of 20 epochs (authors: 2 of 200)",
    )

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        if not 0 < config.cycling <= 1:
            raise invalid("cycling", "a share of the epochs, in (0, 1]", config.cycling)

    def schedule(self, training: TrainingConfig, exits: int) -> Schedule:
        """Return the schedule in the settings, followed by triangular cycles."""
        common = super().schedule(training, exits)
        start = 1 - self.config.cycling
        length = self.config.cycling / (exits - 0.5)

        def cycling(progress: float) -> float:
            if progress < start:
                return common(progress)
            in_cycle = (progress - start) / length % 1
            from_low = abs(2 * in_cycle - 1)  # 1 at both ends of a cycle, 0 in its middle
            return from_low * self.high + (1 - from_low) * self.low

        return cycling

    def ends(self, exits: int) -> list[float]:
        """Return the middles of the cycles, where the rate is low."""
        start = 1 - self.config.cycling
        length = self.config.cycling / (exits - 0.5)
        return [start + (number + 0.5) * length for number in range(exits - 1)]
