"""Masks on weights: which weights may be pruned, and how removed weights stay 0."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from netfission.utils.errors import invalid

# The layers whose weights are prunable, and the name of that weight. Attention keeps its three input
# projections in one matrix outside any linear layer.
_PRUNABLE: dict[type[nn.Module], str] = {
    nn.Conv1d: "weight",
    nn.Conv2d: "weight",
    nn.Conv3d: "weight",
    nn.Linear: "weight",
    nn.MultiheadAttention: "in_proj_weight",
}
_SUFFIX = "_removed"


def prunable_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of all convolutions and linear layers in `module`, by parameter name.

    Biases, normalisation and embeddings are not among them. A weight that several layers share is
    listed once, under its first name.

    Example:
        >>> list(prunable_weights(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))))
        ['0.weight', '2.weight']
    """
    seen: set[int] = set()
    weights: dict[str, nn.Parameter] = {}
    for path, layer in module.named_modules():
        attribute = next((name for kind, name in _PRUNABLE.items() if isinstance(layer, kind)), None)
        weight = layer._parameters.get(attribute) if attribute else None
        if weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            weights[f"{path}.{attribute}" if path else str(attribute)] = weight
    return weights


@torch.no_grad()
def check_plain_weights(module: nn.Module) -> None:
    """Check that every convolution and linear layer computes with the weight it stores.

    Weight standardisation and `torch.nn.utils.parametrize` turn a stored 0 into another number. Such a
    weight can neither be removed nor belong to one path alone.

    Raises:
        ValueError: a layer of `module` computes its weight from the stored one; the message names it.

    Example:
        >>> check_plain_weights(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
        ... # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: model must be made of plain convolutions and linear layers, got layer ...
    """
    for path, layer in module.named_modules():
        kind = next((kind for kind in _PRUNABLE if isinstance(layer, kind)), None)
        if kind is None or not (is_parametrized(layer) or _rescales(layer, kind)):
            continue
        raise invalid(
            "model",
            "made of plain convolutions and linear layers",
            found=f"layer {path!r} ({type(layer).__name__}), which computes its weight from another",
            hint="remove its parametrizations first",
        )


def _rescales(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a convolution with its own `forward` is not linear in its weight."""
    if type(layer).forward is kind.forward or not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    weight = layer.weight
    features = torch.ones(1, layer.in_channels, *(2 * size for size in layer.kernel_size)).to(weight)
    zero, one, two = (functional_call(layer, {"weight": k * weight}, (features,)) for k in (0, 1, 2))
    return not torch.allclose(two - zero, 2 * (one - zero), rtol=1e-3, atol=1e-5)


def apply_masks(module: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Remove the weights of `module` that `kept` masks out: they are 0 from now on, in training too.

    There is no second copy of any weight. Each masked layer holds one bool buffer `weight_removed` (1 byte
    per weight, part of the state dict). The weight itself is stored with its zeros, so the forward pass is
    that of the plain layer.

    The gradient of a removed weight is set to 0, in place, as it is accumulated. An optimiser that works
    element by element (SGD with momentum and weight decay, Adam, AdamW, …) therefore never moves it.
    Gradient clipping and momentum see the pruned network only. Under DDP, gradients are zeroed before they
    are exchanged. Optimisers that mix the elements of a tensor (Muon, Shampoo) do move removed weights. So
    each step of any `torch.optim.Optimizer` is followed by a hook that sets them to 0 again, in place.

    Args:
        module: changed in place.
        kept: parameter name → bool tensor of its shape, True where kept. Each of these parameters gets a
            buffer, even if all of it is kept, so that the names in a state dict depend on settings alone.

    Raises:
        AttributeError: a name is not a parameter of `module`.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> apply_masks(layer, {"weight": torch.tensor([[True, False], [True, True]])})
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> layer.weight.grad
        tensor([[1., 0.],
                [1., 1.]])
    """
    for name, mask in kept.items():
        path, _, attribute = name.rpartition(".")
        layer = module.get_submodule(path)
        weight = layer.get_parameter(attribute)
        assert mask.shape == weight.shape and mask.dtype is torch.bool
        layer.register_buffer(attribute + _SUFFIX, ~mask.to(weight.device))
    enforce_masks(module)


def kept_masks(module: nn.Module) -> dict[str, Tensor]:
    """Return a mask for every prunable weight of `module`: parameter name → bool tensor, True where kept.

    Example:
        >>> kept_masks(nn.Linear(2, 1))
        {'weight': tensor([[True, True]])}
    """
    kept = {
        name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable_weights(module).items()
    }
    return kept | {name: ~_removed_of(layer, attr) for name, layer, attr in _masked_layers(module)}


def masked_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Yield name, weight and mask of each masked weight of `module`; the mask is True where removed.

    The mask is the buffer itself. A caller that changes it sets the newly removed weights to 0, or calls
    `enforce_masks`.
    """
    for name, layer, attribute in _masked_layers(module):
        yield name, layer.get_parameter(attribute), _removed_of(layer, attribute)


def discard_masks(module: nn.Module) -> None:
    """Discard the masks of `module`, in place; removed weights remain plain zeros.

    Weights that had a mask become new parameters without gradient.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> apply_masks(layer, {"weight": torch.tensor([[True, False]])})
        >>> discard_masks(layer)
        >>> list(layer.state_dict()), layer.weight[0, 1].item()
        (['weight'], 0.0)
    """
    for _, layer, attribute in list(_masked_layers(module)):
        delattr(layer, attribute + _SUFFIX)
        weight = layer.get_parameter(attribute).detach()
        setattr(layer, attribute, nn.Parameter(weight, requires_grad=False))


# Parameter → (its layer, its attribute name) for each masked weight. The keys compare by identity:
# parameters cannot carry attributes through pickling, and `==` on tensors is element-wise.
_layer_of_weight = WeakIdKeyDictionary()


def enforce_masks(module: nn.Module) -> None:
    """Set the removed weights of `module` to 0 and keep them at 0; further calls change nothing."""
    for _, layer, attribute in _masked_layers(module):
        weight = layer.get_parameter(attribute)
        with torch.no_grad():
            weight.masked_fill_(_removed_of(layer, attribute), 0)
        if weight not in _layer_of_weight:
            _layer_of_weight[weight] = (weakref.ref(layer), attribute)
            trains = weight.requires_grad  # PyTorch puts no hook on a frozen weight, which may be thawed
            weight.requires_grad_(True).register_post_accumulate_grad_hook(_zero_removed_gradient)
            weight.requires_grad_(trains)


# Masked weights whose removed elements have gradients for now, see `dense_gradients`.
_dense = WeakIdKeyDictionary()


@contextmanager
def dense_gradients(module: nn.Module) -> Iterator[None]:
    """Let `backward` compute the gradients of removed weights as well, within this context.

    They tell which removed weights to bring back. No optimiser may step within the context, since these
    gradients would enter its momentum. At the end of the context they are set to 0.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> apply_masks(layer, {"weight": torch.tensor([[True, False]])})
        >>> with dense_gradients(layer):
        ...     layer(torch.ones(1, 2)).sum().backward()
        ...     print(layer.weight.grad)
        tensor([[1., 1.]])
        >>> layer.weight.grad
        tensor([[1., 0.]])
    """
    weights = [weight for _, weight, _ in masked_weights(module)]
    for weight in weights:
        _dense[weight] = True
    try:
        yield
    finally:
        for weight in weights:
            _dense.pop(weight, None)
            _zero_removed_gradient(weight)


class MaskedModule(nn.Module):
    """Base class of modules with masks: it enforces them again when PyTorch may have replaced parameters.

    Copying, unpickling and loading with `assign=True` make new parameters, and so do some device moves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_enforce_loaded)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        enforce_masks(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        module = super()._apply(fn, recurse)
        enforce_masks(self)
        return module


def _enforce_loaded(module: nn.Module, _incompatible_keys: Any) -> None:
    enforce_masks(module)


def _masked_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield for each masked weight of `module` its parameter name, its layer and its attribute there."""
    for path, layer in module.named_modules():
        for buffer in layer._buffers:
            if buffer.endswith(_SUFFIX):
                attribute = buffer.removesuffix(_SUFFIX)
                yield (f"{path}.{attribute}" if path else attribute), layer, attribute


def _removed_of(layer: nn.Module, attribute: str) -> Tensor:
    return layer.get_buffer(attribute + _SUFFIX)


def _removed_from(weight: Tensor) -> Tensor | None:
    """Return the removed positions of a masked weight; looked up, since `module.to` replaces buffers."""
    if weight not in _layer_of_weight:
        return None
    reference, attribute = _layer_of_weight[weight]
    layer = reference()
    return None if layer is None else _removed_of(layer, attribute)


def _zero_removed_gradient(weight: Tensor) -> None:
    removed = None if weight in _dense else _removed_from(weight)
    if removed is not None and weight.grad is not None:
        # Filled, not multiplied: under AMP a gradient may be infinite, and inf × 0 is NaN.
        weight.grad.masked_fill_(removed, 0)


@torch.no_grad()
def _zero_removed_weights(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            removed = _removed_from(weight)
            if removed is not None:
                weight.masked_fill_(removed, 0)


register_optimizer_step_post_hook(_zero_removed_weights)
