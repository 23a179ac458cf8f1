"""Smaller dense layers: a module with only some of its channels, and one that fits given tensors."""

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netfission.surgery.heads import LAYERS, FewerHeads, heads_of, runs_directly, set_heads
from netfission.surgery.heads import NAMES as HEADS


class ScatteredNorm(nn.Module):
    """A batch norm of some channels that returns all channels, with zeros for the others.

    Features `(batch, channels of the norm, height, width)` → `(batch, all channels, height, width)`.

    Attributes:
        norm: the batch norm.
        sources: int64 `(all channels,)`: the channel of the norm that each channel is; of those that the norm
            lacks, their number.

    Example:
        >>> norm = ScatteredNorm.at(nn.BatchNorm2d(2).eval(), torch.tensor([0, 2]), 4)
        >>> norm(torch.ones(1, 2, 1, 1)).flatten().round().tolist()
        [1.0, 0.0, 1.0, 0.0]
    """

    sources: Tensor

    def __init__(self, norm: nn.Module, sources: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("sources", sources)

    @classmethod
    def at(cls, norm: nn.Module, channels: Tensor, width: int) -> Self:
        """Return a norm whose channels are these, int64 on the CPU, of `width` channels."""
        sources = torch.full((width,), len(channels)).index_copy(0, channels, torch.arange(len(channels)))
        return cls(norm, sources.to(next(norm.parameters()).device))

    def forward(self, features: Tensor) -> Tensor:
        """Normalise features, and put each channel in its place."""
        with_zero = F.pad(self.norm(features), (0, 0, 0, 0, 0, 1))  # a channel of zeros at the end
        return with_zero.index_select(1, self.sources)


def narrowed(
    module: nn.Module, kept: Mapping[str, Mapping[int, Tensor]], scattered: Collection[str] = ()
) -> nn.Module:
    """Return a copy of `module` that holds only some slices of its tensors.

    The widths of its layers follow the new shapes: channels of convolutions and linear layers, and heads of
    attention. Grouped convolutions and norms keep their number of channels per group.

    Args:
        module: the module; not changed.
        kept: parameter or buffer name → dimension → int64 indices to keep along it. The output of a layer and
            the input of the next must keep the same indices.
        scattered: names of batch norms whose output keeps all channels, with zeros for those they lose.

    Returns:
        The smaller module.

    Example:
        >>> layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> half = torch.tensor([0, 2])
        >>> narrowed(layers, {"0.weight": {0: half}, "0.bias": {0: half}, "1.weight": {1: half}})
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
          (1): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    result = copy.deepcopy(module)
    before = _Widths(result)
    for name, dims in kept.items():
        tensor = _get(result, name)
        for dim, indices in dims.items():
            tensor = tensor.index_select(dim, indices.to(tensor.device))
        _set(result, name, tensor)
    before.refresh(result)
    for name in scattered:
        weight = f"{name}.weight"
        if weight in kept:
            norm, width = result.get_submodule(name), len(_get(module, weight))
            result.set_submodule(name, ScatteredNorm.at(norm, kept[weight][0], width))
    return result


def fit(module: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Give the layers of `module` the widths of these tensors, in place; the new tensors hold zeros.

    Args:
        module: a module of the same structure with other widths.
        shapes: parameter or buffer name → shape. Names that the module lacks are ignored, and so are shapes
            that differ in more than their widths, such as kernels of another size. A batch norm becomes a
            `ScatteredNorm` if the names are of one.

    Example:
        >>> layer = nn.Linear(3, 4)
        >>> fit(layer, {"weight": torch.Size([2, 3]), "bias": torch.Size([2])})
        >>> layer
        Linear(in_features=3, out_features=2, bias=True)
    """
    before = _Widths(module)
    modules = dict(module.named_modules())
    for name, shape in shapes.items():
        owner, _, attribute = name.rpartition(".")
        if attribute == "sources" and isinstance(norm := modules.get(owner), nn.BatchNorm2d):
            sources = torch.zeros(shape, dtype=torch.int64, device=next(norm.parameters()).device)
            module.set_submodule(owner, ScatteredNorm(norm, sources))
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, shape in shapes.items():
        if name in tensors and tensors[name].ndim == len(shape) and tensors[name].shape[2:] == shape[2:]:
            _set(module, name, tensors[name].new_zeros(shape))
    before.refresh(module)


def _get(module: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), attribute)
    return tensor


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    layer = module.get_submodule(path)
    old = getattr(layer, attribute)
    if old.ndim == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
    setattr(layer, attribute, tensor)
    layer._non_persistent_buffers_set.discard(attribute)  # the model's code would make it at full width


class _Widths:
    """The widths of the layers of a module, and what its code stores of them."""

    def __init__(self, module: nn.Module) -> None:
        self._layers = {
            name: _width_of(layer) for name, layer in module.named_modules() if isinstance(layer, LAYERS)
        }

    def refresh(self, module: nn.Module) -> None:
        """Set the widths that the module, or a copy of it, stores to those of its tensors."""
        _refresh(module)
        of_owner: dict[str, list[_Change]] = {}
        for name, before in self._layers.items():
            owner = _owner(module, name)
            if owner is not None:
                change = (
                    name.removeprefix(owner).removeprefix("."),
                    before,
                    _width_of(module.get_submodule(name)),
                )
                of_owner.setdefault(owner, []).append(change)
        for owner, changes in of_owner.items():
            if any(before != after for _, before, after in changes):
                _set_widths(module.get_submodule(owner), changes)


_Width = tuple[int, int]  # numbers of input and output channels
_Change = tuple[str, _Width, _Width]  # name of a layer, its widths before and after


def _width_of(layer: nn.Module) -> _Width:
    """Return the numbers of input and output channels that the weight of a layer has."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.shape[1] * int(getattr(layer, "groups", 1)), weight.shape[0]


def _owner(module: nn.Module, layer: str) -> str | None:
    """Return the module whose code runs a layer: an attention that contains it, or else its parent.

    None if there are only containers around it.
    """
    parents = layer.split(".")[:-1]
    names = [".".join(parents[:count]) for count in range(len(parents), -1, -1)]
    around = {name: module.get_submodule(name) for name in names}
    attentions = (
        name
        for name, part in around.items()
        if heads_of(part) is not None and any(runs_directly(part, child) for child in part._modules)
    )
    others = (name for name, part in around.items() if not isinstance(part, nn.ModuleList | nn.Sequential))
    return next(attentions, next(others, None))


def _set_widths(module: nn.Module, changes: Sequence[_Change]) -> None:
    """Set the integers that a module stores of the widths of its layers."""
    if isinstance(module, nn.MultiheadAttention):
        return  # `FewerHeads` reads no other width than that of a head
    heads = heads_of(module)
    if heads is None:
        pairs = [pair for _, before, after in changes for pair in zip(before, after, strict=True)]
        _set_sizes(module, _by_old(pairs))
        return
    pairs = [(before[1], after[1]) for _, before, after in changes if before[1] != after[1]]
    if not pairs:
        return  # only its input has another width
    _, before, after = changes[-1]
    if before[1] == after[1]:
        pairs.append((before[0], after[0]))  # what the output projection reads of all heads
    new_of = _by_old(pairs)
    new_heads = _new_heads(module, changes, heads)
    if new_heads is not None:
        for name, unit in vars(module).items():
            if _is_width(unit) and name not in HEADS and ("dim" in name or "width" in name):
                new_of.setdefault(heads * unit, new_heads * unit)  # a width of all heads
    _set_sizes(module, new_of)
    if new_heads is not None and new_heads != heads:
        _set_all_heads(module, heads, new_heads)


def _by_old(pairs: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return old width → new width; if layers of one width differ, those that changed count."""
    return dict(sorted(pairs, key=lambda pair: pair[0] != pair[1]))


def _new_heads(attention: nn.Module, changes: Sequence[_Change], heads: int) -> int | None:
    """Return the number of heads after changes of its layers; None if it is no integer."""
    ratios = Counter(
        Fraction(after[1], before[1])  # the outputs of all but the last layer, the projection
        for layer, before, after in (changes[:-1] or changes)
        if before[1] != after[1] and runs_directly(attention, layer.partition(".")[0])
    )
    scaled = heads * ratios.most_common(1)[0][0] if ratios else Fraction(heads)
    return int(scaled) if scaled.denominator == 1 else None


def _set_sizes(module: nn.Module, new_of: Mapping[int, int]) -> None:
    """Replace the widths among the attributes of a module, except those of one head."""
    for name, value in list(vars(module).items()):
        if name.startswith("_") or _of_one_head(name):
            continue
        if _is_width(value) and value in new_of:
            setattr(module, name, new_of[value])
        elif isinstance(value, list | tuple) and value and all(map(_is_width, value)):
            setattr(module, name, type(value)(_new_sizes(list(value), new_of)))


def _set_all_heads(attention: nn.Module, heads: int, new_heads: int) -> None:
    """Set the number of heads of an attention, and of what adds a bias to each of its heads."""
    for part in attention.modules():
        if heads_of(part) == heads:
            set_heads(part, new_heads)
        elif not any(new_heads in tensor.shape for tensor in part._parameters.values() if tensor is not None):
            continue
        for name, value in list(vars(part).items()):
            if name.endswith("_shape") and isinstance(value, tuple):  # of a bias for each head
                setattr(part, name, tuple(new_heads if size == heads else size for size in value))


def _of_one_head(name: str) -> bool:
    """Return whether an attribute counts heads or is the width of one, as `num_heads` and `head_dim`."""
    return name in HEADS or ("head" in name and "all" not in name)


def _new_sizes(sizes: list[int], new_of: Mapping[int, int]) -> list[int]:
    """Return the new sizes of pieces that a layer's output is taken apart into."""
    result = [new_of.get(size, size) for size in sizes]
    unknown = [index for index, size in enumerate(sizes) if size not in new_of]
    if sum(sizes) in new_of and len(unknown) == 1:
        result[unknown[0]] += new_of[sum(sizes)] - sum(result)
    return result


def _is_width(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _refresh(module: nn.Module) -> None:
    """Set the widths that the layers store to those of their tensors."""
    for layer in module.modules():
        match layer:
            case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
                if layer.groups > 1:
                    layer.groups = layer.weight.shape[0] // (layer.out_channels // layer.groups)
                layer.out_channels = layer.weight.shape[0]
                layer.in_channels = layer.weight.shape[1] * layer.groups
            case nn.Linear():
                layer.out_features, layer.in_features = layer.weight.shape
            case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d() if layer.affine:
                layer.num_features = layer.weight.shape[0]
            case nn.GroupNorm() if layer.affine:
                if layer.num_groups > 1:
                    layer.num_groups = layer.weight.shape[0] // (layer.num_channels // layer.num_groups)
                layer.num_channels = layer.weight.shape[0]
            case nn.LayerNorm() if layer.elementwise_affine:
                layer.normalized_shape = tuple(layer.weight.shape)
            case nn.MultiheadAttention() if layer._parameters.get("in_proj_weight") is not None:
                if len(layer.in_proj_weight) != 3 * layer.num_heads * layer.head_dim:
                    FewerHeads.change(layer)
            case nn.PReLU():
                layer.num_parameters = layer.weight.shape[0]
