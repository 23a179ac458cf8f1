"""Which weights may be pruned, and the rule that removed weights stay 0."""

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
    """The weights of all convolutions and linear layers in `module`, by parameter name.

    Biases, normalisation and embeddings are not among them. A weight shared by several layers is
    listed once, under its first name.
    """
    seen: set[int] = set()
    found: dict[str, nn.Parameter] = {}
    for path, layer in module.named_modules():
        attribute = next((name for kind, name in _PRUNABLE.items() if isinstance(layer, kind)), None)
        weight = layer._parameters.get(attribute) if attribute else None
        if weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            found[f"{path}.{attribute}" if path else str(attribute)] = weight
    return found


@torch.no_grad()
def refuse_rescaled(module: nn.Module) -> None:
    """Refuse layers that compute with something else than the weight they store.

    Weight standardisation and `torch.nn.utils.parametrize` turn a stored 0 into another number, so that
    a weight could be neither removed nor belong to one path alone.

    Raises:
        ValueError: a convolution or linear layer of `module` is such a layer; names it.
    """
    for path, layer in module.named_modules():
        kind = next((kind for kind in _PRUNABLE if isinstance(layer, kind)), None)
        if kind is None or not (is_parametrized(layer) or _rescales(layer, kind)):
            continue
        raise ValueError(
            f"model: layer {path!r} ({type(layer).__name__}) computes its weight from the one it stores; "
            "takes plain convolutions and linear layers (remove parametrizations first)"
        )


def _rescales(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether an overridden layer is not linear in its weight."""
    if type(layer).forward is kind.forward or not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    weight = layer.weight
    features = torch.ones(1, layer.in_channels, *(2 * size for size in layer.kernel_size)).to(weight)
    zero, one, two = (functional_call(layer, {"weight": k * weight}, (features,)) for k in (0, 1, 2))
    return not torch.allclose(two - zero, 2 * (one - zero), rtol=1e-3, atol=1e-5)


def remove(module: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Set the weights of `module` that are not in `kept` to 0, for good.

    How the zeros are kept without a second copy of any weight: each masked layer holds one bool buffer
    `weight_removed` (1 byte a weight, part of the state dict). The weight itself is stored with its
    zeros, so the forward pass is the plain layer's. The gradient of a removed weight is set to 0, in
    place, as it is accumulated: an optimiser that works element by element (SGD with momentum and
    weight decay, Adam, AdamW, …) therefore never moves it, gradient clipping and momentum see the
    pruned network only, and under DDP it happens before gradients are exchanged. Optimisers that mix
    the elements of a tensor (Muon, Shampoo) do move it, so that after each step of any
    `torch.optim.Optimizer` the removed weights are set to 0 once more, in place.

    Args:
        module: changed in place.
        kept: parameter name → bool tensor of its shape, True where kept. Each gets its buffer, also
            where nothing is removed, so that a network's state dict depends on its settings alone.

    Raises:
        KeyError: a name is not a parameter of `module`.
    """
    for name, mask in kept.items():
        path, _, attribute = name.rpartition(".")
        layer = module.get_submodule(path)
        weight = layer.get_parameter(attribute)
        assert mask.shape == weight.shape and mask.dtype is torch.bool
        layer.register_buffer(attribute + _SUFFIX, ~mask.to(weight.device))
    guard(module)


def kept_masks(module: nn.Module) -> dict[str, Tensor]:
    """Parameter name → bool tensor, True where a weight of `module` is kept, for every prunable weight."""
    kept = {
        name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable_weights(module).items()
    }
    return kept | {name: ~_removed_of(layer, attr) for name, layer, attr in _guardable(module)}


def masked_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Each weight of `module` that has a mask: its name, itself, and the mask, a bool buffer, True = removed.

    It is the buffer itself: whoever changes it calls `guard` at once.
    """
    for name, layer, attribute in _guardable(module):
        yield name, layer.get_parameter(attribute), _removed_of(layer, attribute)


def burn_in(module: nn.Module) -> None:
    """Forget which weights of `module` are removed, in place: they are the zeros that they are, unguarded.

    Weights that had a mask become new parameters, which take no gradient.
    """
    for _, layer, attribute in list(_guardable(module)):
        delattr(layer, attribute + _SUFFIX)
        weight = layer.get_parameter(attribute).detach()
        setattr(layer, attribute, nn.Parameter(weight, requires_grad=False))


# Parameter → (its layer, its attribute name) for each guarded weight. Found by identity: parameters
# cannot carry attributes through pickling, and `==` on tensors is element-wise.
_guarded = WeakIdKeyDictionary()


def guard(module: nn.Module) -> None:
    """Zero the removed weights of `module` and see that they stay 0; harmless when called again."""
    for _, layer, attribute in _guardable(module):
        weight = layer.get_parameter(attribute)
        with torch.no_grad():
            weight.masked_fill_(_removed_of(layer, attribute), 0)
        if weight not in _guarded:
            _guarded[weight] = (weakref.ref(layer), attribute)
            trains = weight.requires_grad  # a frozen weight takes no hook, yet may be thawed
            weight.requires_grad_(True).register_post_accumulate_grad_hook(_zero_removed_gradient)
            weight.requires_grad_(trains)


# Guarded weights whose removed places get their gradients for now, see `dense_gradients`.
_dense = WeakIdKeyDictionary()


@contextmanager
def dense_gradients(module: nn.Module) -> Iterator[None]:
    """Within, `backward` leaves in `.grad` what the removed weights of `module` would get, too.

    For whoever chooses which of them to bring back. An optimiser is not to step within: it would take those
    gradients into its momentum. At the end they are set to 0, as they are everywhere else.
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


class Guarded(nn.Module):
    """A module whose masked weights are guarded again wherever PyTorch may have replaced them.

    Copying, unpickling and loading with `assign=True` make new parameters, and some device moves do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_guard_loaded)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        guard(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        module = super()._apply(fn, recurse)
        guard(self)
        return module


def _guard_loaded(module: nn.Module, _incompatible_keys: Any) -> None:
    guard(module)


def _guardable(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Each masked weight of `module`: its parameter name, its layer and its attribute there."""
    for path, layer in module.named_modules():
        for buffer in layer._buffers:
            if buffer.endswith(_SUFFIX):
                attribute = buffer.removesuffix(_SUFFIX)
                yield (f"{path}.{attribute}" if path else attribute), layer, attribute


def _removed_of(layer: nn.Module, attribute: str) -> Tensor:
    return layer.get_buffer(attribute + _SUFFIX)


def _removed_from(weight: Tensor) -> Tensor | None:
    """The removed positions of a guarded weight; looked up, since `module.to` replaces buffers."""
    if weight not in _guarded:
        return None
    reference, attribute = _guarded[weight]
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
