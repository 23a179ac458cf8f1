"""Element-wise grouping: every weight of a stage belongs to one path (the paper's)."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Self

import torch
from torch import Tensor

from netfission.config import FissionConfig
from netfission.grouping.base import Grouping, Stage, StageSplit
from netfission.surgery.masks import apply_masks, kept_masks
from netfission.surgery.shortcuts import shortcut_weights


@dataclass(frozen=True)
class WeightGrouping(Grouping):
    """A random partition of the kept weights of each tensor, with exact counts.

    Biases, normalisation and other parameters are copied to every path: each trains its own.

    Attributes:
        keep_shortcuts: give every path the whole of each shortcut's projection, as the paper's code does,
            instead of dividing it as well. See `netfission.surgery.shortcuts`.

    Example:
        >>> from torch import nn
        >>> stage = Stage(nn.Linear(4, 4), torch.zeros(1, 4))
        >>> split = WeightGrouping().split(stage, {}, [1.0, 1.0], torch.Generator(), {})
        >>> [int(path.weight.count_nonzero()) for path in split.paths]
        [8, 8]
    """

    keep_shortcuts: bool = False

    @classmethod
    def from_config(cls, config: FissionConfig) -> Self:
        """See `Grouping.from_config`."""
        return cls(config.keep_shortcuts)

    def split(
        self,
        stage: Stage,
        kept: Mapping[str, Tensor],
        shares: Sequence[float],
        generator: torch.Generator,
        scores: Mapping[str, Tensor],
    ) -> StageSplit:
        """See `Grouping.split`."""
        groups: list[dict[str, Tensor]] = [{} for _ in shares]
        if len(shares) > 1 and not kept:
            kept = kept_masks(stage.module)
        keeps = self.keep_shortcuts and len(shares) > 1
        whole = shortcut_weights(stage.module, stage.features) if keeps else set[str]()
        for name, mask in kept.items():
            parts = [mask] * len(shares) if name in whole else partition(mask, shares, generator)
            for group, part in zip(groups, parts, strict=True):
                group[name] = part
        paths = [copy.deepcopy(stage.module) for _ in shares]
        for path, group in zip(paths, groups, strict=True):
            apply_masks(path, group)
        return StageSplit(paths)


def partition(mask: Tensor, shares: Sequence[float], generator: torch.Generator) -> list[Tensor]:
    """Divide the True entries of `mask` at random.

    Args:
        mask: bool tensor of any shape.
        shares: relative sizes of the parts, positive.
        generator: a CPU generator.

    Returns:
        One bool tensor per share, disjoint, whose union is `mask`. Part i has `shares[i] / sum(shares)` of
        its entries, rounded by largest remainder.
    """
    entries = mask.flatten().nonzero().squeeze(1)
    order = torch.randperm(len(entries), generator=generator).to(entries.device)
    parts = []
    for chosen in entries[order].split(apportion(len(entries), shares)):
        part = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
        part[chosen] = True
        parts.append(part.view_as(mask))
    return parts


def apportion(count: int, shares: Sequence[float]) -> list[int]:
    """Split `count` into integers proportional to `shares`, by largest remainder.

    Example:
        >>> apportion(10, [2, 1, 1])
        [5, 3, 2]
    """
    exact = [count * share / sum(shares) for share in shares]
    sizes = [int(quota) for quota in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: sizes[i] - exact[i])
    for i in by_remainder[: count - sum(sizes)]:
        sizes[i] += 1
    return sizes


def fewest(count: int, shares: Sequence[float]) -> int:
    """Return how many of `count` units must stay so that `apportion` gives every share at least one.

    It is 1 if there are fewer units than shares, since every path then gets all of them.

    Example:
        >>> fewest(10, [1, 1, 1]), fewest(10, [4, 1]), fewest(2, [1, 1, 1])
        (3, 3, 1)
    """
    if count < len(shares):
        return 1
    stay = min(count, ceil(sum(shares) / min(shares)))  # the smallest share is one unit or more from there
    while stay > len(shares) and min(apportion(stay - 1, shares)) > 0:
        stay -= 1
    return stay
