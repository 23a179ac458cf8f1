"""Whether a batch of images comes from the distribution of the calibration images: a test of drift."""

import torch
from torch import Tensor

from netfission.utils.errors import describe, invalid


def drift_p_value(scores: Tensor, calibration: Tensor) -> float:
    """Return the exact p-value of the two-sample Kolmogorov–Smirnov test between two sets of scores.

    If the images of both are drawn independently from one distribution, it is at most α with a probability of
    at most α, for any α and any numbers of images. It is not if images depend on each other, as those of a
    video do. The probability is over the draw of both, the batch and the calibration images. Of many batches
    that are compared with one calibration, a share of α falls below α on average over calibrations, and
    nearly so for each one only if the batch is much smaller. For a batch of their number or more, the share
    can be many times α: the test then finds how the calibration images differ, by chance, from all others.

    The statistic D is the largest difference of the two empirical distribution functions. All orders of the
    m + n scores are equally likely, and each is a path of steps; the p-value is the share of paths that reach
    D (Hodges 1958). With equal scores it is too large, never too small.

    Args:
        scores: `(m,)`, floating point, of the batch, see `netfission.evaluation.p_values.Detector.scores`.
        calibration: `(n,)`, floating point, of the images of the calibration.

    Returns:
        The p-value, in [0, 1], to about nine significant digits.

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
    return _share_outside(m, n, statistic)


def _share_outside(m: int, n: int, statistic: int) -> float:
    """Return the share of paths from (0, 0) to (m, n) on which |i n − j m| ≥ D m n somewhere.

    A random one is drawn step by step, as from an urn. What leaves the band for the first time is summed, so
    that nothing is subtracted, and a small share has as many digits as a large one.
    """
    if m > n:
        m, n = n, m
    i = torch.arange(m + 1, dtype=torch.float64)
    share = torch.zeros(m + 1, dtype=torch.float64)  # of paths in the band until now, at (i, k − i)
    share[0] = 1
    outside = 0.0
    for k in range(m + n):
        share /= m + n - k
        to_next_i = share * (m - i)
        share *= n - k + i
        share[1:] += to_next_i[:-1]
        first = max(0, ((k + 1) * m - statistic) // (m + n) + 1)  # of the band at i + j = k + 1
        last = ((k + 1) * m + statistic - 1) // (m + n)
        for left in (share[:first], share[last + 1 :]):
            if len(left):
                outside += left.sum().item()
                left.zero_()
    return min(1.0, outside)
