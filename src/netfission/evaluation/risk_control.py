"""A threshold of confidence above which answers are wrong at most as often as stated: learn then test.

Thresholds are tested one after another, the strictest first, until one fails. Each test asks whether so few
errors would be seen if the error were as large as accepted, by the binomial distribution. As the order is
fixed before the errors are seen, a threshold of too much risk passes only if the first of them does, which
has a probability of at most δ (Angelopoulos et al. 2021, arXiv 2110.01052, fixed-sequence testing).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from netfission.utils.errors import check_share, invalid

NO_THRESHOLD = 2.0  # above every probability
_MOST_THRESHOLDS = 50
_ROUNDING = 1e-12  # relative; (1 − r)ⁿ may be δ itself


def binomial_tail(errors: int, n: int, risk: float) -> float:
    """Return the probability of at most so many errors among n answers, each wrong with probability r.

    It is at most δ exactly if r is at least the Clopper–Pearson upper bound of the error at confidence 1 − δ.

    Args:
        errors: number of errors, from 0 to n.
        n: number of answers.
        risk: r, in (0, 1).

    Example:
        >>> round(binomial_tail(0, 45, 0.05), 4), round(binomial_tail(1, 2, 0.5), 4)
        (0.0994, 0.75)
    """
    k = torch.arange(errors + 1, dtype=torch.float64)
    of_n = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return min(1.0, (of_n + k * math.log(risk) + (n - k) * math.log1p(-risk)).exp().sum().item())


def answers_for_risk(risk: float, delta: float) -> int:
    """Return the smallest number of answers, none of them wrong, that allows a risk: ⌈log δ / log(1 − r)⌉.

    Args:
        risk: highest share of wrong answers r, in (0, 1).
        delta: probability δ that the bound does not hold, in (0, 1).

    Raises:
        ValueError: one of the two is outside (0, 1).

    Example:
        >>> answers_for_risk(0.05, 0.1)
        45
    """
    if not 0 < risk < 1:
        raise invalid("risk", "a share of wrong answers above 0 and below 1 to have a bound", risk)
    check_share("delta", delta)
    return math.ceil(math.log(delta) / math.log1p(-risk) * (1 - _ROUNDING))


def thresholds_to_test(confidence: Tensor, n: int, first: int) -> list[float]:
    """Return the sequence of thresholds to test, from the strictest down to 0, which answers every image.

    The first one answers about `first` of the n images, and each further one about as many more. If there are
    no more than `first`, only 0 is tested: a stricter one would answer too few to pass.

    Args:
        confidence: `(m,)`, floating point, of images that are used for nothing else in the test.
        n: number of images to test on.
        first: number of images that the strictest threshold should answer.

    Example:
        >>> confidence = torch.linspace(0, 1, 101)
        >>> thresholds = thresholds_to_test(confidence, n=400, first=100)
        >>> len(thresholds), thresholds[0], thresholds[-1]
        (50, 0.75, 0.0)
    """
    if first >= n:
        return [0.0]
    shares = torch.linspace(first / n, 1, _MOST_THRESHOLDS, dtype=torch.float64)
    thresholds = torch.quantile(confidence.double(), 1 - shares).tolist()
    return sorted({*thresholds[:-1], 0.0}, reverse=True)


def passing_threshold(
    confidence: Tensor, correct: Tensor, thresholds: Sequence[float], risk: float, delta: float
) -> float:
    """Return the last threshold of a sequence that passes its test, as do all before it.

    Args:
        confidence: `(n,)`, floating point.
        correct: `(n,)`, bool.
        thresholds: falling; fixed without a look at these images.
        risk: highest share of wrong answers r, in (0, 1).
        delta: probability δ that more of the answers are wrong, in (0, 1).

    Returns:
        The threshold; 2, above every probability, if the first one fails.

    Example:
        >>> confidence = torch.linspace(0, 1, 200)
        >>> passing_threshold(confidence, confidence > 0.5, [0.8, 0.6, 0.5, 0.2, 0.0], risk=0.1, delta=0.1)
        0.5
    """
    passed = NO_THRESHOLD
    for threshold in thresholds:
        answered = confidence >= threshold
        errors = int((answered & ~correct).sum())
        if binomial_tail(errors, int(answered.sum()), risk) > delta * (1 + _ROUNDING):
            break
        passed = threshold
    return passed
