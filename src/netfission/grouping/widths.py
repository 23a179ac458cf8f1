"""How many units of each channel group a path gets, so that all paths together cost what the stage does.

Let a stage have groups g of n_g units, and let path p have the share s_p. Its multiply-accumulates with u_g
units of each group are a product over the dimensions d of each layer l,

    C(u) = Σ_l m_l · Π_d (r_ld + Σ_g a_ldg · u_g),

where m_l is the layer's cost in the stage, r_ld the share of dimension d outside all groups, and a_ldg the
share of one unit of group g. The problem is to find widths w_gp, multiples of a block b_g, with

    w_gp ≈ t · n_g · s_p / Σ_q s_q,  w_gp ≤ n_g,  for the largest scale t with  Σ_p C(w_p) ≤ 0.97 · c · C(n)

and a given cost c, by default 1. `StageMacs` is C. `even_widths` finds t by bisection, then rounds the widths
to blocks. If C is linear and c is 1, t is 0.97 and paths leave channels out. If two groups meet in a layer,
that layer shrinks twice and t is above 1.

Example:
    Two groups of 12 units meet in the middle layer: C(u, v) = 8u + uv + 8v.

    >>> import torch
    >>> from torch import nn
    >>> layers = nn.Sequential(nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 8, 1))
    >>> macs = StageMacs(Stage(layers, torch.zeros(1, 8, 1, 1)))
    >>> round(macs([12, 12])), round(macs([7, 7]))
    (336, 161)
    >>> widths = even_widths(macs, counts=[12, 12], blocks=[1, 1], shares=[1, 1])
    >>> widths  # units of both paths, per group
    [[7, 7], [7, 7]]
    >>> exact_widths(counts=[12, 12], blocks=[1, 1], shares=[2, 1])
    [[8, 4], [8, 4]]
"""

from collections.abc import Sequence
from math import ceil, floor, prod

from netfission.grouping.base import Stage
from netfission.grouping.weights import apportion
from netfission.surgery.masks import prunable_weights

# How far the cost of all paths may be from the stage's, and the share of it that is used if possible. It is
# less than all, since every path also reads and writes its own features.
TOLERANCE = 0.05
USED = 0.97
# The smallest scale of widths where every path repeats much of the stage. It is 0.5 if this is not enough for
# the tolerance.
NARROWEST = 0.25
# Below this number of units per path, widths may differ between paths by one unit to meet the cost.
FEW = 8

Widths = list[list[int]]  # of each group, the units of each path


class StageMacs:
    """Multiply-accumulates of a stage as a function C of the units it keeps; these may be fractions."""

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
        """Return the cost of one image if the stage keeps `units[g]` units of each group g."""
        return sum(
            macs
            * prod(
                rest + sum(units[index] * share for index, share in of_unit.items()) for rest, of_unit in dims
            )
            for macs, dims in self._layers
        )


def exact_widths(counts: Sequence[int], blocks: Sequence[int | None], shares: Sequence[float]) -> Widths:
    """Return widths that give every unit to one path, in whole blocks as far as possible.

    Args:
        counts: units of each group.
        blocks: the step in which each group's widths are chosen; None if every path gets the whole group.
        shares: relative share of each path.
    """
    widths = []
    for count, block in zip(counts, blocks, strict=True):
        if block is None:
            widths.append([count] * len(shares))
        else:
            of_paths = [block * blocks_of_path for blocks_of_path in apportion(count // block, shares)]
            of_paths[0] += count % block
            widths.append(of_paths)
    return widths


def even_widths(
    macs: StageMacs,
    counts: Sequence[int],
    blocks: Sequence[int | None],
    shares: Sequence[float],
    cost: float = 1.0,
) -> Widths:
    """Return widths with which the paths together cost what the stage does, within `TOLERANCE` if possible.

    Blocks are halved until the tolerance is met. The other arguments are those of `exact_widths`.

    Args:
        cost: what the paths may cost in place of that, relative to the stage.
    """
    while True:
        widths, ratio = _widths_in_blocks(macs, counts, blocks, shares, cost)
        if abs(ratio - 1) <= TOLERANCE or all(block in (None, 1) for block in blocks):
            return widths
        blocks = [block and max(1, block // 2) for block in blocks]


def _widths_in_blocks(
    macs: StageMacs,
    counts: Sequence[int],
    blocks: Sequence[int | None],
    shares: Sequence[float],
    cost: float,
) -> tuple[Widths, float]:
    """Return widths in whole blocks, and their cost relative to what they may cost.

    The exact widths are rounded down; then groups are rounded up while the cost allows.
    """
    budget = cost * macs(counts)

    def ratio(widths: Sequence[Sequence[float]]) -> float:
        return sum(map(macs, zip(*widths, strict=True))) / budget

    def scaled(scale: float) -> list[list[float]]:
        return [
            [float(count)] * len(shares)
            if block is None
            else [min(count, scale * count * share / sum(shares)) for share in shares]
            for count, block in zip(counts, blocks, strict=True)
        ]

    low, high = 0.0, sum(shares) / min(shares)  # from nothing to whole copies
    if cost == 1:
        low = 0.5
        if ratio(scaled(low)) > USED and ratio(scaled(NARROWEST)) <= 1 + TOLERANCE:
            low, high = NARROWEST, low
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(scaled(middle)) <= USED else (low, middle)
    exact = scaled(low)
    around = [
        _around(group_widths, block or 1, shares) for group_widths, block in zip(exact, blocks, strict=True)
    ]
    widths = [down for down, _ in around]
    by_shortfall = sorted(range(len(counts)), key=lambda g: sum(widths[g]) - sum(exact[g]))
    for enough, limit in (
        (USED, USED),
        (1 - TOLERANCE, 1 + TOLERANCE),
    ):  # the higher limit only if less is too little
        for group in by_shortfall:
            tried = [*widths[:group], around[group][1], *widths[group + 1 :]]
            if ratio(widths) < enough and ratio(tried) <= limit:
                widths = tried
    return widths, ratio(widths)


def _around(exact: Sequence[float], block: int, shares: Sequence[float]) -> tuple[list[int], list[int]]:
    """Return the widths in whole blocks just below and just above; at least one unit."""
    if block == 1 and min(exact) < FEW:
        total = round(sum(exact), 6)
        fewer, more = (apportion(end(total), shares) for end in (floor, ceil))
        return [max(1, width) for width in fewer], [max(1, width) for width in more]
    down = [max(1, block * floor(round(width / block, 6))) for width in exact]
    up = [max(1, block * ceil(round(width / block, 6))) for width in exact]
    return down, up
