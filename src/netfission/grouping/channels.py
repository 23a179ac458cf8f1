"""Channel grouping: each path gets its own internal channels of a stage, as a smaller dense stage."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from netfission.config import FissionConfig
from netfission.grouping.base import Grouping, RepeatedLayer, Stage, StageSplit
from netfission.grouping.weights import apportion
from netfission.grouping.widths import StageMacs, Widths, even_widths, exact_widths
from netfission.surgery.coupling import ChannelGroup, Coupling, kept_indices
from netfission.surgery.masks import prunable_weights
from netfission.surgery.narrowing import narrowed
from netfission.utils.errors import invalid

# Kernels work on blocks of 16 channels (AVX-512; a GPU's on 8 to 64): 85 channels take as long as 96.
BLOCK = 16


@dataclass(frozen=True)
class ChannelGrouping(Grouping):
    """A partition of whole internal channels.

    An internal channel touches neither the stage's input nor its output, so each path's stage is a dense
    stage of the same interface with fewer channels inside. Attention is dealt out by heads, an MLP by
    hidden units; depthwise convolutions, norms, biases and squeeze-excitation follow their channels.
    What lies on the interface, such as the projection of a shortcut, is repeated in every path.

    By default the paths' widths are multiples of 16 where there are enough channels, equal for equal
    shares, and chosen so that the multiply-accumulates of all paths add up to those of the stage within
    5 %, if possible to 97 %: the paths also read and write their features each for itself. Where that
    takes fewer channels than there are, some are left out; where it takes more (both sides of a
    bottleneck's 3×3 shrink), paths borrow channels of each other's shares.

    Attributes:
        exact: give out every channel exactly once instead, whatever it costs.
        by_importance: deal the channels like cards, most important first, so that no path starts poor,
            and leave out the least important; default at random.
    """

    exact: bool = False
    by_importance: bool = False
    masks_weights: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: FissionConfig) -> Self:
        """See `Grouping.from_config`."""
        return cls(config.exact_partition, by_importance=config.assignment == "importance")

    @property
    def needs_scores(self) -> bool:
        """See `Grouping.needs_scores`."""
        return self.by_importance

    def prunable_units(self, stage: Stage) -> Sequence[ChannelGroup]:
        """See `Grouping.prunable_units`: all internal channel groups."""
        return stage.coupling.groups

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
            ValueError: no channels of the stage can be dealt out, or a path would get none of a layer's.
        """
        coupling = stage.coupling
        left = [_left(group, kept) for group in coupling.groups]
        for group, units in zip(coupling.groups, left, strict=True):
            if not units.any():
                raise invalid(
                    "sparsity", "low enough to keep channels", found=f"no channels left of {group.layer!r}"
                )
        if len(shares) == 1:
            return StageSplit([narrowed(stage.module, kept_indices(coupling.groups, left))])
        divided = [group.units >= len(shares) for group in coupling.groups]
        if not any(divided):
            reasons = "; ".join(sorted({*coupling.whole.values(), *_too_few(coupling, shares)}))
            raise invalid(
                "stages",
                "divisible by channels",
                found=f"a stage with {', '.join(prunable_weights(stage.module))} ({reasons})",
                hint="name other stages or branch points, or use grouping='weights'",
            )
        counts = [int(units.sum()) for units in left]
        blocks = [
            _block(group, count, shares) if is_divided else None
            for group, count, is_divided in zip(coupling.groups, counts, divided, strict=True)
        ]
        widths = exact_widths(counts, blocks, shares)
        _refuse_none(coupling, widths)
        cost = 1.0
        if not self.exact:
            macs = StageMacs(stage)
            widths = even_widths(macs, counts, blocks, shares)
            cost = sum(map(macs, zip(*widths, strict=True))) / macs(counts)
        chosen: list[list[Tensor]] = [[] for _ in shares]
        for group, units, own, is_divided in zip(coupling.groups, left, widths, divided, strict=True):
            order = self._order(group, units, scores, generator)
            parts = _deal(order, own) if is_divided else [order] * len(shares)
            for path, part in zip(chosen, parts, strict=True):
                path.append(torch.zeros(group.units, dtype=torch.bool).index_fill(0, part, True))
        paths = [narrowed(stage.module, kept_indices(coupling.groups, units)) for units in chosen]
        return StageSplit(paths, _repeated(stage, divided, shares), cost)

    def _order(
        self, group: ChannelGroup, left: Tensor, scores: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """The units that are left, in the order they are dealt."""
        units = left.nonzero().squeeze(1)
        units = units[torch.randperm(len(units), generator=generator)]
        if self.by_importance:
            units = units[group.sums(scores)[units].argsort(descending=True, stable=True)]
        return units


def _left(group: ChannelGroup, kept: Mapping[str, Tensor]) -> Tensor:
    """The units that pruning left, bool `(units,)`."""
    if not kept:
        return torch.ones(group.units, dtype=torch.bool)
    return group.sums(kept) > 0


def _refuse_none(coupling: Coupling, widths: Widths) -> None:
    for group, of_paths in zip(coupling.groups, widths, strict=True):
        if min(of_paths) == 0:
            raise invalid(
                "ratio",
                "even enough to give channels to every path",
                found=f"none of layer {group.layer!r} for one of {len(of_paths)} paths",
                hint="use a lower sparsity or a more even ratio",
            )


def _block(group: ChannelGroup, count: int, shares: Sequence[float]) -> int:
    """The step in which a group's widths are chosen: at most a third of the narrowest path's."""
    first = group.slices[0]
    if int((first.units == 0).sum()) > 1:  # a unit is several channels already
        return 1
    block = BLOCK
    while block > 1 and 3 * block > count * min(shares) / sum(shares):
        block //= 2
    return block


def _deal(order: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Deal units out in order, always to the path that lacks most of its width; then let paths borrow.

    Args:
        order: int64 units.
        widths: how many each path takes; together they may take more units than there are, or fewer.
    """
    own = widths if sum(widths) <= len(order) else apportion(len(order), widths)
    parts: list[list[int]] = [[] for _ in widths]
    for unit in order[: sum(own)].tolist():
        lacks = [(width - len(part)) / max(width, 1) for width, part in zip(own, parts, strict=True)]
        parts[lacks.index(max(lacks))].append(unit)
    for path, width in enumerate(widths):
        held = set(parts[path])
        others = [unit for unit in order.tolist() if unit not in held]
        parts[path] += others[: width - len(parts[path])]
    return [torch.tensor(part) for part in parts]


def _too_few(coupling: Coupling, shares: Sequence[float]) -> Iterable[str]:
    return (
        f"{group.layer} has {group.units} units for {len(shares)} paths"
        for group in coupling.groups
        if group.units < len(shares)
    )


def _repeated(stage: Stage, divided: Sequence[bool], shares: Sequence[float]) -> tuple[RepeatedLayer, ...]:
    """The layers that every path holds whole."""
    coupling = stage.coupling
    reasons = dict(coupling.whole)
    dealt: set[str] = set()
    for group, is_divided in zip(coupling.groups, divided, strict=True):
        tensors = {part.tensor for part in group.slices}
        if is_divided:
            dealt |= tensors
        else:
            reasons |= dict.fromkeys(tensors, f"{group.units} units are too few for {len(shares)} paths")
    return tuple(
        RepeatedLayer(name, reasons[name], macs)
        for name, macs in stage.macs.items()
        if name in reasons and name not in dealt
    )
