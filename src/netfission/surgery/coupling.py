"""Coupled channels: which slices of a stage's tensors belong to the same channel.

Found with Torch-Pruning's dependency graph (Fang et al. 2023, DepGraph, arXiv 2301.12900) on a copy of
the stage. A set of coupled channels is *internal* where it touches neither the stage's input nor its
output: a part of it can be left out and the stage keeps its interface.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from netfission.surgery.masks import prunable_weights
from netfission.surgery.narrowing import head_dim, narrowed

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ON_INTERFACE = "its channels are the stage's input or output"
UNFOLLOWED = "its channels are cut up and put together in a way that Torch-Pruning does not follow"


@dataclass(frozen=True)
class Slices:
    """Where the channels of a group lie in one tensor.

    Attributes:
        tensor: name of a parameter or buffer of the stage.
        dim: the dimension they lie along.
        units: int64 `(size of that dimension,)`: the unit of the group that each index belongs to,
            -1 for those that are not of the group.
    """

    tensor: str
    dim: int
    units: Tensor

    def keep(self, units: Tensor) -> Tensor:
        """The indices along the dimension that stay with these units; what is not of the group stays.

        Args:
            units: bool `(units of the group,)`.

        Returns:
            bool, of the shape of `self.units`.
        """
        return units[self.units.clamp(min=0)] | (self.units < 0)


@dataclass(frozen=True)
class ChannelGroup:
    """Coupled internal channels of a stage, in units that can be kept or left out one by one.

    A unit is a channel, a whole attention head, or what one group of a grouped convolution needs.

    Attributes:
        layer: the layer that makes the channels, by its name in the stage.
        units: how many there are.
        slices: all tensors that hold a part of them.
    """

    layer: str
    units: int
    slices: tuple[Slices, ...]

    def within(self, prefix: str) -> "ChannelGroup":
        """The same group where its stage's names begin with `prefix`."""
        slices = tuple(Slices(prefix + part.tensor, part.dim, part.units) for part in self.slices)
        return ChannelGroup(prefix + self.layer, self.units, slices)

    def sums(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Sum tensors over what belongs to each unit.

        Args:
            tensors: by the names in `slices`, shaped like what these name; others are passed over.

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
    """What can and what cannot be divided in a stage.

    Attributes:
        groups: the internal channel groups.
        whole: prunable weight → why none of its channels can be divided.
    """

    groups: tuple[ChannelGroup, ...]
    whole: dict[str, str]


def find_coupling(stage: nn.Module, features: Tensor) -> Coupling:
    """Find the internal channel groups of a stage.

    What is found is tried: without half of its units, a group must leave the stage doing what it does
    where the layers that read those units ignore them. A group that does not is left whole.

    Args:
        stage: features → features; not changed.
        features: an example of its input, batch first.

    Returns:
        The groups, attention heads first, then in the order their layers run, and why the rest of the
        stage stays whole.
    """
    heads, whole = _attention_heads(stage)
    channels, refused = _coupled_channels(stage, features)
    whole |= refused
    groups = [*heads, *channels]
    if groups and not _separable(stage, features, groups):
        sound = [group for group in groups if _separable(stage, features, [group])]
        whole |= {g.layer + ".weight": "its channels do not act one by one" for g in groups if g not in sound}
        groups = sound
    divided = {part.tensor for group in groups for part in group.slices}
    reasons = {name: whole.get(name, ON_INTERFACE) for name in prunable_weights(stage) if name not in divided}
    return Coupling(tuple(groups), reasons)


def _attention_heads(stage: nn.Module) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The heads of each attention, and why those of others cannot be told apart."""
    groups: list[ChannelGroup] = []
    whole: dict[str, str] = {}
    for path, module in stage.named_modules():
        width = head_dim(module)
        if width is None:
            if isinstance(module, nn.MultiheadAttention):
                reason = "nn.MultiheadAttention takes no fewer heads than its width holds"
                whole |= {f"{path}.in_proj_weight": reason, f"{path}.out_proj.weight": reason}
            continue
        heads = int(module.num_heads)
        of_channel = torch.arange(heads).repeat_interleave(width)
        slices = [Slices(f"{path}.qkv.weight", 0, of_channel.repeat(3))]
        if module.qkv.bias is not None:
            slices.append(Slices(f"{path}.qkv.bias", 0, of_channel.repeat(3)))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.ndim == 2 and tensor.shape[1] == heads:
                slices.append(Slices(f"{path}.{name}", 1, torch.arange(heads)))  # relative positions
        slices.append(Slices(f"{path}.proj.weight", 1, of_channel))
        groups.append(ChannelGroup(f"{path}.qkv", heads, tuple(slices)))
    return groups, whole


class _Port(nn.Module):
    """Marks the stage's input and output in the dependency graph."""

    def forward(self, features: Tensor) -> Tensor:
        return features * 1.0


class _StandIn(nn.Linear):
    """What an attention is to the channels around it: a map of each token."""

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        return super().forward(input)


@dataclass(frozen=True)
class _Side:
    """The output or input channels of one layer (or the channels of a norm), coupled to others.

    `channels[i]` goes with channel `roots[i]` of the layer that the search began at.
    """

    module: nn.Module | nn.Parameter
    is_input: bool
    channels: Tensor
    roots: Tensor


def _coupled_channels(stage: nn.Module, features: Tensor) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The internal groups of channels outside attention, and why others are none."""
    trial = copy.deepcopy(stage).requires_grad_(True)
    for path, module in stage.named_modules():
        if head_dim(module) is not None:
            stand_in = _StandIn(module.qkv.in_features, module.proj.out_features)
            parent, _, name = path.rpartition(".")
            setattr(trial.get_submodule(parent), name, stand_in.to(features.device))
    names: dict[int, str] = {id(p): name for name, p in trial.named_parameters()}
    names |= {id(m): name for name, m in trial.named_modules()}
    order = {name: place for place, (name, _) in enumerate(trial.named_modules())}
    groups: list[ChannelGroup] = []
    whole: dict[str, str] = {}
    found, lost = _search(trial, features)
    whole |= {f"{names[id(layer)]}.weight": UNFOLLOWED for layer in lost}
    for sides in _merged_at_grouped_convolutions(found):
        makers = (s.module for s in sides if not s.is_input and isinstance(s.module, Conv | nn.Linear))
        layers = sorted((names[id(module)] for module in makers), key=order.__getitem__)
        group = _internal_group(layers, sides, names)
        if isinstance(group, str):
            whole |= {f"{layer}.weight": group for layer in layers}
        else:
            groups.append(group)
    return sorted(groups, key=lambda group: order[group.layer]), whole


def _search(trial: nn.Module, features: Tensor) -> tuple[list[list[_Side]], list[nn.Module]]:
    """All sets of coupled channels, each once; those that reach a port among them.

    The library's arithmetic of indices fails on some ways of cutting channels up and putting them together
    again; the layers at which it did are the second result.
    """
    import torch_pruning as tp  # here, since it is slow to import

    class PortPruner(tp.ops.DummyPruner):  # type: ignore[misc]  # an untyped library
        """Lets the search pass through a port."""

        def get_out_channels(self, port: nn.Module) -> int:  # asked for where features are concatenated
            return features.shape[1]

    layers = [module for module in trial.modules() if isinstance(module, Conv | nn.Linear)]
    ports = nn.Sequential(_Port(), trial, _Port())
    images = features.detach().clone().requires_grad_(True)
    try:
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(
                ports, (images,), customized_pruners={_Port: PortPruner()}, verbose=False
            )
    except Exception:  # whatever it meets
        return [], list(layers)
    found: list[list[_Side]] = []
    lost: list[nn.Module] = []
    visited: set[int] = set()
    for module in layers:
        if module not in graph.module2node or id(module) in visited:
            continue
        pruner = graph.get_pruner_of_module(module)
        channels = list(range(pruner.get_out_channels(module)))
        try:
            coupled = [
                (item.dep, torch.tensor(item.idxs), torch.tensor(item.root_idxs))
                for item in graph.get_pruning_group(module, pruner.prune_out_channels, channels)
            ]
        except Exception:  # whatever it meets
            lost.append(module)
            continue
        sides = []
        for dependency, own, roots in coupled:
            target, handler = dependency.target.module, dependency.handler
            is_input = isinstance(target, Conv | nn.Linear) and not graph.is_out_channel_pruning_fn(handler)
            if isinstance(target, Conv | nn.Linear) and not is_input:
                visited.add(id(target))
            sides.append(_Side(target, is_input, own, roots))
        found.append(sides)
    return found, lost


def _grouped(module: object) -> bool:
    """Whether its input and output channels are coupled by the groups of a convolution."""
    return isinstance(module, Conv) and 1 < module.groups < module.out_channels


def _merged_at_grouped_convolutions(found: list[list[_Side]]) -> list[list[_Side]]:
    """Join the sets on the two sides of a grouped convolution; roots become the convolution's groups."""
    merged: list[list[_Side]] = []
    for sides in found:
        convolutions = {id(side.module) for side in sides if _grouped(side.module)}
        joined = [_by_convolution_groups(sides)]
        apart: list[list[_Side]] = []
        for others in merged:
            meets = convolutions & {id(side.module) for side in others if _grouped(side.module)}
            (joined if meets else apart).append(others)
        merged = [*apart, [side for sides in joined for side in sides]]
    return merged


def _by_convolution_groups(sides: list[_Side]) -> list[_Side]:
    """The sides of a set with their roots numbered by the groups of a layer that divides channels so."""
    for side in sides:
        if _grouped(side.module):
            assert isinstance(side.module, Conv)
            channels, groups = len(side.channels), side.module.groups
        elif isinstance(side.module, nn.GroupNorm) and side.module.num_groups > 1:
            channels, groups = side.module.num_channels, side.module.num_groups
        else:
            continue
        of_root = torch.full((int(max(s.roots.max() for s in sides)) + 1,), -1)
        of_root[side.roots] = side.channels // (channels // groups)
        return [_Side(s.module, s.is_input, s.channels, of_root[s.roots]) for s in sides]
    return sides


def _internal_group(layers: list[str], sides: list[_Side], names: Mapping[int, str]) -> ChannelGroup | str:
    """The group that these sides make, or why they make none."""
    if any(isinstance(side.module, _Port) for side in sides):
        return ON_INTERFACE
    slices: dict[tuple[str, int], Tensor] = {}
    for side in sides:
        if id(side.module) not in names:
            continue  # an operation without tensors
        tensors = _tensors_of(side, names[id(side.module)])
        if isinstance(tensors, str):
            return tensors
        for name, dim, size in tensors:
            if side.channels.max() >= size:
                return UNFOLLOWED
            of_index = slices.setdefault((name, dim), torch.full((size,), -1))
            if ((of_index[side.channels] != -1) & (of_index[side.channels] != side.roots)).any():
                return "its channels are coupled in more than one way"
            of_index[side.channels] = side.roots
    units = 1 + max(int(of_index.max()) for of_index in slices.values())
    parts = tuple(Slices(name, dim, of_index) for (name, dim), of_index in slices.items())
    return ChannelGroup(layers[0], units, parts)


def _tensors_of(side: _Side, name: str) -> list[tuple[str, int, int]] | str:
    """Name, dimension and size there of each tensor that holds channels of a side."""
    module = side.module
    match module:
        case nn.Parameter():
            (dim,) = [d for d, size in enumerate(module.shape) if size == len(side.channels)][-1:] or [0]
            return [(name, dim, module.shape[dim])]
        case _StandIn():
            if side.is_input:
                return [(f"{name}.qkv.weight", 1, module.in_features)]
            sizes = [("weight", module.out_features), ("bias", module.out_features)]
            return [(f"{name}.proj.{tensor}", 0, size) for tensor, size in sizes]
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() | nn.Linear() if side.is_input:
            dense = isinstance(module, nn.Linear) or module.groups == 1
            return [(f"{name}.weight", 1, module.weight.shape[1])] if dense else []
        case (
            nn.Conv1d() | nn.Conv2d() | nn.Conv3d() | nn.Linear() | nn.PReLU()
            | nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d() | nn.GroupNorm() | nn.LayerNorm()
        ):  # fmt: skip
            own = (*module._parameters.items(), *module._buffers.items())
            return [
                (f"{name}.{key}", 0, tensor.shape[0])
                for key, tensor in own
                if tensor is not None and tensor.ndim
            ]
    return f"{type(module).__name__} cannot be divided"


def kept_indices(groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> dict[str, dict[int, Tensor]]:
    """What `narrowed` takes to keep some units of each group.

    Args:
        groups: of one stage.
        kept: for each, a bool tensor `(units,)`.
    """
    masks: dict[str, dict[int, Tensor]] = {}
    for group, units in zip(groups, kept, strict=True):
        for part in group.slices:
            here = part.keep(units)
            dims = masks.setdefault(part.tensor, {})
            dims[part.dim] = dims[part.dim] & here if part.dim in dims else here
    return {
        name: {dim: mask.nonzero().squeeze(1) for dim, mask in dims.items()}
        for name, dims in masks.items()
        if not all(mask.all() for mask in dims.values())
    }


@torch.no_grad()
def _separable(stage: nn.Module, features: Tensor, groups: Sequence[ChannelGroup]) -> bool:
    """Whether the stage without half of each group's units is the stage that ignores them.

    Weights are drawn anew, since a branch may start at 0; norms over several channels are taken out.
    """
    trial = copy.deepcopy(stage).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        values = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
        parameter.copy_(values.to(parameter.device))
    _without_norms_over_channels(trial, groups)
    kept = [torch.arange(group.units) % 2 == 0 for group in groups]
    present = dict(trial.named_parameters()) | dict(trial.named_buffers())
    indices = {name: dims for name, dims in kept_indices(groups, kept).items() if name in present}
    example = torch.randn(features[:1].shape, generator=generator).to(features)
    try:
        narrow = narrowed(trial, indices)(example.clone())
    except Exception:  # whatever an operation says of shapes that do not meet
        return False
    for name, dims in indices.items():
        if 1 in dims:
            dropped = torch.ones(present[name].shape[1], dtype=torch.bool)
            dropped[dims[1]] = False
            present[name][:, dropped.to(present[name].device)] = 0
    expected = trial(example)
    return narrow.shape == expected.shape and bool(
        (narrow - expected).abs().max() <= 1e-3 * expected.abs().max()
    )


def _without_norms_over_channels(trial: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    layers = {part.tensor.rpartition(".")[0] for group in groups for part in group.slices}
    each_alone = Conv | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.PReLU
    for path in layers:
        layer = trial.get_submodule(path)
        if path and not isinstance(layer, each_alone) and not list(layer.children()):
            parent, _, name = path.rpartition(".")
            setattr(trial.get_submodule(parent), name, nn.Identity())
