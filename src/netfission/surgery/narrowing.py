"""Smaller dense layers: a module with only some of its channels, and one that fits given tensors."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def narrowed(module: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> nn.Module:
    """A copy of `module` that holds only some slices of its tensors.

    Layers learn their new widths from the new shapes: channels of convolutions and linear layers, groups
    of grouped convolutions and norms (as many channels a group as before), heads of attention.

    Args:
        module: not changed.
        kept: parameter or buffer name → dimension → int64 indices to keep along it. What one layer feeds
            the next must have been narrowed alike.
    """
    result = copy.deepcopy(module)
    widths = _head_dims(result)
    for name, dims in kept.items():
        tensor = _get(result, name)
        for dim, indices in dims.items():
            tensor = tensor.index_select(dim, indices.to(tensor.device))
        _set(result, name, tensor)
    _refresh(result, widths)
    return result


def fit(module: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Give `module`'s layers the widths of these tensors, in place; the values are to be loaded.

    Args:
        module: the same structure with other widths.
        shapes: parameter or buffer name → shape; those that the module lacks are passed over, and those
            that differ in more than their widths, as kernels of another size.
    """
    widths = _head_dims(module)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, shape in shapes.items():
        if name in own and own[name].ndim == len(shape) and own[name].shape[2:] == shape[2:]:
            _set(module, name, own[name].new_zeros(shape))
    _refresh(module, widths)


def head_dim(module: nn.Module) -> int | None:
    """Channels of one head where `module` is an attention whose heads can be divided, else None.

    That is one in the layout of timm: `qkv` gives queries, keys and values of all heads, `proj` takes
    the heads' outputs side by side, and there are `num_heads` of them.
    """
    qkv, proj, heads = (getattr(module, name, None) for name in ("qkv", "proj", "num_heads"))
    if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and isinstance(heads, int)):
        return None
    inner = proj.in_features
    return inner // heads if qkv.out_features == 3 * inner and inner % heads == 0 else None


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


def _head_dims(module: nn.Module) -> dict[nn.Module, int]:
    widths = {layer: head_dim(layer) for layer in module.modules()}
    return {layer: width for layer, width in widths.items() if width is not None}


def _refresh(module: nn.Module, head_dims: Mapping[nn.Module, int]) -> None:
    """Bring what the layers say of their widths in line with their tensors."""
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
            case nn.PReLU():
                layer.num_parameters = layer.weight.shape[0]
    attention: Any
    for attention, width in head_dims.items():
        attention.num_heads = attention.proj.in_features // width
        if hasattr(attention, "attn_dim"):
            attention.attn_dim = attention.proj.in_features
