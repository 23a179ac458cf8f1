"""What each contender costs, measured side by side in one process, over the single network."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from netfission.algorithm import fission
from netfission.config import RunConfig
from netfission.inference.deploy import deploy
from netfission.methods.base import Method
from netfission.methods.deep_ensemble import DeepEnsemble
from netfission.methods.registry import find_method
from netfission.methods.snapshot import Snapshots
from netfission.network import FissionNetwork
from netfission.profiling.cost import Quartiles, Size, count_parameters, quartiles
from netfission.profiling.macs import count_macs, count_training_macs
from netfission.profiling.timing import inference_times, times_in_turn, training_step
from netfission.runs.folder import environment

BATCH_SIZES = (1, 128)
ROUNDS = 15
_SINGLE = ""  # among the names of contenders


@dataclass(frozen=True)
class ContenderCost:
    """One contender's costs.

    Attributes:
        size: parameters, and multiply-accumulates of inference of one image.
        training_macs: multiply-accumulates of a training step, forward and backward, an image of the batch.
        training: time of a training step over the single network's.
        inference: batch size → time of inference over the single network's, both as they are.
        deployed: the same once both are made fast by this project; empty where it cannot be done.
    """

    size: Size
    training_macs: float
    training: Quartiles
    inference: dict[int, Quartiles]
    deployed: dict[int, Quartiles]


@dataclass(frozen=True)
class Contestant:
    """A contender's trained network, and how it is trained."""

    network: nn.Module
    config: RunConfig

    @property
    def method(self) -> Method:
        """How it is trained."""
        return find_method(self.config.method)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """What a training step descends on."""
        return self.method.step(network, images, labels, self.method.loss(self.config.training)).loss


@dataclass(frozen=True)
class Costs:
    """Costs of contenders, measured side by side.

    Attributes:
        single: the single network's, all times 1.
        contenders: by name.
        rounds: how often each ran.
        environment: versions, device, threads.
    """

    single: ContenderCost
    contenders: dict[str, ContenderCost]
    rounds: int
    environment: dict[str, Any]


def measure_costs(
    contestants: Mapping[str, Contestant], single: nn.Module, images: Tensor, *, rounds: int = ROUNDS
) -> Costs:
    """Count and time contenders in rounds in which each of them, and the single network, runs once.

    Args:
        contestants: by name.
        single: images → logits `(batch, classes)`; what all times are divided by.
        images: as many as the largest of `BATCH_SIZES`, on the CPU.
        rounds: how often each runs.
    """
    networks = {name: each.network.eval() for name, each in contestants.items()} | {_SINGLE: single.eval()}
    fast = {name: made for name, network in networks.items() if (made := _deployed(network, images))}
    fast[_SINGLE] = deploy(fission(single, 1, example_input=images[:2]), images)
    steps = {name: _step(each, images) for name, each in contestants.items()}
    steps[_SINGLE] = training_step(copy.deepcopy(single), images)
    training = _ratios(times_in_turn(steps, images.device, rounds=rounds))
    inference, deployed = (
        {size: _ratios(inference_times(some, images[:size], rounds=rounds)) for size in BATCH_SIZES}
        for some in (networks, fast)
    )
    costs = {
        name: ContenderCost(
            Size(*count_parameters(network), *count_macs(network, images[:1])),
            count_training_macs(steps[name]) / len(images),
            training[name],
            {size: times[name] for size, times in inference.items()},
            {size: times[name] for size, times in deployed.items() if name in times},
        )
        for name, network in networks.items()
    }
    return Costs(costs.pop(_SINGLE), costs, rounds, environment())


def _step(contestant: Contestant, images: Tensor) -> Callable[[], None]:
    return training_step(copy.deepcopy(contestant.network), images, contestant.loss)


def _ratios(times: Mapping[str, Sequence[float]]) -> dict[str, Quartiles]:
    """Each one's times over those of the single network, round by round."""
    return {
        name: quartiles([one / single for one, single in zip(own, times[_SINGLE], strict=True)])
        for name, own in times.items()
    }


def _deployed(network: nn.Module, images: Tensor) -> nn.Module | None:
    """The network made fast to run; None where `deploy` does not know its kind."""
    if isinstance(network, FissionNetwork):
        return deploy(network, images)
    if isinstance(network, DeepEnsemble | Snapshots):
        parts = network.members if isinstance(network, DeepEnsemble) else [*network.slots, network.current]
        members = [_deployed(part, images) for part in parts]
        return None if None in members else DeepEnsemble([made for made in members if made is not None])
    return None
