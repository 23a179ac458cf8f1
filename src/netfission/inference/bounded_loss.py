"""Thresholds of a cascade that lose at most a stated accuracy on new images, with a stated probability.

A part of the examples proposes cascades, from the most expensive to the cheapest. They are tested in this
order on the other examples until one fails, and the last that passes is chosen. As the order is fixed before
the test, a cascade that loses more passes only if the first such one does (fixed-sequence testing,
Angelopoulos et al. 2021, arXiv 2110.01052; for early exits Jazbec et al. 2024, arXiv 2405.20915).
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from netfission.inference.cascade import Rule, cascade_logits, step_by_step
from netfission.inference.thresholds import CascadeChoice, check_examples, choose_thresholds
from netfission.utils.errors import check_share, invalid

_PROPOSING = 3  # one of so many examples proposes, and the others test
_PROPOSALS = 24
_LARGEST_STAKE = 0.75  # of the capital, for a loss of 1


def loses_at_most(losses: Tensor, bound: float, delta: float) -> bool:
    """Return whether losses show that their mean is at most `bound`, by a test that errs with probability δ.

    The test bets on it (Waudby-Smith & Ramdas 2024, arXiv 2010.09686): a capital of 1 grows with each loss
    that is below the bound, and shrinks with each that is above. If the mean is above it, no stakes make the
    capital grow on average, and it ever reaches 1/δ with a probability of at most δ (Ville's inequality). The
    stake on a loss depends on those before it.

    Args:
        losses: `(n,)`, each at most 1, of independent examples in an order drawn at random.
        bound: from 0 to 1.
        delta: δ, in (0, 1).

    Example:
        >>> loses_at_most(torch.zeros(400), 0.01, 0.1), loses_at_most(torch.zeros(200), 0.01, 0.1)
        (True, False)
    """
    losses = losses.double()
    number = torch.arange(1, len(losses) + 1, dtype=torch.float64)
    before, squares = (values.cumsum(0) - values for values in (losses, losses.square()))
    gain = bound - before / (number - 1).clamp(min=1)
    # The mean of squares begins at the bound, as of losses of 0 and 1 whose mean it is.
    stakes = (gain / ((bound + squares) / number + gain.square())).clamp(0, _LARGEST_STAKE)
    capital = torch.log1p(stakes * (bound - losses)).cumsum(0)
    return bool((capital >= -math.log(delta)).any())


def images_for_loss(bound: float, delta: float) -> int:
    """Return how many examples must be tested, none of which loses, to show that the loss is within a bound.

    Example:
        >>> images_for_loss(0.01, 0.1)
        309
    """
    return math.ceil(-math.log(delta) / math.log1p(_LARGEST_STAKE * bound))


def bounded_thresholds(
    logits: Tensor,
    labels: Tensor,
    costs: Sequence[float],
    *,
    max_accuracy_drop: float,
    delta: float,
    order: Sequence[int] | None = None,
    rule: Rule = "margin",
    weights: Sequence[float] | None = None,
) -> CascadeChoice:
    """Choose a cascade of low cost whose accuracy on new images is bounded with probability 1 − δ.

    Of all choices of the examples, at most a share of δ gives a cascade whose accuracy on new images of the
    same kind is lower than that of all exits by more than `max_accuracy_drop`. A third of the examples
    proposes cascades by `choose_thresholds`, the others test them.

    Args:
        logits: `(n, exits, classes)`, finite, exit 0 first, of independent examples that are used for nothing
            else.
        labels: `(n,)`, int64.
        costs: the cost that each exit adds, see `choose_thresholds`.
        max_accuracy_drop: in percentage points, above 0 and below 100.
        delta: δ, in (0, 1).
        order: every exit once, in the order they run; default exit 0 first, then by number.
        rule: see `cascade_confidence`.
        weights: of the exits in the mean of logits, exit 0 first; default equal weights.

    Returns:
        The thresholds, with their accuracy, as counted and also as expected, and cost on all examples. If no
        cascade passes, all thresholds are 1, so that every exit runs for every image and nothing is lost.

    Raises:
        ValueError: an argument is not valid, or there are too few examples for this bound even if none of
            them loses; the message says how many may be enough.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0]]).repeat(600, 1, 1)
        >>> labels = torch.zeros(600, dtype=torch.int64)
        >>> choice = bounded_thresholds(logits, labels, [0.5, 0.5], max_accuracy_drop=1, delta=0.1)
        >>> choice.thresholds, choice.cost  # exit 0 always agrees with the ensemble
        ((0.0,), 0.5)
    """
    check_share("delta", delta)
    if not 0 < max_accuracy_drop < 100:
        raise invalid(
            "max_accuracy_drop", "above 0 and below 100 percentage points with delta", max_accuracy_drop
        )
    logits, labels = logits.cpu(), labels.cpu()
    means, _ = step_by_step(logits, order, rule, weights)
    check_examples(means, labels)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    proposing, testing = shuffled.tensor_split([len(shuffled) // _PROPOSING])
    _check_enough(len(labels), len(testing), max_accuracy_drop, delta)
    propose = partial(
        choose_thresholds,
        logits[proposing],
        labels[proposing],
        costs,
        order=order,
        rule=rule,
        weights=weights,
    )
    total = torch.tensor(costs, dtype=torch.float64).cumsum(0)
    full = (means[:, -1].argmax(dim=1) == labels).double()
    thresholds, correct, cost = (1.0,) * (len(costs) - 1), full, total[-1]
    for limit in torch.linspace(total[-1].item(), costs[0], _PROPOSALS, dtype=torch.float64).tolist():
        proposed = propose(max_cost=limit).thresholds
        output = cascade_logits(logits, proposed, order=order, rule=rule, weights=weights)
        still_correct = (output.logits.argmax(dim=1) == labels).double()
        if not loses_at_most((full - still_correct)[testing], max_accuracy_drop / 100, delta):
            break
        thresholds, correct, cost = proposed, still_correct, total[output.exits_used - 1].mean()
    accuracy = correct.mean().item()
    return CascadeChoice(thresholds, accuracy, accuracy, cost.item())


def _check_enough(images: int, testing: int, max_accuracy_drop: float, delta: float) -> None:
    needed = images_for_loss(max_accuracy_drop / 100, delta)
    if testing < needed:
        least = 100 * math.expm1(-math.log(delta) / testing) / _LARGEST_STAKE
        possible = f"at least {math.ceil(100 * least) / 100:.2f} points" if least < 100 else "left out"
        raise invalid(
            "max_accuracy_drop",
            f"{possible} with {images:,} images and delta={delta:g}",
            max_accuracy_drop,
            hint=f"{math.ceil(needed * _PROPOSING / (_PROPOSING - 1)):,} images may be enough",
        )
