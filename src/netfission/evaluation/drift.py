"""Whether a batch of images comes from the distribution of the calibration images: a test of drift."""

import math

import torch
from torch import Tensor

from netfission.utils.errors import describe, invalid


def drift_p_value(scores: Tensor, calibration: Tensor) -> float:
    """Return the exact p-value of the two-sample Kolmogorov–Smirnov test between two sets of scores.

    If the images of both are drawn independently from one distribution, it is at most α with a probability of
    at most α, for any α and any numbers of images. It is not if images depend on each other, as those of a
    video do. Each test holds by itself: of many, a share of α falls below α without a drift.

    The statistic D is the largest difference of the two empirical distribution functions. All orders of the
    m + n scores are equally likely, and each is a path of steps; those that nowhere reach D are counted row
    by row (Hodges 1958). With equal scores the p-value is too large, never too small.

    Args:
        scores: `(m,)`, floating point, of the batch, see `netfission.evaluation.p_values.Detector.scores`.
        calibration: `(n,)`, floating point, of the images of the calibration.

    Returns:
        The p-value, in [0, 1], to about nine decimals.

    Raises:
        ValueError: one of the two is empty, has another shape, or holds NaN.

    Example:
        >>> round(drift_p_value(torch.tensor([7.0, 8.0, 9.0]), torch.tensor([1.0, 2.0, 3.0])), 6)
        0.1
    """
    for name, values in (("scores", scores), ("calibration", calibration)):
        if values.ndim != 1 or not len(values) or not values.is_floating_point():
            raise invalid(name, "floats of shape (n,) with n of at least 1", found=describe(values))
        if values.isnan().any():
            raise invalid(name, "numbers", found=f"{int(values.isnan().sum())} NaN values")
    m, n = len(scores), len(calibration)
    together = torch.cat([scores.double(), calibration.double()])
    below, other_below = (
        torch.searchsorted(values.double().sort().values, together, right=True)
        for values in (scores, calibration)
    )
    statistic = int((below * n - other_below * m).abs().max())  # D, times m n
    if statistic == 0:
        return 1.0
    return max(0.0, 1 - math.exp(_log_share_within(m, n, statistic)))


def _log_share_within(m: int, n: int, statistic: int) -> float:
    """Return the logarithm of the share of paths from (0, 0) to (m, n) on which |i n − j m| < D m n."""
    paths = torch.zeros(n + 1, dtype=torch.float64)  # to (i, j), for the current i
    paths[0] = 1
    log_scale = 0.0
    for i in range(m + 1):
        first = max(0, (i * n - statistic) // m + 1)
        last = min(n, -((-i * n - statistic) // m) - 1)
        if first > last:
            return -math.inf
        paths[:first] = 0
        paths[last + 1 :] = 0
        paths[first : last + 1] = paths[first : last + 1].cumsum(0)
        largest = paths[last].item()
        if largest == 0:
            return -math.inf
        paths /= largest
        log_scale += math.log(largest)
    every_path = math.lgamma(m + n + 1) - math.lgamma(m + 1) - math.lgamma(n + 1)
    return min(0.0, math.log(paths[n].item()) + log_scale - every_path) if paths[n] > 0 else -math.inf
