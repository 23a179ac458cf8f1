"""Optimisers by name, and learning rates that fall from the last layer to the first."""

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from netfission.config import TrainingConfig
from netfission.utils.errors import check_choice
from netfission.utils.extras import extra

_WEIGHT_DECAY = {"sgd": 5e-4, "adamw": 0.05}  # defaults; those of other optimisers are 0


def timm_optimizers() -> list[str]:
    """Return the names of timm's optimisers that work with plain gradients, on any device.

    Example:
        >>> {"adamw", "lamb", "lion"} <= set(timm_optimizers()), "adahessian" in timm_optimizers()
        (True, False)
    """
    optim = _timm_optim()
    # Those with these prefixes need packages with kernels for CUDA.
    names = [name for name in optim.list_optimizers() if not name.startswith(("bnb", "fused"))]
    return [name for name in names if not optim.get_optimizer_info(name).second_order]


def _timm_optim() -> Any:
    """Import timm's optimisers, whose names mypy does not find."""
    with extra("models", "an optimiser other than sgd and adamw"):
        return import_module("timm.optim")


def check_optimizer(config: TrainingConfig) -> None:
    """Check that the optimiser in the settings exists.

    Raises:
        ValueError: it does not.

    Example:
        >>> check_optimizer(TrainingConfig(optimizer="adamw"))
    """
    if config.optimizer not in _WEIGHT_DECAY:  # which need no timm
        check_choice("optimizer", config.optimizer, dict.fromkeys([*_WEIGHT_DECAY, *timm_optimizers()]))


def has_momentum(name: str) -> bool:
    """Return whether an optimiser reads the setting `momentum`.

    Example:
        >>> has_momentum("sgd"), has_momentum("adamw"), has_momentum("lars")
        (True, False, True)
    """
    if name in _WEIGHT_DECAY:
        return name == "sgd"
    return bool(_timm_optim().get_optimizer_info(name).has_momentum)


def make_optimizer(
    network: nn.Module, config: TrainingConfig, scales: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Make the optimiser in the settings for all parameters of a network, at the peak learning rate.

    Only weights decay: parameters of two dimensions or more. With `sgd` all parameters do, as in the paper.

    Args:
        network: the network.
        config: how to train.
        scales: name of a parameter → factor on its learning rate, default 1; see `layer_scales`.

    Raises:
        ValueError: the optimiser does not exist.

    Example:
        >>> optimizer = make_optimizer(nn.Linear(2, 2), TrainingConfig(optimizer="adamw"), {"bias": 0.5})
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.001, 0.05), (0.0005, 0.0)]
    """
    check_optimizer(config)
    groups = list(_groups(network.named_parameters(), config, scales or {}))
    settings: dict[str, Any] = {"lr": config.peak_rate}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, **settings)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings)
    optimizer: torch.optim.Optimizer = _timm_optim().create_optimizer_v2(
        groups, config.optimizer, momentum=config.momentum, **settings
    )
    return optimizer


def _groups(
    parameters: Iterable[tuple[str, Tensor]], config: TrainingConfig, scales: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """Yield groups of parameters with one rate and one weight decay each, in a fixed order."""
    decay = _WEIGHT_DECAY.get(config.optimizer, 0.0) if config.weight_decay is None else config.weight_decay
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in parameters:
        decays = config.optimizer == "sgd" or parameter.ndim > 1
        groups.setdefault((scales.get(name, 1.0), decays), []).append(parameter)
    for scale, decays in sorted(groups, reverse=True):
        yield {
            "params": groups[scale, decays],
            "lr": scale * config.peak_rate,
            "weight_decay": decay if decays else 0.0,
        }


def layer_scales(network: nn.Module, model: nn.Module, decay: float) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter: `decay` per layer from the last one back.

    A layer is what timm groups as one in its models, such as a block. In other models it is the parameters
    whose names agree up to the first number, such as `layer1`. A parameter of the network belongs to the
    layer of the model whose name its own name holds. If no layer matches, as in a new head, its factor is 1.

    Source: Bao et al. 2022 (BEiT, arXiv 2106.08254), as `timm.optim.param_groups_layer_decay`.

    Args:
        network: made of the model by any method.
        model: the classifier before.
        decay: factor per layer, in (0, 1).

    Returns:
        Name of a parameter of the network → factor.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> layer_scales(nn.ModuleDict({"path": model}), model, 0.5)
        {'path.0.weight': 0.5, 'path.0.bias': 0.5, 'path.2.weight': 1.0, 'path.2.bias': 1.0}
    """
    layers = _layers(model)
    last = max(layers.values())
    known = {name.rpartition(".")[0]: layer for name, layer in layers.items()} | layers
    known.pop("", None)
    numbers = {name: _find(name, known, last) for name, _ in network.named_parameters()}
    return {name: decay ** (last - number) for name, number in numbers.items()}


def _layers(model: nn.Module) -> dict[str, int]:
    """Number the layers of a model: name of a parameter → number from 0."""
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        return dict(group_parameters(model, matcher(coarse=False), reverse=True))
    names = [name for name, _ in model.named_parameters()]
    blocks = [match[0] if (match := re.match(r".*?\d+", name)) else name.rpartition(".")[0] for name in names]
    numbers = {block: number for number, block in enumerate(dict.fromkeys(blocks))}
    return {name: numbers[block] for name, block in zip(names, blocks, strict=True)}


def _find(name: str, known: Mapping[str, int], last: int) -> int:
    """Return the layer of the longest part of a name that is known; the last layer if none is."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for start in range(len(parts) - length + 1):
            if (part := ".".join(parts[start : start + length])) in known:
                return known[part]
    return last
