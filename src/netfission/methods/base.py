"""What every method offers: a network of several predictions, and how it departs from the common training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig, MethodConfig, TrainingConfig
from netfission.losses import EnsembleDistillationLoss
from netfission.methods.schedules import SCHEDULES, Schedule

Network = Callable[[Tensor], Tensor]  # images → logits `(batch, exits, classes)`
Loss = Callable[[Tensor, Tensor], Tensor]  # logits and labels → a scalar


@dataclass(frozen=True)
class BuildPlan:
    """What a method makes its network of.

    Attributes:
        create: seed → the single network on the CPU, images → logits `(batch, classes)`, its weights drawn
            from that seed.
        fission: number of exits (members of a method that has no exits), seed, and how to prune and cut.
        example: images to trace with, float `(batch, channels, height, width)`.
        batches: pairs (images, labels) for the pruning criteria that look at data.
    """

    create: Callable[[int], nn.Module]
    fission: FissionConfig
    example: Tensor
    batches: Sequence[tuple[Tensor, Tensor]] = ()

    def with_one_exit(self, seed: int | None = None) -> Self:
        """The plan of a network of one exit, which has no branches.

        Args:
            seed: its own; default the plan's.
        """
        seed = self.fission.seed if seed is None else seed
        one = replace(self.fission, exits=1, branch_after=None, ratio=None, seed=seed)
        return replace(self, fission=one)


class StepResult(NamedTuple):
    """What one training step came to.

    Attributes:
        loss: a scalar.
        logits: `(batch, exits, classes)` that it was taken of.
        labels: those that go with them, `(batch,)` or soft `(batch, classes)`.
    """

    loss: Tensor
    logits: Tensor
    labels: Tensor


class TrainingHook:
    """What a method does at set points of a training. Each point does nothing unless overridden.

    A training loop calls them; Lightning's does through `netfission.runs.callbacks.MethodHooks`.
    """

    def on_train_start(self, total_steps: int, epochs: int) -> None:
        """Before the first step.

        Args:
            total_steps: optimiser steps of the whole training.
            epochs: epochs of the whole training.

        Raises:
            ValueError: the training is too short for the method.
        """

    def on_epoch_start(self, network: nn.Module, epoch: int) -> None:
        """Before the first batch of an epoch, counted from 0."""

    def on_batch_start(self, network: nn.Module, step: int) -> None:
        """Before a batch goes through the network, as part of an optimiser step counted from 0."""

    def on_before_step(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, step: int, seed: int
    ) -> None:
        """After the gradients of a step, counted from 0, are complete and before the optimiser uses them.

        Args:
            network: in training.
            optimizer: of its parameters.
            step: number of the step.
            seed: of the training.
        """

    def on_batch_end(self, network: nn.Module, steps_done: int) -> None:
        """After a batch; `steps_done` counts the optimiser steps so far."""

    def on_exception(self) -> None:
        """When the training stops early."""


# What a network of one exit reads of the settings of fission, beside the seed.
SINGLE_EXIT_SETTINGS = frozenset({"stages", "sparsity", "criterion", "pruning_steps"})


class Method:
    """A way from one network to several predictions.

    What a subclass leaves as it is here is the common training: every exit learns every image of a batch by
    cross-entropy, at the rate of the schedule asked for.

    Args:
        config: the settings of all methods; `settings` names those that this one reads, of them and of
            fission's, beside exits and seed.
    """

    settings: ClassVar[frozenset[str]] = frozenset()
    distillation: ClassVar[float] = 0.0  # the factor on the distillation term where none is asked for
    deviations: ClassVar[tuple[str, ...]] = ()  # from the common training, in words for a reader

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    def build(self, plan: BuildPlan) -> nn.Module:
        """The network, on the CPU: images → logits `(batch, exits, classes)`.

        Raises:
            ValueError: a setting is not what it takes, or the network cannot carry the method.
        """
        raise NotImplementedError

    def loss(self, training: TrainingConfig) -> EnsembleDistillationLoss:
        """What a step descends on: as the settings say, with the method's own factor where they do not."""
        weight = training.distillation_weight
        return EnsembleDistillationLoss(
            training.temperature,
            self.distillation if weight is None else weight,
            teacher=training.teacher,
            reduction=training.reduction,
        )

    def step(self, network: Network, images: Tensor, labels: Tensor, loss_fn: Loss) -> StepResult:
        """One training step's loss on one batch."""
        logits = network(images)
        return StepResult(loss_fn(logits, labels), logits, labels)

    def epochs(self, asked: int, exits: int) -> int:
        """How many epochs the whole training takes.

        Args:
            asked: those in the settings.
            exits: number of predictions.
        """
        return asked

    def schedule(self, asked: str, exits: int) -> Schedule:
        """The learning rate's course.

        Args:
            asked: name of the schedule in the settings.
            exits: number of predictions.
        """
        return SCHEDULES[asked]

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        """What happens beside the steps.

        Args:
            exits: number of predictions.
            training: how the network is trained.
        """
        return []


def call_with_seed(create: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What `create` makes of random numbers from a seed; the global generator stays as it was."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return create()
