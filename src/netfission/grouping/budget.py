"""Divide stages so that a whole network costs what a budget says."""

import warnings
from collections.abc import Callable
from math import ceil
from typing import TypeVar

from netfission.grouping.widths import TOLERANCE
from netfission.utils.errors import invalid

T = TypeVar("T")

_LEAST = 1e-6  # cost of divided stages at which all widths are the smallest
_STEPS = 5


def meet_budget(
    budget: float,
    divide: Callable[[float], T],
    measure: Callable[[T], float],
    *,
    divided: float,
    copied: float,
    where: str,
) -> T:
    """Divide the stages of a model so that the result costs its budget, within `TOLERANCE`.

    The stem, the stages that all exits share and the heads cost what they do, so the divided stages cost the
    rest. What their widths do not tell, such as the products of attention, is corrected for by measurement.

    Args:
        budget: what the result may cost, relative to the model.
        divide: what the paths of a divided stage cost over the stage → the result.
        measure: the result → its cost relative to the model.
        divided: share of the model's cost that is in stages that are divided, in (0, 1].
        copied: cost relative to the model if every path has a whole copy of these stages.
        where: where the exits leave, for messages.

    Raises:
        ValueError: the narrowest paths cost more, or whole copies cost less.

    Warns:
        UserWarning: the result costs less than the budget by more than `TOLERANCE`.

    Example:
        >>> def divide(cost: float) -> float:
        ...     return 0.4 + 0.6 * cost
        >>> meet_budget(0.7, divide, lambda result: result, divided=0.6, copied=2.2, where="after layer2")
        0.7
        >>> meet_budget(0.3, divide, lambda result: result, divided=0.6, copied=2.2, where="after layer2")
        Traceback (most recent call last):
        ValueError: budget must be at least 0.41 if exits leave after layer2, got 0.3; let them leave earlier
    """
    if budget > copied * (1 + TOLERANCE):
        expected = f"at most {copied:.2f} if exits leave {where}, what whole copies cost"
        raise invalid("budget", expected, budget)
    cost = 1 + (budget - 1) / divided
    within: tuple[float, T] | None = None  # the most expensive result within the budget, and its cost
    for _ in range(_STEPS):
        cost = max(cost, _LEAST)
        result = divide(cost)
        reached = measure(result)
        if reached <= budget * (1 + TOLERANCE) and (within is None or reached > within[0]):
            within = reached, result
        if abs(reached / budget - 1) <= TOLERANCE or (cost == _LEAST and reached > budget):
            break
        cost += (budget - reached) / divided
    if within is not None:
        if within[0] < budget * (1 - TOLERANCE):
            warnings.warn(
                f"the network costs {within[0]:.2f} times the model, less than its budget of {budget:g}: "
                "widths come in steps",
                stacklevel=4,
            )
        return within[1]
    expected = f"at least {ceil(100 * reached) / 100:.2f} if exits leave {where}"
    raise invalid("budget", expected, budget, hint="let them leave earlier")
