"""What a network costs: parameters, multiply-accumulates, memory and time, relative to a reference."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from netfission.profiling.macs import list_calls, run_counted
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
from netfission.surgery.one_input import with_one_input
from netfission.surgery.plain import check_values
from netfission.utils.errors import check_positive_integer, invalid
from netfission.utils.inputs import Inputs, as_inputs, first_rows, map_inputs, row_count, tensors_in
from netfission.utils.modes import in_mode, input_errors
from netfission.utils.text import align_columns, count_noun, exit_names


@runtime_checkable
class HasExits(Protocol):
    """A network whose costs are counted per part and exit: a `FissionNetwork` or its `Ensemble`."""

    @property
    def exits(self) -> int:
        """The number of exits."""

    @property
    def linear(self) -> int:
        """The number of linear exits, which are the last."""

    @property
    def parts(self) -> list[tuple[str, dict[int, nn.Module]]]:
        """Stem, stages and head: the name of each, and exit → the module that its path holds there."""


@dataclass(frozen=True)
class Size:
    """Parameters and multiply-accumulates of a network or of a part of it.

    Attributes:
        parameters_stored: parameters in memory, including removed ones.
        parameters_nonzero: those that are not removed.
        macs_dense: multiply-accumulates of one image as executed, including those of removed weights; see
            `netfission.profiling.macs` for what is counted.
        macs_effective: those of weights that are not removed, which a sparse kernel could reach.
    """

    parameters_stored: int = 0
    parameters_nonzero: int = 0
    macs_dense: int = 0
    macs_effective: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Part:
    """The stem, a stage or the head of a `FissionNetwork`.

    Attributes:
        name: `"stem"`, a stage's name or `"head"`.
        total: of all paths together.
        paths: of the copy of each exit, exit 0 first; None if the exit runs through the copy of exit 0.
    """

    name: str
    total: Size
    paths: tuple[Size | None, ...]


@dataclass(frozen=True)
class Exit:
    """One exit of a `FissionNetwork`.

    Attributes:
        alone: of everything that it runs: the stem, shared stages, its copies of stages, and its head.
        shared: of the parts among these that another exit also runs.
        linear: whether it is a linear exit of features that another exit computes.
    """

    alone: Size
    shared: Size
    linear: bool = False


@dataclass(frozen=True)
class Measurement:
    """Measured time and memory of inference or of a training step on one batch.

    Attributes:
        batch_size: images per batch.
        seconds: per batch.
        images_per_second: at the median time.
        peak_bytes: peak memory in addition to the network and the images, see
            `netfission.profiling.timing.peak_bytes`.
        ratio: seconds over the reference's in the same round; None without a reference.
    """

    batch_size: int
    seconds: Quartiles
    images_per_second: float
    peak_bytes: int
    ratio: Quartiles | None


@dataclass(frozen=True)
class NetworkCounts:
    """What can be counted of a network, without measuring time.

    Attributes:
        size: of the whole network.
        parts: stem, stages and heads of a `FissionNetwork` or its `Ensemble`; empty for other networks.
        exits: of the same, exit 0 first.
        uncounted: operation whose MACs cannot be counted → calls per image.
    """

    size: Size
    parts: tuple[Part, ...]
    exits: tuple[Exit, ...]
    uncounted: dict[str, int]


@dataclass(frozen=True)
class NetworkCost(NetworkCounts):
    """The cost of one network: what is counted, and what is measured.

    Attributes:
        inference: in eval mode without gradients; one entry per batch size.
        training: a training step, its memory including gradients and momentum; None if the output is not
            logits or no parameter has a gradient.
    """

    inference: tuple[Measurement, ...]
    training: Measurement | None


@dataclass(frozen=True)
class Conditions:
    """What measured times and memory depend on in addition to the network.

    Attributes:
        image_shape: of one image, channels first.
        dtype: of the images.
        device: name of the device.
        threads: number of threads of an operation on a CPU.
        batch_sizes: of inference.
        rounds: number of timed rounds, in each of which every network runs once.
        warm_up: number of rounds before that.
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
    """What a network costs, and what its reference costs.

    Attributes:
        network: the network's cost.
        reference: the reference's cost, from the same rounds, with ratios of 1; None without one.
        conditions: of the measurements.

    Example:
        >>> report = cost(nn.Linear(3, 2), torch.zeros(1, 3), nn.Linear(3, 4), batch_sizes=[1], rounds=1)
        >>> report.table().splitlines()[1].split()
        ['parameters', 'stored', '8', '16', '0.50×']
    """

    network: NetworkCost
    reference: NetworkCost | None
    conditions: Conditions

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data, every digit kept."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the figures as JSON text, every digit kept."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def table(self) -> str:
        """Return the figures as aligned plain text: with the reference, then per stage and exit."""
        blocks = [align_columns(_whole_network(self.network, self.reference))]
        if self.network.parts:
            blocks.append(align_columns(_by_stage(self.network, "MACs dense (effective), M", _macs_cell)))
            blocks.append(align_columns(_by_stage(self.network, "parameters (non-zero)", _parameters_cell)))
        for name, counts in (("network", self.network), ("reference", self.reference)):
            if counts is not None and counts.uncounted:
                blocks.append(f"MACs of the {name} leave out {list_calls(counts.uncounted)}")
        conditions = self.conditions
        shape = " × ".join(map(str, conditions.image_shape))
        rounds = count_noun(conditions.rounds, "round")
        blocks.append(
            f"median (quartiles) of {rounds} in turn after {conditions.warm_up} of warm-up"
            f", ratios per round\nimages {shape} {conditions.dtype}; {conditions.device}, "
            f"threads: {conditions.threads}; torch {conditions.torch}"
        )
        return "\n\n".join(blocks)


def cost(
    network: nn.Module,
    example_input: Inputs,
    reference: nn.Module | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    rounds: int = 20,
) -> Cost:
    """Count parameters and multiply-accumulates of a network, and measure its time and memory.

    Networks run in rounds, in each of which every network runs once, so that drift of the machine affects
    them equally; a terminal shows a progress bar. The machine should be idle otherwise. A training step runs
    on a copy of the network, on a batch of the largest batch size and at least 2 images, which batch norms
    need; see `netfission.profiling.timing.training_times`.

    Args:
        network: a `FissionNetwork`, its `Ensemble` or any other module of one tensor; not changed.
        example_input: images `(batch, channels, height, width)` on the networks' device, at least one;
            repeated to fill a batch. Or another tensor, or a tuple or dictionary of tensors.
        reference: usually the model that was fissioned; not changed.
        batch_sizes: numbers of images per batch in inference; all positive.
        rounds: number of timed runs of each network, after 3 that are not timed.

    Returns:
        The counts and measurements, with ratios to the reference if there is one.

    Raises:
        ValueError: a network's weights are computed by hooks (`torch.nn.utils.prune`) or have no values,
            there is no image, a network raises an error on one, `batch_sizes` is empty or holds a number
            below 1, or `rounds` is below 1.

    Example:
        >>> import netfission as nf
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 6 * 6, 5))
        >>> report = nf.cost(model, torch.randn(1, 3, 8, 8), batch_sizes=[1], rounds=1)
        >>> report.network.size.macs_dense  # 8·3·3·3 weights at 6·6 positions, and 288·5 weights
        9216
        >>> report.network.inference[0].seconds.median > 0
        True
    """
    _check(batch_sizes, rounds)
    example_input = as_inputs("example_input", example_input)
    networks = {"network": network} | ({} if reference is None else {"reference": reference})
    for name, module in networks.items():
        check_values(name, module)
        if not isinstance(module, HasExits):
            networks[name] = with_one_input(module, example_input)
        _check_input(networks[name], first_rows(example_input, 1))
    device = tensors_in(example_input)[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        inference = [_inference(networks, _batch(example_input, size), rounds) for size in batch_sizes]
        learning = {
            name: module for name, module in networks.items() if _learns(module, first_rows(example_input, 1))
        }
        training = _training(learning, _batch(example_input, max(2, *batch_sizes)), rounds)
        costs = {
            name: NetworkCost(
                **vars(count(module, first_rows(example_input, 1))),
                inference=tuple(of_all[name] for of_all in inference),
                training=training.get(name),
            )
            for name, module in networks.items()
        }
    conditions = _conditions(example_input, tuple(batch_sizes), rounds)
    return Cost(costs["network"], costs.get("reference"), conditions)


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Count the parameters stored in a module, and those of them that are not removed.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        (8, 8)
    """
    stored = sum(parameter.numel() for parameter in module.parameters())
    removed = sum(int((~mask).sum()) for mask in kept_masks(module).values())
    return stored, stored - removed


def _check(batch_sizes: Sequence[int], rounds: int) -> None:
    if min(batch_sizes, default=0) < 1:
        raise invalid("batch_sizes", "one or more positive integers", list(batch_sizes))
    check_positive_integer("rounds", rounds)


def _batch(images: Inputs, size: int) -> Inputs:
    rows = torch.arange(size, device=tensors_in(images)[0].device) % row_count(images)
    batch: Inputs = map_inputs(lambda tensor: tensor[rows], images)
    return batch


def _conditions(images: Inputs, batch_sizes: tuple[int, ...], rounds: int) -> Conditions:
    first = tensors_in(images)[0]
    return Conditions(
        image_shape=tuple(first.shape[1:]),
        dtype=str(first.dtype).removeprefix("torch."),
        device=device_name(first.device),
        threads=torch.get_num_threads(),
        batch_sizes=batch_sizes,
        rounds=rounds,
        warm_up=WARM_UP,
        torch=torch.__version__,
    )


# --- counting, per part and exit ------------------------------------------------------------------


def count(module: nn.Module, image: Inputs) -> NetworkCounts:
    """Count parameters and multiply-accumulates of a network in eval mode, without measuring time.

    Args:
        module: a `FissionNetwork`, its `Ensemble` or any other module of one tensor; not changed.
        image: `(1, channels, height, width)`, on the module's device.

    Example:
        >>> count(nn.Linear(3, 2), torch.zeros(1, 3)).size.macs_dense
        6
    """
    modules, exits = (module.parts, range(module.exits)) if isinstance(module, HasExits) else ([], range(0))
    counter = run_counted(module, image, [part for _, copies in modules for part in copies.values()])
    parts = []
    for name, copies in modules:
        sizes = {
            number: Size(*count_parameters(part), counter.dense[part], counter.effective[part])
            for number, part in copies.items()
        }
        parts.append(Part(name, sum(sizes.values(), Size()), tuple(map(sizes.get, exits))))
    size = Size(*count_parameters(module), *counter.total)
    others = len(exits) - (module.linear if isinstance(module, HasExits) else 0)
    counted = (_exit(parts, number, linear=number >= others) for number in exits)
    return NetworkCounts(size, tuple(parts), tuple(counted), dict(counter.uncounted))


def _exit(parts: Sequence[Part], number: int, *, linear: bool) -> Exit:
    alone = shared = Size()
    for part in parts:
        copy, trunk = part.paths[number], part.paths[0]
        assert trunk is not None
        alone += copy or trunk
        if copy is None or (number == 0 and None in part.paths):
            shared += trunk
    return Exit(alone, shared, linear)


# --- measuring --------------------------------------------------------------------------------------


def _inference(networks: Mapping[str, nn.Module], images: Inputs, rounds: int) -> dict[str, Measurement]:
    peaks = {name: inference_peak(module, images) for name, module in networks.items()}
    return _measurements(
        inference_times(
            networks, images, rounds=rounds, title=f"inference of {count_noun(row_count(images), 'image')}"
        ),
        peaks,
        row_count(images),
    )


def _training(networks: Mapping[str, nn.Module], images: Inputs, rounds: int) -> dict[str, Measurement]:
    peaks = {name: training_peak(module, images) for name, module in networks.items()}
    return _measurements(
        training_times(
            networks, images, rounds=rounds, title=f"training steps of {row_count(images)} images"
        ),
        peaks,
        row_count(images),
    )


@torch.no_grad()
def _check_input(module: nn.Module, image: Inputs) -> None:
    with in_mode(module, training=False), input_errors("example_input", image):
        module(image)


@torch.enable_grad()
def _learns(module: nn.Module, image: Inputs) -> bool:
    """Return whether the output is logits that carry gradients."""
    with in_mode(module, training=False):
        output = module(image)
    if not isinstance(output, Tensor) or not output.requires_grad:
        return False
    return output.ndim == 2 or (output.ndim == 3 and output.shape[2] > 1)


def _measurements(
    times: Mapping[str, Sequence[float]], peaks: Mapping[str, int], batch_size: int
) -> dict[str, Measurement]:
    measurements = {}
    for name, values in times.items():
        seconds, ratio = Quartiles.from_values(values), None
        if "reference" in times:
            ratio = Quartiles.of_ratios(values, times["reference"])
        measurements[name] = Measurement(batch_size, seconds, batch_size / seconds.median, peaks[name], ratio)
    return measurements


# --- as text ----------------------------------------------------------------------------------------


def _whole_network(network: NetworkCost, reference: NetworkCost | None) -> list[list[str]]:
    """Return rows of the whole network's figures, the reference's and their ratio."""
    networks = [network] if reference is None else [network, reference]
    sizes = [item.size for item in networks]
    rows = [
        ["", "network", *["reference", "ratio"][: 2 * len(networks) - 2]],
        _row("parameters stored", [size.parameters_stored for size in sizes], ",d"),
        _row("parameters non-zero", [size.parameters_nonzero for size in sizes], ",d"),
        _row("MACs dense, M", [size.macs_dense / 1e6 for size in sizes], ",.2f"),
        _row("MACs effective, M", [size.macs_effective / 1e6 for size in sizes], ",.2f"),
    ]
    for of_all in zip(*(item.inference for item in networks), strict=True):
        rows += _measured(f"inference of {of_all[0].batch_size}", of_all)
    steps = [item.training for item in networks if item.training]
    if len(steps) == len(networks):
        rows += _measured(f"training step of {steps[0].batch_size}", steps)
    return rows


def _measured(title: str, measurements: Sequence[Measurement]) -> list[list[str]]:
    times = [f"{title}, ms", *(_spread(item.seconds, 1e3) for item in measurements)]
    if (ratio := measurements[0].ratio) is not None:
        times.append(_spread(ratio, unit="×"))
    return [
        times,
        _row("  images per second", [item.images_per_second for item in measurements], ",.0f"),
        _row("  peak memory, MiB", [item.peak_bytes / 2**20 for item in measurements], ",.2f"),
    ]


def _row(label: str, values: Sequence[float], form: str) -> list[str]:
    ratio = [f"{values[0] / values[1]:.2f}×"] if len(values) > 1 and values[1] else []
    return [label, *(f"{value:{form}}" for value in values), *ratio]


def _spread(values: Quartiles, scale: float = 1, unit: str = "") -> str:
    lower, middle, upper = (f"{scale * value:,.2f}" for value in astuple(values))
    return f"{middle}{unit} ({lower}–{upper})"


def _by_stage(network: NetworkCost, title: str, cell: Callable[[Size | None], str]) -> list[list[str]]:
    """Return rows of one kind of figure, with a column for all paths together and one per path."""
    return [
        [title, "all", *exit_names(len(network.exits), sum(item.linear for item in network.exits))],
        *([part.name, cell(part.total), *map(cell, part.paths)] for part in network.parts),
        ["each exit alone", "", *(cell(item.alone) for item in network.exits)],
        ["  of it shared", "", *(cell(item.shared) for item in network.exits)],
    ]


def _macs_cell(size: Size | None) -> str:
    if size is None:
        return ""
    return _two_kinds(f"{size.macs_dense / 1e6:,.2f}", f"{size.macs_effective / 1e6:,.2f}")


def _parameters_cell(size: Size | None) -> str:
    if size is None:
        return ""
    return _two_kinds(f"{size.parameters_stored:,}", f"{size.parameters_nonzero:,}")


def _two_kinds(stored: str, kept: str) -> str:
    return stored if stored == kept else f"{stored} ({kept})"
