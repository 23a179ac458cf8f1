"""What every grouping offers: one stage in, one stage a path out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RepeatedLayer:
    """A layer that every path repeats as it is.

    Attributes:
        layer: its weight, by its name in the stage.
        reason: why it is not dealt out.
        macs: multiply-accumulates of one copy on one image.
    """

    layer: str
    reason: str
    macs: int


@dataclass(frozen=True)
class StageSplit:
    """A stage dealt out.

    Attributes:
        paths: one module a path, each taking the stage's input to the stage's output.
        repeated: what all of them hold that was meant to be dealt out.
        cost: multiply-accumulates of all paths over the stage's; 1 where the grouping does not choose it.
    """

    paths: list[nn.Module]
    repeated: tuple[RepeatedLayer, ...] = ()
    cost: float = 1.0


class Grouping(Protocol):
    """Deals the weights of a stage out to the paths that run through it."""

    def split(
        self,
        stage: nn.Module,
        kept: Mapping[str, Tensor],
        shares: Sequence[float],
        generator: torch.Generator,
        *,
        features: Tensor,
        scores: Mapping[str, Tensor],
    ) -> StageSplit:
        """Make each path's own stage.

        Args:
            stage: not changed.
            kept: prunable weight of the stage → bool tensor of its shape, True where pruning left it;
                empty where there was no pruning.
            shares: relative share of each path, positive; exit 0's first.
            generator: a CPU generator, the only source of randomness.
            features: an example of the stage's input, batch first.
            scores: prunable weight of the stage → its importance, of the weight's shape; empty where it
                was not asked for.
        """
        ...
