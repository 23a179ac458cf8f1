"""Smaller dense layers: a module with only some of its channels, and one that fits given tensors."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def narrowed(module: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> nn.Module:
    """Return a copy of `module` that holds only some slices of its tensors.

    The widths of its layers follow the new shapes: channels of convolutions and linear layers, and heads of
    attention. Grouped convolutions and norms keep their number of channels per group.

    Args:
        module: the module; not changed.
        kept: parameter or buffer name → dimension → int64 indices to keep along it. The output of a layer and
            the input of the next must keep the same indices.

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
    widths = _head_dims(result)
    for name, dims in kept.items():
        tensor = _get(result, name)
        for dim, indices in dims.items():
            tensor = tensor.index_select(dim, indices.to(tensor.device))
        _set(result, name, tensor)
    _refresh(result, widths)
    return result


def fit(module: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Give the layers of `module` the widths of these tensors, in place; the new tensors hold zeros.

    Args:
        module: a module of the same structure with other widths.
        shapes: parameter or buffer name → shape. Names that the module lacks are ignored, and so are shapes
            that differ in more than their widths, such as kernels of another size.

    Example:
        >>> layer = nn.Linear(3, 4)
        >>> fit(layer, {"weight": torch.Size([2, 3]), "bias": torch.Size([2])})
        >>> layer
        Linear(in_features=3, out_features=2, bias=True)
    """
    widths = _head_dims(module)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, shape in shapes.items():
        if name in tensors and tensors[name].ndim == len(shape) and tensors[name].shape[2:] == shape[2:]:
            _set(module, name, tensors[name].new_zeros(shape))
    _refresh(module, widths)


def head_dim(module: nn.Module) -> int | None:
    """Return the number of channels per head of an attention whose heads can be divided, else None.

    Such an attention has the layout of timm: `qkv` returns queries, keys and values of all heads, `proj` maps
    the concatenated outputs of the heads, and `num_heads` is their number.
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
            case nn.PReLU():
                layer.num_parameters = layer.weight.shape[0]
    attention: Any
    for attention, width in head_dims.items():
        attention.num_heads = attention.proj.in_features // width
        if hasattr(attention, "attn_dim"):
            attention.attn_dim = attention.proj.in_features
