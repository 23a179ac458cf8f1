"""How sure a change of measures between two networks on the same images is, by the bootstrap."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000  # the standard error from them varies by about 2 %
_VALUES = 2**20  # weights that are held at once

# How often each image is in each set, float64 `(sets, n)` → measure → its value in each set, `(sets,)`
Resampled = Callable[[Tensor], dict[str, Tensor]]


def resampled_errors(single: Resampled, ensemble: Resampled, n: int) -> dict[str, float]:
    """Return the standard errors of the changes of measures between two networks on the same images.

    They are the standard deviations of the changes in 1,000 sets of as many images, drawn with replacement
    and the same for both networks (the bootstrap, Efron & Tibshirani 1993, chapter 6). Of a measure that is a
    mean over images, this is the standard deviation of the images' differences over the square root of their
    number, up to about 2 %. Images are taken to be independent of each other.

    Args:
        single: measures of the single network.
        ensemble: measures of the ensemble.
        n: number of images.

    Returns:
        Measure → standard error; without the measures that are not defined in two sets or more.

    Example:
        >>> def mean_of(values: Tensor) -> Resampled:
        ...     return lambda weights: {"mae": weights @ values / weights.sum(dim=1)}
        >>> before, after = torch.zeros(400).double(), torch.tensor([1.0, 3.0] * 200).double()
        >>> errors = resampled_errors(mean_of(before), mean_of(after), 400)  # 1 / sqrt(400)
        >>> round(errors["mae"], 3)
        0.05
    """
    generator = np.random.default_rng(0)
    parts: dict[str, list[Tensor]] = {}
    at_once = max(1, min(RESAMPLES, _VALUES // n))
    for start in range(0, RESAMPLES, at_once):
        sets = min(at_once, RESAMPLES - start)
        drawn = (generator.integers(n, size=n) for _ in range(sets))
        weights = torch.tensor(np.stack([np.bincount(rows, minlength=n) for rows in drawn])).double()
        before, after = single(weights), ensemble(weights)
        for name in before.keys() & after.keys():
            parts.setdefault(name, []).append(after[name] - before[name])
    changes = {name: torch.cat(parts[name]) for name in sorted(parts)}
    defined = {name: change[change.isfinite()] for name, change in changes.items()}
    return {name: change.std().item() for name, change in defined.items() if len(change) > 1}
