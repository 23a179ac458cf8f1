"""How many units of each channel group a path gets, so that all paths together cost what the stage does."""

from collections.abc import Sequence
from math import ceil, floor, prod

from netfission.grouping.base import Stage
from netfission.grouping.weights import apportion
from netfission.surgery.masks import prunable_weights

# How far the paths' multiply-accumulates may be from the stage's, and how much of them is used if possible:
# a little less than all, since every path also reads and writes features of its own.
TOLERANCE = 0.05
USED = 0.97
# Below so many units a path, widths may differ between paths by one unit to meet the cost.
FEW = 8

Widths = list[list[int]]  # of each group, the units of each path


class StageMacs:
    """Multiply-accumulates of a stage by how many units of each group it keeps; fractions will do."""

    def __init__(self, stage: Stage) -> None:
        # Of each weight: its cost, and for each dimension the share of it that is in no group, and what one
        # unit of each group adds to that.
        self._layers: list[tuple[float, list[tuple[float, dict[int, float]]]]] = []
        weights, coupling = prunable_weights(stage.module), stage.coupling
        for name, macs in stage.macs.items():
            dims: dict[int, dict[int, float]] = {}
            for index, group in enumerate(coupling.groups):
                for part in group.slices:
                    if part.tensor == name:
                        held = int((part.units >= 0).sum()) / weights[name].shape[part.dim]
                        dims.setdefault(part.dim, {})[index] = held / group.units
            factors = [
                (1 - sum(share * coupling.groups[index].units for index, share in of_unit.items()), of_unit)
                for of_unit in dims.values()
            ]
            self._layers.append((macs, factors))

    def __call__(self, units: Sequence[float]) -> float:
        """The cost of one image where the stage keeps so many units of each group."""
        return sum(
            macs
            * prod(
                rest + sum(units[index] * share for index, share in of_unit.items()) for rest, of_unit in dims
            )
            for macs, dims in self._layers
        )


def exact_widths(counts: Sequence[int], blocks: Sequence[int | None], shares: Sequence[float]) -> Widths:
    """Every unit to one path, in whole blocks as far as they go.

    Args:
        counts: units of each group.
        blocks: the step in which each group's widths are chosen; None where it stays whole in every path.
        shares: relative share of each path.
    """
    widths = []
    for count, block in zip(counts, blocks, strict=True):
        if block is None:
            widths.append([count] * len(shares))
        else:
            of_paths = [block * own for own in apportion(count // block, shares)]
            of_paths[0] += count % block
            widths.append(of_paths)
    return widths


def even_widths(
    macs: StageMacs, counts: Sequence[int], blocks: Sequence[int | None], shares: Sequence[float]
) -> Widths:
    """Widths at which the paths together cost what the stage does, within `TOLERANCE` where they can.

    Blocks are halved until that is met. Arguments as for `exact_widths`.
    """
    while True:
        widths, ratio = _filled(macs, counts, blocks, shares)
        if abs(ratio - 1) <= TOLERANCE or all(block in (None, 1) for block in blocks):
            return widths
        blocks = [block and max(1, block // 2) for block in blocks]


def _filled(
    macs: StageMacs, counts: Sequence[int], blocks: Sequence[int | None], shares: Sequence[float]
) -> tuple[Widths, float]:
    """Widths in whole blocks and their cost over the stage's: rounded down, then up as far as it goes."""
    budget = macs(counts)

    def ratio(widths: Sequence[Sequence[float]]) -> float:
        return sum(map(macs, zip(*widths, strict=True))) / budget

    def scaled(scale: float) -> list[list[float]]:
        return [
            [float(count)] * len(shares)
            if block is None
            else [min(count, scale * count * share / sum(shares)) for share in shares]
            for count, block in zip(counts, blocks, strict=True)
        ]

    low, high = 0.5, 2.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(scaled(middle)) <= USED else (low, middle)
    exact = scaled(low)
    around = [_around(own, block or 1, shares) for own, block in zip(exact, blocks, strict=True)]
    widths = [down for down, _ in around]
    by_lack = sorted(range(len(counts)), key=lambda g: sum(widths[g]) - sum(exact[g]))
    for enough, limit in ((USED, USED), (1 - TOLERANCE, 1 + TOLERANCE)):  # more only where less is too little
        for group in by_lack:
            tried = [*widths[:group], around[group][1], *widths[group + 1 :]]
            if ratio(widths) < enough and ratio(tried) <= limit:
                widths = tried
    return widths, ratio(widths)


def _around(exact: Sequence[float], block: int, shares: Sequence[float]) -> tuple[list[int], list[int]]:
    """The widths in whole blocks just below and just above; at least one unit."""
    if block == 1 and min(exact) < FEW:
        total = round(sum(exact), 6)
        fewer, more = (apportion(end(total), shares) for end in (floor, ceil))
        return [max(1, own) for own in fewer], [max(1, own) for own in more]
    down = [max(1, block * floor(round(width / block, 6))) for width in exact]
    up = [max(1, block * ceil(round(width / block, 6))) for width in exact]
    return down, up
