"""A cascade's accuracy and cost, beside single exits, the full ensemble and the single network."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from netfission.ensemble import mean_logits
from netfission.inference.bounded_loss import bounded_thresholds
from netfission.inference.cascade import Cascade, ExitCosts, Rule, cascade_logits, describe_stops, exit_costs
from netfission.inference.deployment import deploy, deploy_exits
from netfission.inference.thresholds import CascadeChoice, choose_thresholds
from netfission.network import ExitPath, FissionNetwork
from netfission.profiling.macs import Macs, count_macs
from netfission.profiling.timing import Quartiles, inference_times
from netfission.utils.errors import invalid
from netfission.utils.text import align_columns, exit_names, percent

CURVE_COSTS = 13  # maximum costs for which the curve's thresholds are chosen
CURVE_TIMED = 5  # largest number of the curve's points that are timed
IMAGES_PER_ROUND = {1: 20, 256: 256}  # batch size → images that are timed together
MIN_ROUNDS, MAX_ROUNDS = 3, 10
_EXCEEDED = "exceeded"  # marks the name of a row
_ROUNDING = 1e-9  # by which a bound may be exceeded
SECONDS = 60.0  # of timing per batch size, after which `MIN_ROUNDS` are enough

Labelled = tuple[Tensor, Tensor]  # logits `(n, exits, classes)` and labels `(n,)`
Weights = tuple[float, ...] | None  # of the exits in the mean of logits; None for equal ones
Kind = Literal["single", "ensemble", "exit", "chosen", "curve"]


@dataclass(frozen=True)
class Point:
    """Accuracy of one classifier on the test images, and its cost relative to the single network's.

    Attributes:
        name: of the classifier.
        kind: single (the model before its fission), ensemble (of all exits), exit, chosen (the cascade for
            the target) or curve (cascades for other costs).
        macs: dense multiply-accumulates per image, mean over the test images.
        effective_macs: those that meet a weight that is not removed.
        accuracy: share of the test images that are classified correctly; None if it is unknown.
        accuracy_drop: the full ensemble's accuracy less this one.
        accuracy_drop_error: standard error of `accuracy_drop`, from its values per image.
        exits_used: mean number of exits run.
        thresholds: of a cascade.
        times: batch size → measured time over the single network's, both deployed; empty if it was not
            timed.
        exceeds: whether a cascade exceeds on the test images the bound that its thresholds keep on the
            validation images.
    """

    name: str
    kind: Kind
    macs: float
    effective_macs: float
    accuracy: float | None = None
    accuracy_drop: float | None = None
    accuracy_drop_error: float | None = None
    exits_used: float | None = None
    thresholds: tuple[float, ...] | None = None
    times: dict[int, Quartiles] = field(default_factory=dict)
    exceeds: bool = False


@dataclass(frozen=True)
class CascadeEvaluation:
    """Accuracy and cost of a cascade and of what it is compared with: `cascade.json`.

    Attributes:
        rule: see `netfission.inference.cascade_confidence`.
        order: the exits as they run.
        max_accuracy_drop: the target in percentage points of accuracy; None if `max_cost` was given.
        max_cost: the target relative to the single network's cost; None if `max_accuracy_drop` was given.
        choice: the thresholds chosen for the target, with accuracy and cost on the validation images.
        validation_accuracy: of the full ensemble there.
        validation_images: number of validation images.
        test_images: number of test images.
        rounds: batch size → number of timed rounds.
        points: single network, full ensemble, exits, chosen cascade, then the cascade's curve from the
            cheapest on.
        delta: probability, over the choice of the validation images, that the chosen cascade loses more than
            `max_accuracy_drop` on new images; None if there is no such bound.
    """

    rule: Rule
    order: tuple[int, ...]
    max_accuracy_drop: float | None
    max_cost: float | None
    choice: CascadeChoice
    validation_accuracy: float
    validation_images: int
    test_images: int
    rounds: dict[int, int]
    points: list[Point]
    delta: float | None = None

    @property
    def least_accuracy(self) -> float | None:
        """Accuracy of the full ensemble on the test images less the accepted drop; None without one."""
        full = next(point.accuracy for point in self.points if point.kind == "ensemble")
        if self.max_accuracy_drop is None or full is None:
            return None
        return full - self.max_accuracy_drop / 100

    def table(self) -> str:
        """Return the timed points as aligned plain text, followed by how they were measured."""
        head = ["", "accuracy %", "drop, points", "exits", "MACs", "effective"]
        head += [f"time, batch {size}" for size in self.rounds]
        rows = [head, *(_cells(point) for point in self.points if point.times)]
        rounds = " and ".join(map(str, self.rounds.values()))
        order = ", ".join(map(str, self.order))
        stops = describe_stops(self.rule, self.choice.thresholds)
        chosen, full = percent(self.choice.accuracy), percent(self.validation_accuracy)
        exceeded = any(point.exceeds for point in self.points if point.times)
        marked = f"{_EXCEEDED}: kept on the validation images, but not on the test images."
        return "\n".join(
            [
                align_columns(rows),
                "",
                f"{self.test_images} test images; drop: relative to the full ensemble, ± standard error.",
                "Costs are means relative to the single network; time: all deployed, median (quartiles) of "
                f"{rounds} rounds side by side.",
                f"Exits run in the order {order}; {stops}.",
                f"Chosen for {_target(self.max_accuracy_drop, self.max_cost)} on "
                f"{self.validation_images} validation images, "
                f"with {chosen} % accuracy there (full ensemble {full} %)",
                f"at {self.choice.cost:.3f}× the MACs.",
                *self._promise(),
                *([marked] if exceeded else []),
            ]
        )

    def _promise(self) -> list[str]:
        """Return what `delta` says, a line each."""
        if self.delta is None:
            return []
        lines = [
            f"On new images the drop is within the bound with a probability of {1 - self.delta:g} over the "
            "choice of the validation images;",
            "a larger drop on the test images may be chance.",
        ]
        if all(threshold == 1 for threshold in self.choice.thresholds):
            lines.append("No cheaper cascade passed the test, so every exit runs for every image.")
        return lines


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
    delta: float | None = None,
    single_accuracy: float | None = None,
) -> CascadeEvaluation:
    """Choose thresholds on validation images, and measure the cascade on test images.

    Every network is deployed before it is timed: see `netfission.inference.deploy`.

    Args:
        network: in eval mode.
        single: the model before its fission, in eval mode; its MACs and time are the unit of costs.
        validation: logits `(n, exits, classes)` and labels `(n,)` to choose thresholds on.
        test: the same of the images that every accuracy and mean cost is measured on.
        images: a mix of test images, `(n, channels, height, width)` on the networks' device, to time with.
        rule: see `netfission.inference.cascade_confidence`.
        max_accuracy_drop: see `netfission.inference.choose_thresholds`.
        max_cost: see there; relative to the single network's dense MACs.
        delta: see `netfission.inference.bounded_thresholds`; by default, the thresholds keep
            `max_accuracy_drop` on the validation images alone.
        single_accuracy: of a trained single network on the test images, for comparison.

    Raises:
        ValueError: the target is out of reach, an argument is invalid, or a network cannot be deployed.
    """
    image = images[:1]
    unit = count_macs(single, image)
    costs = exit_costs(network, image)
    weights = network.exit_weights
    relative = [macs / unit.dense for macs in costs.dense]
    choose = partial(choose_thresholds, *validation, relative, order=costs.order, rule=rule, weights=weights)
    if delta is None:
        choice = choose(max_accuracy_drop=max_accuracy_drop, max_cost=max_cost)
    elif max_accuracy_drop is None:
        raise invalid("delta", "left out unless max_accuracy_drop is given", delta)
    else:
        choice = bounded_thresholds(
            *validation,
            relative,
            max_accuracy_drop=max_accuracy_drop,
            delta=delta,
            order=costs.order,
            rule=rule,
            weights=weights,
        )
    variants = [
        *_fixed(network, image, costs),
        _Variant(
            f"cascade, {_target(max_accuracy_drop, max_cost)}",
            "chosen",
            costs,
            choice.thresholds,
            max_accuracy_drop=max_accuracy_drop,
            max_cost=max_cost,
        ),
        *_curve(choose, costs, relative),
    ]
    timed = [variant for variant in variants if variant.timed]
    ratios = _time_ratios(network, single, timed, rule, images)
    single_times, *times = _by_network(ratios)
    times_of = dict(zip((variant.name for variant in timed), times, strict=True))
    points = [
        _point(variant, rule, weights, test, unit, times_of.get(variant.name, {})) for variant in variants
    ]
    return CascadeEvaluation(
        rule=rule,
        order=costs.order,
        max_accuracy_drop=max_accuracy_drop,
        max_cost=max_cost,
        choice=choice,
        validation_accuracy=_ensemble_correct(*validation, weights).mean().item(),
        validation_images=len(validation[1]),
        test_images=len(test[1]),
        rounds={size: len(by_network[0]) for size, by_network in ratios.items()},
        points=[Point("single network", "single", 1.0, 1.0, single_accuracy, times=single_times), *points],
        delta=delta,
    )


@dataclass(frozen=True)
class _Variant:
    """A cascade to be measured: the full ensemble never stops early, a single exit stops at once."""

    name: str
    kind: Kind
    costs: ExitCosts
    thresholds: tuple[float, ...]
    timed: bool = True
    max_accuracy_drop: float | None = None
    max_cost: float | None = None

    def deployed(
        self, network: FissionNetwork, exits: FissionNetwork, rule: Rule, batch: Tensor
    ) -> nn.Module:
        """Return it as a module for such batches, made of the network or of its deployed exits."""
        if self.kind == "ensemble":
            return nn.Sequential(deploy(network, batch), _MeanOfExits(network.exit_weights))
        return Cascade(exits, self.thresholds, order=self.costs.order, rule=rule)


class _MeanOfExits(nn.Module):
    def __init__(self, weights: Weights = None) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, logits: Tensor) -> Tensor:
        return mean_logits(logits, self.weights)


def _fixed(network: FissionNetwork, image: Tensor, costs: ExitCosts) -> list[_Variant]:
    """Return the variants without chosen thresholds: the full ensemble, and each exit alone."""
    exits = range(len(costs.order))
    names = exit_names(len(exits), network.linear)
    variants = [_Variant("full ensemble", "ensemble", costs, (1.0,) * len(exits[1:]))]
    for number in exits:
        order = (number, *(other for other in exits if other != number))
        alone = exit_costs(network, image, order)
        variants.append(_Variant(names[number], "exit", alone, (0.0,) * len(exits[1:])))
    return variants


def _curve(
    choose: Callable[..., CascadeChoice], costs: ExitCosts, relative: Sequence[float]
) -> list[_Variant]:
    """Return cascades from the cost of the first exit to that of all."""
    limits = torch.linspace(relative[0], sum(relative), CURVE_COSTS, dtype=torch.float64).tolist()
    limit_of: dict[tuple[float, ...], float] = {}
    for limit in limits:
        limit_of.setdefault(choose(max_cost=limit).thresholds, limit)
    spacing = ceil(len(limit_of) / CURVE_TIMED)
    return [
        _Variant(
            f"cascade, cost ≤ {limit:.3f}×", "curve", costs, thresholds, index % spacing == 0, max_cost=limit
        )
        for index, (thresholds, limit) in enumerate(limit_of.items())
    ]


def _point(
    variant: _Variant,
    rule: Rule,
    weights: Weights,
    test: Labelled,
    unit: Macs,
    times: dict[int, Quartiles],
) -> Point:
    logits, labels = test
    output = cascade_logits(logits, variant.thresholds, order=variant.costs.order, rule=rule, weights=weights)
    correct = (output.logits.argmax(dim=1) == labels).double()
    drop = _ensemble_correct(logits, labels, weights) - correct
    macs, accuracy_drop = _mean_cost(variant.costs.dense, output.exits_used) / unit.dense, drop.mean().item()
    bounds = ((macs, variant.max_cost), (100 * accuracy_drop, variant.max_accuracy_drop))
    return Point(
        name=variant.name,
        kind=variant.kind,
        macs=macs,
        effective_macs=_mean_cost(variant.costs.effective, output.exits_used) / unit.effective,
        accuracy=correct.mean().item(),
        accuracy_drop=accuracy_drop,
        accuracy_drop_error=drop.std(correction=0).item() / sqrt(len(drop)),
        exits_used=output.exits_used.double().mean().item(),
        thresholds=variant.thresholds,
        times=times,
        exceeds=any(bound is not None and value > bound + _ROUNDING for value, bound in bounds),
    )


def _ensemble_correct(logits: Tensor, labels: Tensor, weights: Weights) -> Tensor:
    """Return 1 if the full ensemble is right, else 0, per image."""
    return (mean_logits(logits, weights).argmax(dim=1) == labels).double()


def _mean_cost(added: Sequence[int], exits_used: Tensor) -> float:
    return torch.tensor(added).double().cumsum(dim=0)[exits_used - 1].mean().item()


Ratios = list[tuple[float, ...]]  # per network, one time per round over the single network's


def _time_ratios(
    network: FissionNetwork, single: nn.Module, variants: Sequence[_Variant], rule: Rule, images: Tensor
) -> dict[int, Ratios]:
    """Time the single network and the variants at every batch size, over the single network's time."""
    one_exit = FissionNetwork(single, [ExitPath([], nn.Identity())], [], [])
    deployed_single = nn.Sequential(deploy(one_exit, images[:2], joined=False), _MeanOfExits())
    exits = deploy_exits(network, images[:2])
    ratios = {}
    for size, count in IMAGES_PER_ROUND.items():
        batch = images[:size]
        modules = [deployed_single, *(variant.deployed(network, exits, rule, batch) for variant in variants)]
        ratios[size] = _round_ratios([_Reader(module, size) for module in modules], images, count)
    return ratios


def _by_network(ratios: dict[int, Ratios]) -> list[dict[int, Quartiles]]:
    """Return the quartiles by batch size, for each network."""
    by_size = [[Quartiles.from_values(values) for values in networks] for networks in ratios.values()]
    return [dict(zip(ratios, quartiles, strict=True)) for quartiles in zip(*by_size, strict=True)]


def _round_ratios(readers: Sequence[nn.Module], images: Tensor, count: int) -> Ratios:
    """Time each reader over the first one in every round; each round has other images."""
    generator = torch.Generator().manual_seed(0)
    networks = {str(number): reader for number, reader in enumerate(readers)}
    rounds: list[list[float]] = []
    start = time.perf_counter()
    while len(rounds) < 1 + MIN_ROUNDS or (
        len(rounds) < 1 + MAX_ROUNDS and time.perf_counter() - start < SECONDS
    ):
        drawn = torch.randint(len(images), (count,), generator=generator)
        seconds = inference_times(networks, images[drawn.to(images.device)], rounds=1, warm_up=0)
        rounds.append([duration / seconds["0"][0] for (duration,) in seconds.values()])
    return list(zip(*rounds[1:], strict=True))  # the first round is for warm-up


class _Reader(nn.Module):
    """Classifies images in batches of one size, and reads each answer before the next batch."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network = network
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.network(batch).argmax(dim=1).cpu() for batch in images.split(self.size)])


def _target(max_accuracy_drop: float | None, max_cost: float | None) -> str:
    return f"drop ≤ {max_accuracy_drop:g} points" if max_cost is None else f"cost ≤ {max_cost:g}×"


def _cells(point: Point) -> list[str]:
    """Return the cells of the table's row."""
    accuracy = drop = exits_used = ""
    if point.accuracy is not None:
        accuracy = percent(point.accuracy)
    if point.accuracy_drop is not None and point.accuracy_drop_error is not None:
        drop = f"{100 * point.accuracy_drop:.2f} ± {100 * point.accuracy_drop_error:.2f}"
    if point.exits_used is not None:
        exits_used = f"{point.exits_used:.2f}"
    costs = [f"{point.macs:.3f}×", f"{point.effective_macs:.3f}×"]
    times = [f"{t.median:.2f}× ({t.lower:.2f}–{t.upper:.2f})" for t in point.times.values()]
    name = f"{point.name} ({_EXCEEDED})" if point.exceeds else point.name
    return [name, accuracy, drop, exits_used, *costs, *times]
