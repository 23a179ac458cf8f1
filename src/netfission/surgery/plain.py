"""Refuse modules that are not a plain network: wrapped, converted, pruned by hooks, or without values."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from netfission.utils.errors import invalid

# Type of a wrapper → its attribute that holds the network. By name, so that nothing needs to be imported.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "AveragedModel": "module",
    "_FabricModule": "module",
    "DeepSpeedEngine": "module",
}


def check_plain(argument: str, module: nn.Module) -> None:
    """Check that a module is a network as its author wrote it, whose copies can be cut and changed.

    Args:
        argument: name of the argument, for the message.
        module: the network.

    Raises:
        ValueError: it is not an `nn.Module`; it wraps the network (`torch.compile`, `DataParallel`, …); it
            is scripted, exported, quantised or sharded; hooks compute its weights (`torch.nn.utils.prune`);
            or its parameters have no values yet. The message says what to pass instead.

    Example:
        >>> check_plain("model", nn.DataParallel(nn.Linear(2, 2)))
        Traceback (most recent call last):
        ValueError: model must be a plain network, got DataParallel, which wraps it; pass model.module
    """
    check_values(argument, module)
    for found, hint in _faults(argument, module):
        raise invalid(argument, "a plain network", found=found, hint=hint)


def check_values(argument: str, module: nn.Module) -> None:
    """Check that a module's weights are parameters with values of their own, so that it can be copied.

    Args:
        argument: name of the argument, for the message.
        module: the network.

    Raises:
        ValueError: it is not an `nn.Module`, hooks compute its weights (`torch.nn.utils.prune`), or its
            parameters have no values yet.

    Example:
        >>> check_values("model", nn.LazyLinear(2))
        Traceback (most recent call last):
        ValueError: model must be a network with values, got 'weight' without a shape; run it on images first
    """
    if not isinstance(module, nn.Module):
        found = repr(module) if isinstance(module, str | type) else type(module).__name__
        raise invalid(argument, "a network (an instance of nn.Module)", found=found)
    for path, layer in module.named_modules():
        for hook in layer._forward_pre_hooks.values():
            if remedy := _remedy(hook):
                found = f"layer {path!r}, whose weight a hook computes"
                raise invalid(argument, "made of plain layers", found=found, hint=f"call {remedy} first")
    for path, tensor in _tensors(module):
        if is_lazy(tensor):
            hint = "run it on images first"
            raise invalid(argument, "a network with values", found=f"{path!r} without a shape", hint=hint)
        if tensor.is_meta:
            hint = "give it values on a real device first"
            raise invalid(argument, "a network with values", found=f"{path!r} on the meta device", hint=hint)


def logits_hint(output: Any) -> str:
    """Say how to get the logits out of a network's output that is not a tensor.

    Example:
        >>> logits_hint({"logits": 0, "features": 1})
        "wrap it in a module that returns its output's logits alone (output['logits'])"
    """
    where = ""
    if hasattr(output, "logits"):  # as Hugging Face's
        where = " (output.logits)"
    elif isinstance(output, dict) and "logits" in output:
        where = " (output['logits'])"
    return f"wrap it in a module that returns its output's logits alone{where}"


def _faults(argument: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield what is not plain in a module, and what to do about it."""
    name = type(module).__name__
    for kind in type(module).__mro__:
        if kind.__name__ in _WRAPPERS:
            yield f"{kind.__name__}, which wraps it", f"pass {argument}.{_WRAPPERS[kind.__name__]}"
    if isinstance(module, ScriptModule):
        yield f"{name}, compiled by torch.jit", "pass the module that it was made from"
    if isinstance(module, fx.GraphModule) and not _calls_layers(module):
        yield f"{name} of functions without layers", "pass the module that it was traced or exported from"
    for path, layer in module.named_modules():
        if ".quantized" in type(layer).__module__:
            yield f"quantised layer {path!r}", "pass the network before it is quantised"
    for path, tensor in _tensors(module):
        if type(tensor.data).__name__ == "DTensor":
            yield f"sharded {path!r}", "pass the network before it is sharded"


def _calls_layers(module: fx.GraphModule) -> bool:
    """Return whether a graph calls modules with parameters; that of `torch.export` calls functions only."""
    called = [module.get_submodule(node.target) for node in module.graph.nodes if node.op == "call_module"]
    return any(True for layer in called for _ in layer.parameters())


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _remedy(hook: Any) -> str:
    """Return the call that makes the weight of a hook a parameter again; empty if it computes none."""
    if isinstance(hook, BasePruningMethod):
        return f"torch.nn.utils.prune.remove(layer, {hook._tensor_name!r})"
    if isinstance(hook, WeightNorm):
        return f"torch.nn.utils.remove_weight_norm(layer, {hook.name!r})"
    if isinstance(hook, SpectralNorm):
        return f"torch.nn.utils.remove_spectral_norm(layer, {hook.name!r})"
    return ""
