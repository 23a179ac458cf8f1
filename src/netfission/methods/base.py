"""The interface of every method: a network of several predictions, and what differs in its training.

A new baseline is one file with a subclass of `Method`, and one line in `netfission.methods.registry.METHODS`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from netfission.config import BranchPoints, FissionConfig, MethodConfig, Reduction, TrainingConfig
from netfission.ensemble import Average
from netfission.losses import EnsembleDistillationLoss, distillation_loss
from netfission.methods.schedules import SCHEDULES, Schedule, warmed_up
from netfission.surgery.backbone import main_output
from netfission.utils.seeds import seeded

Network = Callable[[Tensor], Tensor]  # images → logits `(batch, exits, classes)`
Loss = Callable[[Tensor, Tensor], Tensor]  # logits and labels → a scalar
# Logits of exits, of a teacher `(batch, 1, classes)`, labels, and temperature → a scalar, summed over exits
Distillation = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class BuildPlan:
    """What a method needs to build its network.

    Attributes:
        create: seed → the single network on the CPU, images → logits `(batch, classes)`, its weights drawn
            from that seed.
        fission: number of exits (or members, for a method without exits), seed, and how to prune and split.
        example: images to trace with, float `(batch, channels, height, width)`.
        batches: pairs (images, labels) for the pruning criteria that read data.
        trained: whether the single network has trained weights.

    Example:
        >>> from functools import partial
        >>> create = partial(call_with_seed, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
        >>> plan = BuildPlan(create, FissionConfig(exits=3), torch.zeros(1, 1, 8, 8))
        >>> plan.with_one_exit(seed=7).fission.exits
        1
    """

    create: Callable[[int], nn.Module]
    fission: FissionConfig
    example: Tensor
    batches: Sequence[tuple[Tensor, Tensor]] = ()
    trained: bool = False

    @property
    def branch_after(self) -> list[int | str] | BranchPoints | None:
        """The branch points that the settings ask for; `auto` is replaced by what it stands for."""
        return self.fission.known_branch_after(trained=self.trained)

    def with_one_exit(self, seed: int | None = None) -> Self:
        """Return the plan of a network of one exit, which has no branches.

        Args:
            seed: of the network; default the seed of this plan.
        """
        seed = self.fission.seed if seed is None else seed
        one = replace(self.fission, exits=1, branch_after=None, linear_exits=None, ratio=None, seed=seed)
        return replace(self, fission=one)


class StepResult(NamedTuple):
    """The result of one training step.

    Attributes:
        loss: a scalar.
        logits: `(batch, exits, classes)` that the loss was computed from.
        labels: the labels of these logits, `(batch,)` or soft `(batch, classes)`.
    """

    loss: Tensor
    logits: Tensor
    labels: Tensor


class TrainingHook:
    """What a method does at set points of a training.

    A subclass overrides the points that it needs; the others do nothing. Any training loop can call them;
    `netfission.runs.callbacks.MethodHooks` does so in the runs of this library.

    Example:
        A hook that freezes the network's first layer after the first epoch:

        >>> class FreezeFirstLayer(TrainingHook):
        ...     def on_epoch_start(self, network: nn.Module, epoch: int) -> None:
        ...         network[0].requires_grad_(epoch == 0)
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> hook = FreezeFirstLayer()
        >>> for epoch in range(2):
        ...     hook.on_epoch_start(network, epoch)
        >>> [parameter.requires_grad for parameter in network.parameters()]
        [False, False, True, True]
    """

    def on_train_start(self, total_steps: int, epochs: int) -> None:
        """Run before the first step.

        Args:
            total_steps: optimiser steps of the whole training.
            epochs: epochs of the whole training.

        Raises:
            ValueError: the training is too short for the method.
        """

    def on_epoch_start(self, network: nn.Module, epoch: int) -> None:
        """Run before the first batch of an epoch, counted from 0."""

    def on_batch_start(self, network: nn.Module, step: int) -> None:
        """Run before a batch goes through the network, as part of an optimiser step counted from 0."""

    def on_before_step(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, step: int, seed: int
    ) -> None:
        """Run when the gradients of a step are complete, before the optimiser uses them.

        Args:
            network: in training.
            optimizer: of the network's parameters.
            step: number of the step, counted from 0.
            seed: of the training.
        """

    def on_batch_end(self, network: nn.Module, steps_done: int) -> None:
        """Run after a batch; `steps_done` counts the optimiser steps so far."""

    def on_exception(self) -> None:
        """Run when the training stops early."""


# The settings of fission, beside the seed, that a network of one exit reads.
SINGLE_EXIT_SETTINGS = frozenset({"stages", "sparsity", "criterion", "pruning_steps"})


class Method:
    """A way from one network to several predictions. A subclass must define `build`.

    To add a method, write one file in `netfission.methods` with a subclass whose name ends in `Method`, and
    enter it in `netfission.methods.registry.METHODS`. Settings of its own go into `MethodConfig`.

    A subclass that cannot use all settings overrides `check`, and calls it in `build`.

    All other methods of this class are the common training: each exit learns each image of a batch by
    cross-entropy, at the rate of the schedule in the settings. A subclass overrides what differs.

    Attributes:
        settings: names of the settings that the method reads, of `MethodConfig` and `FissionConfig`, beside
            `exits` and `seed`, which all methods read.
        average: what the ensemble averages over the predictions, by the method's authors: logits or
            probabilities. Evaluation, calibration, prediction and export follow `average_of`.
        average_source: where the authors say so.
        reduction: of the losses of the predictions, sum or mean, if the settings leave it open.
        distillation: the weight of the distillation term, if the settings leave it open.
        joint: whether a training step has several predictions of each image, so that it can distil.
        follows_schedule: whether the learning rate depends on the schedule in the settings.
        may_stop_early: whether the network of an epoch before the last one is a whole result.
        loses_weights: why its members cannot keep trained weights, in words for a message; empty if they can.
        needs_weights: why it is of use from trained weights alone, in words for a message; empty if it is of
            use from fresh ones, too.
        revision: raised when the training of the method changes, so that earlier results are not taken for
            results of the new one.
        deviations: how the training departs from the common one, in words for a reader.
        differences: where the settings differ from those of the method's authors, with their size, beside
            those that all methods share (epochs, optimiser, learning rate).

    Args:
        config: the settings of all methods.

    Example:
        A method that averages networks from different seeds, built for grey images of 8×8 pixels:

        >>> class Committee(nn.Module):
        ...     def __init__(self, members: list[nn.Module]) -> None:
        ...         super().__init__()
        ...         self.members = nn.ModuleList(members)
        ...
        ...     def forward(self, images: Tensor) -> Tensor:
        ...         return torch.stack([member(images) for member in self.members], dim=1)
        >>> class CommitteeMethod(Method):
        ...     def build(self, plan: BuildPlan) -> nn.Module:
        ...         return Committee([plan.create(seed) for seed in range(plan.fission.exits)])
        >>> def create(seed: int) -> nn.Module:
        ...     return call_with_seed(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), seed)
        >>> plan = BuildPlan(create, FissionConfig(exits=3), example=torch.zeros(2, 1, 8, 8))
        >>> network = CommitteeMethod(MethodConfig()).build(plan)
        >>> network(plan.example).shape  # (batch, exits, classes)
        torch.Size([2, 3, 10])
    """

    settings: ClassVar[frozenset[str]] = frozenset()
    average: ClassVar[Average] = "probabilities"
    average_source: ClassVar[str] = "Lakshminarayanan et al. 2017, section 2.4"
    reduction: ClassVar[Reduction] = "sum"
    distillation: ClassVar[float] = 0.0
    joint: ClassVar[bool] = True
    follows_schedule: ClassVar[bool] = True
    may_stop_early: ClassVar[bool] = True
    loses_weights: ClassVar[str] = ""
    needs_weights: ClassVar[str] = ""
    revision: ClassVar[int] = 0
    deviations: ClassVar[tuple[str, ...]] = ()
    differences: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build the network, on the CPU: images → logits `(batch, exits, classes)`.

        Raises:
            ValueError: a setting is not valid, or the method cannot use the model.
        """
        raise NotImplementedError

    def average_of(self, fission: FissionConfig) -> Average:
        """Return what the ensemble of a network averages over its predictions: `average` by default."""
        return self.average

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network before it is built; `build` checks them, too.

        Args:
            fission: number of exits, and how to prune and split.

        Raises:
            ValueError: a setting is not valid, or the method cannot be built so, whatever the model.
        """

    def check_start(self, plan: BuildPlan) -> None:
        """Check that what the network starts from fits, before a comparison trains another one.

        Raises:
            ValueError: trained weights do not fit, or the method cannot start from them.
        """
        plan.create(plan.fission.seed)

    @classmethod
    def distillation_weight(cls, training: TrainingConfig) -> float:
        """Return the weight of the distillation term: that of the settings, or else the method's."""
        weight = training.distillation_weight
        return cls.distillation if weight is None else weight

    def loss(self, training: TrainingConfig) -> nn.Module:
        """Return the loss that the settings ask for, by default with the method's reduction and weight."""
        return EnsembleDistillationLoss(
            training.temperature,
            self.distillation_weight(training),
            teacher=training.teacher,
            reduction=training.reduction or self.reduction,
        )

    def step(self, network: Network, images: Tensor, labels: Tensor, loss_fn: Loss) -> StepResult:
        """Compute the loss of one training step on one batch.

        Args:
            network: images → logits `(batch, exits, classes)`.
            images: `(batch, channels, height, width)`.
            labels: `(batch,)`, or soft `(batch, classes)`.
            loss_fn: logits and labels → a scalar, see `loss`.
        """
        logits = network(images)
        return StepResult(loss_fn(logits, labels), logits, labels)

    def with_parent(
        self,
        result: StepResult,
        images: Tensor,
        parent: nn.Module | None,
        training: TrainingConfig,
        distil: Distillation | None = None,
    ) -> StepResult:
        """Add to a step's loss the distillation from the network that the training started from.

        Args:
            result: of the step.
            images: `(batch, channels, height, width)`.
            parent: images → logits `(batch, classes)`, in eval mode; None to leave the loss as it is.
            training: the settings.
            distil: the loss of exits that learn from a teacher; default that of classes,
                `netfission.losses.distillation_loss`.
        """
        if parent is None:
            return result
        with torch.no_grad():
            teacher = main_output(parent(images))[:, None]
        distil = distil or _distil_classes
        loss = distil(result.logits, teacher, result.labels, training.temperature)
        if (training.reduction or self.reduction) == "mean":
            loss = loss / result.logits.shape[1]
        return result._replace(loss=result.loss + training.parent_weight * loss)

    def training_states(self, network: nn.Module) -> list[nn.Module]:
        """Return a copy of the network as it is in training, by which the cost of a step is measured.

        If the cost of a step changes in the course of a training, these are several networks, one for each
        of equally long parts of it.
        """
        return [copy.deepcopy(network)]

    def inference_network(self, network: nn.Module) -> nn.Module:
        """Return the part of a trained network that inference needs."""
        return network

    def epochs(self, epochs: int, exits: int) -> int:
        """Return the number of epochs of the whole training.

        Args:
            epochs: those in the settings.
            exits: number of predictions.
        """
        return epochs

    def schedule(self, training: TrainingConfig, exits: int) -> Schedule:
        """Return the schedule of the learning rate.

        Args:
            training: the settings, with the name of a schedule and the share of the warm-up.
            exits: number of predictions.
        """
        return warmed_up(SCHEDULES[training.schedule], training.warmup)

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        """Return what happens beside the training steps.

        Args:
            exits: number of predictions.
            training: how the network is trained.

        Raises:
            ValueError: the method cannot be trained so.
        """
        return []


def _distil_classes(logits: Tensor, teacher: Tensor, _labels: Tensor, temperature: float) -> Tensor:
    return distillation_loss(logits, teacher, temperature=temperature)


def call_with_seed(create: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Call `create` with PyTorch's global generator of the CPU seeded, and leave its state as it was.

    Example:
        >>> first, again = (call_with_seed(lambda: nn.Linear(2, 2), seed=0) for _ in range(2))
        >>> torch.equal(first.weight, again.weight)
        True
    """
    with seeded(seed):
        return create()
