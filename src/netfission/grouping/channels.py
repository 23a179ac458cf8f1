"""Channel grouping: each path gets its own internal channels of a stage, as a smaller dense stage."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from netfission.config import FissionConfig
from netfission.grouping.base import Grouping, RepeatedLayer, Stage, StageSplit
from netfission.grouping.weights import apportion
from netfission.grouping.widths import StageMacs, Widths, even_widths, exact_widths
from netfission.surgery.coupling import ChannelGroup, Coupling, kept_indices, scattered_norms
from netfission.surgery.masks import prunable_weights
from netfission.surgery.narrowing import narrowed
from netfission.utils.errors import invalid

# Kernels work on blocks of 16 channels (AVX-512; a GPU's on 8 to 64): 85 channels take as long as 96.
BLOCK = 16


@dataclass(frozen=True)
class ChannelGrouping(Grouping):
    """A partition of whole internal channels.

    An internal channel touches neither the stage's input nor its output, so each path's stage is a dense
    stage of the same interface with fewer channels inside. Attention is divided by heads, an MLP by
    hidden units. Depthwise convolutions, norms, biases and squeeze-excitation follow their channels.
    Every path repeats the layers on the interface, such as the projection of a shortcut. Batch norms in
    identity branches may tie all channels to the interface (RepVGG, MobileOne). Then one of the last reads
    the channels of the path and adds nothing to the others; see `find_coupling`. A head of several layers is
    divided as well, if copies of it would add over 5 % to the network's multiply-accumulates.

    By default, widths are multiples of 16 if there are enough channels, and equal for equal shares. All
    paths together need `cost` times the multiply-accumulates of the stage, within 5 %, and 97 % of that if
    possible; see `netfission.grouping.widths`. If these widths need fewer channels than there are, some are
    left out. If they need more (both sides of a bottleneck's 3×3 shrink), paths share channels.

    Attributes:
        exact: give each channel to exactly one path instead, whatever the cost.
        cost: multiply-accumulates of all paths over those of the stage.
        by_importance: assign channels in turn, most important first, so that every path gets important
            ones, and leave out the least important; default at random.
        overlap: share of the channels of the narrowest path that all paths hold, the first of those that are
            assigned, in [0, 1].

    Example:
        >>> ChannelGrouping(by_importance=True).needs_scores
        True
    """

    exact: bool = False
    by_importance: bool = False
    overlap: float = 0.0
    cost: float = 1.0
    masks_weights: ClassVar[bool] = False
    divides_heads: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: FissionConfig) -> Self:
        """See `Grouping.from_config`."""
        return cls(config.exact_partition, config.assignment == "importance", config.overlap)

    @property
    def needs_scores(self) -> bool:
        """See `Grouping.needs_scores`."""
        return self.by_importance

    def within(self, cost: float) -> Self:
        """See `Grouping.within`."""
        return replace(self, cost=cost)

    def prunable_units(self, stage: Stage) -> Sequence[ChannelGroup]:
        """See `Grouping.prunable_units`: all internal channel groups."""
        return stage.coupling.groups

    def can_divide(self, stage: Stage, paths: int) -> bool:
        """See `Grouping.can_divide`: whether a group has a unit for each path."""
        return any(group.units >= paths for group in stage.coupling.groups)

    def split(
        self,
        stage: Stage,
        kept: Mapping[str, Tensor],
        shares: Sequence[float],
        generator: torch.Generator,
        scores: Mapping[str, Tensor],
    ) -> StageSplit:
        """See `Grouping.split`.

        Raises:
            ValueError: no channels of the stage can be divided, or a path would get none of a layer's.
        """
        coupling = stage.coupling
        left = [_left(group, kept) for group in coupling.groups]
        for group, units in zip(coupling.groups, left, strict=True):
            if not units.any():
                raise invalid(
                    "sparsity", "low enough to keep channels", found=f"no channels left of {group.layer!r}"
                )
        if len(shares) == 1:
            return _split_into(stage, [left])
        divided = [group.units >= len(shares) for group in coupling.groups]
        if not any(divided):
            reasons = "; ".join(sorted({*coupling.undivided.values(), *_too_few(coupling, shares)}))
            layers = ", ".join(prunable_weights(stage.module))
            raise invalid(
                "stages",
                "divisible by channels",
                found=f"a stage with {layers} ({reasons})" if layers else "a stage without layers",
                hint="name other stages or branch points, or use grouping='weights'",
            )
        counts = [int(units.sum()) for units in left]
        blocks = [
            _block(group, count, shares) if is_divided else None
            for group, count, is_divided in zip(coupling.groups, counts, divided, strict=True)
        ]
        widths = exact_widths(counts, blocks, shares)
        _check_not_empty(coupling, widths)
        cost = 1.0
        if not self.exact:
            macs = StageMacs(stage)
            widths = even_widths(macs, counts, blocks, shares, self.cost)
            cost = sum(map(macs, zip(*widths, strict=True))) / macs(counts)
        chosen: list[list[Tensor]] = [[] for _ in shares]
        for group, units, of_paths, is_divided in zip(coupling.groups, left, widths, divided, strict=True):
            order = self._order(group, units, scores, generator)
            parts = assign_units(order, of_paths, self.overlap) if is_divided else [order] * len(shares)
            for path, part in zip(chosen, parts, strict=True):
                path.append(torch.zeros(group.units, dtype=torch.bool).index_fill(0, part, True))
        return _split_into(stage, chosen, _repeated(stage, divided, shares), cost)

    def _order(
        self, group: ChannelGroup, left: Tensor, scores: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Return the units that pruning left, in the order they are assigned."""
        units = left.nonzero().squeeze(1)
        units = units[torch.randperm(len(units), generator=generator)]
        if self.by_importance:
            units = units[group.sums(scores)[units].argsort(descending=True, stable=True)]
        return units


def _split_into(
    stage: Stage,
    units: Sequence[Sequence[Tensor]],
    repeated: tuple[RepeatedLayer, ...] = (),
    cost: float = 1.0,
) -> StageSplit:
    """Return the stage with some units of each group: for each path a bool tensor `(units,)` per group."""
    groups = stage.coupling.groups
    kept = [kept_indices(groups, of_path) for of_path in units]
    paths = [narrowed(stage.module, indices, scattered_norms(groups)) for indices in kept]
    return StageSplit(paths, repeated, cost, kept)


def _left(group: ChannelGroup, kept: Mapping[str, Tensor]) -> Tensor:
    """Return which units pruning left, bool `(units,)`."""
    if not kept:
        return torch.ones(group.units, dtype=torch.bool)
    return group.sums(kept) > 0


def _check_not_empty(coupling: Coupling, widths: Widths) -> None:
    """Check that each path gets at least one unit of each group."""
    for group, of_paths in zip(coupling.groups, widths, strict=True):
        if min(of_paths) == 0:
            raise invalid(
                "ratio",
                "even enough to give channels to every path",
                found=f"none of layer {group.layer!r} for one of {len(of_paths)} paths",
                hint="use a more even ratio",
            )


def _block(group: ChannelGroup, count: int, shares: Sequence[float]) -> int:
    """Return the block that a group's widths are multiples of: at most a third of the narrowest width."""
    first = group.slices[0]
    if int((first.units == 0).sum()) > 1:  # a unit is several channels already
        return 1
    block = BLOCK
    while block > 1 and 3 * block > count * min(shares) / sum(shares):
        block //= 2
    return block


def assign_units(order: Tensor, widths: Sequence[int], overlap: float = 0.0) -> list[Tensor]:
    """Assign units to paths in order, each to the path that is furthest from its width.

    Args:
        order: int64 units.
        widths: number of units of each path. If they add up to fewer units than there are, the last units
            are left out. If they add up to more, each path is filled up with the first units of the others.
        overlap: share of the least width, in [0, 1]: so many of the first units go to all paths.

    Returns:
        The units of each path, int64.

    Example:
        >>> assign_units(torch.arange(6), [3, 2])
        [tensor([0, 2, 4]), tensor([1, 3])]
        >>> assign_units(torch.arange(3), [2, 2])
        [tensor([0, 2]), tensor([1, 0])]
        >>> assign_units(torch.arange(6), [4, 4], overlap=0.5)
        [tensor([0, 1, 2, 4]), tensor([0, 1, 3, 5])]
    """
    common = round(overlap * min(widths))
    if common:
        rest = assign_units(order[common:], [width - common for width in widths])
        return [torch.cat([order[:common], part]) for part in rest]
    exclusive = widths if sum(widths) <= len(order) else apportion(len(order), widths)
    parts: list[list[int]] = [[] for _ in widths]
    for unit in order[: sum(exclusive)].tolist():
        missing = [(width - len(part)) / max(width, 1) for width, part in zip(exclusive, parts, strict=True)]
        parts[missing.index(max(missing))].append(unit)
    for path, width in enumerate(widths):
        held = set(parts[path])
        others = [unit for unit in order.tolist() if unit not in held]
        parts[path] += others[: width - len(parts[path])]
    return [order.new_tensor(part) for part in parts]


def _too_few(coupling: Coupling, shares: Sequence[float]) -> Iterable[str]:
    return (
        f"{group.layer} has {group.units} units for {len(shares)} paths"
        for group in coupling.groups
        if group.units < len(shares)
    )


def _repeated(stage: Stage, divided: Sequence[bool], shares: Sequence[float]) -> tuple[RepeatedLayer, ...]:
    """Return the layers that every path repeats."""
    coupling = stage.coupling
    reasons = dict(coupling.undivided)
    in_groups: set[str] = set()
    for group, is_divided in zip(coupling.groups, divided, strict=True):
        tensors = {part.tensor for part in group.slices}
        if is_divided:
            in_groups |= tensors
        else:
            reasons |= dict.fromkeys(tensors, f"{group.units} units are too few for {len(shares)} paths")
    return tuple(
        RepeatedLayer(name, reasons[name], macs)
        for name, macs in stage.macs.items()
        if name in reasons and name not in in_groups
    )
