"""A cascade's accuracy and cost, beside single exits, the full ensemble and the single network.

If images do not have one class each, another measure takes the place of accuracy.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, sqrt
from typing import Literal, NamedTuple, Protocol

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
        measure: what every `accuracy` here is, a share of 1: another measure if images do not have one class.
        tile: height and width of the parts of an image, in pixels, that stop each by themselves; None if
            whole images do.
        halo: pixels that later exits see around a tile.
    """

    rule: str
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
    measure: str = "accuracy"
    tile: int | None = None
    halo: int = 0

    @property
    def unit(self) -> str:
        """What stops by itself: an image, or a tile of one."""
        return "image" if self.tile is None else "tile"

    @property
    def least_accuracy(self) -> float | None:
        """Accuracy of the full ensemble on the test images less the accepted drop; None without one."""
        full = next(point.accuracy for point in self.points if point.kind == "ensemble")
        if self.max_accuracy_drop is None or full is None:
            return None
        return full - self.max_accuracy_drop / 100

    @property
    def drawn_bound(self) -> float | None:
        """`least_accuracy`, if a figure that has it shows the points well; else None.

        It may lie below them by as much as they span, and by at least one percentage point.
        """
        known = [point.accuracy for point in self.points if point.accuracy is not None]
        bound = self.least_accuracy
        if bound is None or min(known) - bound > max(max(known) - min(known), 0.01):
            return None
        return bound

    def table(self) -> str:
        """Return the timed points as aligned plain text, followed by how they were measured."""
        head = ["", f"{self.measure} %", "drop, points", "exits", "MACs", "effective"]
        head += [f"time, batch {size}" for size in self.rounds]
        rows = [head, *(_cells(point) for point in self.points if point.times)]
        rounds = " and ".join(map(str, self.rounds.values()))
        order = ", ".join(map(str, self.order))
        stops = describe_stops(self.rule, self.choice.thresholds, self.unit)
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
                f"with {chosen} % {self.measure} there (full ensemble {full} %)",
                f"at {self.choice.cost:.3f}× the MACs.",
                *self._tiles(),
                *self._promise(),
                *([marked] if exceeded else []),
            ]
        )

    def _tiles(self) -> list[str]:
        """Return what later exits run on, a line, if not on whole images."""
        if self.tile is None:
            return []
        return [
            f"The first exit runs on whole images, later ones on tiles of {self.tile}×{self.tile} pixels and "
            f"{self.halo} around, which count in the MACs."
        ]

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
    answers = _ClassAnswers(network, validation, test, rule, images[:1], delta)
    return measure_cascade(
        network,
        single,
        answers,
        images,
        max_accuracy_drop=max_accuracy_drop,
        max_cost=max_cost,
        single_accuracy=single_accuracy,
    )


class Outcome(NamedTuple):
    """What one classifier gets right on the test images.

    Attributes:
        accuracy: the measure, a share of 1.
        drop: that of the full ensemble less this one.
        error: standard error of `drop`.
        exits_used: number of exits that each image, or each tile, ran, int64.
    """

    accuracy: float
    drop: float
    error: float
    exits_used: Tensor


class Answers(Protocol):
    """What is known of the answers of a network's exits, from which cascades are chosen and measured.

    Attributes:
        rule: name of the confidence.
        measure: see `CascadeEvaluation`.
        tile: see there.
        halo: see there.
        costs: of the exits in the order in which a cascade runs them, per image if nothing stops.
        delta: see `CascadeEvaluation`.
        validation_accuracy: of the full ensemble.
        validation_images: their number.
        test_images: their number.
    """

    rule: str
    measure: str
    tile: int | None
    halo: int
    costs: ExitCosts
    delta: float | None
    validation_accuracy: float
    validation_images: int
    test_images: int

    def choose(
        self, relative: Sequence[float], max_accuracy_drop: float | None, max_cost: float | None
    ) -> CascadeChoice:
        """Choose thresholds on the validation images, by costs relative to the single network."""

    def keep(
        self, relative: Sequence[float], max_accuracy_drop: float | None, max_cost: float | None
    ) -> CascadeChoice:
        """Choose those of the cascade itself, of which more may be promised than of others."""

    def ensemble(self) -> Outcome:
        """Measure all exits together on the test images."""

    def exit(self, number: int) -> Outcome:
        """Measure an exit alone."""

    def cascade(self, thresholds: tuple[float, ...]) -> Outcome:
        """Measure a cascade."""

    def combining(self) -> nn.Module:
        """Return the module that makes the ensemble's output of the outputs of all exits."""

    def stopping(
        self, network: FissionNetwork, thresholds: tuple[float, ...], order: tuple[int, ...]
    ) -> nn.Module:
        """Return a cascade as a module.

        Args:
            network: whose exits run, the deployed one.
            thresholds: of each step but the last; all of them 0 for an exit alone.
            order: of the exits.
        """


class _ClassAnswers:
    """Logits of one class per image, see `evaluate_cascade`."""

    measure = "accuracy"
    tile: int | None = None
    halo = 0

    def __init__(
        self,
        network: FissionNetwork,
        validation: Labelled,
        test: Labelled,
        rule: Rule,
        image: Tensor,
        delta: float | None,
    ) -> None:
        self.rule: str = rule
        self._rule: Rule = rule
        self.costs = exit_costs(network, image)
        self.delta = delta
        self._validation, self._test = validation, test
        self._weights = network.exit_weights
        self.validation_accuracy = _ensemble_correct(*validation, self._weights).mean().item()
        self.validation_images, self.test_images = len(validation[1]), len(test[1])

    def choose(
        self, relative: Sequence[float], max_accuracy_drop: float | None, max_cost: float | None
    ) -> CascadeChoice:
        return choose_thresholds(
            *self._validation,
            relative,
            order=self.costs.order,
            rule=self._rule,
            weights=self._weights,
            max_accuracy_drop=max_accuracy_drop,
            max_cost=max_cost,
        )

    def keep(
        self, relative: Sequence[float], max_accuracy_drop: float | None, max_cost: float | None
    ) -> CascadeChoice:
        if self.delta is None:
            return self.choose(relative, max_accuracy_drop, max_cost)
        if max_accuracy_drop is None:
            raise invalid("delta", "left out unless max_accuracy_drop is given", self.delta)
        return bounded_thresholds(
            *self._validation,
            relative,
            max_accuracy_drop=max_accuracy_drop,
            delta=self.delta,
            order=self.costs.order,
            rule=self._rule,
            weights=self._weights,
        )

    def ensemble(self) -> Outcome:
        return self.cascade((1.0,) * (len(self.costs.order) - 1))

    def exit(self, number: int) -> Outcome:
        order = alone_first(number, len(self.costs.order))
        return self._outcome((0.0,) * (len(order) - 1), order)

    def cascade(self, thresholds: tuple[float, ...]) -> Outcome:
        return self._outcome(thresholds, self.costs.order)

    def _outcome(self, thresholds: tuple[float, ...], order: tuple[int, ...]) -> Outcome:
        logits, labels = self._test
        output = cascade_logits(logits, thresholds, order=order, rule=self._rule, weights=self._weights)
        correct = (output.logits.argmax(dim=1) == labels).double()
        drop = _ensemble_correct(logits, labels, self._weights) - correct
        error = drop.std(correction=0).item() / sqrt(len(drop))
        return Outcome(correct.mean().item(), drop.mean().item(), error, output.exits_used)

    def combining(self) -> nn.Module:
        return _MeanOfExits(self._weights)

    def stopping(
        self, network: FissionNetwork, thresholds: tuple[float, ...], order: tuple[int, ...]
    ) -> nn.Module:
        return Cascade(network, thresholds, order=order, rule=self._rule)


def alone_first(number: int, exits: int) -> tuple[int, ...]:
    """Return the order of exits in which one comes first.

    Example:
        >>> alone_first(1, 3)
        (1, 0, 2)
    """
    return (number, *(other for other in range(exits) if other != number))


def measure_cascade(
    network: FissionNetwork,
    single: nn.Module,
    answers: Answers,
    images: Tensor,
    *,
    max_accuracy_drop: float | None = None,
    max_cost: float | None = None,
    single_accuracy: float | None = None,
    batches: Mapping[int, int] | None = None,
) -> CascadeEvaluation:
    """Choose thresholds, and measure and time the cascade and what it is compared with.

    Args:
        network: in eval mode.
        single: see `evaluate_cascade`.
        answers: of the exits on validation and test images.
        images: see `evaluate_cascade`.
        max_accuracy_drop: see there, of the measure of `answers`.
        max_cost: see there.
        single_accuracy: the measure of a trained single network on the test images.
        batches: batch size → images that are timed together; default `IMAGES_PER_ROUND`.

    Raises:
        ValueError: see `evaluate_cascade`.
    """
    image = images[:1]
    unit = count_macs(single, image)
    costs = answers.costs
    relative = [macs / unit.dense for macs in costs.dense]
    choice = answers.keep(relative, max_accuracy_drop, max_cost)
    variants = [
        *_fixed(network, image),
        _Variant(
            f"cascade, {_target(max_accuracy_drop, max_cost)}",
            "chosen",
            costs,
            choice.thresholds,
            max_accuracy_drop=max_accuracy_drop,
            max_cost=max_cost,
        ),
        *_curve(partial(answers.choose, relative, None), costs, relative),
    ]
    timed = [variant for variant in variants if variant.timed]
    ratios = _time_ratios(network, single, timed, answers, images, batches or IMAGES_PER_ROUND)
    single_times, *times = _by_network(ratios)
    times_of = dict(zip((variant.name for variant in timed), times, strict=True))
    points = [_point(variant, answers, unit, times_of.get(variant.name, {})) for variant in variants]
    return CascadeEvaluation(
        rule=answers.rule,
        order=costs.order,
        max_accuracy_drop=max_accuracy_drop,
        max_cost=max_cost,
        choice=choice,
        validation_accuracy=answers.validation_accuracy,
        validation_images=answers.validation_images,
        test_images=answers.test_images,
        rounds={size: len(by_network[0]) for size, by_network in ratios.items()},
        points=[Point("single network", "single", 1.0, 1.0, single_accuracy, times=single_times), *points],
        delta=answers.delta,
        measure=answers.measure,
        tile=answers.tile,
        halo=answers.halo,
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
        self, network: FissionNetwork, exits: FissionNetwork, answers: Answers, batch: Tensor
    ) -> nn.Module:
        """Return it as a module for such batches, made of the network or of its deployed exits."""
        if self.kind == "ensemble":
            return nn.Sequential(deploy(network, batch), answers.combining())
        return answers.stopping(exits, self.thresholds, self.costs.order)

    def outcome(self, answers: Answers) -> Outcome:
        """Measure it on the test images."""
        if self.kind == "ensemble":
            return answers.ensemble()
        return answers.exit(self.costs.order[0]) if self.kind == "exit" else answers.cascade(self.thresholds)


class _MeanOfExits(nn.Module):
    def __init__(self, weights: Weights = None) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, logits: Tensor) -> Tensor:
        return mean_logits(logits, self.weights)


def _fixed(network: FissionNetwork, image: Tensor) -> list[_Variant]:
    """Return the variants without chosen thresholds: the full ensemble, and each exit alone."""
    exits = range(network.exits)
    names = exit_names(len(exits), network.linear)
    variants = [
        _Variant("full ensemble", "ensemble", exit_costs(network, image), (1.0,) * len(exits[1:])),
    ]
    for number in exits:
        alone = exit_costs(network, image, alone_first(number, len(exits)))
        variants.append(_Variant(names[number], "exit", alone, (0.0,) * len(exits[1:])))
    return variants


def _curve(
    choose: Callable[..., CascadeChoice], costs: ExitCosts, relative: Sequence[float]
) -> list[_Variant]:
    """Return cascades from the cost of the first exit to that of all."""
    limits = torch.linspace(relative[0], sum(relative), CURVE_COSTS, dtype=torch.float64).tolist()
    limit_of: dict[tuple[float, ...], float] = {}
    for limit in limits:
        limit_of.setdefault(choose(limit).thresholds, limit)
    spacing = ceil(len(limit_of) / CURVE_TIMED)
    return [
        _Variant(
            f"cascade, cost ≤ {limit:.3f}×", "curve", costs, thresholds, index % spacing == 0, max_cost=limit
        )
        for index, (thresholds, limit) in enumerate(limit_of.items())
    ]


def _point(variant: _Variant, answers: Answers, unit: Macs, times: dict[int, Quartiles]) -> Point:
    outcome = variant.outcome(answers)
    macs = _mean_cost(variant.costs.dense, outcome.exits_used) / unit.dense
    bounds = ((macs, variant.max_cost), (100 * outcome.drop, variant.max_accuracy_drop))
    return Point(
        name=variant.name,
        kind=variant.kind,
        macs=macs,
        effective_macs=_mean_cost(variant.costs.effective, outcome.exits_used) / unit.effective,
        accuracy=outcome.accuracy,
        accuracy_drop=outcome.drop,
        accuracy_drop_error=outcome.error,
        exits_used=outcome.exits_used.double().mean().item(),
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
    network: FissionNetwork,
    single: nn.Module,
    variants: Sequence[_Variant],
    answers: Answers,
    images: Tensor,
    batches: Mapping[int, int],
) -> dict[int, Ratios]:
    """Time the single network and the variants at every batch size, over the single network's time."""
    one_exit = FissionNetwork(single, [ExitPath([], nn.Identity())], [], [])
    deployed_single = nn.Sequential(deploy(one_exit, images[:2], joined=False), _MeanOfExits())
    exits = deploy_exits(network, images[:2])
    ratios = {}
    for size, count in batches.items():
        batch = images[:size]
        modules = [
            deployed_single,
            *(variant.deployed(network, exits, answers, batch) for variant in variants),
        ]
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
