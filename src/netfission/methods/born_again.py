"""Born-Again Networks (Furlanello et al. 2018, arXiv 1805.04770): a network that is its own teacher."""

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig, TrainingConfig
from netfission.losses import EnsembleDistillationLoss, distillation_loss
from netfission.methods.base import (
    SINGLE_EXIT_SETTINGS,
    BuildPlan,
    Loss,
    Method,
    Network,
    StepResult,
    TrainingHook,
)
from netfission.methods.checks import check_unused
from netfission.methods.fission import FissionMethod
from netfission.methods.schedules import Schedule, repeated
from netfission.surgery.masks import MaskedModule
from netfission.utils.errors import check_positive_integer, invalid
from netfission.utils.modes import in_mode


class BornAgain(MaskedModule):
    """Networks of the same structure, trained one after another, each with the one before as its teacher.

    In train mode it maps images to logits `(batch, 1, classes)` of the network in training, followed by those
    of its teacher, if it has one: `(batch, 2, classes)`. In eval mode it maps them to those of the network in
    training alone.

    Attributes:
        generations: the networks.
        active: the number of the network in training, from 0; an int64 scalar, part of the state dict.

    Args:
        generations: networks of images → logits `(batch, 1, classes)`.

    Example:
        >>> def network():
        ...     return nn.Sequential(nn.Linear(4, 10), nn.Unflatten(1, (1, 10)))
        >>> chain = BornAgain([network(), network()])
        >>> chain.start(1)
        >>> chain(torch.rand(5, 4)).shape, chain.eval()(torch.rand(5, 4)).shape
        (torch.Size([5, 2, 10]), torch.Size([5, 1, 10]))
    """

    active: Tensor

    def __init__(self, generations: Sequence[nn.Module]) -> None:
        super().__init__()
        self.generations = nn.ModuleList(generations)
        self.register_buffer("active", torch.zeros((), dtype=torch.long))
        self.number = 0  # `active`, to be read without waiting for the device
        self.register_load_state_dict_post_hook(_read_active)  # type: ignore[no-untyped-call]

    def start(self, number: int) -> None:
        """Train the network of this number from now on."""
        self.number = number
        self.active.fill_(number)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits; see the class for their shape in train and eval mode."""
        logits: Tensor = self.generations[self.number](images)
        if not self.training or self.number == 0:
            return logits
        teacher = self.generations[self.number - 1]
        with torch.no_grad(), in_mode(teacher, training=False):
            teacher_logits = teacher(images)
        return torch.cat([logits, teacher_logits], dim=1)


def _read_active(module: nn.Module, _incompatible_keys: object) -> None:
    assert isinstance(module, BornAgain)
    module.number = int(module.active)


class BornAgainLoss(nn.Module):
    """Cross-entropy of the network in training, plus distillation from its teacher.

    Args:
        temperature: of the distillation.
        weight: factor on the distillation term, ≥ 0.

    Example:
        >>> loss = BornAgainLoss(temperature=3.0, weight=1.0)
        >>> student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[3.0, 0.0]]])
        >>> labels = torch.tensor([0])
        >>> loss(student, labels)  # no teacher: log 2
        tensor(0.6931)
        >>> loss(torch.cat([student, teacher], dim=1), labels)
        tensor(1.6916)
    """

    def __init__(self, temperature: float, weight: float) -> None:
        super().__init__()
        self.cross_entropy = EnsembleDistillationLoss(temperature, weight=0.0)
        self.temperature = temperature
        self.weight = weight

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits `(batch, 1 or 2, classes)`, those of a teacher last."""
        student, teacher = logits[:, :1], logits[:, 1:]
        loss: Tensor = self.cross_entropy(student, labels)
        if teacher.shape[1]:
            loss = loss + self.weight * distillation_loss(student, teacher, temperature=self.temperature)
        return loss


class StartGenerations(TrainingHook):
    """Starts each generation at its epoch.

    Args:
        generations: number of them.
        epochs: of all generations together, a multiple of their number.

    Example:
        >>> chain = BornAgain([nn.Linear(4, 10), nn.Linear(4, 10)])
        >>> StartGenerations(2, epochs=30).on_epoch_start(chain, epoch=15)
        >>> chain.number
        1
    """

    def __init__(self, generations: int, epochs: int) -> None:
        self.generations = generations
        self.epochs = epochs

    def on_epoch_start(self, network: nn.Module, epoch: int) -> None:
        """Choose the network that this epoch trains."""
        assert isinstance(network, BornAgain)
        network.start(epoch * self.generations // self.epochs)


class BornAgainMethod(Method):
    """A single network with itself as its teacher: the simplest use of a longer training.

    The epochs are divided evenly among `generations` networks from different seeds. Each but the first learns
    from the labels and, at the distillation's temperature, from the one before it; in the paper at
    temperature 1. The last one is the result. The schedule of the learning rate repeats with each generation.
    """

    settings: ClassVar[frozenset[str]] = SINGLE_EXIT_SETTINGS | {"generations"}
    joint = False
    may_stop_early = False
    average = "logits"
    average_source = "it has one prediction"
    distillation = 1.0
    deviations = ("the epochs are divided among generations; each has the one before as its teacher",)

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network.

        Raises:
            ValueError: fewer than 2 generations, or more than one exit.
        """
        if check_positive_integer("generations", self.config.generations) == 1:
            raise invalid("generations", "at least 2", self.config.generations)
        check_unused("exits", fission.exits, 1, self.config.method, "it has one prediction")

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build networks from the seeds `generations * seed`, `generations * seed + 1`, ….

        Raises:
            ValueError: fewer than 2 generations, more than one exit, or what `netfission.fission` refuses.
        """
        self.check(plan.fission)
        generations = self.config.generations
        first = generations * plan.fission.seed
        plans = [plan.with_one_exit(first + number) for number in range(generations)]
        return BornAgain([FissionMethod(self.config).build(one) for one in plans])

    def loss(self, training: TrainingConfig) -> nn.Module:
        """Return the loss that the settings ask for."""
        return BornAgainLoss(training.temperature, self.distillation_weight(training))

    def training_states(self, network: nn.Module) -> list[nn.Module]:
        """Return copies of the network, one in the training of each generation."""
        assert isinstance(network, BornAgain)
        states = [copy.deepcopy(network) for _ in network.generations]
        for number, state in enumerate(states):
            state.start(number)
        return list(states)

    def inference_network(self, network: nn.Module) -> nn.Module:
        """Return the last generation, as its teachers are not needed any more."""
        assert isinstance(network, BornAgain)
        return network.generations[network.number]

    def step(self, network: Network, images: Tensor, labels: Tensor, loss_fn: Loss) -> StepResult:
        """Compute the loss of one training step; the logits returned are those of the network in training."""
        logits = network(images)
        return StepResult(loss_fn(logits, labels), logits[:, :1], labels)

    def schedule(self, training: TrainingConfig, exits: int) -> Schedule:
        """Return the schedule in the settings, repeated per generation."""
        return repeated(super().schedule(training, exits), self.config.generations)

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        """Start each generation at its epoch.

        Raises:
            ValueError: the epochs cannot be divided evenly, the training averages weights, or it runs on
                several devices.
        """
        devices = training.devices * training.machines
        check_unused("devices", devices, 1, self.config.method, "other generations get no gradients")
        generations = self.config.generations
        if training.epochs % generations:
            raise invalid("epochs", f"a multiple of generations={generations}", training.epochs)
        check_unused("ema", training.ema, None, self.config.method, "it would average the generations")
        return [StartGenerations(generations, training.epochs)]
