"""Learning-rate schedules: share of the training done, in [0, 1) → factor on the peak rate."""

from collections.abc import Callable
from math import cos, pi

Schedule = Callable[[float], float]


def paper(progress: float) -> float:
    """Hold the peak rate for half of the training, then fall linearly to 1 % of it at 90 %, and hold that.

    Source: Network Fission Ensembles (arXiv 2408.02301), section 4: from 0.1 down to 0.001.

    Example:
        >>> [round(paper(progress), 3) for progress in (0.0, 0.5, 0.7, 0.9)]
        [1.0, 1.0, 0.505, 0.01]
    """
    done = min(max((progress - 0.5) / 0.4, 0.0), 1.0)
    return 1.0 - 0.99 * done


def cosine(progress: float) -> float:
    """Fall from 1 to 0 along half a cosine.

    Source: Loshchilov & Hutter 2017 (arXiv 1608.03983), without restarts.

    Example:
        >>> round(cosine(0.5), 3)
        0.5
    """
    return 0.5 * (1 + cos(pi * progress))


def one_cycle(progress: float) -> float:
    """Warm up linearly from 4 % over 30 % of the training, then fall to 0 along half a cosine.

    Source: Smith & Topin 2018 (arXiv 1708.07120).

    Example:
        >>> [round(one_cycle(progress), 3) for progress in (0.0, 0.3, 0.65)]
        [0.04, 1.0, 0.5]
    """
    if progress < 0.3:
        return 0.04 + 0.96 * progress / 0.3
    return cosine((progress - 0.3) / 0.7)


def repeated(schedule: Schedule, times: int) -> Schedule:
    """Return a schedule that runs through another one so many times, in equal parts of the training.

    Example:
        >>> twice = repeated(cosine, 2)
        >>> [round(twice(progress), 3) for progress in (0.0, 0.25, 0.5)]
        [1.0, 0.5, 1.0]
    """
    return lambda progress: schedule(progress * times % 1.0)


def warmed_up(schedule: Schedule, share: float) -> Schedule:
    """Return a schedule that starts with a linear rise from 1 % to 100 % of the peak rate.

    Args:
        schedule: what follows the rise, as a whole.
        share: of the training, in [0, 1); 0 returns the schedule itself.

    Example:
        >>> warm = warmed_up(cosine, 0.2)
        >>> [round(warm(progress), 3) for progress in (0.0, 0.1, 0.2, 0.6)]
        [0.01, 0.505, 1.0, 0.5]
    """
    if share == 0:
        return schedule

    def warming(progress: float) -> float:
        if progress < share:
            return 0.01 + 0.99 * progress / share
        return schedule((progress - share) / (1 - share))

    return warming


SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "one_cycle": one_cycle, "paper": paper}
