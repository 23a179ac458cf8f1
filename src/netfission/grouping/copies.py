"""No partition: every path gets the whole stage (TreeNet, Lee et al. 2015, arXiv 1511.06314)."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig
from netfission.grouping.base import Grouping, Stage, StageSplit
from netfission.surgery.masks import apply_masks, prunable_weights


@dataclass(frozen=True)
class CopyGrouping(Grouping):
    """Full-width branches: as many networks' worth of weights and MACs as there are paths.

    Exit 0 keeps the weights given. Equal branches would get equal gradients and stay equal for good, so
    each other path starts from weights of its own. By default, these are the same values in random order,
    tensor by tensor, which is a fresh draw from the model's own initialisation. It also undoes any
    pretraining, so trained weights get normal noise instead.

    Attributes:
        copy_noise: standard deviation of the noise over that of the weights of each tensor; None for a random
            order.

    Example:
        >>> from torch import nn
        >>> stage = Stage(nn.Linear(2, 2), torch.zeros(1, 2))
        >>> split = CopyGrouping().split(stage, {}, [1.0, 1.0], torch.Generator(), {})
        >>> [path.weight.shape for path in split.paths]
        [torch.Size([2, 2]), torch.Size([2, 2])]
    """

    copy_noise: float | None = None

    @classmethod
    def from_config(cls, config: FissionConfig) -> Self:
        """See `Grouping.from_config`."""
        return cls(config.copy_noise)

    def split(
        self,
        stage: Stage,
        kept: Mapping[str, Tensor],
        shares: Sequence[float],
        generator: torch.Generator,
        scores: Mapping[str, Tensor],
    ) -> StageSplit:
        """See `Grouping.split`; `shares` only tells how many paths there are."""
        paths = [copy.deepcopy(stage.module) for _ in shares]
        for path in paths[1:]:
            if self.copy_noise is None:
                shuffle_weights(path, generator)
            else:
                add_noise(path, self.copy_noise, generator)
        for path in paths:
            apply_masks(path, kept)
        return StageSplit(paths)


@torch.no_grad()
def shuffle_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Put the values of every prunable weight of `module` into random order, in place."""
    for weight in prunable_weights(module).values():
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.copy_(weight.flatten()[order].view_as(weight))


@torch.no_grad()
def add_noise(module: nn.Module, relative: float, generator: torch.Generator) -> None:
    """Add normal noise to every prunable weight of `module`, in place.

    Args:
        module: any module.
        relative: standard deviation of the noise over that of the weights of the same tensor.
        generator: on the CPU.
    """
    for weight in prunable_weights(module).values():
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        weight.add_(noise, alpha=relative * weight.std(correction=0).item())
