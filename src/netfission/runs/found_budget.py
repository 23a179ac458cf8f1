"""The multiply-accumulates that were found for a run's budget in a measured time."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from torch import nn

from netfission.config import FissionConfig
from netfission.grouping.budget import TimedBudget
from netfission.network import FissionNetwork


@dataclass(frozen=True)
class FoundBudget:
    """What was found for a budget in a measured time, and measured with it: a resumed run keeps it.

    Attributes:
        timed: the budget in multiply-accumulates, what is reached with it, and the time.
        stages: the modules that end the network's stages.
        batch_size: number of images that were timed.
        environment: versions, device and number of threads.
        branch_after: where the exits leave, if the budget made late ones leave earlier.

    Example:
        >>> from netfission.config import RunConfig
        >>> from netfission.profiling.timing import Quartiles
        >>> timed = TimedBudget(0.9, 0.89, Quartiles(0.97, 0.98, 1.0))
        >>> found = FoundBudget(timed, ["block1", "block2", "bn"], 32, {"threads": 1})
        >>> config = RunConfig.from_dict({"grouping": "channels", "budget_in": "time"})
        >>> found.applied(config.fission).budget
        0.9
    """

    timed: TimedBudget
    stages: list[str]
    batch_size: int
    environment: dict[str, Any]
    branch_after: list[int] | None = None

    @classmethod
    def of(cls, network: nn.Module, environment: dict[str, Any]) -> Self | None:
        """Return what was found for a network; None if its budget is not in a measured time."""
        if not isinstance(network, FissionNetwork) or network.timed is None or network.config is None:
            return None
        made = network.config
        branches = [*network.branch_after[: made.exits - 1]] if network.leaves_earlier else None
        return cls(network.timed, [*network.stage_names], made.budget_batch_size, environment, branches)

    def applied(self, config: FissionConfig) -> FissionConfig:
        """Return the settings with the multiply-accumulates in place of the time."""
        found = replace(config, budget=self.timed.asked, budget_in="macs", stages=self.stages)
        return found if self.branch_after is None else replace(found, branch_after=[*self.branch_after])

    def text(self) -> str:
        """Return it in words.

        Example:
            >>> from netfission.profiling.timing import Quartiles
            >>> timed = TimedBudget(0.9, 0.89, Quartiles(0.97, 0.98, 1.0))
            >>> FoundBudget(timed, ["block1"], 32, {}).text()
            'budget in time: 0.89 of the MACs take 0.98 (0.97–1.00) of the time, batch of 32, deployed'
        """
        timed, time = self.timed, self.timed.time
        return (
            f"budget in {timed.budget_in}: {timed.macs:.2f} of the MACs take {time.median:.2f} "
            f"({time.lower:.2f}–{time.upper:.2f}) of the time, batch of {self.batch_size}, {timed.run}"
        )

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"
