"""fission(): one classifier in, one multi-exit network out."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig
from netfission.grouping import GROUPINGS, ChannelGrouping, Grouping, RepeatedLayer, WeightGrouping
from netfission.grouping.widths import TOLERANCE
from netfission.network import ExitPath, FissionNetwork
from netfission.pruning.prune import CRITERIA, Batches, prune, score
from netfission.surgery.backbone import Backbone, cut
from netfission.surgery.coupling import ChannelGroup, find_coupling
from netfission.surgery.masks import kept_masks, prunable_weights, refuse_rescaled, remove
from netfission.utils.modes import in_mode
from netfission.utils.text import check_choice


def fission(
    model: nn.Module,
    exits: int,
    *,
    branch_after: Sequence[int | str] | None = None,
    stages: Sequence[str] | None = None,
    grouping: str | Grouping = "weights",
    ratio: Sequence[float] | None = None,
    sparsity: float = 0.0,
    criterion: str = "snip",
    pruning_steps: int | None = None,
    batches: Batches = (),
    example_input: Tensor | None = None,
    keep_shortcuts: bool = False,
    exact_partition: bool = False,
    assignment: str = "random",
    seed: int = 0,
) -> FissionNetwork:
    """Turn one classifier into a multi-exit network (Network Fission Ensembles, arXiv 2408.02301).

    The model is cut into stages, pruned if asked, and the remaining weights of each stage are dealt out
    to the paths that run through it. Its weights are kept where they land, so a pretrained model can be
    fissioned and fine-tuned; every exit starts with a copy of the model's head.

    Args:
        model: images `(batch, channels, height, width)` → logits `(batch, classes)`; not changed. Any
            model that `netfission.surgery.backbone.cut` can cut, or a `Backbone`.
        exits: number of exits. With 1 and no sparsity the output equals the model's bit for bit.
        branch_after: for each exit from 1, the stage after which it leaves exit 0: a stage name or
            its 1-based number, before the last stage. A stage may be named twice. Default 1, 2, ….
        stages: names of the modules that end the stages; default found from the graph.
        grouping: `"weights"` (element-wise, the paper), `"channels"` (whole internal channels, each path a
            smaller dense network), `"copies"` (whole stages) or a `Grouping`.
        ratio: relative shares of the paths, exit 0 first, positive; default equal.
        sparsity: share of the prunable weights of stem and stages to remove before grouping, in [0, 1).
            With `"channels"` whole channels go, so that the share is met to within one.
        criterion: what scores them, see `netfission.pruning.prune`.
        pruning_steps: default the criterion's own: 1, for `"synflow"` 100.
        batches: pairs (images, labels) for the criteria that look at data (`"snip"`, `"grasp"`).
        example_input: images to trace and check the cut with, float `(batch, channels, height, width)`;
            default the first of `batches`, else what a timm model says it takes.
        keep_shortcuts: with grouping `"weights"`, every path gets the whole of each 1×1 shortcut.
        exact_partition: with grouping `"channels"`, every channel goes to exactly one path; default is to
            choose widths by their cost, see `netfission.grouping.ChannelGrouping`.
        assignment: with grouping `"channels"`, `"random"` or `"importance"`: the most important channels are
            dealt out first, in turn, by the criterion's scores.
        seed: the same seed gives the same network.

    Returns:
        A `FissionNetwork` on the model's device: images → logits `(batch, exits, classes)`.

    Raises:
        ValueError: a setting is not one of those above, or the model cannot be cut.

    Warns:
        UserWarning: pruning or grouping left a layer of a path without weights, or the paths of a stage
            cost more than it does by over 5 %.
    """
    dealer = _grouping(grouping, keep_shortcuts, exact_partition, assignment)
    if not isinstance(exits, int) or exits < 1:
        raise ValueError(f"exits={exits}: takes a whole number from 1")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: takes the share of weights to remove, in [0, 1)")
    check_choice("criterion", criterion, CRITERIA)
    shares = _shares(ratio, exits)
    example = _example(model, example_input, batches)
    backbone = cut(model, example, stages)
    refuse_rescaled(backbone)
    branches = resolve_branches(branch_after, exits, backbone.stage_names)
    features = _features(backbone, example)
    names = [name for name in prunable_weights(backbone) if not name.startswith("head.")]
    if criterion == "synflow" and not batches:
        batches = [(example, example)]  # it reads the shape of the images alone
    kept: dict[str, Tensor] = {}
    if sparsity > 0:
        kept = prune(
            backbone,
            names,
            sparsity,
            criterion=criterion,
            batches=batches,
            steps=pruning_steps,
            seed=seed,
            groups=_channel_groups(backbone, features) if isinstance(dealer, ChannelGrouping) else (),
        )
    scores: dict[str, Tensor] = {}
    if assignment == "importance":
        scores = score(backbone, names, criterion, batches, seed, kept)
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(dealer, ChannelGrouping):
        remove(backbone.stem, _within(kept, "stem."))
    own_stages: list[list[nn.Module]] = [[] for _ in range(exits)]
    repeated: dict[str, tuple[RepeatedLayer, ...]] = {}
    for index, (name, stage) in enumerate(zip(backbone.stage_names, backbone.stages, strict=True)):
        running = [0] + [k for k, after in enumerate(branches, start=1) if after <= index]
        prefix = f"stages.{index}."
        dealt = dealer.split(
            stage,
            _within(kept, prefix),
            [shares[k] for k in running],
            generator,
            features=features[index],
            scores=_within(scores, prefix),
        )
        for k, part in zip(running, dealt.paths, strict=True):
            own_stages[k].append(part)
        if dealt.repeated:
            repeated[name] = dealt.repeated
        if dealt.cost > 1 + TOLERANCE:
            warnings.warn(
                f"stage {name!r}: its {len(running)} paths together cost {dealt.cost:.2f} times the "
                "multiply-accumulates of the stage, as much of it cannot be divided; summary() says why",
                stacklevel=2,
            )
    paths = [ExitPath(parts, copy.deepcopy(backbone.head)) for parts in own_stages]
    config = None
    if isinstance(grouping, str):
        config = FissionConfig(
            exits=exits,
            branch_after=None if branch_after is None else list(branch_after),
            stages=None if stages is None else list(stages),
            grouping=grouping,
            keep_shortcuts=keep_shortcuts,
            exact_partition=exact_partition,
            assignment=assignment,
            ratio=None if ratio is None else list(ratio),
            sparsity=sparsity,
            criterion=criterion,
            pruning_steps=pruning_steps,
            seed=seed,
        )
    network = FissionNetwork(backbone.stem, paths, branches, backbone.stage_names, repeated, config)
    _warn_of_empty_layers(paths, branches, kept)
    for module in (network, network.paths, *paths, *(path.stages for path in paths)):
        module.training = model.training
    return network


def _grouping(
    grouping: str | Grouping, keep_shortcuts: bool, exact_partition: bool, assignment: str
) -> Grouping:
    """The grouping asked for; a setting that goes with another one by name is refused."""
    check_choice("assignment", assignment, ("importance", "random"))
    name = check_choice("grouping", grouping, GROUPINGS) if isinstance(grouping, str) else repr(grouping)
    for setting, given, takes in (
        ("keep_shortcuts", keep_shortcuts, "weights"),
        ("exact_partition", exact_partition, "channels"),
        ("assignment", assignment != "random" and assignment, "channels"),
    ):
        if given and name != takes:
            raise ValueError(
                f"{setting}={given!r}: goes with grouping={takes!r} given by name, not with {name}"
            )
    if name == "weights":
        return WeightGrouping(keep_shortcuts)
    if name == "channels":
        return ChannelGrouping(exact_partition, by_importance=assignment == "importance")
    return GROUPINGS[name]() if isinstance(grouping, str) else grouping


@torch.no_grad()
def _features(backbone: Backbone, example: Tensor) -> list[Tensor]:
    """What each stage reads."""
    with in_mode(backbone, training=False):
        features = [backbone.stem(example.clone())]
        for stage in backbone.stages[:-1]:
            features.append(stage(features[-1]))
    return features


def _channel_groups(backbone: Backbone, features: Sequence[Tensor]) -> list[ChannelGroup]:
    """The channel groups of all stages, by their names in the backbone."""
    return [
        group.within(f"stages.{index}.")
        for index, stage in enumerate(backbone.stages)
        for group in find_coupling(stage, features[index]).groups
    ]


def _shares(ratio: Sequence[float] | None, exits: int) -> list[float]:
    shares = [1.0] * exits if ratio is None else [float(share) for share in ratio]
    if len(shares) != exits or not all(isfinite(share) and share > 0 for share in shares):
        raise ValueError(f"ratio={ratio!r}: takes {exits} positive numbers, one an exit, exit 0 first")
    return shares


def resolve_branches(
    branch_after: Sequence[int | str] | None, exits: int, stage_names: Sequence[str]
) -> list[int]:
    """The number of shared stages of each exit from 1.

    Args:
        branch_after: as `fission` takes it.
        exits: number of exits.
        stage_names: of the backbone, in the order they run.

    Raises:
        ValueError: there are too few stages, or `branch_after` names none or too many of them.
    """
    last = len(stage_names) - 1
    if branch_after is None:
        if exits - 1 > last:
            raise ValueError(
                f"exits={exits}: takes at most {last + 1}, one a stage ({', '.join(stage_names)}); pass "
                "stages=[…] to name more stages, or branch_after=[…] to let exits share a branch point"
            )
        return list(range(1, exits))
    numbers = {name: number for number, name in enumerate(stage_names, start=1)}
    branches = [numbers.get(stage, 0) if isinstance(stage, str) else stage for stage in branch_after]
    if len(branches) != exits - 1 or not all(branch in range(1, last + 1) for branch in branches):
        raise ValueError(
            f"branch_after={list(branch_after)!r}: takes {exits - 1} stages, each a number "
            f"from 1 to {last} or one of {', '.join(stage_names[:-1])}"
        )
    return branches


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that a timm model says it takes; None for others."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    return settings.get("input_size")


def _example(model: nn.Module, example_input: Tensor | None, batches: Batches) -> Tensor:
    if example_input is None and batches:
        example_input = batches[0][0]
    if example_input is None:
        size = input_size(model)
        if size is None:
            raise ValueError(
                "example_input=None: takes a batch of images, float (batch, channels, height, width)"
            )
        example_input = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    if not len(example_input) or not example_input.isfinite().all():
        raise ValueError(
            f"example_input of shape {tuple(example_input.shape)}: takes at least one image, of finite values"
        )
    parameter = next(model.parameters(), example_input)
    return example_input[:2].to(parameter)


def _within(masks: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): mask for name, mask in masks.items() if name.startswith(prefix)}


def _warn_of_empty_layers(
    paths: Sequence[ExitPath], branches: Sequence[int], kept: Mapping[str, Tensor]
) -> None:
    """Name the layers that dealing out left empty; those that pruning emptied are reported there."""
    empty = []
    for number, (path, shared) in enumerate(zip(paths, (0, *branches), strict=True)):
        for index, stage in enumerate(path.stages, start=shared):
            for name, mask in kept_masks(stage).items():
                pruned = kept.get(f"stages.{index}.{name}")
                if not mask.any() and (pruned is None or pruned.any()):
                    empty.append(f"{name} of exit {number}")
    if empty:
        warnings.warn(
            f"too few weights to deal out: {len(empty)} layers got none: {', '.join(empty)}",
            stacklevel=3,
        )
