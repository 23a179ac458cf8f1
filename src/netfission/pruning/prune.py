"""Pruning at initialisation: score the weights, keep the best, once or in steps."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
from netfission.utils.errors import check_choice

Batches = Sequence[tuple[Tensor, Tensor]]
Score = Callable[[nn.Module, Mapping[str, Tensor], Batches, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Criterion:
    """What scores weights for pruning.

    Attributes:
        score: `(model, weights, batches, generator)` → name → score, higher is kept.
        needs: what it reads of `batches`: nothing, the shape of the images, or images and labels.
        steps: how many times it prunes by default.
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
) -> dict[str, Tensor]:
    """Choose which weights of `model` to keep; the model itself is not changed.

    In n steps the density falls geometrically, ρ^(k/n) after step k (Tanaka et al. 2020, SynFlow), each
    step scoring the network that the last one left. A weight once removed stays removed.

    Args:
        model: images → logits `(batch, classes)`.
        names: the parameters to choose among; default all of `prunable_weights(model)`.
        sparsity: share of those weights to remove, in [0, 1). Exactly `round(sparsity · n)` go.
        criterion: one of `CRITERIA`.
        batches: pairs (images, labels), on the model's device. `snip` and `grasp` read them, `synflow`
            reads the shape of the first images.
        steps: times to prune; default 1, for `synflow` 100.
        seed: for the criteria that draw, and for dropout while scoring.
        groups: channel groups of `model`; with these, whole units go, those with the lowest sum of scores
            per weight first, until at least as many weights are removed as asked for, or all units are.

    Returns:
        name → bool tensor on the weight's device, True where kept.

    Raises:
        ValueError: `sparsity` outside [0, 1), unknown `criterion`, `steps` below 1, missing `batches`, or
            scores that are NaN.

    Warns:
        UserWarning: a layer lost all its weights, or many of those kept have the same score.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: takes the share of weights to remove, in [0, 1)")
    chosen = _criterion(criterion, batches if sparsity > 0 else None)
    steps = chosen.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps={steps}: takes a whole number from 1")
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
            kept = select_units(scores, kept, groups, remain)
            continue
        alive = {name: score.masked_fill(~kept[name], -torch.inf) for name, score in scores.items()}
        kept = select(alive, remain, generator)
    if not groups:
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
        seed: for the criteria that draw, and for dropout while scoring.
        kept: weights to score the network with; default all.

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
    """The criterion of this name, once it is sure that it gets the data it needs; None asks for none."""
    chosen = CRITERIA[check_choice("criterion", name, CRITERIA)]
    if chosen.needs != "nothing" and batches is not None and not batches:
        raise ValueError(
            f"batches={batches!r}: criterion {name!r} looks at data; takes a list of pairs (images, labels)"
        )
    return chosen


def select_units(
    scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], groups: Sequence[ChannelGroup], keep: int
) -> dict[str, Tensor]:
    """Remove whole units until no more than `keep` weights are left, or no unit is.

    Args:
        scores: name → score of each weight, higher is kept.
        kept: name → bool tensor, what earlier selections left.
        groups: the units; weights in none of them stay.
        keep: number of weights to leave, over all tensors.

    Returns:
        name → bool tensor, True where kept: the most that do not exceed `keep`.

    Raises:
        ValueError: a score is NaN.
    """
    sums, counts = [], []
    for group in groups:
        sums.append(group.sums({name: score * kept[name] for name, score in scores.items()}))
        counts.append(group.sums(kept))
    flat, sizes = torch.cat(sums), torch.cat(counts)
    if flat.isnan().any():
        raise ValueError("pruning scores are NaN; check the images and weights")
    per_weight = torch.where(sizes > 0, flat / sizes.clamp(min=1), -torch.inf)
    order = per_weight.argsort(stable=True)

    def without(lowest: int) -> dict[str, Tensor]:
        present = torch.ones(len(order), dtype=torch.bool)
        present[order[:lowest]] = False
        masks = {name: mask.clone() for name, mask in kept.items()}
        for group, units in zip(groups, present.split([group.units for group in groups]), strict=True):
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
    """Say so where chance, not the criterion, chose a good part of what was kept."""
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


def _report_emptied(kept: Mapping[str, Tensor], criterion: str, sparsity: float) -> None:
    emptied = [name for name, mask in kept.items() if not mask.any()]
    if emptied:
        warnings.warn(
            f"pruning by {criterion} at sparsity {sparsity} removed every weight of {len(emptied)} "
            f"of {len(kept)} layers: {', '.join(emptied)}",
            stacklevel=3,
        )
