"""Thresholds of a cascade, chosen on labelled examples for a target of accuracy or of cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor

from netfission.ensemble import fit_temperature
from netfission.inference.cascade import Rule, step_by_step

_GRID = 2**16  # combinations tried before each threshold is refined
_ROUNDING = 1e-9  # allowed on sums of costs and of points, which are floats


@dataclass(frozen=True)
class CascadeChoice:
    """Thresholds chosen on labelled logits, and what the cascade was worth there.

    Attributes:
        thresholds: one for each exit but the last, in the order the exits run.
        accuracy: share of the examples that the cascade got right, in [0, 1].
        expected_accuracy: the share that the probabilities of all exits' ensemble expect it to get right.
        cost: mean over the examples, in the unit of the costs given.
    """

    thresholds: tuple[float, ...]
    accuracy: float
    expected_accuracy: float
    cost: float


def choose_thresholds(
    logits: Tensor,
    labels: Tensor,
    costs: Sequence[float],
    *,
    order: Sequence[int] | None = None,
    rule: Rule = "margin",
    max_accuracy_drop: float | None = None,
    max_cost: float | None = None,
) -> CascadeChoice:
    """Choose a cascade's thresholds on labelled examples, for accuracy or for cost.

    A search that only counted right answers would find the thresholds at which the few examples that
    change their class happen to fall well, and lose more than asked for on any others. So it also goes
    by the *expected* accuracy: an answer is right with the probability that the ensemble of all exits
    gives it, after temperature scaling on these examples (Guo et al. 2017, arXiv 1706.04599).

    Tried are all combinations of a grid over the steps, at quantiles of the confidence there; then each
    threshold in turn is moved to the best of all values that part the examples differently, until none
    moves. Deterministic. Choose on examples that neither training nor the final test looks at.

    Args:
        logits: `(n, exits, classes)`, finite, exit 0 first.
        labels: `(n,)`, int64.
        costs: what each exit adds to those before it, positive, in the order they run and in any unit,
            such as `ExitCosts.dense` over the single network's.
        order: every exit once, in the order they run; default as numbered.
        rule: see `cascade_confidence`.
        max_accuracy_drop: minimise the cost, and lose at most this many percentage points of accuracy
            relative to the ensemble of all exits, both as counted and as expected.
        max_cost: be as accurate as can be expected, at a mean cost of at most this, in the unit of `costs`.

    Returns:
        The thresholds, with their accuracy and cost on these examples.

    Raises:
        ValueError: not exactly one of `max_accuracy_drop` and `max_cost` is given, an argument is invalid,
            or no thresholds cost so little; the message gives the least possible cost.
    """
    means, scores = step_by_step(logits.cpu(), order, rule)
    labels = labels.cpu()
    if not len(means) or not means.isfinite().all():
        raise ValueError(f"logits of {len(means)} examples: takes finite numbers, of at least one example")
    if labels.shape != (len(means),):
        raise ValueError(f"labels of shape {tuple(labels.shape)}: takes ({len(means)},), one an example")
    classes = means.shape[2]
    if labels.is_floating_point() or not all(0 <= label < classes for label in labels.aminmax()):
        raise ValueError(
            f"labels from {labels.min().item()} to {labels.max().item()} ({labels.dtype}): takes whole "
            f"numbers from 0 to {classes - 1}, as the logits are of {classes} classes"
        )
    _check_target(costs, means.shape[1], max_accuracy_drop, max_cost)
    search = _Search.from_means(means, labels, scores, costs, max_accuracy_drop, max_cost)
    by_step = scores.unbind(dim=1)
    grid = int(_GRID ** (1 / max(len(by_step), 1)))
    best = search.best([_between(of_step, grid) for of_step in by_step])
    while True:
        start = best
        for step, of_step in enumerate(by_step):
            candidates = [of_step.new_tensor([threshold]) for threshold in best.thresholds]
            candidates[step] = torch.cat([candidates[step], _between(of_step, len(of_step))]).unique()
            best = search.best(candidates)
        if (best.expected_accuracy, best.cost) == (start.expected_accuracy, start.cost):
            return best


@dataclass(frozen=True)
class _Search:
    """Finds the best of many combinations of thresholds at once.

    Attributes:
        scores: `(n, exits - 1)`, confidence after each step but the last.
        right: `(n, exits)`, float64, 1 where the ensemble is right after a step, else 0.
        expected: `(n, exits)`, float64, how probable that is.
        costs: what each step adds.
        max_accuracy_drop: see `choose_thresholds`.
        max_cost: see there.
    """

    scores: Tensor
    right: Tensor
    expected: Tensor
    costs: Sequence[float]
    max_accuracy_drop: float | None
    max_cost: float | None

    @classmethod
    def from_means(
        cls,
        means: Tensor,
        labels: Tensor,
        scores: Tensor,
        costs: Sequence[float],
        max_accuracy_drop: float | None,
        max_cost: float | None,
    ) -> Self:
        """From the mean logits after each step, `(n, exits, classes)`."""
        classes = means.argmax(dim=2)
        probabilities = (means[:, -1] / fit_temperature(means[:, -1], labels)).softmax(dim=1)
        # Multiples of 2^-20, whose sums are exact, so that equals are found equal.
        expected = (probabilities.gather(1, classes).double() * 2**20).round() / 2**20
        return cls(
            scores, (classes == labels.unsqueeze(1)).double(), expected, costs, max_accuracy_drop, max_cost
        )

    def best(self, candidates: Sequence[Tensor]) -> CascadeChoice:
        """The best combination for the target; of each step the candidates in ascending order."""
        n = len(self.scores)
        right, expected, cost = self._sum_up(candidates)
        if self.max_accuracy_drop is not None:
            lost = torch.maximum(self.right[:, -1].sum() - right, self.expected[:, -1].sum() - expected)
            allowed, worse = lost <= self.max_accuracy_drop / 100 * n + _ROUNDING, cost
        else:
            assert self.max_cost is not None
            allowed, worse = cost <= self.max_cost + _ROUNDING, -expected
        # Of equals the first: its thresholds are the lowest, so that it costs the least.
        place = int(worse.masked_fill(~allowed, torch.inf).argmin())
        indices = torch.unravel_index(torch.tensor(place), cost.shape)
        return CascadeChoice(
            tuple(values[index].item() for values, index in zip(candidates, indices, strict=True)),
            right.flatten()[place].item() / n,
            expected.flatten()[place].item() / n,
            cost.flatten()[place].item(),
        )

    def _sum_up(self, candidates: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers right and expected to be right, and mean cost, each with a dimension a step."""
        n = len(self.scores)
        right, expected = self.right[:, 0].sum(), self.expected[:, 0].sum()
        cost = torch.tensor(self.costs[0], dtype=torch.float64)
        cell, shape = torch.zeros(n, dtype=torch.int64), []
        for step, values in enumerate(candidates):
            # An example goes on under the candidates from its score upwards.
            below = torch.searchsorted(values, self.scores[:, step].contiguous())
            shape.append(len(values) + 1)
            cell = cell * shape[-1] + below
            steps = slice(step, step + 2)
            right = right.unsqueeze(-1) + _reaching(cell, self.right[:, steps].diff(), shape)
            expected = expected.unsqueeze(-1) + _reaching(cell, self.expected[:, steps].diff(), shape)
            share = _reaching(cell, torch.full((n, 1), 1.0, dtype=torch.float64), shape) / n
            cost = cost.unsqueeze(-1) + self.costs[step + 1] * share
        return right, expected, cost


def _reaching(cell: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum the weights of the examples that go on at every step so far, for each combination."""
    table = torch.zeros(prod(shape), dtype=weight.dtype)
    table = table.index_add(0, cell, weight.squeeze(1)).reshape(*shape)
    for dim, size in enumerate(shape):
        table = table.cumsum(dim).narrow(dim, 0, size - 1)
    return table


def _between(scores: Tensor, most: int) -> Tensor:
    """0, 1 and at most so many values between neighbouring scores, evenly spaced by rank; ascending."""
    ranked = scores.sort().values
    upper = torch.linspace(1, len(ranked) - 1, min(most, len(ranked) - 1)).long()
    middles = ranked[upper - 1].lerp(ranked[upper], 0.5)
    candidates: Tensor = torch.cat([scores.new_tensor([0.0, 1.0]), middles]).unique()
    return candidates


def _check_target(
    costs: Sequence[float], exits: int, max_accuracy_drop: float | None, max_cost: float | None
) -> None:
    if not isinstance(costs, Sequence) or len(costs) != exits or not all(cost > 0 for cost in costs):
        raise ValueError(f"costs={costs!r}: takes {exits} positive numbers, one an exit")
    if (max_accuracy_drop is None) == (max_cost is None):
        raise ValueError(f"max_accuracy_drop={max_accuracy_drop}, max_cost={max_cost}: takes one of the two")
    if max_accuracy_drop is not None and not 0 <= max_accuracy_drop <= 100:
        raise ValueError(f"max_accuracy_drop={max_accuracy_drop}: takes points of accuracy, from 0 to 100")
    if max_cost is not None and not max_cost >= costs[0]:
        raise ValueError(f"max_cost={max_cost}: takes at least {costs[0]:.4g}, what the first exit costs")
