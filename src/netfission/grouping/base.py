"""What every grouping offers: one stage in, one stage a path out."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Grouping(Protocol):
    """Deals the weights of a stage out to the paths that run through it."""

    def deal(
        self,
        stage: nn.Module,
        kept: Mapping[str, Tensor],
        shares: Sequence[float],
        generator: torch.Generator,
    ) -> list[nn.Module]:
        """Make each path's own stage.

        Args:
            stage: not changed.
            kept: prunable weight of the stage → bool tensor of its shape, True where pruning left it;
                empty where there was no pruning.
            shares: relative share of each path, positive; exit 0's first.
            generator: a CPU generator, the only source of randomness.

        Returns:
            One module a path, each taking the stage's input to the stage's output.
        """
        ...
