"""Divide stages so that a whole network costs what a budget says, in multiply-accumulates or in time."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import TypeVar

from netfission.grouping.widths import TOLERANCE
from netfission.profiling.timing import Quartiles
from netfission.utils.errors import invalid

T = TypeVar("T")

_LEAST = 1e-6  # cost of divided stages at which all widths are the smallest
_STEPS = 5  # divisions at most, as each takes long

_TRIES = 8  # measurements of time at most
_AIM = 0.985  # share of the budget in time that is aimed at
_CLOSE = 0.97  # share of it that is close enough
_UPPER = 1.02  # what the upper quartile may be over the budget
_STEP = 0.004  # relative difference of multiply-accumulates that is too small to be tried
_BUSY = 0.1  # spread of times over their median, above which a device is busy


class UnmetBudgetError(ValueError):
    """The paths cannot be as narrow or as wide as a budget asks.

    Attributes:
        nearest: the budget nearest to it that can be met.

    Example:
        >>> UnmetBudgetError("budget must be at least 0.41", 0.41).nearest
        0.41
    """

    def __init__(self, message: str, nearest: float) -> None:
        super().__init__(message)
        self.nearest = nearest


def _unmet(budget: float, expected: str, nearest: float, hint: str = "") -> UnmetBudgetError:
    return UnmetBudgetError(str(invalid("budget", expected, budget, hint=hint)), nearest)


def meet_budget(
    budget: float,
    divide: Callable[[float], T],
    measure: Callable[[T], float],
    *,
    divided: float,
    copied: float,
    where: str,
    hint: str = "",
) -> T:
    """Divide the stages of a model so that the result costs its budget, within `TOLERANCE`.

    They are divided five times at most. The stem, the stages that all exits share and the heads cost what
    they do, so the divided stages cost the rest. What their widths do not tell, such as the products of
    attention, is corrected for by measurement.

    Args:
        budget: what the result may cost, relative to the model.
        divide: what the paths of a divided stage cost over the stage → the result.
        measure: the result → its cost relative to the model.
        divided: share of the model's cost that is in stages that are divided, in (0, 1].
        copied: cost relative to the model if every path has a whole copy of these stages.
        where: where the exits leave, for messages.
        hint: what to do if the narrowest paths cost more, for the message.

    Raises:
        UnmetBudgetError: the narrowest paths cost more, or whole copies cost less.

    Warns:
        UserWarning: the result costs less than the budget by more than `TOLERANCE`.

    Example:
        >>> def divide(cost: float) -> float:
        ...     return 0.4 + 0.6 * cost
        >>> about = {"divided": 0.6, "copied": 2.2, "where": "after layer2"}
        >>> meet_budget(0.7, divide, lambda result: result, **about)
        0.7
        >>> meet_budget(0.3, divide, lambda result: result, **about)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        netfission.grouping.budget.UnmetBudgetError: budget must be at least 0.41 if exits leave...
    """
    if budget > copied * (1 + TOLERANCE):
        expected = f"at most {copied:.2f} if exits leave {where}, what whole copies cost"
        raise _unmet(budget, expected, copied)
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
    least = ceil(100 * reached) / 100
    raise _unmet(budget, f"at least {least:.2f} if exits leave {where}", least, hint)


def meet_time(
    budget: float,
    divide: Callable[[float], T],
    reached: Callable[[T], float],
    measure: Callable[[T], Quartiles],
    *,
    where: str,
    budget_in: str = "time",
) -> "TimedBudget":
    """Find the multiply-accumulates at which a network takes the time of its budget.

    Time grows with the multiply-accumulates, but not in proportion: narrow layers use a device less well,
    and starting a layer takes time, too. So it is measured, at most `_TRIES` times and once more for the
    narrowest paths, and the next widths follow from the line through the measurements on both sides of the
    budget. The most expensive network within the budget is chosen: its median is within it, and its upper
    quartile exceeds it by at most 2 %.

    Args:
        budget: the time, relative to the model's.
        divide: multiply-accumulates relative to the model's → the result, the same again for the same number.
        reached: the result → its multiply-accumulates relative to the model's.
        measure: the result → its time relative to the model's.
        where: the branch points, for messages.
        budget_in: what is timed: `"time"` of inference, or `"training"`.

    Raises:
        UnmetBudgetError: the narrowest paths take longer, or whole copies take less.

    Warns:
        UserWarning: the times vary much, as on a busy device.

    Example:
        >>> def measure(macs: float) -> Quartiles:
        ...     return Quartiles(0.2 + 0.89 * macs, 0.2 + 0.9 * macs, 0.2 + 0.91 * macs)
        >>> found = meet_time(1.0, lambda macs: macs, lambda macs: macs, measure, where="after layer2")
        >>> round(found.macs, 2), round(found.time.median, 2)
        (0.87, 0.99)
        >>> meet_time(0.1, lambda macs: macs, lambda macs: macs, measure, where="after b")
        ... # doctest: +ELLIPSIS
        Traceback (most recent call last):
        netfission.grouping.budget.UnmetBudgetError: budget must be at least 0.21 in time with exits...
    """
    measured: list[TimedBudget] = []  # from narrow to wide
    asked: float | None = budget
    widest = False
    while asked is not None:
        try:
            tried = divide(asked)
        except UnmetBudgetError as error:
            widest = widest or error.nearest < asked
            asked = error.nearest
            tried = divide(asked)
        if any(asked == one.asked for one in measured):  # the narrowest or widest paths, again
            break
        measured.append(TimedBudget(asked, reached(tried), measure(tried), budget_in))
        del tried  # a network may be large
        measured.sort(key=lambda one: one.macs)
        asked = _next(budget, measured)
    within = [one for one in measured if one.pace <= budget]
    least, most = min(one.pace for one in measured), max(one.pace for one in measured)
    if not within:
        expected = f"at least {ceil(100 * least) / 100:.2f} in {budget_in} with exits {where}"
        raise _unmet(budget, expected, least, hint="try other branch points")
    if widest and most < budget * _CLOSE:
        expected = (
            f"at most {floor(100 * most) / 100:.2f} in {budget_in} with exits {where}, what whole copies take"
        )
        raise _unmet(budget, expected, most)
    _report_spread(within[-1].time)
    return within[-1]


@dataclass(frozen=True)
class TimedBudget:
    """What the time of a network is with a budget in multiply-accumulates.

    Attributes:
        asked: the budget.
        macs: multiply-accumulates of the network over the model's, which widths come near to in steps.
        time: over the model's.
        budget_in: what was timed: `"time"` of inference, or `"training"`.

    Example:
        >>> TimedBudget(0.9, 0.89, Quartiles(0.97, 0.98, 1.02)).pace
        1.0
    """

    asked: float
    macs: float
    time: Quartiles
    budget_in: str = "time"

    @property
    def run(self) -> str:
        """What was timed, in words.

        Example:
            >>> TimedBudget(0.9, 0.89, Quartiles(0.97, 0.98, 1.02), "training").run
            'a training step'
        """
        return "a training step" if self.budget_in == "training" else "deployed"

    @property
    def pace(self) -> float:
        """What must be within the budget; on a device so busy that its times vary much, the median alone."""
        if _spread(self.time) > _BUSY:
            return self.time.median
        return max(self.time.median, self.time.upper / _UPPER)


def _next(budget: float, measured: Sequence[TimedBudget]) -> float | None:
    """Return the multiply-accumulates to try next; None if what was measured decides.

    They follow from the line through the two results next to the aim, or through 0 and the only one. Before a
    budget is refused, the narrowest paths are tried.
    """
    if any(budget * _CLOSE <= one.pace <= budget for one in measured):
        return None
    aim = budget * _AIM
    above = sum(one.pace <= aim for one in measured)
    low, high = (measured[min(max(above + side, 0), len(measured) - 1)] for side in (-1, 0))
    if low is high and len(measured) > 1:  # all are above the aim, or all below
        low, high = (measured[0], measured[1]) if above == 0 else (measured[-2], measured[-1])
    apart = high.macs - low.macs
    slope = high.pace / high.macs if low is high else (high.pace - low.pace) / apart if apart else 0.0
    macs = max(_LEAST, high.macs + (aim - high.pace) / slope) if slope > 0 else high.macs
    # Widths come in steps, so that the line may lead to those that are known.
    other = (low.macs + high.macs) / 2 if low.pace <= aim < high.pace else 0.9 * low.macs
    for tried in (macs, other):
        known = any(abs(tried / near - 1) < _STEP for one in measured for near in (one.macs, one.asked))
        if not known and len(measured) < _TRIES:
            return tried
    return None if measured[0].pace <= budget else _LEAST


def _spread(time: Quartiles) -> float:
    return (time.upper - time.lower) / time.median


def _report_spread(time: Quartiles) -> None:
    if _spread(time) > _BUSY:
        warnings.warn(
            f"the times vary by {_spread(time):.0%} between the quartiles, as on a device that does other "
            "work: the budget in time may be missed, so measure on an idle one",
            stacklevel=4,
        )
