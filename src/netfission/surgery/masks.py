"""Masks on weights: which weights may be pruned, and how removed weights stay 0."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.optimizer import register_optimizer_step_post_hook

from netfission.surgery.standardised import standardises
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
def check_plain_weights(module: nn.Module, *, standardised: bool = True) -> None:
    """Check that every convolution and linear layer computes with the weight it stores.

    Weight standardisation and `torch.nn.utils.parametrize` turn a stored 0 into another number. Such a
    weight can neither be removed nor belong to one path alone.

    Args:
        module: the module.
        standardised: whether layers that standardise their weight are refused, too.

    Raises:
        ValueError: a layer of `module` computes its weight from the stored one; the message names it.

    Example:
        >>> check_plain_weights(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
        ... # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: model must be made of plain convolutions and linear layers, got layer ...
    """
    for path, layer in module.named_modules():
        _check_plain_weight(path, layer, standardised=standardised)


def _check_plain_weight(path: str, layer: nn.Module, *, standardised: bool = True) -> None:
    if isinstance(layer, tuple(_PRUNABLE)) and (
        is_parametrized(layer) or (standardised and standardises(layer))
    ):
        raise invalid(
            "model",
            "made of plain convolutions and linear layers",
            found=f"layer {path!r} ({type(layer).__name__}), which computes its weight from another",
            hint="remove its parametrizations first, or use grouping='channels' with sparsity=0",
        )


def apply_masks(module: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Remove the weights of `module` that `kept` masks out: they are 0 from now on, in training too.

    Each masked layer holds one bool buffer `weight_removed` (1 byte per weight, part of the state dict). It
    becomes an instance of a subclass of its class, of the same name, in which the *attribute* `weight` is
    a property. Whoever reads it, the layer's own `forward` or another module, reads 0 where a weight was
    removed, whatever changed the stored weight before. The names in `parameters()` and in a state dict stay
    the same.

    - A parameter of the layer itself is set to 0 in place as it is read. So there is no second copy of it.
      Its gradient is masked by a hook on the parameter, which `backward` and `torch.autograd.grad` both
      call. An optimiser that works element by element (SGD with momentum and weight decay, Adam, AdamW, …)
      never moves removed weights. Gradient clipping and momentum see the pruned network only. Under DDP and
      FSDP2, gradients are masked before they are exchanged.
    - Any other tensor in its place (in `torch.func.functional_call`, under FSDP2, in a traced or compiled
      network, after `torch.nn.utils.prune`) is read as a masked copy, through which gradients flow.

    Optimisers that mix the elements of a tensor (Muon, Shampoo) do move removed weights. So each step of
    any `torch.optim.Optimizer` is followed by a hook that sets them to 0 again, in place. The same happens
    before a state dict is made and after one is loaded.

    Args:
        module: changed in place.
        kept: parameter name → bool tensor of its shape, True where kept. Each of these parameters gets a
            buffer, even if all of it is kept, so that the names in a state dict depend on settings alone.

    Raises:
        AttributeError: a name is not a parameter of `module`.
        ValueError: a layer computes its weight from the stored one, see `check_plain_weights`.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> apply_masks(layer, {"weight": torch.tensor([[True, False], [True, True]])})
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> layer.weight.grad
        tensor([[1., 0.],
                [1., 1.]])
        >>> _ = nn.init.ones_(layer.weight)
        >>> layer(torch.ones(1, 2))
        tensor([[1., 2.]], grad_fn=<MmBackward0>)
    """
    for name, mask in kept.items():
        path, _, attribute = name.rpartition(".")
        layer = module.get_submodule(path)
        _check_plain_weight(path, layer)
        weight = layer.get_parameter(attribute)
        assert mask.shape == weight.shape and mask.dtype is torch.bool
        layer.register_buffer(attribute + _SUFFIX, ~mask.to(weight.device))
        if isinstance(layer, _MaskedLayer):
            plain, attributes = layer.plain_class, (*layer.masked_attributes, attribute)
        else:
            plain, attributes = type(layer), (attribute,)
        layer.__class__ = _masked_class(plain, tuple(dict.fromkeys(attributes)))
        assert isinstance(layer, _MaskedLayer)
        layer.adopt_weights()


def kept_masks(module: nn.Module) -> dict[str, Tensor]:
    """Return a mask for every prunable weight of `module`: parameter name → bool tensor, True where kept.

    Example:
        >>> kept_masks(nn.Linear(2, 1))
        {'weight': tensor([[True, True]])}
    """
    kept = {
        name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable_weights(module).items()
    }
    return kept | {name: ~removed for name, _, _, removed in _masks(module)}


def masked_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Yield name, weight and mask of each masked weight of `module`; the mask is True where removed.

    The mask is the buffer itself, and may be changed. The weight is 0 there once it is read again.
    """
    for name, layer, attribute, removed in _masks(module):
        yield name, layer.get_parameter(attribute), removed


def discard_masks(module: nn.Module) -> None:
    """Discard the masks of `module`, in place; removed weights remain plain zeros.

    Weights that had a mask become new parameters without gradient.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> apply_masks(layer, {"weight": torch.tensor([[True, False]])})
        >>> discard_masks(layer)
        >>> list(layer.state_dict()), layer.weight[0, 1].item(), type(layer) is nn.Linear
        (['weight'], 0.0, True)
    """
    for _, layer, attribute, _ in list(_masks(module)):
        weight = getattr(layer, attribute).detach()
        delattr(layer, attribute + _SUFFIX)
        setattr(layer, attribute, nn.Parameter(weight, requires_grad=False))
    for layer in module.modules():
        if isinstance(layer, _MaskedLayer):
            layer.__class__ = layer.plain_class  # type: ignore[assignment]


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
    layers = [layer for layer in module.modules() if isinstance(layer, _MaskedLayer)]
    for layer in layers:
        layer.gradients_are_dense = True
    try:
        yield
    finally:
        for layer in layers:
            layer.gradients_are_dense = False
        for _, weight, removed in masked_weights(module):
            if weight.grad is not None:
                _clear(weight.grad, removed)


class _MaskedLayer(nn.Module):
    """Base of the classes that `_masked_class` makes."""

    plain_class: ClassVar[type[nn.Module]]
    masked_attributes: ClassVar[tuple[str, ...]]
    gradients_are_dense = False

    def adopt_weights(self) -> None:
        """Set the removed weights to 0, and mask the gradients of the layer's own parameters."""
        for attribute in self.masked_attributes:
            weight, removed = self._parameters.get(attribute), self._buffers.get(attribute + _SUFFIX)
            if weight is not None and removed is not None and not weight.is_inference():
                _clear(weight, removed)
                _mask_gradients(weight, self, attribute)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name in self.masked_attributes and param is not None:
            _mask_gradients(param, self, name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        module = super()._apply(fn, recurse)
        self.adopt_weights()
        return module

    def _save_to_state_dict(self, *args: Any) -> None:
        self.adopt_weights()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.adopt_weights()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.adopt_weights()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_layer, (self.plain_class, self.masked_attributes), self.__getstate__()

    def __delattr__(self, name: str) -> None:
        if name in self.masked_attributes and name in self._parameters:  # to become a parametrization
            raise invalid(
                name,
                f"a plain parameter of {type(self).__name__} while some of its elements are removed",
                found="a parametrization",
            )
        super().__delattr__(name)


_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[_MaskedLayer]] = {}


def _masked_class(plain: type[nn.Module], attributes: tuple[str, ...]) -> type[_MaskedLayer]:
    """Return the class of layers of class `plain` whose weights in `attributes` have masks."""
    if (plain, attributes) in _classes:
        return _classes[plain, attributes]
    members = {attribute: _masked_attribute(attribute) for attribute in attributes}
    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    settings = {"plain_class": plain, "masked_attributes": attributes}
    masked = type(plain.__name__, (_MaskedLayer, plain), {**names, **settings, **members})
    return _classes.setdefault((plain, attributes), masked)


def _masked_attribute(attribute: str) -> property:
    def read(layer: _MaskedLayer) -> Tensor:
        weight = layer._parameters.get(attribute)
        if weight is None:
            weight = layer.__dict__.get(attribute)
        if weight is None:
            raise AttributeError(f"{type(layer).__name__} has no {attribute}")
        removed = layer._buffers.get(attribute + _SUFFIX)
        if removed is None:
            return weight
        if _is_eager():
            if _is_distributed(weight):
                _mask_gradients(weight, layer, attribute)
            mask = _gradient_mask(weight)
            if mask is not None and mask.layer() is layer:
                _clear(weight, removed)
                return weight
        if layer.gradients_are_dense:
            return torch.where(removed, weight - weight.detach(), weight)
        return _masked(weight, removed)

    def write(layer: _MaskedLayer, weight: Tensor) -> None:
        layer.__dict__[attribute] = weight

    def delete(layer: _MaskedLayer) -> None:
        del layer.__dict__[attribute]

    return property(read, write, delete)


def _new_layer(plain: type[nn.Module], attributes: tuple[str, ...]) -> _MaskedLayer:
    masked = _masked_class(plain, attributes)
    return masked.__new__(masked)


class _GradientMask:
    """A hook on a parameter that sets the gradients of its removed elements to 0."""

    __torch_unserializable__ = True  # a copy of the parameter gets its own

    def __init__(self, layer: _MaskedLayer, attribute: str) -> None:
        self.layer = weakref.ref(layer)
        self.attribute = attribute

    @property
    def removed(self) -> Tensor | None:
        """The mask; looked up, since `module.to` replaces buffers."""
        layer = self.layer()
        return None if layer is None else layer._buffers.get(self.attribute + _SUFFIX)

    @property
    def dense(self) -> bool:
        """Whether gradients of removed elements are wanted, see `dense_gradients`."""
        layer = self.layer()
        return layer is not None and layer.gradients_are_dense

    def __call__(self, gradient: Tensor) -> Tensor | None:
        removed = self.removed
        return None if removed is None or self.dense else _masked(gradient, removed)


def _mask_gradients(weight: Tensor, layer: _MaskedLayer, attribute: str) -> None:
    """Put a `_GradientMask` on a parameter, unless it has one."""
    if not isinstance(weight, nn.Parameter) or not (type(weight) is nn.Parameter or _is_distributed(weight)):
        return
    if _gradient_mask(weight) is None:
        trains = weight.requires_grad  # PyTorch puts no hook on a frozen weight, which may be thawed
        weight.requires_grad_(True).register_hook(_GradientMask(layer, attribute))
        weight.requires_grad_(trains)
    weight._backward_hooks = weight._backward_hooks  # `torch.utils.swap_tensors` lists hooks that it drops


def _gradient_mask(weight: Tensor) -> _GradientMask | None:
    """Return the hook that masks the gradient of `weight`, and make it the last of its hooks."""
    hooks = weight._backward_hooks or {}
    for number, hook in reversed(hooks.items()):
        if isinstance(hook, _GradientMask):
            if number != next(reversed(hooks)):
                hooks[number] = hooks.pop(number)
            return hook
    return None


def _is_eager() -> bool:
    return not (
        torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()
    )


# Integers of as many bytes as a number. On a CPU, clearing bits is ten times as fast as `masked_fill`.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _kept_bits(removed: Tensor) -> Tensor:
    """Return 0 where removed, and −1, which has all bits set, where kept."""
    return removed.view(torch.int8) - 1


@torch.no_grad()
def _clear(weight: Tensor, removed: Tensor) -> None:
    """Set the removed elements of `weight` to 0, in place."""
    weight = weight.data  # so that its version stays: it may be saved for `backward`
    if weight.device.type == "cpu" and type(weight) is Tensor:
        weight.view(_BITS[weight.itemsize]).bitwise_and_(_kept_bits(removed))
    else:
        weight.masked_fill_(_placed_like(removed, weight), 0)


def _masked(tensor: Tensor, removed: Tensor) -> Tensor:
    """Return a copy of `tensor` that is 0 where removed; its gradient is 0 there, too."""
    differentiable = torch.is_grad_enabled() and tensor.requires_grad
    if tensor.device.type == "cpu" and type(tensor) is Tensor and not differentiable and _is_eager():
        # Not multiplied: under AMP a gradient may be infinite, and inf × 0 is NaN.
        return (tensor.view(_BITS[tensor.itemsize]) & _kept_bits(removed)).view(tensor.dtype)
    if torch.compiler.is_exporting():  # PyTorch 2.11 cannot write the other to ONNX, which trains faster
        return tensor.masked_fill(_placed_like(removed, tensor), 0)
    return torch.where(_placed_like(removed, tensor), 0, tensor)


def _placed_like(removed: Tensor, tensor: Tensor) -> Tensor:
    """Return the mask as a distributed tensor if `tensor` is one (FSDP2, tensor parallelism)."""
    if not _is_distributed(tensor):
        return removed
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(tensor, DTensor)
    return distribute_tensor(removed, tensor.device_mesh, tensor.placements, src_data_rank=None)


def _is_distributed(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")  # a DTensor; its module is slow to import


class MaskedModule(nn.Module):
    """Base class of networks with masks, whose masks can be averaged along with their other buffers.

    `torch.optim.swa_utils.AveragedModel` with `use_buffers=True` subtracts buffers, which PyTorch refuses
    for bool tensors.

    Example:
        >>> network = MaskedModule()
        >>> network.register_buffer("removed", torch.tensor([True, False]))
        >>> average = torch.optim.swa_utils.AveragedModel(network, use_buffers=True)
        >>> average.update_parameters(network)
        >>> average.update_parameters(network)
        >>> average.module.removed
        tensor([ True, False])
    """

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Yield all buffers; a bool buffer comes as an alias that can be subtracted."""
        for buffer in super().buffers(recurse):
            yield buffer.as_subclass(_Subtractable) if buffer.dtype is torch.bool else buffer


class _Subtractable(Tensor):
    """A bool tensor with a difference, in floats."""

    def __sub__(self, other: Any) -> Tensor:
        return torch.sub(self.float(), other.float())


def _masks(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield for each masked weight of `module` its name, its layer, its attribute there and its mask."""
    for path, layer in module.named_modules():
        if isinstance(layer, _MaskedLayer):
            for attribute in layer.masked_attributes:
                removed = layer._buffers.get(attribute + _SUFFIX)
                if removed is not None:
                    yield (f"{path}.{attribute}" if path else attribute), layer, attribute, removed


def _clear_after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            mask = _gradient_mask(weight)
            if mask is not None and mask.removed is not None:
                _clear(weight, mask.removed)


register_optimizer_step_post_hook(_clear_after_step)
