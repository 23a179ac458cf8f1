"""The multiply-accumulates that were found for a run's budget in time."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from torch import nn

from netfission.config import RunConfig
from netfission.network import FissionNetwork
from netfission.profiling.timing import Quartiles


@dataclass(frozen=True)
class FoundBudget:
    """What was found for a budget in time, and measured with it: a resumed run keeps it.

    Attributes:
        macs: multiply-accumulates of the network with all its paths over those of the model.
        time: time of its inference over the model's, deployed.
        batch_size: number of images that were timed.
        environment: versions, device and number of threads.

    Example:
        >>> found = FoundBudget(0.9, Quartiles(0.97, 0.98, 1.0), 32, {"threads": 1})
        >>> config = RunConfig.from_dict({"grouping": "channels", "budget_in": "time"})
        >>> found.applied(config).fission.budget
        0.9
    """

    macs: float
    time: Quartiles
    batch_size: int
    environment: dict[str, Any]

    @classmethod
    def of(cls, network: nn.Module, environment: dict[str, Any]) -> Self | None:
        """Return what was found for a network; None if its budget is not in time."""
        if not isinstance(network, FissionNetwork) or network.relative_time is None or network.config is None:
            return None
        config = network.config
        return cls(config.budget, network.relative_time, config.budget_batch_size, environment)

    def applied(self, config: RunConfig) -> RunConfig:
        """Return the settings with the multiply-accumulates in place of the budget in time."""
        return replace(config, fission=replace(config.fission, budget=self.macs, budget_in="macs"))

    def text(self) -> str:
        """Return it in words.

        Example:
            >>> FoundBudget(0.9, Quartiles(0.97, 0.98, 1.0), 32, {}).text()
            'budget in time: 0.90 of the MACs take 0.98 (0.97–1.00) of the time, batch of 32, deployed'
        """
        lower, median, upper = self.time.lower, self.time.median, self.time.upper
        return (
            f"budget in time: {self.macs:.2f} of the MACs take {median:.2f} ({lower:.2f}–{upper:.2f}) of the "
            f"time, batch of {self.batch_size}, deployed"
        )

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"
