"""Pruning at initialisation: score the weights, keep the best, once or in steps."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netfission.pruning.erk import erk
from netfission.pruning.grasp import grasp
from netfission.pruning.magnitude import magnitude
from netfission.pruning.masks import prunable_weights, select
from netfission.pruning.random import random
from netfission.pruning.snip import snip
from netfission.pruning.synflow import synflow
from netfission.words import one_of

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
    chosen = CRITERIA[one_of("criterion", criterion, CRITERIA)]
    steps = chosen.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps={steps}: takes a whole number from 1")
    if chosen.needs != "nothing" and not batches and sparsity > 0:
        raise ValueError(
            f"batches={batches!r}: criterion {criterion!r} looks at data; takes a list of pairs "
            "(images, labels)"
        )
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
        alive = {name: score.masked_fill(~kept[name], -torch.inf) for name, score in scores.items()}
        kept = select(alive, max(keep, round(total * (keep / total) ** (step / steps))), generator)
    _report_ties(alive, kept, criterion)
    _report_emptied(kept, criterion, sparsity)
    return kept


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
