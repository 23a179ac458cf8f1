"""Keep the variance of features where a path reads only a part of a layer and no normalisation follows."""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from netfission.surgery.masks import kept_masks, prunable_weights
from netfission.surgery.standardised import standardises
from netfission.utils.inputs import Inputs, cloned
from netfission.utils.modes import in_mode

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@torch.no_grad()
def unnormalised_weights(network: nn.Module, images: Inputs) -> set[str]:
    """Return the prunable weights of the layers that run after the last normalisation layer of a network.

    A normalisation layer is one of PyTorch's, or one whose class says so in its name. `LocalResponseNorm`
    is not one, as it hardly changes a scale.

    Args:
        network: images → logits.
        images: a batch to run it on, in eval mode.

    Example:
        >>> layers = [nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)]
        >>> sorted(unnormalised_weights(nn.Sequential(*layers), torch.zeros(1, 2)))
        ['2.weight', '4.weight']
    """
    layers = {name.rpartition(".")[0]: name for name in prunable_weights(network)}
    found: set[str] = set()

    def note(name: str, module: nn.Module) -> None:
        if _normalises(module):
            found.clear()
        elif name in layers:
            found.add(layers[name])

    hooks = [
        module.register_forward_pre_hook(lambda module, _inputs, name=name: note(name, module))
        for name, module in network.named_modules()
    ]
    try:
        with in_mode(network, training=False):
            network(cloned(images))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _normalises(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return isinstance(module, _NORMS) or ("norm" in name and not isinstance(module, nn.LocalResponseNorm))


@torch.no_grad()
def keep_variance(path: nn.Module, stage: nn.Module, kept: Mapping[str, Tensor], names: set[str]) -> None:
    """Multiply the weights of a path by the square root of n / m, where it reads m of a layer's n inputs.

    A sum over m independent terms has m / n of the variance of one over n terms (He et al. 2015,
    arXiv 1502.01852), so that features of a deep network without normalisation would fade.

    Args:
        path: made from the stage; changed in place.
        stage: the stage, whole.
        kept: prunable weight of the stage → bool tensor, True where pruning kept it; empty if all are kept.
        names: the weights to scale; others stay as they are.

    Example:
        >>> from netfission.surgery.masks import apply_masks
        >>> stage, path = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
        >>> path.weight = nn.Parameter(torch.ones(1, 4))
        >>> apply_masks(path, {"weight": torch.tensor([[True, False, False, False]])})
        >>> keep_variance(path, stage, {}, {"weight"})
        >>> path.weight
        Parameter containing:
        tensor([[2., 0., 0., 0.]], requires_grad=True)
    """
    before, after = kept_masks(stage) | dict(kept), kept_masks(path)
    for name in names & before.keys() & after.keys():
        inputs, of_path = _inputs(before[name]), _inputs(after[name])
        if 0 < of_path < inputs:
            _scaled(path, name).mul_(sqrt(inputs / of_path))


def _scaled(path: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter that scales a layer: its weight, or the gain if that is standardised."""
    layer = path.get_submodule(name.rpartition(".")[0])
    gain = getattr(layer, "gain", None)
    return gain if isinstance(gain, nn.Parameter) and standardises(layer) else path.get_parameter(name)


def _inputs(mask: Tensor) -> float:
    """Return the mean number of kept weights per output of a layer that has any."""
    return int(mask.sum()) / max(int(mask.flatten(1).any(dim=1).sum()), 1)
