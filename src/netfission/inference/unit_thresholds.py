"""Choose the thresholds of a cascade by counts that add up, if answers are not one class per image."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from netfission.inference.thresholds import ROUNDING, CascadeChoice, check_target, threshold_candidates
from netfission.utils.errors import invalid

_COMBINATIONS = 2**10  # of thresholds that are tried


@dataclass(frozen=True)
class UnitCounts:
    """What the answers of a cascade amount to in each unit that stops by itself: an image, or a tile of it.

    Counts are such that the score of a set of images follows from their sum over units: of a mean absolute
    error the sum of the errors and their number, of a mean IoU the pixels in intersection and union.

    Attributes:
        confidence: `(units, exits - 1)`, after each step but the last.
        counted: `(units, exits, counts)`, float64, after each step, by the targets.
        expected: the same by what the ensemble of all exits gives for probable, in place of the targets.
        full: `(units, counts)`, of the ensemble of all exits, by the targets. Those of the last step unless
            a unit is a tile, whose pixels later exits see without the rest of the image.
        full_expected: the same as expected.
        images: `(units,)`, int64, the number of the image of each unit.

    Example:
        >>> ones = torch.ones(4, 2, 1, dtype=torch.float64)
        >>> units = UnitCounts(torch.ones(4, 1), ones, ones, ones[:, 1], ones[:, 1], torch.arange(4) // 2)
        >>> units.stop((0.0,)), units.units_per_image
        (tensor([0, 0, 0, 0]), 2.0)
    """

    confidence: Tensor
    counted: Tensor
    expected: Tensor
    full: Tensor
    full_expected: Tensor
    images: Tensor

    @property
    def units_per_image(self) -> float:
        """The mean number of units of an image."""
        return len(self.images) / (int(self.images.max()) + 1)

    def stop(self, thresholds: tuple[float, ...]) -> Tensor:
        """Return the step after which each unit stops, from 0, `(units,)` int64."""
        continues = self.confidence <= self.confidence.new_tensor(thresholds)
        return continues.long().cumprod(dim=1).sum(dim=1)

    def at(self, steps: Tensor, *, expected: bool = False) -> Tensor:
        """Return the counts of each unit after a step, `(units, counts)`.

        Args:
            steps: `(units,)`, int64, from 0.
            expected: those without targets.
        """
        counts = self.expected if expected else self.counted
        return counts[torch.arange(len(steps)), steps]

    def of_images(self, counts: Tensor) -> Tensor:
        """Return the sums of units' counts `(units, counts)` per image, `(images, counts)`."""
        sums = counts.new_zeros(int(self.images.max()) + 1, counts.shape[1])
        return sums.index_add(0, self.images, counts)


class UnitSearch:
    """Chooses thresholds by the counts of units, for targets of score or of cost.

    It tries a thousand combinations of thresholds at most, or two per step if there are more than ten, at
    quantiles of the confidence after each step. As in `netfission.inference.choose_thresholds`, a bound on
    the loss must hold both as counted by the targets and as expected by the ensemble of all exits: else it
    would be fitted to the few images that happen to
    gain. The probabilities are those of the ensemble as trained.

    Args:
        units: of images that are used neither for training nor for the final test.
        score: sums of counts `(…, counts)` → scores `(…)`, higher if better, a share of 1.
        costs: what each step adds to the cost of an image if all its units run it, positive, in any unit.

    Example:
        >>> counted = torch.tensor([[[0.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]]).double()
        >>> units = UnitCounts(torch.tensor([[0.2], [0.8]]), counted, counted, counted[:, 1], counted[:, 1],
        ...                    torch.arange(2))
        >>> search = UnitSearch(units, lambda sums: sums[..., 0] / sums[..., 1], [1.0, 1.0])
        >>> search.choose(max_accuracy_drop=0.0)  # the first image runs both exits
        CascadeChoice(thresholds=(0.5,), accuracy=1.0, expected_accuracy=1.0, cost=1.5)
    """

    def __init__(self, units: UnitCounts, score: Callable[[Tensor], Tensor], costs: list[float]) -> None:
        self.units = units
        self.score = score
        self.costs = costs

    @cached_property
    def _combinations(self) -> list[tuple[float, ...]]:
        steps = self.units.confidence.unbind(dim=1)
        each = int(_COMBINATIONS ** (1 / max(len(steps), 1)))  # 0 and 1 among them
        candidates = [threshold_candidates(step, max(each - 2, 0)) for step in steps]
        grid = torch.cartesian_prod(*candidates).reshape(-1, len(steps)) if steps else torch.zeros(1, 0)
        return [tuple(thresholds) for thresholds in grid.tolist()]

    @cached_property
    def _tried(self) -> tuple[Tensor, Tensor, Tensor]:
        """Score as counted, as expected, and mean cost of each combination, float64."""
        total = torch.tensor(self.costs, dtype=torch.float64).cumsum(0)
        sums, expected, costs = [], [], []
        for thresholds in self._combinations:
            steps = self.units.stop(thresholds)
            sums.append(self.units.at(steps).sum(dim=0))
            expected.append(self.units.at(steps, expected=True).sum(dim=0))
            costs.append(total[steps].mean())
        return self.score(torch.stack(sums)), self.score(torch.stack(expected)), torch.stack(costs)

    def choose(
        self, *, max_accuracy_drop: float | None = None, max_cost: float | None = None
    ) -> CascadeChoice:
        """Choose the thresholds of least cost for a loss, or of the highest expected score for a cost.

        Args:
            max_accuracy_drop: accepted loss of score against the ensemble of all exits, in points of 0.01.
            max_cost: highest mean cost per image.

        Returns:
            The thresholds, with score, expected score and cost on these images.

        Raises:
            ValueError: not exactly one of the two is given, or no thresholds meet it.
        """
        check_target(self.costs, len(self.costs), max_accuracy_drop, max_cost)
        counted, expected, cost = self._tried
        if max_accuracy_drop is not None:
            full, full_expected = (
                self.score(counts.sum(dim=0)) for counts in (self.units.full, self.units.full_expected)
            )
            drop = torch.maximum(full - counted, full_expected - expected)
            allowed, objective = drop <= max_accuracy_drop / 100 + ROUNDING, cost
            if not allowed.any():
                least = f"at least {100 * drop.min().item():.3g} points, the least of any thresholds"
                raise invalid("max_accuracy_drop", least, max_accuracy_drop)
        else:
            assert max_cost is not None
            allowed, objective = cost <= max_cost + ROUNDING, -expected
        best = int(objective.masked_fill(~allowed, torch.inf).argmin())
        return CascadeChoice(
            self._combinations[best], counted[best].item(), expected[best].item(), cost[best].item()
        )
