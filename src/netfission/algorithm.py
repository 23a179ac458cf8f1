"""Network Fission Ensembles (arXiv 2408.02301): cut a network, prune it, split its stages, assemble paths."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig, FissionSettings
from netfission.grouping import Grouping, Stage, StageSplit, find_grouping
from netfission.grouping.budget import TimedBudget, UnmetBudgetError, meet_budget, meet_time
from netfission.grouping.weights import fewest
from netfission.grouping.widths import TOLERANCE
from netfission.inference.deployment import deploy
from netfission.network import ExitPath, FissionNetwork, LinearExit, LinearMapExit
from netfission.profiling.macs import macs_by_weight, run_counted
from netfission.profiling.timing import Quartiles, relative_step_time, relative_time
from netfission.pruning.prune import CRITERIA, Batches, prune, score
from netfission.surgery.backbone import (
    Backbone,
    checkpointed,
    cut,
    resolve_branches,
    resolve_linear_exits,
    stages_of_layers,
)
from netfission.surgery.example import check_batches, check_images, example_images
from netfission.surgery.features import map_tensors
from netfission.surgery.masks import apply_masks, check_plain_weights, kept_masks, prunable_weights
from netfission.surgery.plain import check_plain
from netfission.surgery.reconstruction import in_batches, reconstruct
from netfission.surgery.rescaling import keep_variance, unnormalised_weights
from netfission.surgery.stages import FEWEST
from netfission.utils.errors import check_choice, invalid
from netfission.utils.inputs import Inputs, cloned, first_rows, map_inputs
from netfission.utils.modes import in_mode
from netfission.utils.seeds import seeded
from netfission.utils.text import count_noun

_TIMED = 10.0  # seconds for which each network is timed, if the budget is in a measured time


def fission(
    model: nn.Module,
    exits: int = 3,
    *,
    grouping: str | Grouping = "weights",
    batches: Batches = (),
    example_input: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    **settings: Unpack[FissionSettings],
) -> FissionNetwork:
    """Turn one classifier into a multi-exit network (Network Fission Ensembles, arXiv 2408.02301).

    The model is cut into stages and pruned if `sparsity` asks for it. The remaining weights of each stage
    are divided among the paths that run through it. Weights keep their values, so a pretrained model can be
    divided and fine-tuned; with `reconstruct`, paths get weights with which they compute what the model does.
    Else, only layers after which no normalisation layer runs are scaled: a path that reads 1/k of a layer's
    inputs has its weights times √k, so that features keep their variance. Every exit starts with a copy of
    the model's head.

    Args:
        model: images `(batch, channels, height, width)` → logits `(batch, classes)`, or for each pixel
            `(batch, classes, height, width)`, also as `"out"` of a dictionary; not changed. Any model that
            `netfission.surgery.backbone.cut` can cut, or a `Backbone`. Images may be any other tensor with a
            row per example, such as vectors or the ids of tokens, or several, as classifiers of transformers
            read them; of the dictionary that these return, `"logits"` are taken.
        exits: number of exits. With one exit and no sparsity the output equals the model's bit for bit.
        grouping: `"weights"` (single weights, as in the paper), `"channels"` (whole internal channels; each
            path is a smaller dense network), `"copies"` (whole stages), or a `Grouping`.
        batches: pairs (images, labels), for the criteria that read data (`"snip"`, `"grasp"`) and for
            `reconstruct`.
        example_input: images to trace and check the model with, float `(batch, channels, height, width)`;
            default the first of `batches`, else random images of the size in a timm model's configuration.
            Several inputs are a dictionary (or what a tokenizer returns) of the model's arguments by name, or
            a tuple of them by position. The network reads the same as one argument.
        **settings: all other fields of `FissionConfig`: `branch_after`, `linear_exits`, `stages`, `ratio`,
            `sparsity`, `criterion`, `pruning_steps`, `keep_shortcuts`, `exact_partition`, `budget`,
            `budget_in`, `budget_batch_size`, `assignment`, `overlap`, `reconstruct`, `copy_noise`,
            `linear_weight` and `seed`.

    Returns:
        A `FissionNetwork` on the model's device: images → logits `(batch, exits, classes)`, with height and
        width behind if the model has them.

    Raises:
        ValueError: a setting is not valid, or the model cannot be cut: it is wrapped (`torch.compile`,
            `DataParallel`), pruned by `torch.nn.utils.prune`, or does not return logits of two classes or
            more. The message says what to pass instead.
        TypeError: a keyword is unknown.

    Warns:
        UserWarning: a layer of a path got no weights, `reconstruct` cannot solve a layer, or the paths of a
            stage together need over 5 % more multiply-accumulates than the stage. With `budget_in="time"` or
            `"training"`, the device does other work.

    Example:
        >>> import netfission as nf, torch
        >>> from netfission.models import create_model
        >>> model = create_model("wrn-10-1", num_classes=10)
        >>> images = torch.randn(2, 3, 32, 32)
        >>> net = nf.fission(model, exits=3, grouping="channels", example_input=images, seed=0)
        >>> net(images).shape
        torch.Size([2, 3, 10])
        >>> net.stage_names, net.branch_after
        (('block1', 'block2', 'bn'), (1, 2))
    """
    _check_keywords(settings)
    name = grouping if isinstance(grouping, str) else repr(grouping)
    config = FissionConfig(exits=exits, grouping=name, **cast(dict[str, Any], settings))
    divider = find_grouping(grouping, config)
    check_plain("model", model)
    check_batches(batches)
    example = example_images(model, example_input, batches)
    _check_images(batches, example, config, divider)
    if config.budget_is_timed and exits > 1:
        division = _divide_in_time(model, example, divider, config, batches)
    else:
        division = _divide_in_macs(model, example, divider, config, batches)
    unsolved = _complete(division, example, batches)
    if config.budget == 1 and division.timed is None:  # another one is met, or refused
        _report_costs(division)
    _report_empty_layers(division.network, division.kept)
    _report_unsolved(unsolved)
    _report_checkpointing(model, division.network)
    network, network.timed = division.network, division.timed
    if not isinstance(grouping, str):
        network.config = None
    for module in (network, network.paths, *network.paths, *(path.stages for path in network.exit_paths)):
        module.training = model.training
    return network


@dataclass(frozen=True)
class _Division:
    """A network that was divided; its paths have the weights of the whole one.

    Attributes:
        config: the settings, with the stages that were joined.
        backbone: its parts, whole.
        stages: of the backbone.
        kept: what pruning kept of it, see `_prune`.
        branches: for each exit but the first, how many stages it shares with exit 0.
        splits: of each stage.
        of_head: the same for the head.
        network: the result; it lacks the linear exits yet.
        timed: what was found for a budget in a measured time.
    """

    config: FissionConfig
    backbone: Backbone
    stages: Sequence[Stage]
    kept: Mapping[str, Tensor]
    branches: Sequence[int]
    splits: Sequence[StageSplit]
    of_head: StageSplit
    network: FissionNetwork
    timed: TimedBudget | None = None


def _divide_in_time(
    model: nn.Module, example: Inputs, divider: Grouping, config: FissionConfig, batches: Batches
) -> _Division:
    """Divide a model so that the result takes the time of its budget, measured beside the model."""
    generator = torch.Generator().manual_seed(config.seed)

    def repeated(tensor: Tensor) -> Tensor:
        shape = (config.budget_batch_size, *tensor.shape[1:])
        if tensor.is_floating_point():
            return torch.rand(shape, generator=generator).to(tensor)
        return tensor[:1].expand(shape).contiguous()

    images = map_inputs(repeated, example)
    first = _divide_in_macs(model, example, divider, replace(config, budget=1.0, budget_in="macs"), batches)
    names = list(first.backbone.stage_names)
    whole = run_counted(first.backbone, first_rows(example, 1)).total.dense
    after = resolve_linear_exits(config.linear_exits, names)
    undivided = FissionNetwork(
        first.backbone.stem, [ExitPath(list(first.backbone.stages), first.backbone.head)], (), names
    )
    training = config.budget_in == "training"
    single = undivided if training else deploy(undivided, images)
    del first, undivided  # a network may be large

    def divide(branches: Sequence[int], macs: float) -> _Division:
        within = replace(config, budget=macs, budget_in="macs", stages=names)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the network costs")  # this budget is not the user's
            return _divide(model, example, divider, within, batches, branches)

    def reached(division: _Division) -> float:
        return run_counted(division.network, first_rows(example, 1)).total.dense / whole

    def measure(division: _Division) -> Quartiles:
        divided = division.network
        paths = [*divided.exit_paths, *linear_paths(division.backbone, after, example, config.seed)]
        network = FissionNetwork(divided.stem, paths, [*divided.branch_after, *after], names)
        if training:
            return relative_step_time(network, single, images, seconds=_TIMED)
        return relative_time(deploy(network, images), single, images, seconds=_TIMED)

    def find(branches: Sequence[int]) -> _Division:
        within = partial(divide, branches)
        where = _where_exits_leave(names, branches)
        found = meet_time(config.budget, within, reached, measure, where=where, budget_in=config.budget_in)
        return replace(within(found.asked), timed=found)

    return _first_within_budget(_branch_choices(config, names), find, config.budget)


def _branch_choices(config: FissionConfig, names: Sequence[str]) -> list[list[int]]:
    """Return the branch points to try in turn: of late exits with a budget to meet, each earlier one."""
    asked = config.known_branch_after(trained=False)
    branches = resolve_branches(asked, config.exits, names)
    if asked != "late" or not branches or (config.budget == 1 and not config.budget_is_timed):
        return [branches]
    return [[after] * len(branches) for after in range(branches[0], 0, -1)]


def _first_within_budget(
    choices: Sequence[Sequence[int]], divide: Callable[[Sequence[int]], _Division], budget: float
) -> _Division:
    """Divide at the first of some branch points where the budget can be met; else tell what is nearest to it.

    Raises:
        ValueError: it can be met at none, or the model cannot be divided at the first.
    """
    unmet: list[UnmetBudgetError] = []
    for branches in choices:
        try:
            return divide(branches)
        except UnmetBudgetError as error:
            unmet.append(error)
        except ValueError:  # an earlier stage that cannot be divided
            if not unmet:
                raise
    raise min(unmet, key=lambda error: abs(error.nearest - budget))


def _where_exits_leave(names: Sequence[str], branches: Sequence[int]) -> str:
    """Return where the first exit leaves, in words."""
    return f"after {names[min(branches) - 1]}"


def _divide_in_macs(
    model: nn.Module, example: Inputs, divider: Grouping, config: FissionConfig, batches: Batches
) -> _Division:
    """Divide a model so that the result costs its budget in multiply-accumulates."""
    if _by_default(config, model) and divider.divides_heads:
        return _with_cheapest_stages(model, example, divider, config, batches)
    return _divide(model, example, divider, config, batches)


def _with_cheapest_stages(
    model: nn.Module, example: Inputs, divider: Grouping, config: FissionConfig, batches: Batches
) -> _Division:
    """Divide a model whose last stage ends where the network costs least; see `_stages_with_larger_head`."""
    division = _divide(model, example, divider, config, batches)
    if division.splits[-1].cost > 1 + TOLERANCE and config.budget == 1:
        names = _stages_with_larger_head(model, division.backbone.stage_names)
        if names != list(division.backbone.stage_names):
            other = _divide(model, example, divider, replace(config, stages=names), batches)
            division = min(
                division, other, key=lambda one: run_counted(one.network, first_rows(example, 1)).total
            )
    return division


def _divide(
    model: nn.Module,
    example: Inputs,
    divider: Grouping,
    config: FissionConfig,
    batches: Batches,
    branches: Sequence[int] | None = None,
) -> _Division:
    """Cut, prune and split a model, and assemble its paths.

    Args:
        model: the model.
        example: images, as it reads them.
        divider: divides its stages.
        config: the settings.
        batches: for criteria and the reconstruction.
        branches: for each exit but the first, how many stages it shares with exit 0; default by the settings.
    """
    backbone = cut(model, example, config.stages, config.exits)
    stages = _analyse(backbone, example)
    names = list(backbone.stage_names)
    if _by_default(config, model):
        names = _divisible(names, stages, divider, config.exits) or _regrouped(
            model, example, names, divider, config.exits
        )
    if names != list(backbone.stage_names):
        config = replace(config, stages=names)
        backbone = cut(model, example, names, config.exits)
        stages = _analyse(backbone, example)
    if divider.masks_weights or config.sparsity > 0:
        check_plain_weights(backbone, standardised=config.sparsity > 0)  # else where a mask is applied
    if len(names) == 1 < config.exits and config.stages is None and not isinstance(model, Backbone):
        raise _one_stage(model, example, names[0], divider, config.exits)
    choices = _branch_choices(config, names) if branches is None else [branches]

    def divide(after: Sequence[int]) -> _Division:
        return _divide_at(after, backbone, stages, divider, config, batches, example)

    return _first_within_budget(choices, divide, config.budget)


def _divide_at(
    branches: Sequence[int],
    backbone: Backbone,
    stages: Sequence[Stage],
    divider: Grouping,
    config: FissionConfig,
    batches: Batches,
    example: Inputs,
) -> _Division:
    """Prune and split a model that was cut, and assemble its paths.

    Raises:
        UnmetBudgetError: the paths cannot cost what the budget says with these branch points.
    """
    asked = config.known_branch_after(trained=False)
    earlier = list(branches) != resolve_branches(asked, config.exits, backbone.stage_names)
    if earlier:
        config = replace(config, branch_after=list(branches))
    kept, scores = _prune(backbone, stages, divider, branches, config, batches, example)

    def divide(cost: float) -> _Division:
        splits = _split(stages, kept, scores, divider.within(cost), branches, config)
        of_head = _split_head(backbone, stages, divider, config, example)
        network = _assemble(backbone, splits, of_head.paths, branches, config)
        network.leaves_earlier = earlier
        return _Division(config, backbone, stages, kept, branches, splits, of_head, network)

    if config.budget == 1 or config.exits == 1:
        return divide(1.0)
    counted = run_counted(backbone, first_rows(example, 1), list(backbone.stages))
    total = counted.total.dense
    stage_macs = [counted.dense[stage] for stage in backbone.stages]
    added = ((len(_exits_in(index, branches)) - 1) * macs for index, macs in enumerate(stage_macs))
    return meet_budget(
        config.budget,
        divide,
        lambda division: run_counted(division.network, first_rows(example, 1)).total.dense / total,
        divided=sum(stage_macs[min(branches) :]) / total,
        copied=1 + sum(added) / total,
        where=_where_exits_leave(backbone.stage_names, branches),
        hint="let them leave earlier" if min(branches) > 1 else "use fewer exits",
    )


def _complete(division: _Division, example: Inputs, batches: Batches) -> list[str]:
    """Fit the weights of the paths, and add the linear exits, in place.

    Returns:
        The names of the layers that reconstruction leaves as they are.
    """
    config, backbone = division.config, division.backbone
    after = resolve_linear_exits(config.linear_exits, backbone.stage_names)
    unsolved: list[str] = []
    if config.reconstruct:
        unsolved = _reconstruct(backbone, division.splits, division.of_head, division.branches, batches)
    elif config.exits > 1:
        unnormalised = unnormalised_weights(backbone, first_rows(example, 1))
        _keep_variance(division.stages, division.splits, division.kept, unnormalised)
        for head in division.of_head.paths:
            keep_variance(head, backbone.head, {}, _names_below(unnormalised, "head."))
    linear = linear_paths(backbone, after, example, config.seed)
    if config.reconstruct and linear:
        _fit_linear_exits(backbone, linear, after, batches)
    division.network.paths.extend(linear)
    division.network.branch_after += tuple(after)
    return unsolved


def _by_default(config: FissionConfig, model: nn.Module) -> bool:
    """Return whether the stages and branch points are ours to choose."""
    ours = config.branch_after is None or isinstance(config.branch_after, str)
    return ours and config.stages is None and not isinstance(model, Backbone)


def _stages_with_larger_head(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the names of stages of which the last one ends earlier, after a module of the others' kind.

    What follows that module belongs to the head then: a wide convolution before the pooling, of which copies
    would cost much. The names are the same if there is no such module.
    """
    modules = {name: (name.rpartition(".")[0], type(module)) for name, module in model.named_modules()}
    order = list(modules)
    between = order[order.index(names[-2]) + 1 : order.index(names[-1])] if len(names) > 1 else []
    alike = [name for name in between if modules[name] == modules[names[-2]]]
    return [*names[:-1], *(alike or names)[-1:]]


def _check_keywords(settings: Mapping[str, object]) -> None:
    """Raise a TypeError for a keyword that `fission` does not accept."""
    known = ("exits", "grouping", "batches", "example_input", *FissionSettings.__annotations__)
    for name in settings:
        try:
            check_choice("keyword", name, known)
        except ValueError as error:
            raise TypeError(str(error)) from None


def _check_images(batches: Batches, example: Inputs, config: FissionConfig, divider: Grouping) -> None:
    """Check the batches that a criterion or the reconstruction reads."""
    is_float = not isinstance(example, Tensor) or example.is_floating_point()
    codes = None if is_float else cast(Tensor, example).dtype
    if config.reconstruct:
        if not isinstance(example, Tensor):
            raise invalid("reconstruct", "False for a network of several inputs", True)
        check_images(batches, "reconstruct=True", tuple(example.shape[1:]), codes)
    needs = CRITERIA[check_choice("criterion", config.criterion, CRITERIA)].needs
    scores = config.sparsity > 0 or divider.needs_scores
    if scores and needs == "shape" and not (isinstance(example, Tensor) and example.is_floating_point()):
        expected = "one that reads no images of ones, such as 'snip' or 'magnitude', for this network"
        raise invalid("criterion", expected, config.criterion)
    if scores and batches and needs == "data":
        check_images(batches, f"criterion={config.criterion!r}", codes=codes)


def _analyse(backbone: Backbone, example: Inputs) -> list[Stage]:
    """Return each stage with an example of its input."""
    with torch.no_grad(), in_mode(backbone, training=False):
        features = [backbone.stem(cloned(example))]
        for module in backbone.stages[:-1]:
            features.append(module(features[-1]))
    return [Stage(module, inputs) for module, inputs in zip(backbone.stages, features, strict=True)]


def _divisible(names: Sequence[str], stages: Sequence[Stage], grouping: Grouping, exits: int) -> list[str]:
    """Return the names of stages without those that cannot be divided; none if none can.

    Such a stage joins the next one, the last one the stage before. All exits share the first stage.
    """
    if exits == 1:
        return list(names)
    paths = [min(index + 1, exits) for index in range(len(stages))]  # an exit leaves after each stage
    divisible = [grouping.can_divide(*pair) for pair in zip(stages[1:], paths[1:], strict=True)]
    if all(divisible):
        return list(names)
    if not any(divisible):
        return []
    if not divisible[-1]:
        divisible[-2:] = [False, True]
    return [names[0], *(name for name, can in zip(names[1:], divisible, strict=True) if can)]


def _regrouped(
    model: nn.Module, example: Inputs, names: Sequence[str], grouping: Grouping, exits: int
) -> list[str]:
    """Return other stages, if none of those that were found can be divided: each is a single layer.

    A stage has several layers if the modules of the last one's kind are in equal groups, or if all stages
    but the first are joined. The names are the same if this does not help either.
    """
    kinds = {name: (name.rpartition(".")[0], type(module)) for name, module in model.named_modules()}
    order = [name for name in kinds if name]
    row = [name for name in order[: order.index(names[-1]) + 1] if kinds[name] == kinds[names[-1]]]
    counts = range(min(max(FEWEST, exits), len(row)), 1, -1)
    groups = [[row[(index + 1) * len(row) // count - 1] for index in range(count)] for count in counts]
    for others in (*groups, [names[0], names[-1]]):
        with suppress(ValueError):  # these cannot end stages
            parts = _analyse(cut(model, example, others, exits), example)
            if found := _divisible(others, parts, grouping, exits):
                return found
    return list(names)


def _one_stage(model: nn.Module, example: Inputs, name: str, grouping: Grouping, exits: int) -> ValueError:
    """Make the error for a network in which only one stage is found; it names other stages that work."""

    def works(backbone: Backbone) -> bool:
        names = list(backbone.stage_names)
        stages = _analyse(backbone, example)
        if exits > len(names):  # then all leave after the first
            return all(grouping.can_divide(stage, exits) for stage in stages[1:])
        return _divisible(names, stages, grouping, exits) == names

    others = stages_of_layers(model, example, works)
    hint = "its layers cannot end stages that can be divided: pass a netfission.Backbone of your own parts"
    if others:
        shared = f" and branch_after={[1] * (exits - 1)}" if exits > len(others) else ""
        hint = f"pass stages={others!r}{shared}"
    return invalid(
        "exits", f"1 for a network of one stage ({name}), unless others are named", exits, hint=hint
    )


def _prune(
    backbone: Backbone,
    stages: Sequence[Stage],
    grouping: Grouping,
    branches: Sequence[int],
    config: FissionConfig,
    batches: Batches,
    example: Inputs,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Prune stem and stages, and score what is left if the grouping asks for it.

    Returns:
        Name of each prunable weight in the backbone → bool tensor, True where kept; and → its scores.
        Either is empty if it was not asked for.
    """
    if CRITERIA[check_choice("criterion", config.criterion, CRITERIA)].needs == "shape":
        batches = batches or [(example, torch.empty(0))]  # the images are read alone
    names = [name for name in prunable_weights(backbone) if not name.startswith("head.")]
    kept: dict[str, Tensor] = {}
    if config.sparsity > 0:
        units, floors = [], []
        for index, stage in enumerate(stages):
            shares = _shares_in(index, branches, config)
            for group in grouping.prunable_units(stage):
                units.append(group.within(f"stages.{index}."))
                floors.append(fewest(group.units, shares))
        kept = prune(
            backbone,
            names,
            config.sparsity,
            criterion=config.criterion,
            batches=batches,
            steps=config.pruning_steps,
            seed=config.seed,
            groups=units,
            floors=floors,
        )
    scores: dict[str, Tensor] = {}
    if grouping.needs_scores:
        scores = score(backbone, names, config.criterion, batches, config.seed, kept)
    if grouping.masks_weights:
        apply_masks(backbone.stem, _below(kept, "stem."))
    return kept, scores


def _split(
    stages: Sequence[Stage],
    kept: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    grouping: Grouping,
    branches: Sequence[int],
    config: FissionConfig,
) -> list[StageSplit]:
    """Divide each stage among the exits whose path runs through it: exit 0 and those that have left it."""
    generator = torch.Generator().manual_seed(config.seed)
    splits = []
    for index, stage in enumerate(stages):
        prefix = f"stages.{index}."
        shares = _shares_in(index, branches, config)
        kept_here = _below(kept, prefix)
        split = grouping.split(stage, kept_here, shares, generator, _below(scores, prefix))
        if grouping.masks_weights:
            _check_pruned(split, kept_here)
        splits.append(split)
    return splits


def _split_head(
    backbone: Backbone, stages: Sequence[Stage], grouping: Grouping, config: FissionConfig, example: Inputs
) -> StageSplit:
    """Return the head of each exit: a copy, or a share of its inner channels if copies cost much.

    A head of several layers (MobileNetV3, AlexNet) is divided if copies of it would add over 5 % to the
    network's multiply-accumulates.
    """
    if config.exits > 1 and grouping.divides_heads:
        with torch.no_grad(), in_mode(backbone, training=False):
            head = Stage(backbone.head, stages[-1].module(map_tensors(Tensor.clone, stages[-1].features)))
        others = macs_by_weight(backbone.stem, example), *(stage.macs for stage in stages)
        total = sum(sum(macs.values()) for macs in (*others, head.macs))
        added = (config.exits - 1) * sum(head.macs.values())
        if added > TOLERANCE * total and grouping.can_divide(head, config.exits):
            generator = torch.Generator().manual_seed(config.seed)
            return grouping.split(head, {}, config.shares, generator, {})
    return StageSplit([copy.deepcopy(backbone.head) for _ in range(config.exits)])


@torch.no_grad()
def _reconstruct(
    backbone: Backbone,
    splits: Sequence[StageSplit],
    of_head: StageSplit,
    branches: Sequence[int],
    batches: Batches,
) -> list[str]:
    """Solve the layers of all paths so that each computes what the whole network does; see `reconstruct`.

    Returns:
        The names of the layers that stay as they are.
    """
    images = _images_of(batches, backbone)
    unsolved: dict[str, None] = {}
    with in_mode(backbone, *(path for split in splits for path in split.paths), training=False):
        whole = in_batches(backbone.stem, images)
        of_exit = {0: whole}  # what the path of each exit reads
        for index, (part, split) in enumerate(
            [*zip(backbone.stages, splits, strict=True), (backbone.head, of_head)]
        ):
            exits = _exits_in(index, branches)
            of_exit = {exit_: of_exit.get(exit_, of_exit[0]) for exit_ in exits}
            kept_of = split.kept or [{}] * len(exits)
            after = whole if part is backbone.head else in_batches(part, whole)
            for exit_, path, kept in zip(exits, split.paths, kept_of, strict=True):
                if not kept and of_exit[exit_] is whole:  # as before the first branch point
                    of_exit[exit_] = after
                    continue
                left = reconstruct(path, part, kept, of_exit[exit_], whole)
                unsolved |= dict.fromkeys(left)
                if part is not backbone.head:
                    of_exit[exit_] = in_batches(path, of_exit[exit_])
            whole = after
    return list(unsolved)


def _images_of(batches: Batches, backbone: Backbone) -> Tensor:
    """Return the images of all batches, or what else they hold, on the network's device."""
    images, parameter = torch.cat([cast(Tensor, rows) for rows, _ in batches]), next(backbone.parameters())
    return images.to(parameter) if images.is_floating_point() else images.to(parameter.device)


@torch.no_grad()
def _fit_linear_exits(
    backbone: Backbone, paths: Sequence[ExitPath], after: Sequence[int], batches: Batches
) -> None:
    """Fit each linear exit to the logits of the whole network, on its own share of the images, in place.

    The shares keep exits of the same features from becoming equal.
    """
    exits = [cast(LinearExit | LinearMapExit, path.head) for path in paths]
    images = _images_of(batches, backbone)
    pooled: dict[nn.Module, Tensor] = {}  # what each exit reads: features of earlier stages need not be kept
    with in_mode(backbone, training=False):
        features = in_batches(backbone.stem, images)
        for number, stage in enumerate(backbone.stages, start=1):
            features = in_batches(stage, features)
            for exit_, stages in zip(exits, after, strict=True):
                if stages == number:
                    pooled[exit_] = exit_.pooled(cast(Tensor, features))  # several, of maps
        logits = in_batches(backbone.head, features)
    assert isinstance(logits, Tensor)
    for index, exit_ in enumerate(exits):
        share = slice(index, None, len(exits))
        exit_.fit(pooled[exit_][share], logits[share])


def _keep_variance(
    stages: Sequence[Stage], splits: Sequence[StageSplit], kept: Mapping[str, Tensor], names: set[str]
) -> None:
    """Scale the layers of which a path reads a part only, if no normalisation runs after them."""
    for index, (stage, split) in enumerate(zip(stages, splits, strict=True)):
        prefix = f"stages.{index}."
        here = _names_below(names, prefix)
        for path in split.paths if len(split.paths) > 1 else ():
            keep_variance(path, stage.module, _below(kept, prefix), here)


def _check_pruned(split: StageSplit, kept: Mapping[str, Tensor]) -> None:
    """Refuse a grouping whose paths hold weights that pruning removed."""
    for path in split.paths if kept else ():
        for name, mask in kept_masks(path).items():
            if name in kept and mask.shape == kept[name].shape and (mask & ~kept[name]).any():
                expected = "one whose paths hold only the weights that pruning kept"
                raise invalid(
                    "grouping", expected, found=f"removed weights of {name}", hint="apply kept in its split"
                )


def _exits_in(index: int, branches: Sequence[int]) -> list[int]:
    """Return the exits that have a path of their own in a stage, counted from 0."""
    return [0] + [exit_ for exit_, after in enumerate(branches, start=1) if after <= index]


def _shares_in(index: int, branches: Sequence[int], config: FissionConfig) -> list[float]:
    """Return the relative share of each path that runs through a stage, exit 0's first."""
    return [config.shares[exit_] for exit_ in _exits_in(index, branches)]


def _assemble(
    backbone: Backbone,
    splits: Sequence[StageSplit],
    heads: Sequence[nn.Module],
    branches: Sequence[int],
    config: FissionConfig,
) -> FissionNetwork:
    """Put the parts of each path in a row, with its head at its end."""
    parts: list[list[nn.Module]] = [[] for _ in range(1 + len(branches))]
    for index, split in enumerate(splits):
        for exit_, part in zip(_exits_in(index, branches), split.paths, strict=True):
            parts[exit_].append(part)
    paths = [ExitPath(path_stages, head) for path_stages, head in zip(parts, heads, strict=True)]
    names = backbone.stage_names
    repeated = {name: split.repeated for name, split in zip(names, splits, strict=True) if split.repeated}
    return FissionNetwork(backbone.stem, paths, branches, names, repeated, config)


def linear_paths(backbone: Backbone, after: Sequence[int], example: Inputs, seed: int) -> list[ExitPath]:
    """Make the paths of linear exits, which pass features on from their stage to a linear classifier.

    Args:
        backbone: the network, whole.
        after: for each linear exit, how many stages it shares with exit 0.
        example: images, float `(batch, channels, height, width)`.
        seed: of the weights of the classifiers.

    Raises:
        ValueError: the features of a stage cannot be read by a linear exit.

    Example:
        >>> from netfission.models import create_model
        >>> images = torch.zeros(2, 3, 32, 32)
        >>> (path,) = linear_paths(cut(create_model("wrn-10-1", 10), images), [2], images, seed=0)
        >>> path(torch.zeros(5, 32, 16, 16)).shape
        torch.Size([5, 10])
    """
    if not after:
        return []
    with torch.no_grad(), in_mode(backbone, training=False):
        features = [backbone.stem(cloned(example))]
        for stage in backbone.stages:
            features.append(stage(map_tensors(Tensor.clone, features[-1])))
        logits = backbone.head(map_tensors(Tensor.clone, features[-1]))
    classes = logits.shape[1]
    with seeded(seed):
        exits: list[LinearExit | LinearMapExit] = [
            LinearExit(features[number], classes, example)
            if logits.ndim == 2
            else LinearMapExit(features[number], classes, cast(Tensor, example))
            for number in after
        ]
    rest = [len(backbone.stages) - number for number in after]
    paths = [
        ExitPath([nn.Identity() for _ in range(count)], exit_)
        for count, exit_ in zip(rest, exits, strict=True)
    ]
    return [path.train(backbone.training) for path in paths]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _names_below(names: set[str], prefix: str) -> set[str]:
    """Return the names that begin with `prefix`, without it."""
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def _report_costs(division: _Division) -> None:
    """Warn of each stage whose paths together need clearly more multiply-accumulates than the stage.

    A stage that was pruned is compared as it was before.
    """
    stages = zip(division.backbone.stage_names, division.stages, division.splits, strict=True)
    for name, stage, split in stages:
        cost = split.cost
        if cost > 1 + TOLERANCE and division.kept:
            features = map_tensors(lambda tensor: tensor[:1].clone(), stage.features)
            macs = (sum(macs_by_weight(path, features).values()) for path in split.paths)
            cost = sum(macs) / sum(stage.macs.values())
        if cost > 1 + TOLERANCE:
            warnings.warn(
                f"stage {name!r}: its {len(split.paths)} paths together need {cost:.2f} times the "
                "multiply-accumulates of the stage, because much of it cannot be divided; see summary()",
                stacklevel=3,
            )


def _report_checkpointing(model: nn.Module, network: nn.Module) -> None:
    """Warn if gradient checkpointing is on in the model, and in no part of the network."""
    if checkpointed(model) and not checkpointed(network):
        warnings.warn(
            "the model's gradient checkpointing is left out; if memory is short, train with smaller batches, "
            "else turn it off in the model before",
            stacklevel=3,
        )


def _report_unsolved(names: Sequence[str]) -> None:
    """Warn of the layers that reconstruction leaves as they are."""
    if names:
        listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        warnings.warn(
            f"reconstruct leaves {count_noun(len(names), 'layer')} as before, as outputs are not linear in "
            f"all weights and inputs (standardised, parametrised or grouped): {listed}",
            stacklevel=3,
        )


def _report_empty_layers(network: FissionNetwork, kept: Mapping[str, Tensor]) -> None:
    """Warn of the layers that got no weights, unless pruning emptied them, which it reports itself."""
    empty = []
    for exit_, (path, shared) in enumerate(zip(network.exit_paths, (0, *network.branch_after), strict=True)):
        for index, stage in enumerate(path.stages, start=shared):
            for name, mask in kept_masks(stage).items():
                pruned = kept.get(f"stages.{index}.{name}")
                if not mask.any() and (pruned is None or pruned.any()):
                    empty.append(f"{name} of exit {exit_}")
    if empty:
        warnings.warn(
            f"too few weights to divide: {len(empty)} layers got none: {', '.join(empty)}", stacklevel=3
        )
