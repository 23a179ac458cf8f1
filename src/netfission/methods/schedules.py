"""Learning-rate schedules: share of the training done, in [0, 1) → factor on the peak rate."""

from collections.abc import Callable
from math import cos, pi

Schedule = Callable[[float], float]


def paper(progress: float) -> float:
    """The paper's: the full rate for half of the training, then linear to 1 % at 90 %, then held.

    Network Fission Ensembles (arXiv 2408.02301), section 4: 0.1 down to 0.001.
    """
    done = min(max((progress - 0.5) / 0.4, 0.0), 1.0)
    return 1.0 - 0.99 * done


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts)."""
    return 0.5 * (1 + cos(pi * progress))


def one_cycle(progress: float) -> float:
    """Linear warm-up from 4 % over 30 % of the training, then half a cosine to 0 (Smith & Topin 2018)."""
    if progress < 0.3:
        return 0.04 + 0.96 * progress / 0.3
    return cosine((progress - 0.3) / 0.7)


SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "one_cycle": one_cycle, "paper": paper}
