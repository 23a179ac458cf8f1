"""What each contender costs, measured side by side in one process, over the single network."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from netfission.algorithm import fission
from netfission.config import MethodConfig, RunConfig, TrainingConfig
from netfission.inference.deployment import deploy
from netfission.methods.base import Distillation, Loss, Method
from netfission.methods.deep_ensemble import DeepEnsemble
from netfission.methods.fission import FissionMethod
from netfission.methods.registry import find_method
from netfission.methods.snapshot import Snapshots
from netfission.network import FissionNetwork
from netfission.profiling.cost import Size, count_parameters
from netfission.profiling.macs import count_macs, count_training_macs
from netfission.profiling.timing import Quartiles, inference_times, times_in_turn, training_step
from netfission.runs.folder import environment
from netfission.surgery.backbone import main_output
from netfission.tasks import Task

LARGEST_BATCH = 128  # of networks whose outputs are small
ROUNDS = 15
_SINGLE = ""  # the single network's key among the names of contenders


@dataclass(frozen=True)
class ContenderCost:
    """The costs of one contender.

    Attributes:
        size: parameters, and multiply-accumulates of inference per image.
        training_macs: multiply-accumulates of a training step, forward and backward, per image of the batch;
            the mean over the training if they change.
        training: time of a training step over the single network's; such a mean, too.
        inference: batch size → time of inference over the single network's, neither deployed.
        deployed: batch size → the same if both are deployed; empty if the contender cannot be deployed.
    """

    size: Size
    training_macs: float
    training: Quartiles
    inference: dict[int, Quartiles]
    deployed: dict[int, Quartiles]


@dataclass(frozen=True)
class Costs:
    """The costs of contenders, measured side by side.

    Attributes:
        single: costs of the single network, whose times are all 1.
        contenders: name → costs.
        rounds: number of times that each network ran.
        environment: versions, device, threads.
    """

    single: ContenderCost
    contenders: dict[str, ContenderCost]
    rounds: int
    environment: dict[str, Any]

    @property
    def batch_sizes(self) -> list[int]:
        """The numbers of images that inference was timed on, in ascending order."""
        return sorted(self.single.inference)


@dataclass(frozen=True)
class TimedContender:
    """A contender's trained network, the settings it is trained with, and the network that teaches it.

    The teacher is there if `parent_weight` is set: images → logits `(batch, classes)`.
    """

    network: nn.Module
    config: RunConfig
    parent: nn.Module | None = None

    @cached_property
    def method(self) -> Method:
        """The method that trains the network, the same one in all steps, as in a training."""
        return find_method(self.config.method)

    def loss(
        self,
        network: nn.Module,
        images: Tensor,
        targets: Tensor,
        loss_fn: Loss,
        distil: Distillation | None = None,
    ) -> Tensor:
        """Return the loss of a training step, a scalar.

        Args:
            network: that is trained.
            images: a batch.
            targets: of the batch.
            loss_fn: outputs and targets → a scalar, see `netfission.tasks.Task.loss`.
            distil: of the teacher, see `netfission.methods.base.Method.with_parent`.
        """
        result = self.method.step(network, images, targets, loss_fn)
        return self.method.with_parent(result, images, self.parent, self.config.training, distil).loss

    def training_steps(self, images: Tensor, task: Task) -> list[Callable[[], None]]:
        """Return steps on copies of the network, one per part of the training, to be run any number of times.

        See `netfission.methods.base.Method.training_states`.
        """
        loss_fn = task.loss(self.method, self.config.training)
        loss = partial(self.loss, loss_fn=loss_fn, distil=task.distil)
        targets = task.blank_targets(images)
        states = self.method.training_states(self.network)
        return [training_step(state, images, loss, targets) for state in states]


def measure_costs(
    contenders: Mapping[str, TimedContender],
    single: nn.Module,
    images: Tensor,
    task: Task,
    *,
    rounds: int = ROUNDS,
) -> Costs:
    """Count and time contenders, in rounds in which each of them and the single network runs once.

    Args:
        contenders: by name.
        single: the single network that all times are divided by: images → outputs `(batch, outputs, …)`,
            also as `"out"` of a dictionary.
        images: at least 2, on the CPU. Training is timed on all of them, inference on one and on all.
        task: what the networks learn.
        rounds: number of rounds.
    """
    networks = {
        name: contender.method.inference_network(contender.network).eval()
        for name, contender in contenders.items()
    }
    networks[_SINGLE] = single.eval()
    fast_networks = {name: fast for name, network in networks.items() if (fast := _deploy(network, images))}
    fast_networks[_SINGLE] = deploy(fission(single, 1, example_input=images[:2]), images)
    steps = {name: contender.training_steps(images, task) for name, contender in contenders.items()}
    steps[_SINGLE] = [
        training_step(copy.deepcopy(single), images, _single_loss(task), task.blank_targets(images))
    ]
    training = _ratios(_step_times(steps, images.device, rounds))
    inference, deployed = (
        {size: _ratios(inference_times(timed, images[:size], rounds=rounds)) for size in (1, len(images))}
        for timed in (networks, fast_networks)
    )
    costs = {
        name: ContenderCost(
            Size(*count_parameters(network), *count_macs(network, images[:1])),
            mean(map(count_training_macs, steps[name])) / len(images),
            training[name],
            {size: ratios[name] for size, ratios in inference.items()},
            {size: ratios[name] for size, ratios in deployed.items() if name in ratios},
        )
        for name, network in networks.items()
    }
    return Costs(costs.pop(_SINGLE), costs, rounds, environment())


def _single_loss(task: Task) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Return the loss of a training step of the single network, which learns from the targets alone."""
    loss = task.loss(FissionMethod(MethodConfig()), TrainingConfig(distillation_weight=0.0))

    def compute(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = loss(main_output(network(images)).unsqueeze(1), targets)
        return value

    return compute


def _step_times(
    steps: Mapping[str, Sequence[Callable[[], None]]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Time training steps; of a contender with several kinds of step, their mean in each round."""

    def all_steps(kinds: Sequence[Callable[[], None]]) -> None:
        for step in kinds:
            step()

    times = times_in_turn(
        {name: partial(all_steps, kinds) for name, kinds in steps.items()}, device, rounds=rounds
    )
    return {name: [seconds / len(steps[name]) for seconds in values] for name, values in times.items()}


def _ratios(times: Mapping[str, Sequence[float]]) -> dict[str, Quartiles]:
    """Each network's times over those of the single network, round by round."""
    return {name: Quartiles.of_ratios(network_times, times[_SINGLE]) for name, network_times in times.items()}


def _deploy(network: nn.Module, images: Tensor) -> nn.Module | None:
    """The deployed network; None if `deploy` does not support its kind."""
    if isinstance(network, FissionNetwork):
        return deploy(network, images)
    if isinstance(network, DeepEnsemble | Snapshots):
        parts = network.members if isinstance(network, DeepEnsemble) else [*network.slots, network.current]
        members = [fast for part in parts if (fast := _deploy(part, images))]
        return DeepEnsemble(members) if len(members) == len(parts) else None
    return None
