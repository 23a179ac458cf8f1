"""A cascade's accuracy against its cost, beside single exits, the full ensemble and the single network."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path
from statistics import quantiles

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from netfission.inference.cascade import Cascade, ExitCosts, Rule, cascade_logits, exit_costs
from netfission.inference.deploy import deploy, deploy_exits
from netfission.inference.thresholds import CascadeChoice, choose_thresholds
from netfission.network import ExitPath, FissionNetwork
from netfission.profiling.macs import Macs, count_macs
from netfission.profiling.timing import inference_times
from netfission.utils.files import write_whole
from netfission.utils.text import align_columns

CURVE_LIMITS = 13  # costs for which thresholds are chosen
CURVE_TIMED = 5  # how many of the curve's points are timed, at most
IMAGES_A_ROUND = {1: 20, 256: 256}  # batch size → images that are timed together
FEWEST_ROUNDS, MOST_ROUNDS = 3, 10
SECONDS = 60.0  # of timing a batch size, after which the fewest rounds will do

Labelled = tuple[Tensor, Tensor]  # logits `(n, exits, classes)` and labels `(n,)`


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of so many rounds, and the quartiles about it."""

    lower: float
    median: float
    upper: float
    rounds: int


@dataclass(frozen=True)
class Point:
    """One way to an answer: its accuracy on the test images, and its cost over the single network's.

    Attributes:
        name: what it is.
        kind: single (the model before its fission), ensemble (of all exits), exit, chosen (the cascade for
            the target) or curve (cascades for other costs).
        macs: dense multiply-accumulates an image, mean over the test images.
        effective_macs: those that meet a weight that is not removed.
        accuracy: share of the test images that are right; None where it is not known.
        lost: by how much that is below the full ensemble's.
        lost_error: standard error of `lost`, image by image.
        exits_used: mean number of exits run.
        thresholds: of a cascade.
        times: batch size → measured time over the single network's, both deployed; empty where it was not
            timed.
    """

    name: str
    kind: str
    macs: float
    effective_macs: float
    accuracy: float | None = None
    lost: float | None = None
    lost_error: float | None = None
    exits_used: float | None = None
    thresholds: tuple[float, ...] | None = None
    times: dict[int, Ratio] = field(default_factory=dict)


@dataclass(frozen=True)
class CascadeEvaluation:
    """Figures of a cascade.

    Attributes:
        rule: see `netfission.inference.cascade_confidence`.
        order: the exits as they run.
        max_accuracy_drop: the target in percentage points of accuracy; None if `max_cost` was given.
        max_cost: the target relative to the single network's cost; None if `max_accuracy_drop` was given.
        choice: the thresholds chosen for that, with their figures on the validation images.
        validation_accuracy: of the full ensemble there.
        validation_images: how many those are.
        test_images: how many the points' accuracies are about.
        points: single network, full ensemble, exits, chosen cascade, then the cascade's curve from the
            cheapest on.
    """

    rule: Rule
    order: tuple[int, ...]
    max_accuracy_drop: float | None
    max_cost: float | None
    choice: CascadeChoice
    validation_accuracy: float
    validation_images: int
    test_images: int
    points: list[Point]

    def table(self) -> str:
        """Give the timed points as aligned plain text, and say how they came about."""
        head = ["", "accuracy %", "lost, points", "exits", "MACs", "effective"]
        head += [f"time, batch {size}" for size in IMAGES_A_ROUND]
        rows = [head, *(_cells(point) for point in self.points if point.times)]
        rounds = " and ".join(f"{t.rounds}" for t in self.points[0].times.values())
        order = ", ".join(map(str, self.order))
        thresholds = ", ".join(f"{threshold:.4g}" for threshold in self.choice.thresholds)
        here, full = 100 * self.choice.accuracy, 100 * self.validation_accuracy
        return "\n".join(
            [
                align_columns(rows),
                "",
                f"{self.test_images} test images; lost: against the full ensemble, ± standard error.",
                "Costs are means over the single network's; time: all deployed, median (quartiles) of "
                f"{rounds} rounds side by side.",
                f"Exits run in the order {order}; an image stops at {self.rule} above {thresholds}.",
                f"Chosen to {_target(self.max_accuracy_drop, self.max_cost)} on "
                f"{self.validation_images} validation images, "
                f"with {here:.2f} % accuracy there (full ensemble {full:.2f} %)",
                f"at {self.choice.cost:.3f}× the MACs.",
            ]
        )

    def draw(self, path: Path) -> list[Path]:
        """Draw the points into `path` with the suffixes png and svg, each whole or not at all."""
        figure = Figure(figsize=(11.5, 5), layout="constrained")
        count_noun, timed = figure.subplots(1, 2, sharey=True)
        _draw(count_noun, self.points, None, _COLOURS[0])
        count_noun.set(xlabel="MACs (dense, mean) ÷ single network's", ylabel="accuracy on test images, %")
        for size, colour in zip(IMAGES_A_ROUND, _COLOURS, strict=True):
            _draw(timed, [point for point in self.points if point.times], size, colour)
        timed.set(xlabel="measured time ÷ single network's, both deployed (median, quartiles)")
        for axes in (count_noun, timed):
            axes.axvline(1, color="#444444", linestyle="--", linewidth=1, label="single network's cost")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(fontsize=8, loc="lower right")
        figure.suptitle(
            f"Exits {', '.join(map(str, self.order))} one after another until {self.rule} suffices: "
            f"{self.test_images} test images, thresholds from {self.validation_images} validation images",
            fontsize=10,
        )
        drawn = [path.with_suffix(f".{kind}") for kind in ("png", "svg")]
        for file in drawn:
            buffer = BytesIO()
            figure.savefig(buffer, format=file.suffix[1:], dpi=130)
            write_whole(file, buffer.getvalue())
        return drawn


def evaluate_cascade(
    network: FissionNetwork,
    single: nn.Module,
    validation: Labelled,
    test: Labelled,
    images: Tensor,
    *,
    rule: Rule = "margin",
    max_accuracy_drop: float | None = None,
    max_cost: float | None = None,
    single_accuracy: float | None = None,
) -> CascadeEvaluation:
    """Choose thresholds on validation images, and measure what they are worth on test images.

    What is timed is made fast first, all alike: see `netfission.inference.deploy`.

    Args:
        network: in eval mode.
        single: the model before its fission, in eval mode; its MACs and time are the unit of costs.
        validation: logits and labels to choose thresholds on.
        test: logits and labels that every accuracy and mean cost is of.
        images: a mix of test images, `(n, channels, height, width)` on the networks' device, to time with.
        rule: see `netfission.inference.cascade_confidence`.
        max_accuracy_drop: see `netfission.inference.choose_thresholds`.
        max_cost: see there; over the single network's dense MACs.
        single_accuracy: of a trained single network on the test images, to stand beside.

    Raises:
        ValueError: the target is out of reach, an argument is not what it takes, or a network cannot be
            deployed.
    """
    image = images[:1]
    unit = count_macs(single, image)
    costs = exit_costs(network, image)
    relative = [macs / unit.dense for macs in costs.dense]
    choose = partial(choose_thresholds, *validation, relative, order=costs.order, rule=rule)
    choice = choose(max_accuracy_drop=max_accuracy_drop, max_cost=max_cost)
    ways = [
        *_without_choice(network, image, costs),
        _Way(f"cascade, {_target(max_accuracy_drop, max_cost)}", "chosen", costs, choice.thresholds),
        *_curve(choose, costs, relative),
    ]
    timed = [way for way in ways if way.timed]
    alone, *times = _times(network, single, timed, rule, images)
    times_of = dict(zip((way.name for way in timed), times, strict=True))
    points = [_point(way, rule, test, unit, times_of.get(way.name, {})) for way in ways]
    return CascadeEvaluation(
        rule=rule,
        order=costs.order,
        max_accuracy_drop=max_accuracy_drop,
        max_cost=max_cost,
        choice=choice,
        validation_accuracy=_right(*validation).mean().item(),
        validation_images=len(validation[1]),
        test_images=len(test[1]),
        points=[Point("single network", "single", 1.0, 1.0, single_accuracy, times=alone), *points],
    )


@dataclass(frozen=True)
class _Way:
    """A cascade to be measured; full ensemble and single exits are cascades that stop never and at once."""

    name: str
    kind: str
    costs: ExitCosts
    thresholds: tuple[float, ...]
    timed: bool = True

    def deployed(
        self, network: FissionNetwork, exits: FissionNetwork, rule: Rule, batch: Tensor
    ) -> nn.Module:
        """As a module, of the network or of its deployed exits, to answer such batches."""
        if self.kind == "ensemble":
            return nn.Sequential(deploy(network, batch), _MeanOfExits())
        return Cascade(exits, self.thresholds, order=self.costs.order, rule=rule)


class _MeanOfExits(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits.mean(dim=1)


def _without_choice(network: FissionNetwork, image: Tensor, costs: ExitCosts) -> list[_Way]:
    """The full ensemble, and each exit alone."""
    exits = range(len(costs.order))
    ways = [_Way("full ensemble", "ensemble", costs, (1.0,) * len(exits[1:]))]
    for number in exits:
        order = (number, *(other for other in exits if other != number))
        alone = exit_costs(network, image, order)
        ways.append(_Way(f"exit {number}", "exit", alone, (0.0,) * len(exits[1:])))
    return ways


def _curve(choose: Callable[..., CascadeChoice], costs: ExitCosts, relative: Sequence[float]) -> list[_Way]:
    """Cascades from the cost of the first exit to that of all."""
    limits = torch.linspace(relative[0], sum(relative), CURVE_LIMITS, dtype=torch.float64).tolist()
    limit_of: dict[tuple[float, ...], float] = {}
    for limit in limits:
        limit_of.setdefault(choose(max_cost=limit).thresholds, limit)
    spacing = ceil(len(limit_of) / CURVE_TIMED)
    return [
        _Way(f"cascade, spend {limit:.3f}", "curve", costs, thresholds, timed=index % spacing == 0)
        for index, (thresholds, limit) in enumerate(limit_of.items())
    ]


def _point(way: _Way, rule: Rule, test: Labelled, unit: Macs, times: dict[int, Ratio]) -> Point:
    logits, labels = test
    output = cascade_logits(logits, way.thresholds, order=way.costs.order, rule=rule)
    right = (output.logits.argmax(dim=1) == labels).double()
    lost = _right(logits, labels) - right
    return Point(
        name=way.name,
        kind=way.kind,
        macs=_mean_cost(way.costs.dense, output.exits_used) / unit.dense,
        effective_macs=_mean_cost(way.costs.effective, output.exits_used) / unit.effective,
        accuracy=right.mean().item(),
        lost=lost.mean().item(),
        lost_error=lost.std(correction=0).item() / sqrt(len(lost)),
        exits_used=output.exits_used.double().mean().item(),
        thresholds=way.thresholds,
        times=times,
    )


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the full ensemble is right, else 0."""
    return (logits.mean(dim=1).argmax(dim=1) == labels).double()


def _mean_cost(added: Sequence[int], exits_used: Tensor) -> float:
    return torch.tensor(added).double().cumsum(dim=0)[exits_used - 1].mean().item()


def _times(
    network: FissionNetwork, single: nn.Module, ways: Sequence[_Way], rule: Rule, images: Tensor
) -> list[dict[int, Ratio]]:
    """Time of the single network and of each way over the single network's, for every batch size."""
    one_exit = FissionNetwork(single, [ExitPath([], nn.Identity())], [], [])
    alone = nn.Sequential(deploy(one_exit, images[:2], joined=False), _MeanOfExits())
    exits = deploy_exits(network, images[:2])
    times: list[dict[int, Ratio]] = [{} for _ in range(1 + len(ways))]
    for size, count in IMAGES_A_ROUND.items():
        modules = [alone, *(way.deployed(network, exits, rule, images[:size]) for way in ways)]
        ratios = _ratios([_Reader(module, size) for module in modules], images, count)
        for of_module, own in zip(times, ratios, strict=True):
            lower, median, upper = quantiles(own, n=4, method="inclusive")
            of_module[size] = Ratio(lower, median, upper, len(own))
    return times


def _ratios(readers: Sequence[nn.Module], images: Tensor, count: int) -> list[tuple[float, ...]]:
    """Time of each over the first one's, round by round; every round has other images."""
    generator = torch.Generator().manual_seed(0)
    named = {str(number): reader for number, reader in enumerate(readers)}
    rounds: list[list[float]] = []
    start = time.perf_counter()
    while len(rounds) < 1 + FEWEST_ROUNDS or (
        len(rounds) < 1 + MOST_ROUNDS and time.perf_counter() - start < SECONDS
    ):
        drawn = torch.randint(len(images), (count,), generator=generator)
        seconds = inference_times(named, images[drawn.to(images.device)], rounds=1, warm_up=0)
        rounds.append([own / seconds["0"][0] for (own,) in seconds.values()])
    return list(zip(*rounds[1:], strict=True))


class _Reader(nn.Module):
    """Answers images in batches of one size, and reads each answer before it takes the next."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network = network
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.network(batch).argmax(dim=1).cpu() for batch in images.split(self.size)])


def _target(max_accuracy_drop: float | None, max_cost: float | None) -> str:
    return (
        f"lose at most {max_accuracy_drop:g} points" if max_cost is None else f"spend at most {max_cost:g}×"
    )


def _cells(point: Point) -> list[str]:
    """A line of the table."""
    unknown = ["", "", ""]
    if point.accuracy is not None:
        unknown[0] = f"{100 * point.accuracy:.2f}"
    if point.lost is not None and point.lost_error is not None and point.exits_used is not None:
        unknown[1:] = [f"{100 * point.lost:.2f} ± {100 * point.lost_error:.2f}", f"{point.exits_used:.2f}"]
    costs = [f"{point.macs:.3f}×", f"{point.effective_macs:.3f}×"]
    times = [f"{t.median:.2f}× ({t.lower:.2f}–{t.upper:.2f})" for t in point.times.values()]
    return [point.name, *unknown, *costs, *times]


_COLOURS = ("#0b6e99", "#c1571a")
_MARKERS = {
    "single": ("D", 7),
    "ensemble": ("*", 13),
    "exit": ("s", 6),
    "curve": (".", 7),
    "chosen": ("o", 10),
}
_LEGEND = {
    "single": "single network",
    "ensemble": "all exits",
    "exit": "one exit alone",
    "curve": "cascade",
    "chosen": "cascade as chosen",
}


def _draw(axes: Axes, points: Sequence[Point], size: int | None, colour: str) -> None:
    """Draw points by their MACs, with a legend of what they are, or by their time at a batch size."""
    for kind, (marker, width) in _MARKERS.items():
        own = [(point, 100 * point.accuracy) for point in points if point.accuracy is not None]
        own = [(point, accuracy) for point, accuracy in own if point.kind == kind]
        if not own:
            continue
        accuracies = [accuracy for _, accuracy in own]
        places = [point.macs if size is None else point.times[size].median for point, _ in own]
        axes.plot(
            places,
            accuracies,
            marker,
            markersize=width,
            color=colour,
            linestyle="-" if kind == "curve" else "none",
            fillstyle="none" if kind == "chosen" else "full",
            label=_LEGEND[kind] if size is None else f"batch {size}" if kind == "curve" else None,
        )
        if size is not None:
            times = [point.times[size] for point, _ in own]
            bars = [[t.median - t.lower for t in times], [t.upper - t.median for t in times]]
            axes.errorbar(places, accuracies, xerr=bars, fmt="none", ecolor=colour, elinewidth=0.8)
        elif kind == "exit":
            for index, (point, accuracy) in enumerate(own):
                place = (point.macs, accuracy)
                axes.annotate(point.name, place, (8, 6 - 9 * index), textcoords="offset points", fontsize=8)
