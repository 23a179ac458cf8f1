"""What a network costs: parameters, multiply-accumulates, and time measured beside another's."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from netfission.modes import in_mode
from netfission.pruning.masks import kept_masks, prunable_weights


@dataclass(frozen=True)
class Cost:
    """The cost of one network.

    Attributes:
        parameters_stored: parameters in memory, removed ones included.
        parameters_nonzero: those that are not removed.
        macs_dense: multiply-accumulates of one image as executed, removed weights included.
        macs_effective: those that meet a weight that is not removed; what a sparse kernel could reach.
        seconds: median time of inference of one batch of `example_input`.
        ratio: median over the rounds of its time over the reference's in the same round; None without.
        ratio_range: smallest and largest of those ratios; None without a reference.
    """

    parameters_stored: int
    parameters_nonzero: int
    macs_dense: int
    macs_effective: int
    seconds: float
    ratio: float | None = None
    ratio_range: tuple[float, float] | None = None


def cost(
    network: nn.Module, example_input: Tensor, *, reference: nn.Module | None = None, rounds: int = 20
) -> dict[str, Cost]:
    """Count and time a network, beside a reference where one is given.

    Args:
        network: a `FissionNetwork` or any other module.
        example_input: a batch of images on the networks' device; its size is what is timed.
        reference: usually the model that was fissioned.
        rounds: timed runs of each, after three that are not counted.

    Returns:
        `"network"` → its cost, and `"reference"` → the reference's, if given.
    """
    networks = {"network": network} | ({} if reference is None else {"reference": reference})
    times = inference_times(networks, example_input, rounds=rounds)
    costs = {}
    for name, module in networks.items():
        stored, nonzero = count_parameters(module)
        dense, effective = count_macs(module, example_input[:1])
        ratios = [a / b for a, b in zip(times[name], times.get("reference", []), strict=False)]
        costs[name] = Cost(
            stored,
            nonzero,
            dense,
            effective,
            median(times[name]),
            median(ratios) if ratios else None,
            (min(ratios), max(ratios)) if ratios else None,
        )
    return costs


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Parameters stored, and of them those that are not removed."""
    stored = sum(parameter.numel() for parameter in module.parameters())
    removed = sum(int((~mask).sum()) for mask in kept_masks(module).values())
    return stored, stored - removed


@torch.no_grad()
def count_macs(module: nn.Module, example_input: Tensor) -> tuple[int, int]:
    """Multiply-accumulates of one forward pass: as executed, and without those of removed weights.

    The first is half of what `torch.utils.flop_counter` counts: matrix products and convolutions.
    """
    masks = kept_masks(module)
    removed: list[int] = []
    handles = []
    for name in prunable_weights(module):
        path, _, attribute = name.rpartition(".")
        gone = int((~masks[name]).sum())
        if gone:
            layer = module.get_submodule(path)
            handles.append(layer.register_forward_hook(_removed_macs(attribute, gone, removed)))
    try:
        with in_mode(module, training=False), FlopCounterMode(display=False) as counter:
            module(example_input)
    finally:
        for handle in handles:
            handle.remove()
    dense = counter.get_total_flops() // 2
    return dense, dense - sum(removed)


def _removed_macs(attribute: str, gone: int, total: list[int]) -> Callable[..., None]:
    """A hook that adds a layer's share: each removed weight is met once at every output position."""

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        result = output if isinstance(output, Tensor) else output[0]
        features = layer.get_parameter(attribute).shape[0]
        if isinstance(layer, nn.MultiheadAttention):  # one matrix gives queries, keys and values
            features //= 3
        total.append(result.numel() // features * gone)

    return add


def inference_times(
    networks: Mapping[str, nn.Module], images: Tensor, *, rounds: int = 20, warm_up: int = 3
) -> dict[str, list[float]]:
    """Time networks side by side: in each round every network runs once, so that drift meets all alike.

    Args:
        networks: name → module, on the images' device; run in eval mode, which is undone afterwards.
        images: one batch.
        rounds: how many times are kept of each.
        warm_up: rounds before that.

    Returns:
        name → seconds of each round.
    """
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode(), in_mode(*networks.values(), training=False):
        for index in range(warm_up + rounds):
            for name, module in networks.items():
                _wait_for(images)
                start = time.perf_counter()
                module(images)
                _wait_for(images)
                if index >= warm_up:
                    times[name].append(time.perf_counter() - start)
    return times


def _wait_for(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
