"""What `netfission.evaluation.cascade` needs to know of exits, if images do not have one class each."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from netfission.evaluation.cascade import Outcome
from netfission.evaluation.evaluate import run_batches
from netfission.inference.cascade import Cascade, ExitCosts, StoppingRule, exit_costs
from netfission.inference.thresholds import CascadeChoice
from netfission.inference.tiles import TileCascade, tile_costs
from netfission.inference.unit_thresholds import UnitCounts, UnitSearch
from netfission.network import FissionNetwork

_RESAMPLES = 200  # of the images, for a standard error

Batches = Iterable[tuple[Tensor, Tensor]]


class ScoredRule(StoppingRule, Protocol):
    """What is asked of a task here, see `netfission.tasks.early_exit.EarlyExit`."""

    measure: str

    def counts(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return counts that add up over images."""

    def expected_counts(self, output: Tensor, full: Tensor, targets: Tensor) -> Tensor:
        """Return those that an ensemble expects."""

    def score(self, sums: Tensor) -> Tensor:
        """Return the measure by sums of counts."""


class Tiling:
    """Parts of images that stop by themselves.

    Args:
        tile: height and width in pixels, which divide those of the images.
        halo: pixels that later exits see around a tile.

    Example:
        >>> Tiling(tile=2, halo=0).cut(torch.arange(8).view(1, 2, 4)).tolist()
        [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    """

    def __init__(self, tile: int, halo: int) -> None:
        self.tile = tile
        self.halo = halo

    def cut(self, maps: Tensor) -> Tensor:
        """Cut maps `(batch, …, height, width)` into tiles `(batch · tiles, …, tile, tile)`, row by row."""
        rows, columns = maps.shape[-2] // self.tile, maps.shape[-1] // self.tile
        parts: Tensor = maps.unflatten(-1, (columns, self.tile)).unflatten(-3, (rows, self.tile))
        tiles: Tensor = parts.movedim(-4, 1).movedim(-2, 2).flatten(0, 2)
        return tiles


class _Counting:
    """Counts what each exit, all exits and each step of a cascade answer, batch by batch."""

    def __init__(
        self, network: FissionNetwork, rule: ScoredRule, order: Sequence[int], tiling: Tiling | None
    ):
        self.network, self.rule, self.order, self.tiling = network, rule, order, tiling
        self.weights = network.exit_weights
        self.cascade = None
        if tiling is not None:
            self.cascade = TileCascade(
                network, (1.0,) * (len(order) - 1), tile=tiling.tile, halo=tiling.halo, order=order, rule=rule
            )
        self.images = 0
        self.columns: list[list[Tensor]] = [[] for _ in range(6)]
        self.of_exits: list[Tensor] = []

    def add(self, images: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch of images, the outputs of all exits, and their targets."""
        rule, weights = self.rule, self.weights
        targets = targets.to(outputs.device)
        full = rule.combined(outputs, weights)
        steps = self._steps(images, outputs)
        exits = [rule.counts(output, targets) for output in outputs.unbind(dim=1)]
        parts = [part if self.tiling is None else self.tiling.cut(part) for part in (*steps, full, targets)]
        *steps, full, targets = parts
        of_image = torch.arange(self.images, self.images + len(images)).repeat_interleave(
            len(full) // len(images)
        )
        found = (
            torch.stack([rule.confidence(output) for output in steps[:-1]] or [full.new_zeros(len(full))], 1),
            torch.stack([rule.counts(output, targets) for output in steps], dim=1),
            torch.stack([rule.expected_counts(output, full, targets) for output in steps], dim=1),
            rule.counts(full, targets),
            rule.expected_counts(full, full, targets),
            of_image,
        )
        for column, values in zip(self.columns, found, strict=True):
            column.append(values.cpu())
        self.of_exits.append(torch.stack(exits, dim=1).cpu())
        self.images += len(images)

    def _steps(self, images: Tensor, outputs: Tensor) -> list[Tensor]:
        """Return the cascade's outputs after each step, of images none of which stops."""
        if self.cascade is not None:
            return self.cascade.all_steps(images)
        order, weights = list(self.order), self.weights
        return [
            self.rule.combined(
                outputs[:, order[: step + 1]],
                None if weights is None else [weights[number] for number in order[: step + 1]],
            )
            for step in range(len(order))
        ]

    def result(self) -> tuple[UnitCounts, Tensor]:
        """Return the counts of all units, and those of each exit alone, `(images, exits, counts)`."""
        return UnitCounts(*(torch.cat(column) for column in self.columns)), torch.cat(self.of_exits)


class TargetAnswers:
    """Counts of the answers on validation and test images, see `netfission.evaluation.cascade.Answers`.

    Args:
        network: in eval mode.
        rule: of its task.
        validation: batches of normalised images and targets, on any device.
        test: the same.
        image: a batch of one, on the network's device.
        tiling: the parts that stop by themselves; default whole images.

    Raises:
        ValueError: see `netfission.inference.tiles.TileCascade`.
    """

    delta: float | None = None

    def __init__(
        self,
        network: FissionNetwork,
        rule: ScoredRule,
        validation: Batches,
        test: Batches,
        image: Tensor,
        tiling: Tiling | None = None,
    ) -> None:
        self._rule, self._tiling = rule, tiling
        self._weights = network.exit_weights
        self.rule, self.measure = rule.name, rule.measure
        self.tile: int | None = None if tiling is None else tiling.tile
        self.halo = 0 if tiling is None else tiling.halo
        self.costs: ExitCosts = exit_costs(network, image)
        order = self.costs.order
        if tiling is not None:
            self.costs = tile_costs(network, image, tile=tiling.tile, halo=tiling.halo, order=order)
        (self._validation, _), (self._test, self._exits) = (
            _count(network, batches, _Counting(network, rule, order, tiling), image.device)
            for batches in (validation, test)
        )
        self.validation_accuracy = rule.score(self._validation.full.sum(dim=0)).item()
        self.validation_images, self.test_images = (
            int(units.images.max()) + 1 for units in (self._validation, self._test)
        )
        self._full = self._test.of_images(self._test.full)
        self._search: UnitSearch | None = None

    def choose(
        self, relative: Sequence[float], max_accuracy_drop: float | None, max_cost: float | None
    ) -> CascadeChoice:
        """Choose thresholds by the counts of the validation images."""
        if self._search is None or self._search.costs != list(relative):
            self._search = UnitSearch(self._validation, self._rule.score, list(relative))
        return self._search.choose(max_accuracy_drop=max_accuracy_drop, max_cost=max_cost)

    keep = choose

    def ensemble(self) -> Outcome:
        """Measure all exits together on the test images."""
        return self._outcome(self._full, torch.full_like(self._test.images, self._exits.shape[1]))

    def exit(self, number: int) -> Outcome:
        """Measure an exit alone."""
        return self._outcome(self._exits[:, number], torch.ones_like(self._test.images))

    def cascade(self, thresholds: tuple[float, ...]) -> Outcome:
        """Measure a cascade."""
        steps = self._test.stop(thresholds)
        return self._outcome(self._test.of_images(self._test.at(steps)), steps + 1)

    def _outcome(self, counts: Tensor, exits_used: Tensor) -> Outcome:
        """Measure by the counts of each image; the error is that of resampled images (Efron 1979)."""
        score = self._rule.score
        drop = score(self._full.sum(dim=0)) - score(counts.sum(dim=0))
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(counts), (_RESAMPLES, len(counts)), generator=generator)
        times = torch.zeros(_RESAMPLES, len(counts), dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))
        drops = score(times @ self._full) - score(times @ counts)
        return Outcome(
            score(counts.sum(dim=0)).item(), drop.item(), drops.std(correction=0).item(), exits_used
        )

    def combining(self) -> nn.Module:
        """Return the module that makes the ensemble's output of the outputs of all exits."""
        return _Combined(partial(self._rule.combined, weights=self._weights))

    def stopping(
        self, network: FissionNetwork, thresholds: tuple[float, ...], order: tuple[int, ...]
    ) -> nn.Module:
        """Return a cascade as a module; an exit alone runs on whole images."""
        if self._tiling is None or not any(thresholds):
            return Cascade(network, thresholds, order=order, rule=self._rule)
        tile, halo = self._tiling.tile, self._tiling.halo
        return TileCascade(network, thresholds, tile=tile, halo=halo, order=order, rule=self._rule)


@dataclass(frozen=True)
class ImageChoice:
    """Thresholds for whole images, chosen by a loss.

    Attributes:
        order: of the exits, cheapest first.
        thresholds: one per exit but the last.
        images: number of images that they are chosen on.
    """

    order: tuple[int, ...]
    thresholds: tuple[float, ...]
    images: int


def choose_for_images(
    network: FissionNetwork, rule: ScoredRule, validation: Batches, image: Tensor, max_accuracy_drop: float
) -> ImageChoice:
    """Choose the thresholds of least cost for a loss, of whole images, on validation images.

    Args:
        network: in eval mode.
        rule: of its task.
        validation: batches of normalised images and targets.
        image: a batch of one, on the network's device.
        max_accuracy_drop: accepted loss in points of the rule's measure.

    Raises:
        ValueError: no thresholds keep it.
    """
    costs = exit_costs(network, image)
    units, _ = _count(network, validation, _Counting(network, rule, costs.order, None), image.device)
    search = UnitSearch(units, rule.score, [float(cost) for cost in costs.dense])
    choice = search.choose(max_accuracy_drop=max_accuracy_drop)
    return ImageChoice(costs.order, choice.thresholds, len(units.images))


def _count(
    network: FissionNetwork, batches: Batches, counting: _Counting, device: torch.device
) -> tuple[UnitCounts, Tensor]:
    def pairs() -> Iterable[tuple[Tensor, Tensor]]:
        for images, targets in batches:
            held.append(images.to(device))
            yield held[-1], targets

    def take(outputs: Tensor, targets: Tensor) -> None:
        counting.add(held.pop(), outputs, targets)

    held: list[Tensor] = []
    run_batches(network, pairs(), take, device)
    return counting.result()


class _Combined(nn.Module):
    def __init__(self, combined: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.combined = combined

    def forward(self, outputs: Tensor) -> Tensor:
        return self.combined(outputs)
