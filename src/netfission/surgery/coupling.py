"""Coupled channels: which slices of a stage's tensors belong to the same channel.

They are found with Torch-Pruning's dependency graph (Fang et al. 2023, DepGraph, arXiv 2301.12900) on a
copy of the stage. A set of coupled channels is *internal* if it touches neither the stage's input nor its
output. A part of an internal set can be left out, and the stage keeps its interface.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from netfission.surgery.masks import prunable_weights
from netfission.surgery.narrowing import head_dim, narrowed
from netfission.utils.errors import first_line

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ON_INTERFACE = "its channels are the stage's input or output"
UNFOLLOWED = "its channels are split and concatenated in a way that Torch-Pruning does not follow"
TOO_LARGE = "its channels are coupled in too many ways to follow all of them"
# How many channel indices Torch-Pruning may pass on, and along how many dependencies, while it follows the
# channels of one layer. Attention with reshapes makes it pass ever longer lists in circles. DenseNet-201
# needs 1.5 million indices along 4,400 dependencies, ResNet-152 half of that.
INDEX_LIMIT = 3_000_000
DEPENDENCY_LIMIT = 6_000
# What Torch-Pruning's graph and index arithmetic raise on such channels, seen with ShuffleNets (IndexError,
# ZeroDivisionError), gated halves (TypeError) and layers that it does not know (ValueError).
_UNFOLLOWED_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _TooLargeError(Exception):
    """The channels of a layer cannot be followed within the limits."""


class _Work:
    """The work done to follow the channels of one layer.

    With each layer that exceeds the limits, those of the next get smaller, so that all work is bounded.
    """

    def __init__(self) -> None:
        self._indices = self._dependencies = 0
        self._exceeded = 0

    def reset(self) -> None:
        """Begin with another layer."""
        self._indices = self._dependencies = 0

    def add(self, indices: int, dependencies: int = 0) -> None:
        """Count work, and raise an error if it exceeds the limits."""
        self._indices += indices
        self._dependencies += dependencies
        share = 1 + self._exceeded
        if self._indices * share > INDEX_LIMIT or self._dependencies * share > DEPENDENCY_LIMIT:
            self._exceeded += 1
            raise _TooLargeError


class _CountedMappings(list[Any]):
    """The index mappings of one dependency, which Torch-Pruning applies in turn, with their work counted."""

    def __init__(self, mappings: Sequence[Any], work: _Work) -> None:
        super().__init__(mappings)
        self._work = work

    def __iter__(self) -> Iterator[Any]:
        yield self._count
        for mapping in super().__iter__():
            if mapping is not None:
                repeats = 1 if mapping.reverse else getattr(mapping, "_stride", 1)
                yield partial(self._apply, mapping, repeats)

    def _count(self, indices: list[Any]) -> list[Any]:
        self._work.add(len(indices), dependencies=1)
        return indices

    def _apply(self, mapping: Any, repeats: int, indices: list[Any]) -> list[Any]:
        self._work.add(len(indices) * repeats)  # before the memory is needed
        mapped: list[Any] = mapping(indices)
        return mapped


@dataclass(frozen=True)
class Slices:
    """Where the channels of a group lie in one tensor.

    Attributes:
        tensor: name of a parameter or buffer of the stage.
        dim: the dimension they lie along.
        units: int64 `(size of that dimension,)`: the unit of the group that each index belongs to,
            -1 for indices outside the group.
    """

    tensor: str
    dim: int
    units: Tensor

    def keep(self, units: Tensor) -> Tensor:
        """Return which indices along the dimension stay with these units; those outside the group stay.

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
        slices: where the channels lie, one entry per tensor and dimension.
    """

    layer: str
    units: int
    slices: tuple[Slices, ...]

    def within(self, prefix: str) -> "ChannelGroup":
        """Return the same group with `prefix` before all names."""
        slices = tuple(Slices(prefix + part.tensor, part.dim, part.units) for part in self.slices)
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


def find_coupling(stage: nn.Module, features: Tensor) -> Coupling:
    """Find the internal channel groups of a stage.

    Each group is tested: without half of the group's units, the stage must compute what it computes if the
    layers that read those units ignore them. A group that fails the test is not divided.

    Args:
        stage: features → features; not changed.
        features: an example of its input, batch first.

    Returns:
        The groups, attention heads first, then in the order of their layers, and why the other layers of
        the stage are not divided.

    Example:
        >>> stage = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3))
        >>> coupling = find_coupling(stage, torch.zeros(1, 8, 16, 16))
        >>> [(group.layer, group.units) for group in coupling.groups]
        [('0', 12)]
    """
    heads, undivided = _attention_heads(stage)
    channels, refused = _coupled_channels(stage, features)
    undivided |= refused
    groups = [*heads, *channels]
    if groups and not _separable(stage, features, groups):
        sound = [group for group in groups if _separable(stage, features, [group])]
        reason = "its channels do not act one by one"
        undivided |= {f"{group.layer}.weight": reason for group in groups if group not in sound}
        groups = sound
    divided = {part.tensor for group in groups for part in group.slices}
    reasons = {
        name: undivided.get(name, ON_INTERFACE) for name in prunable_weights(stage) if name not in divided
    }
    return Coupling(tuple(groups), reasons)


def _attention_heads(stage: nn.Module) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the heads of each attention, and why those of other attentions cannot be distinguished."""
    groups: list[ChannelGroup] = []
    undivided: dict[str, str] = {}
    for path, module in stage.named_modules():
        width = head_dim(module)
        if width is None:
            if isinstance(module, nn.MultiheadAttention):
                reason = "nn.MultiheadAttention does not allow fewer heads at the same width"
                undivided |= {f"{path}.in_proj_weight": reason, f"{path}.out_proj.weight": reason}
            continue
        heads = int(module.num_heads)
        head_of_channel = torch.arange(heads).repeat_interleave(width)
        slices = [Slices(f"{path}.qkv.weight", 0, head_of_channel.repeat(3))]
        if module.qkv.bias is not None:
            slices.append(Slices(f"{path}.qkv.bias", 0, head_of_channel.repeat(3)))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.ndim == 2 and tensor.shape[1] == heads:
                slices.append(Slices(f"{path}.{name}", 1, torch.arange(heads)))  # relative positions
        slices.append(Slices(f"{path}.proj.weight", 1, head_of_channel))
        groups.append(ChannelGroup(f"{path}.qkv", heads, tuple(slices)))
    return groups, undivided


def _in_float32(stage: nn.Module) -> nn.Module:
    """Return a copy of a stage whose channels can be followed and tested, whatever its precision."""
    return copy.deepcopy(stage).float()


class _Port(nn.Module):
    """A mark of the stage's input and output in the dependency graph."""

    def forward(self, features: Tensor) -> Tensor:
        return features * 1.0


class _StandIn(nn.Linear):
    """A stand-in for an attention, which to the channels around it is a map of each token."""

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
    """Return the internal groups of channels outside attention, and why other layers have none."""
    trial = _in_float32(stage).requires_grad_(True)
    for path, module in stage.named_modules():
        if head_dim(module) is not None:
            stand_in = _StandIn(module.qkv.in_features, module.proj.out_features)
            parent, _, name = path.rpartition(".")
            setattr(trial.get_submodule(parent), name, stand_in.to(features.device))
    names: dict[int, str] = {id(p): name for name, p in trial.named_parameters()}
    names |= {id(m): name for name, m in trial.named_modules()}
    order = {name: index for index, (name, _) in enumerate(trial.named_modules())}
    groups: list[ChannelGroup] = []
    found, unfollowed = _search(trial, features)
    undivided = {f"{names[id(layer)]}.weight": reason for layer, reason in unfollowed.items()}
    for sides in _merged_at_grouped_convolutions(found):
        makers = (s.module for s in sides if not s.is_input and isinstance(s.module, Conv | nn.Linear))
        layers = sorted((names[id(module)] for module in makers), key=order.__getitem__)
        group = _internal_group(layers, sides, names)
        if isinstance(group, str):
            undivided |= {f"{layer}.weight": group for layer in layers}
        else:
            groups.append(group)
    return sorted(groups, key=lambda group: order[group.layer]), undivided


def _search(trial: nn.Module, features: Tensor) -> tuple[list[list[_Side]], dict[nn.Module, str]]:
    """Return all sets of coupled channels, each once, and the layers whose channels cannot be followed.

    The sets include those that reach a port. Torch-Pruning fails on some ways of splitting and concatenating
    channels; the second result is layer → reason, which ends in the library's message.
    """
    import torch_pruning as tp  # here, since it is slow to import

    class PortPruner(tp.ops.DummyPruner):  # type: ignore[misc]  # an untyped library
        """Lets the search pass through a port."""

        def get_out_channels(self, port: nn.Module) -> int:  # called if features are concatenated
            return features.shape[1]

    layers = [module for module in trial.modules() if isinstance(module, Conv | nn.Linear)]
    ports = nn.Sequential(_Port(), trial, _Port())
    images = features.detach().float().clone().requires_grad_(True)
    try:
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(
                ports, (images,), customized_pruners={_Port: PortPruner()}, verbose=False
            )
    except _UNFOLLOWED_ERRORS as error:
        return [], dict.fromkeys(layers, _unfollowed(error))
    work = _Work()
    for node in graph.module2node.values():
        for dependency in node.dependencies:
            dependency.index_mapping = _CountedMappings(dependency.index_mapping, work)
    found: list[list[_Side]] = []
    unfollowed: dict[nn.Module, str] = {}
    visited: set[int] = set()
    for module in layers:
        if module not in graph.module2node or id(module) in visited:
            continue
        pruner = graph.get_pruner_of_module(module)
        channels = list(range(pruner.get_out_channels(module)))
        work.reset()
        try:
            coupled = [
                (item.dep, torch.tensor(item.idxs), torch.tensor(item.root_idxs))
                for item in graph.get_pruning_group(module, pruner.prune_out_channels, channels)
            ]
        except _UNFOLLOWED_ERRORS as error:
            unfollowed[module] = _unfollowed(error)
            continue
        except _TooLargeError:
            unfollowed[module] = TOO_LARGE
            continue
        sides = []
        for dependency, indices, roots in coupled:
            target, handler = dependency.target.module, dependency.handler
            is_input = isinstance(target, Conv | nn.Linear) and not graph.is_out_channel_pruning_fn(handler)
            if isinstance(target, Conv | nn.Linear) and not is_input:
                visited.add(id(target))
            sides.append(_Side(target, is_input, indices, roots))
        found.append(sides)
    return found, unfollowed


def _unfollowed(error: Exception) -> str:
    return f"{UNFOLLOWED} ({type(error).__name__}: {first_line(error)})"


def _grouped(module: object) -> bool:
    """Return whether the module is a convolution whose groups couple input and output channels."""
    return isinstance(module, Conv) and 1 < module.groups < module.out_channels


def _merged_at_grouped_convolutions(found: list[list[_Side]]) -> list[list[_Side]]:
    """Join the sets on the two sides of a grouped convolution; roots become the convolution's groups."""
    merged: list[list[_Side]] = []
    for sides in found:
        convolutions = {id(side.module) for side in sides if _grouped(side.module)}
        joined = [_by_convolution_groups(sides)]
        others: list[list[_Side]] = []
        for earlier in merged:
            shared = convolutions & {id(side.module) for side in earlier if _grouped(side.module)}
            (joined if shared else others).append(earlier)
        merged = [*others, [side for sides in joined for side in sides]]
    return merged


def _by_convolution_groups(sides: list[_Side]) -> list[_Side]:
    """Return the sides of a set with roots numbered by the groups of a grouped convolution or norm."""
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
    """Return the group of these sides, or why they form no group."""
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
    """Return name, dimension and size of each tensor that holds channels of a side, or why it cannot."""
    module = side.module
    match module:
        case nn.Parameter():
            (dim,) = [d for d, size in enumerate(module.shape) if size == len(side.channels)][-1:] or [0]
            return [(name, dim, module.shape[dim])]
        case _StandIn():
            if side.is_input:
                return [(f"{name}.qkv.weight", 1, module.in_features)]
            return [(f"{name}.proj.{tensor}", 0, module.out_features) for tensor in ("weight", "bias")]
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() | nn.Linear() if side.is_input:
            dense = isinstance(module, nn.Linear) or module.groups == 1
            return [(f"{name}.weight", 1, module.weight.shape[1])] if dense else []
        case (
            nn.Conv1d() | nn.Conv2d() | nn.Conv3d() | nn.Linear() | nn.PReLU()
            | nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d() | nn.GroupNorm() | nn.LayerNorm()
        ):  # fmt: skip
            tensors = (*module._parameters.items(), *module._buffers.items())
            return [
                (f"{name}.{key}", 0, tensor.shape[0])
                for key, tensor in tensors
                if tensor is not None and tensor.ndim
            ]
    return f"{type(module).__name__} cannot be divided"


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


@torch.no_grad()
def _separable(stage: nn.Module, features: Tensor, groups: Sequence[ChannelGroup]) -> bool:
    """Return whether the stage without half of each group's units equals the stage that ignores them.

    Weights are random, since a branch may start at 0, and norms over several channels are replaced.
    """
    trial = _in_float32(stage).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        values = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
        parameter.copy_(values.to(parameter.device))
    _without_norms_over_channels(trial, groups)
    kept = [torch.arange(group.units) % 2 == 0 for group in groups]
    present = dict(trial.named_parameters()) | dict(trial.named_buffers())
    indices = {name: dims for name, dims in kept_indices(groups, kept).items() if name in present}
    example = torch.randn(features[:1].shape, generator=generator).to(features.device)
    try:
        narrow = narrowed(trial, indices)(example.clone())
    except Exception:  # a user's stage may raise anything if a shape is not what it expects
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
