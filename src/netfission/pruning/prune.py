"""Prune at initialisation: score the weights and keep those with the highest scores, once or in steps.

A new criterion is a function in a file of its own, of the type `Score`, and an entry in `CRITERIA`.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from netfission.pruning.erk import erk
from netfission.pruning.grasp import grasp
from netfission.pruning.magnitude import magnitude
from netfission.pruning.random import random
from netfission.pruning.selection import select
from netfission.pruning.snip import snip
from netfission.pruning.synflow import synflow
from netfission.surgery.coupling import ChannelGroup
from netfission.surgery.masks import prunable_weights
from netfission.utils.errors import check_choice, check_positive_integer, invalid
from netfission.utils.inputs import Inputs

Batches = Sequence[tuple[Inputs, Tensor]]
Score = Callable[[nn.Module, Mapping[str, Tensor], Batches, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Criterion:
    """A score of weights for pruning, and what it needs.

    Attributes:
        score: `(model, weights, batches, generator)` → name → score of the weight's shape, higher is kept.
            It runs the model with `weights`, some of which are 0 already, and does not change it.
        needs: what it reads of `batches`: `"nothing"`, the `"shape"` of the images, or their `"data"`.
        steps: number of steps in which to prune by default.

    Example:
        >>> from netfission.pruning.magnitude import magnitude
        >>> Criterion(magnitude).steps
        1
    """

    score: Score
    needs: str = "nothing"
    steps: int = 1


CRITERIA: dict[str, Criterion] = {
    "random": Criterion(random),
    "erk": Criterion(erk),
    "magnitude": Criterion(magnitude),
    "snip": Criterion(snip, needs="data"),
    "grasp": Criterion(grasp, needs="data"),
    "synflow": Criterion(synflow, needs="shape", steps=100),
}


def prune(
    model: nn.Module,
    names: Sequence[str] | None = None,
    sparsity: float = 0.0,
    *,
    criterion: str = "snip",
    batches: Batches = (),
    steps: int | None = None,
    seed: int = 0,
    groups: Sequence[ChannelGroup] = (),
    floors: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Choose which weights of `model` to keep; the model itself is not changed.

    In n steps the density falls geometrically to ρ = 1 - sparsity: ρ^(k/n) after step k (Tanaka et al. 2020,
    SynFlow). Each step scores the network that the previous step left. A removed weight stays removed.

    Args:
        model: images → logits `(batch, classes)`.
        names: the parameters to prune; default all of `prunable_weights(model)`.
        sparsity: share of the n weights to remove, in [0, 1). Exactly `round(sparsity · n)` are removed.
        criterion: one of `CRITERIA`.
        batches: pairs (images, labels), on the model's device. `snip` and `grasp` read them, `synflow`
            reads the shape of the first images.
        steps: number of steps; default 1, for `synflow` 100.
        seed: for the criteria that draw random numbers, and for dropout while scoring.
        groups: channel groups of `model`. If given, whole units are removed, those with the lowest mean score
            per weight first, until the sparsity is reached or no unit is left.
        floors: number of units that each group keeps in any case, one per group; default 0.

    Returns:
        name → bool tensor on the weight's device, True where kept.

    Raises:
        ValueError: an argument is not valid, `batches` is missing, or scores are NaN.

    Warns:
        UserWarning: a layer lost all its weights, many of those kept have the same score, or `groups` and
            `floors` do not allow the sparsity.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> layer.weight = nn.Parameter(torch.tensor([[0.1, -0.4, 0.2, 0.3]]))
        >>> prune(layer, sparsity=0.5, criterion="magnitude")
        {'weight': tensor([[False,  True, False,  True]])}
    """
    if not 0 <= sparsity < 1:
        raise invalid("sparsity", "the share of weights to remove, in [0, 1)", sparsity)
    chosen = _criterion(criterion, batches if sparsity > 0 else None)
    steps = check_positive_integer("steps", chosen.steps if steps is None else steps)
    parameters = prunable_weights(model)
    weights = {name: parameters[name].detach() for name in (parameters if names is None else names)}
    kept = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    keep = total - round(sparsity * total)
    if keep == total:
        return kept
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        masked = {name: weight * kept[name] for name, weight in weights.items()}
        scores = chosen.score(model, masked, batches, generator)
        remain = max(keep, round(total * (keep / total) ** (step / steps)))
        if groups:
            kept = select_units(scores, kept, groups, remain, floors)
            continue
        alive = {name: score.masked_fill(~kept[name], -torch.inf) for name, score in scores.items()}
        kept = select(alive, remain, generator)
    if groups:
        _report_unreached(kept, keep, sparsity)
    else:
        _report_ties(alive, kept, criterion)
        _report_emptied(kept, criterion, sparsity)
    return kept


def score(
    model: nn.Module,
    names: Sequence[str],
    criterion: str,
    batches: Batches = (),
    seed: int = 0,
    kept: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Score weights without removing any.

    Args:
        model: images → logits `(batch, classes)`; not changed.
        names: the parameters to score.
        criterion: one of `CRITERIA`.
        batches: see `prune`.
        seed: for the criteria that draw random numbers, and for dropout while scoring.
        kept: name → bool tensor; the network is scored with the other weights at 0; default all kept.

    Returns:
        name → score, shaped like the weight, higher is more important.

    Raises:
        ValueError: unknown `criterion` or missing `batches`.
    """
    chosen = _criterion(criterion, batches)
    parameters = prunable_weights(model)
    weights = {name: parameters[name].detach() for name in names}
    weights = {name: weight * kept[name] if kept else weight for name, weight in weights.items()}
    return chosen.score(model, weights, batches, torch.Generator().manual_seed(seed))


def _criterion(name: str, batches: Batches | None) -> Criterion:
    """Return the criterion of this name, and check that it gets the batches it needs unless they are None."""
    chosen = CRITERIA[check_choice("criterion", name, CRITERIA)]
    if chosen.needs != "nothing" and batches is not None and not batches:
        raise invalid("batches", f"pairs (images, labels) for criterion {name!r}", batches)
    return chosen


def select_units(
    scores: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    groups: Sequence[ChannelGroup],
    keep: int,
    floors: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Remove whole units until at most `keep` weights are left, or no unit is left to remove.

    Args:
        scores: name → score of each weight, higher is kept.
        kept: name → bool tensor, True where earlier selections kept a weight.
        groups: the units; weights outside all groups stay.
        keep: number of weights to keep, over all tensors.
        floors: number of units that stay in each group, those with the highest scores; default 0 of each.

    Returns:
        name → bool tensor, True where kept; the largest number that does not exceed `keep`.

    Raises:
        ValueError: a score is NaN.
    """
    sums, counts = [], []
    for group in groups:
        sums.append(group.sums({name: score * kept[name] for name, score in scores.items()}))
        counts.append(group.sums(kept))
    flat, sizes = torch.cat(sums), torch.cat(counts)
    if flat.isnan().any():
        raise invalid("pruning scores", "numbers", found="NaN", hint="check the images and weights")
    per_weight = torch.where(sizes > 0, flat / sizes.clamp(min=1), -torch.inf)
    unit_counts = [group.units for group in groups]
    order = per_weight.argsort(stable=True)
    removable = torch.ones(len(order), dtype=torch.bool)
    firsts = accumulate(unit_counts[:-1], initial=0)
    for first, count, floor in zip(firsts, unit_counts, floors or [0] * len(groups), strict=True):
        of_group = order[(order >= first) & (order < first + count)]
        removable[of_group[count - min(floor, count) :]] = False
    order = order[removable[order]]

    def without(lowest: int) -> dict[str, Tensor]:
        present = torch.ones(len(flat), dtype=torch.bool)
        present[order[:lowest]] = False
        masks = {name: mask.clone() for name, mask in kept.items()}
        for group, units in zip(groups, present.split(unit_counts), strict=True):
            for part in group.slices:
                if part.tensor in masks:
                    mask = masks[part.tensor]
                    along = [-1 if dim == part.dim else 1 for dim in range(mask.ndim)]
                    mask &= part.keep(units).view(along).to(mask.device)
        return masks

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if sum(int(mask.sum()) for mask in without(middle).values()) <= keep:
            high = middle
        else:
            low = middle + 1
    return without(low)


def _report_ties(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], criterion: str) -> None:
    """Warn if chance, not the criterion, chose more than 5 % of the kept weights."""
    scores_kept = torch.cat([score[kept[name]] for name, score in scores.items()])
    if not len(scores_kept):
        return
    lowest = scores_kept.min()
    if not any((score[~kept[name]] == lowest).any() for name, score in scores.items()):
        return  # all of them were kept
    tied = int((scores_kept == lowest).sum())
    if tied > max(1, 0.05 * len(scores_kept)):
        warnings.warn(
            f"{tied / len(scores_kept):.0%} of the weights kept have the same score, {lowest:g}, by "
            f"{criterion}: chance chose them. Often norms at the end of residual branches start at 0 (timm: "
            "create the model with zero_init_last=False)",
            stacklevel=3,
        )


def _report_unreached(kept: Mapping[str, Tensor], keep: int, sparsity: float) -> None:
    """Warn if whole units could not reach the sparsity."""
    total = sum(mask.numel() for mask in kept.values())
    left = sum(int(mask.sum()) for mask in kept.values())
    if left > keep:
        warnings.warn(
            f"pruning whole channels removes {1 - left / total:.0%} of the weights, less than sparsity "
            f"{sparsity}: the others are on the interface of stages, or the last that a path needs",
            stacklevel=3,
        )


def _report_emptied(kept: Mapping[str, Tensor], criterion: str, sparsity: float) -> None:
    """Warn of the layers that lost all weights."""
    emptied = [name for name, mask in kept.items() if not mask.any()]
    if emptied:
        warnings.warn(
            f"pruning by {criterion} at sparsity {sparsity} removed every weight of {len(emptied)} "
            f"of {len(kept)} layers: {', '.join(emptied)}",
            stacklevel=3,
        )
