"""Choose the thresholds of a cascade on labelled examples, for a target of accuracy or of cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor

from netfission.ensemble import fit_temperature
from netfission.inference.cascade import Rule, step_by_step
from netfission.utils.errors import describe, invalid

_GRID = 2**16  # combinations tried before each threshold is refined
ROUNDING = 1e-9  # allowed on sums of costs and of points, which are floats


@dataclass(frozen=True)
class CascadeChoice:
    """Thresholds chosen on labelled logits, with the cascade's accuracy and cost there.

    Attributes:
        thresholds: one per exit but the last, in the order the exits run.
        accuracy: share of the examples that the cascade classifies correctly, in [0, 1].
        expected_accuracy: the share expected by the probabilities of the ensemble of all exits.
        cost: mean over the examples, in the unit of the costs given.

    Example:
        >>> logits = torch.tensor([[[4.0, 0.0], [4.0, 0.0]], [[1.0, 0.0], [0.0, 4.0]]])
        >>> choose_thresholds(logits, torch.tensor([0, 1]), [1.0, 1.0], max_cost=1.0).thresholds
        (0.0,)
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
    weights: Sequence[float] | None = None,
    max_accuracy_drop: float | None = None,
    max_cost: float | None = None,
) -> CascadeChoice:
    """Choose a cascade's thresholds on labelled examples, for accuracy or for cost.

    A search that only counted correct answers would overfit to the few examples whose class changes, and
    lose more accuracy than allowed on others. So it also uses the *expected* accuracy: an answer is correct
    with the probability that the ensemble of all exits gives it. The probabilities are calibrated by
    temperature scaling on these examples (Guo et al. 2017, arXiv 1706.04599).

    The search first tries all combinations of a grid over the steps, at quantiles of the confidence there.
    Then it moves one threshold after another to the best of all values that separate the examples
    differently, until none moves. It is deterministic. Choose on examples that are used neither for training
    nor for the final test.

    Args:
        logits: `(n, exits, classes)`, finite, exit 0 first.
        labels: `(n,)`, int64.
        costs: the cost that each exit adds, positive, in the order they run and in any unit, such as
            `ExitCosts.dense` over the single network's MACs.
        order: every exit once, in the order they run; default exit 0 first, then by number.
        rule: see `cascade_confidence`.
        weights: of the exits in the mean of logits, exit 0 first; default equal weights.
        max_accuracy_drop: minimise the cost, with at most this many percentage points less accuracy than the
            ensemble of all exits, both as counted and as expected.
        max_cost: maximise the expected accuracy, at a mean cost of at most this, in the unit of `costs`.

    Returns:
        The thresholds, with their accuracy and cost on these examples.

    Raises:
        ValueError: not exactly one of `max_accuracy_drop` and `max_cost` is given, an argument is invalid,
            or no thresholds cost so little; the message gives the lowest possible cost.

    Example:
        >>> logits = torch.tensor([[[4.0, 0.0], [4.0, 0.0]], [[1.0, 0.0], [0.0, 4.0]]])
        >>> choice = choose_thresholds(logits, torch.tensor([0, 1]), [1.0, 1.0], max_accuracy_drop=0)
        >>> choice.accuracy, choice.cost  # the first example stops after exit 0
        (1.0, 1.5)
    """
    means, scores = step_by_step(logits.cpu(), order, rule, weights)
    labels = labels.cpu()
    check_examples(means, labels)
    check_target(costs, means.shape[1], max_accuracy_drop, max_cost)
    search = _Search.from_means(means, labels, scores, costs, max_accuracy_drop, max_cost)
    step_scores = scores.unbind(dim=1)
    grid = int(_GRID ** (1 / max(len(step_scores), 1)))
    best = search.best([threshold_candidates(values, grid) for values in step_scores])
    while True:
        start = best
        for step, values in enumerate(step_scores):
            candidates = [values.new_tensor([threshold]) for threshold in best.thresholds]
            candidates[step] = torch.cat(
                [candidates[step], threshold_candidates(values, len(values))]
            ).unique()
            best = search.best(candidates)
        if (best.expected_accuracy, best.cost) == (start.expected_accuracy, start.cost):
            return best


def check_examples(means: Tensor, labels: Tensor) -> None:
    """Check labelled examples by the mean logits after each step, `(n, exits, classes)`.

    Raises:
        ValueError: there are none, a logit is not finite, or the labels have another shape or range.
    """
    if not len(means) or not means.isfinite().all():
        found = f"{int((~means.isfinite()).any(dim=(1, 2)).sum())} of {len(means)} with NaN or infinity"
        raise invalid("logits", "finite, of at least one example", found=found if len(means) else "none")
    if labels.shape != (len(means),) or labels.is_floating_point():
        raise invalid("labels", f"integers of shape ({len(means)},), as logits", found=describe(labels))
    classes = means.shape[2]
    if not all(0 <= label < classes for label in labels.aminmax()):
        raise invalid(
            "labels",
            f"from 0 to {classes - 1}, as logits have {classes} classes",
            found=f"{labels.min().item()} to {labels.max().item()}",
        )


@dataclass(frozen=True)
class _Search:
    """Finds the best of many combinations of thresholds at once.

    Attributes:
        scores: `(n, exits - 1)`, confidence after each step but the last.
        correct: `(n, exits)`, float64, 1 if the ensemble is correct after a step, else 0.
        expected: `(n, exits)`, float64, the probability of that.
        costs: the cost that each step adds.
        max_accuracy_drop: see `choose_thresholds`.
        max_cost: see there.
    """

    scores: Tensor
    correct: Tensor
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
        """Make it from the mean logits after each step, `(n, exits, classes)`."""
        classes = means.argmax(dim=2)
        probabilities = (means[:, -1] / fit_temperature(means[:, -1:], labels)).softmax(dim=1)
        # Multiples of 2^-20, whose sums are exact, so that equal sums compare equal.
        expected = (probabilities.gather(1, classes).double() * 2**20).round() / 2**20
        correct = (classes == labels.unsqueeze(1)).double()
        return cls(scores, correct, expected, costs, max_accuracy_drop, max_cost)

    def best(self, candidates: Sequence[Tensor]) -> CascadeChoice:
        """Find the best combination for the target.

        Args:
            candidates: per step, thresholds in ascending order.
        """
        n = len(self.scores)
        correct, expected, cost = self._sum_up(candidates)
        if self.max_accuracy_drop is not None:
            drop = torch.maximum(self.correct[:, -1].sum() - correct, self.expected[:, -1].sum() - expected)
            allowed, objective = drop <= self.max_accuracy_drop / 100 * n + ROUNDING, cost
        else:
            assert self.max_cost is not None
            allowed, objective = cost <= self.max_cost + ROUNDING, -expected
        # Of equal ones the first: its thresholds are the lowest, so it costs the least.
        best = int(objective.masked_fill(~allowed, torch.inf).argmin())
        indices = torch.unravel_index(torch.tensor(best), cost.shape)
        return CascadeChoice(
            tuple(values[index].item() for values, index in zip(candidates, indices, strict=True)),
            correct.flatten()[best].item() / n,
            expected.flatten()[best].item() / n,
            cost.flatten()[best].item(),
        )

    def _sum_up(self, candidates: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return counts of correct and expected correct examples, and mean cost; one dimension per step."""
        n = len(self.scores)
        correct, expected = self.correct[:, 0].sum(), self.expected[:, 0].sum()
        cost = torch.tensor(self.costs[0], dtype=torch.float64)
        cell, shape = torch.zeros(n, dtype=torch.int64), []
        for step, values in enumerate(candidates):
            # An example continues at the candidates from its score upwards.
            below = torch.searchsorted(values, self.scores[:, step].contiguous())
            shape.append(len(values) + 1)
            cell = cell * shape[-1] + below
            steps = slice(step, step + 2)
            correct = correct.unsqueeze(-1) + _reaching(cell, self.correct[:, steps].diff(), shape)
            expected = expected.unsqueeze(-1) + _reaching(cell, self.expected[:, steps].diff(), shape)
            share = _reaching(cell, torch.full((n, 1), 1.0, dtype=torch.float64), shape) / n
            cost = cost.unsqueeze(-1) + self.costs[step + 1] * share
        return correct, expected, cost


def _reaching(cell: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum the weights of the examples that continue at every step so far, for each combination."""
    table = torch.zeros(prod(shape), dtype=weight.dtype)
    table = table.index_add(0, cell, weight.squeeze(1)).reshape(*shape)
    for dim, size in enumerate(shape):
        table = table.cumsum(dim).narrow(dim, 0, size - 1)
    return table


def threshold_candidates(scores: Tensor, limit: int) -> Tensor:
    """Return 0, 1 and at most `limit` values between neighbouring scores, evenly spaced by rank.

    Example:
        >>> threshold_candidates(torch.tensor([0.2, 0.4, 0.8]), limit=2)
        tensor([0.0000, 0.3000, 0.6000, 1.0000])
    """
    ranked = scores.sort().values
    upper = torch.linspace(1, len(ranked) - 1, min(limit, len(ranked) - 1)).long()
    midpoints = ranked[upper - 1].lerp(ranked[upper], 0.5)
    candidates: Tensor = torch.cat([scores.new_tensor([0.0, 1.0]), midpoints]).unique()
    return candidates


def check_target(
    costs: Sequence[float], exits: int, max_accuracy_drop: float | None, max_cost: float | None
) -> None:
    """Raise a `ValueError` unless there are positive costs, and one target that they can meet."""
    if not isinstance(costs, Sequence) or len(costs) != exits or not all(cost > 0 for cost in costs):
        raise invalid("costs", f"{exits} positive numbers, one per exit", costs)
    if max_accuracy_drop is not None and max_cost is not None:
        raise invalid("max_cost", "None if max_accuracy_drop is given", max_cost)
    if max_cost is None and (max_accuracy_drop is None or not 0 <= max_accuracy_drop <= 100):
        expected = "from 0 to 100 percentage points, unless max_cost is given"
        raise invalid("max_accuracy_drop", expected, max_accuracy_drop)
    if max_cost is not None and not max_cost >= costs[0]:
        raise invalid("max_cost", f"at least {costs[0]:.4g}, the cost of the first exit", max_cost)
