"""What a network costs: parameters, multiply-accumulates, memory, and time measured beside another's."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from netfission.profiling.macs import listed, run_counted
from netfission.profiling.timing import (
    WARM_UP,
    Quartiles,
    device_name,
    inference_peak,
    inference_times,
    training_peak,
    training_times,
)
from netfission.surgery.masks import kept_masks
from netfission.utils.modes import in_mode, input_errors
from netfission.utils.text import align_columns


@runtime_checkable
class HasExits(Protocol):
    """What is counted by part and by exit: a `FissionNetwork`, or its `Ensemble`."""

    @property
    def exits(self) -> int:
        """Number of exits."""

    @property
    def parts(self) -> list[tuple[str, dict[int, nn.Module]]]:
        """Stem, stages and head: the name of each, and its modules by the exit whose path holds them."""


@dataclass(frozen=True)
class Size:
    """What can be counted of a network or of a part of it.

    Attributes:
        parameters_stored: parameters in memory, removed ones included.
        parameters_nonzero: those that are not removed.
        macs_dense: multiply-accumulates of one image as executed, removed weights included; what counts as
            one is said in `netfission.profiling.macs`.
        macs_effective: those that meet a weight that is not removed; what a sparse kernel could reach.
    """

    parameters_stored: int = 0
    parameters_nonzero: int = 0
    macs_dense: int = 0
    macs_effective: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Part:
    """One step on the way through a `FissionNetwork`.

    Attributes:
        name: `"stem"`, a stage's name or `"head"`.
        total: of all paths together.
        paths: what each exit has of its own here, exit 0 first; None where it runs through exit 0's.
    """

    name: str
    total: Size
    paths: tuple[Size | None, ...]


@dataclass(frozen=True)
class Exit:
    """One exit of a `FissionNetwork`.

    Attributes:
        alone: all that it needs when it runs alone: stem, stages shared and own, head.
        shared: so much of that as another exit runs through as well.
    """

    alone: Size
    shared: Size


@dataclass(frozen=True)
class Measurement:
    """Inference of one batch, or a training step on it, as measured.

    Attributes:
        batch_size: images.
        seconds: of one batch.
        images_per_second: at the median.
        peak_bytes: peak memory beside the network and the images, see
            `netfission.profiling.timing.peak_bytes`.
        ratio: seconds over the reference's, each from the same round; None without a reference.
    """

    batch_size: int
    seconds: Quartiles
    images_per_second: float
    peak_bytes: int
    ratio: Quartiles | None


@dataclass(frozen=True)
class NetworkCounts:
    """What can be counted of a network, without a clock.

    Attributes:
        size: of the whole network.
        parts: of a `FissionNetwork` or its `Ensemble`: stem, stages, heads. Of others none.
        exits: of the same, exit 0 first.
        uncounted: operation → calls for one image, of those whose MACs cannot be counted.
    """

    size: Size
    parts: tuple[Part, ...]
    exits: tuple[Exit, ...]
    uncounted: dict[str, int]


@dataclass(frozen=True)
class NetworkCost(NetworkCounts):
    """The cost of one network: what is counted, and what is measured.

    Attributes:
        inference: in eval mode without gradients; one a batch size.
        training: a step, gradients and momentum in its memory; None where the output is no logits or no
            parameter takes a gradient.
    """

    inference: tuple[Measurement, ...]
    training: Measurement | None


@dataclass(frozen=True)
class Conditions:
    """What measured figures depend on beside the network.

    Attributes:
        image_shape: of one image, channels first.
        dtype: of the images.
        device: its name.
        threads: that an operation on a CPU may use.
        batch_sizes: of inference.
        rounds: how often each network ran, in turn with the other.
        warm_up: how often before that.
        torch: version.
    """

    image_shape: tuple[int, ...]
    dtype: str
    device: str
    threads: int
    batch_sizes: tuple[int, ...]
    rounds: int
    warm_up: int
    torch: str


@dataclass(frozen=True)
class Cost:
    """What a network costs, beside its reference.

    Attributes:
        network: the network's cost.
        reference: the reference's, from the same rounds, with ratios of 1; None without one.
        conditions: of the measurements.
    """

    network: NetworkCost
    reference: NetworkCost | None
    conditions: Conditions

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as plain data, every digit kept."""
        return asdict(self)

    def to_json(self) -> str:
        """Give the figures as JSON text, every digit kept."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def table(self) -> str:
        """Give the figures as aligned plain text: beside the reference, then by stage and exit."""
        blocks = [align_columns(_beside(self.network, self.reference))]
        if self.network.parts:
            blocks.append(align_columns(_by_stage(self.network, "MACs dense (effective), M", _macs_cell)))
            blocks.append(align_columns(_by_stage(self.network, "parameters (non-zero)", _parameters_cell)))
        for name, each in (("network", self.network), ("reference", self.reference)):
            if each is not None and each.uncounted:
                blocks.append(f"MACs of the {name} leave out {listed(each.uncounted)}")
        c = self.conditions
        blocks.append(
            f"median (quartiles) of {c.rounds} rounds in turn after {c.warm_up} of warm-up, ratios by round\n"
            f"images {' × '.join(map(str, c.image_shape))} {c.dtype}; {c.device}, threads: {c.threads}; "
            f"torch {c.torch}"
        )
        return "\n\n".join(blocks)


def cost(
    network: nn.Module,
    example_input: Tensor,
    reference: nn.Module | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    rounds: int = 20,
) -> Cost:
    """Count, weigh and time a network, beside a reference where one is given.

    Times are taken in rounds, in each of which every network runs once, so that drift of the machine meets
    both alike; it should be idle otherwise. A training step runs on a copy, with as many images as the
    largest batch and 2 at least, which batch norms need; see `netfission.profiling.timing.training_times`.

    Args:
        network: a `FissionNetwork`, its `Ensemble` or any other module of one tensor; not changed.
        example_input: images on the networks' device, at least one; repeated to fill a batch.
        reference: usually the model that was fissioned; not changed.
        batch_sizes: images a batch in inference, from 1.
        rounds: timed runs of each, after 3 that are not.

    Raises:
        ValueError: no image, or not such as a network takes; no batch size, one below 1 or no round.
    """
    _check(batch_sizes, rounds)
    networks = {"network": network} | ({} if reference is None else {"reference": reference})
    for module in networks.values():
        _try(module, example_input[:1])
    device = example_input.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        inference = [_inference(networks, _batch(example_input, size), rounds) for size in batch_sizes]
        learning = {name: module for name, module in networks.items() if _learns(module, example_input[:1])}
        training = _training(learning, _batch(example_input, max(2, *batch_sizes)), rounds)
        costs = {
            name: NetworkCost(
                **vars(count(module, example_input[:1])),
                inference=tuple(of_all[name] for of_all in inference),
                training=training.get(name),
            )
            for name, module in networks.items()
        }
    conditions = _conditions(example_input, tuple(batch_sizes), rounds)
    return Cost(costs["network"], costs.get("reference"), conditions)


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Parameters stored, and of them those that are not removed."""
    stored = sum(parameter.numel() for parameter in module.parameters())
    removed = sum(int((~mask).sum()) for mask in kept_masks(module).values())
    return stored, stored - removed


def _check(batch_sizes: Sequence[int], rounds: int) -> None:
    if min(batch_sizes, default=0) < 1:
        raise ValueError(f"batch_sizes={list(batch_sizes)}: takes whole numbers from 1, at least one")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: takes a whole number from 1")


def _batch(images: Tensor, size: int) -> Tensor:
    return images[torch.arange(size, device=images.device) % len(images)]


def _conditions(images: Tensor, batch_sizes: tuple[int, ...], rounds: int) -> Conditions:
    return Conditions(
        image_shape=tuple(images.shape[1:]),
        dtype=str(images.dtype).removeprefix("torch."),
        device=device_name(images.device),
        threads=torch.get_num_threads(),
        batch_sizes=batch_sizes,
        rounds=rounds,
        warm_up=WARM_UP,
        torch=torch.__version__,
    )


# --- counting, by part and by exit ------------------------------------------------------------------


def count(module: nn.Module, image: Tensor) -> NetworkCounts:
    """Count a network in eval mode.

    Args:
        module: a `FissionNetwork`, its `Ensemble` or any other module of one tensor; not changed.
        image: `(1, channels, height, width)`, on the module's device.
    """
    steps, exits = (module.parts, range(module.exits)) if isinstance(module, HasExits) else ([], range(0))
    counter = run_counted(module, image, [part for _, own in steps for part in own.values()])
    parts = []
    for name, own in steps:
        sizes = {
            number: Size(*count_parameters(part), counter.dense[part], counter.effective[part])
            for number, part in own.items()
        }
        parts.append(Part(name, sum(sizes.values(), Size()), tuple(map(sizes.get, exits))))
    size = Size(*count_parameters(module), *counter.total)
    return NetworkCounts(
        size, tuple(parts), tuple(_exit(parts, number) for number in exits), dict(counter.uncounted)
    )


def _exit(parts: Sequence[Part], number: int) -> Exit:
    alone = shared = Size()
    for part in parts:
        own, trunk = part.paths[number], part.paths[0]
        assert trunk is not None
        alone += own or trunk
        if own is None or (own is trunk and None in part.paths):
            shared += trunk
    return Exit(alone, shared)


# --- measuring --------------------------------------------------------------------------------------


def _inference(networks: Mapping[str, nn.Module], images: Tensor, rounds: int) -> dict[str, Measurement]:
    peaks = {name: inference_peak(module, images) for name, module in networks.items()}
    return _measurements(inference_times(networks, images, rounds=rounds), peaks, len(images))


def _training(networks: Mapping[str, nn.Module], images: Tensor, rounds: int) -> dict[str, Measurement]:
    peaks = {name: training_peak(module, images) for name, module in networks.items()}
    return _measurements(training_times(networks, images, rounds=rounds), peaks, len(images))


@torch.no_grad()
def _try(module: nn.Module, image: Tensor) -> None:
    with in_mode(module, training=False), input_errors("example_input", image):
        module(image)


@torch.enable_grad()
def _learns(module: nn.Module, image: Tensor) -> bool:
    """Whether it gives logits that carry gradients."""
    with in_mode(module, training=False):
        output = module(image)
    return isinstance(output, Tensor) and output.ndim in (2, 3) and output.requires_grad


def _measurements(
    times: Mapping[str, Sequence[float]], peaks: Mapping[str, int], batch_size: int
) -> dict[str, Measurement]:
    measurements = {}
    for name, values in times.items():
        seconds, ratio = Quartiles.from_values(values), None
        if "reference" in times:
            ratio = Quartiles.from_values([a / b for a, b in zip(values, times["reference"], strict=True)])
        measurements[name] = Measurement(batch_size, seconds, batch_size / seconds.median, peaks[name], ratio)
    return measurements


# --- as text ----------------------------------------------------------------------------------------


def _beside(network: NetworkCost, reference: NetworkCost | None) -> list[list[str]]:
    """Rows of the whole network's figures, the reference's and their ratio."""
    networks = [network] if reference is None else [network, reference]
    sizes = [each.size for each in networks]
    rows = [
        ["", "network", *["reference", "ratio"][: 2 * len(networks) - 2]],
        _row("parameters stored", [size.parameters_stored for size in sizes], ",d"),
        _row("parameters non-zero", [size.parameters_nonzero for size in sizes], ",d"),
        _row("MACs dense, M", [size.macs_dense / 1e6 for size in sizes], ",.2f"),
        _row("MACs effective, M", [size.macs_effective / 1e6 for size in sizes], ",.2f"),
    ]
    for of_all in zip(*(each.inference for each in networks), strict=True):
        rows += _measured(f"inference of {of_all[0].batch_size}", of_all)
    steps = [each.training for each in networks if each.training]
    if len(steps) == len(networks):
        rows += _measured(f"training step of {steps[0].batch_size}", steps)
    return rows


def _measured(what: str, measurements: Sequence[Measurement]) -> list[list[str]]:
    times = [f"{what}, ms", *(_spread(each.seconds, 1e3) for each in measurements)]
    if (ratio := measurements[0].ratio) is not None:
        times.append(_spread(ratio, unit="×"))
    return [
        times,
        _row("  images a second", [each.images_per_second for each in measurements], ",.0f"),
        _row("  peak memory, MiB", [each.peak_bytes / 2**20 for each in measurements], ",.2f"),
    ]


def _row(label: str, values: Sequence[float], form: str) -> list[str]:
    ratio = [f"{values[0] / values[1]:.2f}×"] if len(values) > 1 and values[1] else []
    return [label, *(f"{value:{form}}" for value in values), *ratio]


def _spread(values: Quartiles, scale: float = 1, unit: str = "") -> str:
    lower, middle, upper = (f"{scale * value:,.2f}" for value in astuple(values))
    return f"{middle}{unit} ({lower}–{upper})"


def _by_stage(network: NetworkCost, title: str, cell: Callable[[Size | None], str]) -> list[list[str]]:
    """Rows of one kind of figure, with a column for all paths together and one for each."""
    return [
        [title, "all", *(f"exit {number}" for number in range(len(network.exits)))],
        *([part.name, cell(part.total), *map(cell, part.paths)] for part in network.parts),
        ["each exit alone", "", *(cell(each.alone) for each in network.exits)],
        ["  of it shared", "", *(cell(each.shared) for each in network.exits)],
    ]


def _macs_cell(size: Size | None) -> str:
    if size is None:
        return ""
    return _two_kinds(f"{size.macs_dense / 1e6:,.2f}", f"{size.macs_effective / 1e6:,.2f}")


def _parameters_cell(size: Size | None) -> str:
    if size is None:
        return ""
    return _two_kinds(f"{size.parameters_stored:,}", f"{size.parameters_nonzero:,}")


def _two_kinds(all_of_it: str, of_kept_weights: str) -> str:
    return all_of_it if all_of_it == of_kept_weights else f"{all_of_it} ({of_kept_weights})"
