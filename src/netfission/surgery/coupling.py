"""Coupled channels: which slices of a stage's tensors belong to the same channel.

They are found by following the channels through one run of the stage, see `netfission.surgery.channel_flow`.
A set of coupled channels is *internal* if it touches neither the stage's input nor its output. A part of an
internal set can be left out, and the stage keeps its interface.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from netfission.surgery.channel_flow import TORCH_ATTENTION, WHOLE, Flow, Part, follow, is_norm
from netfission.surgery.heads import divides, heads_of
from netfission.surgery.masks import prunable_weights
from netfission.surgery.narrowing import narrowed
from netfission.surgery.standardised import leave_out_standardisation, standardises
from netfission.utils.modes import trial_copy

ON_INTERFACE = "its channels are the stage's input or output"
MIXED = "its channels do not act one by one"
_TRIED = 2  # identity branches, from the last, each of which costs a run of the stage
COUPLED_TWICE = "its channels are coupled in more than one way"


@dataclass(frozen=True, eq=False)
class Slices:
    """Where the channels of a group lie in one tensor.

    Attributes:
        tensor: name of a parameter or buffer of the stage.
        dim: the dimension they lie along.
        units: int64 `(size of that dimension,)`: the unit of the group that each index belongs to,
            -1 for indices outside the group.
        scattered: whether it belongs to a norm whose output keeps all channels, see `find_coupling`.
    """

    tensor: str
    dim: int
    units: Tensor
    scattered: bool = False

    def keep(self, units: Tensor) -> Tensor:
        """Return which indices along the dimension stay with these units; those outside the group stay.

        Args:
            units: bool `(units of the group,)`.

        Returns:
            bool, of the shape of `self.units`.
        """
        return units[self.units.clamp(min=0)] | (self.units < 0)


@dataclass(frozen=True, eq=False)  # two with equal tensors are not the same group
class ChannelGroup:
    """Coupled internal channels of a stage, in units that can be kept or left out one by one.

    A unit is a channel, a whole attention head, or what one group of a grouped convolution needs.

    Attributes:
        layer: the layer that makes the channels, by its name in the stage.
        units: how many there are.
        slices: where the channels lie, one entry per tensor and dimension.
    """

    layer: str
    units: int
    slices: tuple[Slices, ...]

    def within(self, prefix: str) -> "ChannelGroup":
        """Return the same group with `prefix` before all names."""
        slices = tuple(replace(part, tensor=prefix + part.tensor) for part in self.slices)
        return ChannelGroup(prefix + self.layer, self.units, slices)

    def sums(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Sum tensors over the elements that belong to each unit.

        Args:
            tensors: name in `slices` → tensor of the parameter's shape; other names are ignored.

        Returns:
            float64 `(units,)` on the CPU.
        """
        total = torch.zeros(self.units, dtype=torch.float64)
        for part in self.slices:
            if part.tensor in tensors:
                tensor = tensors[part.tensor].double()
                others = [dim for dim in range(tensor.ndim) if dim != part.dim]
                of_index = (tensor.sum(others) if others else tensor).cpu()
                total.index_add_(0, part.units[part.units >= 0], of_index[part.units >= 0])
        return total


@dataclass(frozen=True)
class Coupling:
    """The channels of a stage that can be divided, and why the others cannot.

    Attributes:
        groups: the internal channel groups.
        undivided: prunable weight → why none of its channels can be divided.
    """

    groups: tuple[ChannelGroup, ...]
    undivided: dict[str, str]


def find_coupling(stage: nn.Module, features: Any) -> Coupling:
    """Find the internal channel groups of a stage.

    Groups are tested: without half of each group's units, the stage must compute what it computes if the
    layers that read those units ignore them. A group that fails the test is not divided.

    Blocks of RepVGG and MobileOne add a batch norm of their input to their convolutions. These identity
    branches tie the channels of all blocks to the stage's output. So one of the last two may be *scattered*:
    it reads the channels that a path keeps. It adds them, in their places, to the output of the convolutions
    beside it, which is whole. Such a path computes what the stage does if the removed channels are 0, and if
    the weight and bias of that identity branch are 0 for them.

    Args:
        stage: features → features; not changed.
        features: an example of its input, batch first; a tensor, or several if the stage reads several.

    Returns:
        The groups, attention heads first, then in the order of their layers, and why the other layers of
        the stage are not divided.

    Example:
        >>> stage = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3))
        >>> coupling = find_coupling(stage, torch.zeros(1, 8, 16, 16))
        >>> [(group.layer, group.units) for group in coupling.groups]
        [('0', 12)]
    """
    trial = _on_cpu_in_float32(stage)
    example = tree_map_only(Tensor, _first_row, features)
    flow = follow(trial, example)
    sound, undivided = _sound_groups(trial, example, flow)
    held = {part.tensor for group in sound for part in group.slices}
    whole = [name for name in flow.identities if f"{name}.weight" not in held]
    for name in reversed(whole[-_TRIED:]):
        freed, reasons = _sound_groups(trial, example, follow(trial, example, scattered=name))
        if scattered_norms(freed):
            sound, undivided = freed, reasons
            break
    for path, module in stage.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not divides(module):
            undivided |= dict.fromkeys((f"{path}.in_proj_weight", f"{path}.out_proj.weight"), TORCH_ATTENTION)
    divided = {part.tensor for group in sound for part in group.slices}
    reasons = {
        name: undivided.get(name, ON_INTERFACE) for name in prunable_weights(stage) if name not in divided
    }
    return Coupling(tuple(sound), reasons)


def _first_row(tensor: Tensor) -> Tensor:
    row = tensor[:1].detach().cpu()
    return row.float() if row.is_floating_point() else row  # a mask of tokens stays one


def _sound_groups(stage: nn.Module, example: Any, flow: Flow) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups whose units act one by one, and why other layers are not divided."""
    groups, undivided = _channel_groups(stage, flow)
    sound = _sound(stage, example, groups)
    joined = _joined(groups, sound)
    if joined:
        layers = {group.layer for group in joined}
        others = [group for group in sound if group.layer not in layers]
        candidates = sorted([*others, *joined], key=_rank(stage))
        sound = candidates if _separable(stage, example, candidates) else sound
    return sound, {f"{group.layer}.weight": MIXED for group in groups if group not in sound} | undivided


def _on_cpu_in_float32(stage: nn.Module) -> nn.Module:
    """Return a copy of a stage whose channels can be followed, whatever its device and precision.

    On other devices a layer runs other operations, such as `cudnn_batch_norm`.
    """
    tensors = [*stage.parameters(), *stage.buffers()]
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    if on_cpu and all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point()):
        return trial_copy(stage)
    return copy.deepcopy(stage).cpu().float()


def _channel_groups(stage: nn.Module, flow: Flow) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups of tied channels, and why those of other layers cannot be left out."""
    classes = _classes(flow)
    kept = {int(classes[label]): reason for label, reason in flow.reasons.items()}
    kept[int(classes[WHOLE])] = ON_INTERFACE
    shared = torch.bincount(classes, minlength=flow.count) > 1
    parts = [replace(part, labels=_of(classes, part.labels)) for part in flow.parts.values()]
    for name, labels in flow.loose.items():
        part = _part_of_loose(name, classes[labels], shared)
        if isinstance(part, Part):
            parts.append(part)
        else:
            kept |= dict.fromkeys(part, COUPLED_TWICE)
    undivided: dict[str, str] = {}
    for part in parts:
        if part.makes:
            reasons = [kept[label] for label in part.labels.unique().tolist() if label in kept]
            if reasons:
                undivided[part.tensor] = reasons[0]
    order = {name: index for index, (name, _) in enumerate(stage.named_modules())}
    found = _units(parts, set(kept), order, _attentions(stage))
    groups = [_group(places, units, parts, order) for places, units in found]
    undivided = {f"{group.layer}.weight": MIXED for group in groups if group.units == 1} | undivided
    groups = [group for group in groups if group.units > 1]
    return sorted(groups, key=_rank(stage)), undivided


def _rank(stage: nn.Module) -> Callable[[ChannelGroup], tuple[bool, int]]:
    """Return the key that sorts groups: attention heads first, then by the order of their layers."""
    order = {name: index for index, (name, _) in enumerate(stage.named_modules())}

    def rank(group: ChannelGroup) -> tuple[bool, int]:
        heads = heads_of(stage.get_submodule(group.layer.rpartition(".")[0]))
        return heads is None, order[group.layer]

    return rank


def _joined(groups: Sequence[ChannelGroup], sound: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Return of each layer with a group that is not sound one group of all, if their units divide evenly.

    Code may take equal pieces of a layer's output and send one through a grouped convolution, which makes
    larger units (Res2NeXt). Then pieces stay equal if several units of the other piece are one unit.
    """
    of_layer: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        of_layer.setdefault(group.layer, []).append(group)
    found = []
    for layer, several in of_layer.items():
        units = min(group.units for group in several)
        is_sound = all(group in sound for group in several)
        if len(several) > 1 and not is_sound and all(group.units % units == 0 for group in several):
            slices: dict[tuple[str, int], Slices] = {}
            for group in several:
                for part in group.slices:
                    place = part.tensor, part.dim
                    coarse = torch.where(part.units < 0, -1, part.units // (group.units // units))
                    before = slices[place].units if place in slices else coarse
                    slices[place] = replace(part, units=torch.maximum(before, coarse))
            found.append(ChannelGroup(layer, units, tuple(slices.values())))
    return found


def _classes(flow: Flow) -> Tensor:
    """Return the class of each label: the smallest label that it is tied to."""
    classes = torch.arange(flow.count)
    if not flow.pairs:
        return classes
    first, second = torch.cat(flow.pairs, 1)
    while True:
        one, other = classes[first], classes[second]
        if torch.equal(one, other):
            return classes
        classes.scatter_reduce_(0, torch.maximum(one, other), torch.minimum(one, other), "amin")
        while not torch.equal(jumped := classes[classes], classes):
            classes = jumped


def _of(classes: Tensor, labels: Tensor) -> Tensor:
    """Return the classes of labels; what has no label is whole."""
    return classes[labels.clamp(min=WHOLE)]


def _part_of_loose(name: str, classes: Tensor, shared: Tensor) -> Part | set[int]:
    """Return along which dimension the channels lie in a parameter that is used outside a layer.

    Args:
        name: of the parameter.
        classes: int64, of each element.
        shared: bool `(labels,)`: whether a class has several members; elements of others are not used.

    Returns:
        The part, or the classes that lie along several dimensions.
    """
    used = shared[classes]
    for dim, size in enumerate(classes.shape):
        if size == 1:
            continue
        rows, is_used = (tensor.movedim(dim, 0).reshape(size, -1) for tensor in (classes, used))
        largest = rows.masked_fill(~is_used, -1).amax(1)
        smallest = rows.masked_fill(~is_used, torch.iinfo(torch.int64).max).amin(1)
        if bool(((largest == smallest) | (largest < 0)).all()):
            return Part(name, dim, largest.clamp(min=WHOLE))
    return set(classes[used].unique().tolist()) - {WHOLE}


_Places = tuple[int, ...]


def _attentions(stage: nn.Module) -> dict[str, tuple[str, int]]:
    """Return each layer of an attention → the attention's name and its number of heads."""
    found: dict[str, tuple[str, int]] = {}
    for name, module in stage.named_modules():
        heads = heads_of(module)
        if heads is not None:
            layers = (f"{name}.{layer}".lstrip(".") for layer, _ in module.named_modules())
            found |= dict.fromkeys(layers, (name, heads))
    return found


def _units(
    parts: Sequence[Part], kept: set[int], order: Mapping[str, int], attentions: Mapping[str, tuple[str, int]]
) -> list[tuple[_Places, list[list[int]]]]:
    """Return the units of each group, as the classes that they consist of, and the parts that hold them.

    Classes that lie in the same parts form a group, one class per unit. If several groups of the same size
    begin at one layer, a unit has a class of each: the code that takes the layer's output apart takes equal
    pieces. So it has of groups in one attention that each have as many units as heads, since the attention
    has one number of heads.
    """
    held: dict[int, list[int]] = {}
    for index, part in enumerate(parts):
        for label in part.labels.unique().tolist():
            if label not in kept:
                held.setdefault(label, []).append(index)
    groups: dict[_Places, list[int]] = {}
    for label, found in held.items():
        if any(parts[place].makes for place in found):
            groups.setdefault(tuple(found), []).append(label)
    joined: list[tuple[_Places, list[list[int]]]] = []
    for places, labels in groups.items():
        units = [[label] for label in _in_order(labels, parts[_first_maker(places, parts, order)])]
        source = _source(places, parts, len(units), attentions)
        same = [other for other in joined if len(other[1]) == len(units)]
        for other in [other for other in same if _source(other[0], parts, len(units), attentions) == source]:
            joined.remove(other)
            places = (*dict.fromkeys((*other[0], *places)),)
            units = [[*one, *more] for one, more in zip(other[1], units, strict=True)]
        joined.append((places, units))
    return joined


def _source(
    places: Sequence[int], parts: Sequence[Part], units: int, attentions: Mapping[str, tuple[str, int]]
) -> str:
    """Return the first layer to run that makes the channels of a group; of heads, the attention."""
    layer = parts[min(place for place in places if parts[place].makes)].tensor.rpartition(".")[0]
    attention, heads = attentions.get(layer, ("", 0))
    return f"heads of {attention}" if heads == units else layer


def _first_maker(places: Sequence[int], parts: Sequence[Part], order: Mapping[str, int]) -> int:
    makers = [place for place in places if parts[place].makes]
    return min(makers, key=lambda place: order[parts[place].tensor.rpartition(".")[0]])


def _in_order(labels: Sequence[int], part: Part) -> list[int]:
    """Return labels in the order of their first channel in a part."""
    first = {label: index for index, label in reversed(list(enumerate(part.labels.tolist())))}
    return sorted(labels, key=first.__getitem__)


def _group(
    places: _Places, units: Sequence[Sequence[int]], parts: Sequence[Part], order: Mapping[str, int]
) -> ChannelGroup:
    first = _first_maker(places, parts, order)
    unit_of = {label: index for index, labels in enumerate(units) for label in labels}
    slices = tuple(
        Slices(
            parts[place].tensor,
            parts[place].dim,
            torch.tensor([unit_of.get(label, -1) for label in parts[place].labels.tolist()]),
            parts[place].scattered,
        )
        for place in sorted(places, key=lambda place: place != first)
    )
    return ChannelGroup(parts[first].tensor.rpartition(".")[0], len(units), slices)


def _sound(stage: nn.Module, example: Any, groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Return the groups whose units act one by one.

    All are tested at once, then by the kind of their layers, which repeats with each block. Of a kind that
    fails, the groups are tested in halves unless the first and the last fail, too.
    """
    if not groups or _separable(stage, example, groups):
        return groups
    kinds: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        kinds.setdefault(re.sub(r"\d+", "", group.layer) + f" {len(group.slices)}", []).append(group)
    found: list[ChannelGroup] = []
    for of_kind in kinds.values():
        if _separable(stage, example, of_kind):
            found += of_kind
        elif any(_separable(stage, example, [group]) for group in (of_kind[0], of_kind[-1])):
            found += _sound_by_halves(stage, example, of_kind)
    found = [group for group in groups if group in found]
    return found if _separable(stage, example, found) else _sound_by_halves(stage, example, found)


def _sound_by_halves(stage: nn.Module, example: Any, groups: list[ChannelGroup]) -> list[ChannelGroup]:
    if not groups or _separable(stage, example, groups):
        return groups
    if len(groups) == 1:
        return []
    middle = len(groups) // 2
    halves = [_sound_by_halves(stage, example, half) for half in (groups[:middle], groups[middle:])]
    both = halves[0] + halves[1]
    return both if len(both) < len(groups) and _separable(stage, example, both) else halves[0]


def kept_indices(groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> dict[str, dict[int, Tensor]]:
    """Return the indices that `narrowed` needs to keep some units of each group.

    Args:
        groups: groups of one stage.
        kept: for each group a bool tensor `(units,)`, True where kept.

    Returns:
        Tensor name → dimension → int64 indices to keep along it.
    """
    masks: dict[str, dict[int, Tensor]] = {}
    for group, units in zip(groups, kept, strict=True):
        for part in group.slices:
            stays = part.keep(units)
            dims = masks.setdefault(part.tensor, {})
            dims[part.dim] = dims[part.dim] & stays if part.dim in dims else stays
    return {
        name: {dim: mask.nonzero().squeeze(1) for dim, mask in dims.items()}
        for name, dims in masks.items()
        if not all(mask.all() for mask in dims.values())
    }


def scattered_norms(groups: Sequence[ChannelGroup]) -> set[str]:
    """Return the names of the norms that `narrowed` needs to scatter, see `find_coupling`."""
    return {part.tensor.rpartition(".")[0] for group in groups for part in group.slices if part.scattered}


@torch.no_grad()
def _separable(stage: nn.Module, features: Any, groups: Sequence[ChannelGroup]) -> bool:
    """Return whether the stage without half of each group's units equals the stage that ignores them.

    Weights are random, since a branch may start at 0. What depends on all channels of a layer is left out.
    """
    trial = copy.deepcopy(stage).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        values = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
        parameter.copy_(values.to(parameter.device))
    _leave_out_statistics(trial, groups)
    kept = [_about_half(group.units, index) for index, group in enumerate(groups)]
    present = dict(trial.named_parameters()) | dict(trial.named_buffers())
    indices = {name: dims for name, dims in kept_indices(groups, kept).items() if name in present}
    scattered = scattered_norms(groups)
    example = tree_map_only(Tensor, lambda part: _random_like(part, generator), features)
    try:
        narrow = narrowed(trial, indices, scattered)(_cloned(example))
    except Exception:  # a user's stage may raise anything if a shape is not what it expects
        return False
    for name, dims in indices.items():
        for dim in (1, 0) if name.rpartition(".")[0] in scattered else (1,):
            if dim in dims:
                dropped = torch.ones(present[name].shape[dim], dtype=torch.bool)
                dropped[dims[dim]] = False
                present[name].movedim(dim, 0)[dropped.to(present[name].device)] = 0
    return all(
        one.shape == other.shape and _are_close(one, other)
        for one, other in zip(tree_leaves(narrow), tree_leaves(trial(_cloned(example))), strict=True)
        if one.numel()
    )


def _are_close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= 1e-3 * other.abs().max())


def _random_like(features: Tensor, generator: torch.Generator) -> Tensor:
    """Return random features; what is not floating point, such as a mask of tokens, stays."""
    if not features.is_floating_point():
        return features
    return torch.randn(features.shape, generator=generator).to(features.device)


def _about_half(units: int, index: int) -> Tensor:
    """Return a bool tensor that keeps the first half of a group's units, but the last in place of the first.

    Every second group keeps one unit more if it has four or more, as a path may get more units of one group
    than of another: code that takes equal pieces of both fails then.
    """
    kept = torch.arange(units) < (units + 1) // 2 + (index % 2 if units > 3 else 0)
    kept[0], kept[-1] = False, True
    return kept


def _cloned(features: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, features)


def _leave_out_statistics(trial: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Leave out norms over channels and the standardisation of weights, which depend on all channels."""
    layers = {part.tensor.rpartition(".")[0] for group in groups for part in group.slices}
    for path in layers:
        layer = trial.get_submodule(path)
        if path and (isinstance(layer, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) or is_norm(layer)):
            parent, _, name = path.rpartition(".")
            setattr(trial.get_submodule(parent), name, nn.Identity())
        elif isinstance(layer, nn.Conv2d) and standardises(layer):
            leave_out_standardisation(layer)
