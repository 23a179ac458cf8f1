"""Prediction sets that contain the label with a stated probability: split conformal prediction.

A score says how unusual a class is for an image. The set of an image has the classes whose score is at most a
quantile of the scores of the labels of calibration images. If these and a new image are exchangeable, the set
contains the new image's label with at least the stated coverage, whatever the network (Vovk et al. 2005;
Angelopoulos & Bates 2021, arXiv 2107.07511, theorem 1).

That coverage is the mean over all choices of calibration images: about half of the choices give less. A
higher quantile gives the coverage with probability 1 − δ over their choice (Vovk 2012, proposition 2a).
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from netfission.evaluation.risk_control import answers_for_risk, binomial_tail
from netfission.utils.errors import check_choice, check_share, describe, invalid

SetScore = Literal["lac", "aps", "raps"]
# Of RAPS, as in the paper for ImageNet: chosen before any calibration image is seen.
RAPS_FREE_CLASSES = 5  # size of a set from which further classes are penalised
RAPS_PENALTY = 0.01
_PLACES = 1024  # that are kept: classes have few different numbers of images, and each takes milliseconds


def class_scores(log_probabilities: Tensor, score: SetScore) -> Tensor:
    """Return how unusual each class is for each image; a prediction set has the classes of low scores.

    - `lac`: negative logarithm of the class's probability (least ambiguous classes, Sadinle et al. 2019;
      one minus the probability gives the same sets). The smallest sets on average; a set may be empty.
    - `aps`: total probability of the more probable classes (adaptive prediction sets, Romano et al. 2020,
      without randomisation). Larger sets for difficult images; none is empty.
    - `raps`: the same plus 0.01 for every rank beyond 5 (regularised APS, Angelopoulos et al. 2021, arXiv
      2009.14193), so that sets of many classes are rarer.

    Args:
        log_probabilities: `(n, classes)`, floating point, natural logarithms.
        score: which of the three.

    Returns:
        `(n, classes)`, float64.

    Raises:
        ValueError: the score is unknown, or the shape or dtype differs.

    Example:
        >>> log_probabilities = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> class_scores(log_probabilities, "aps")
        tensor([[0.0000, 0.5000, 0.8000]], dtype=torch.float64)
    """
    check_choice("score", score, get_args(SetScore))
    if log_probabilities.ndim != 2 or not log_probabilities.is_floating_point():
        found = describe(log_probabilities)
        raise invalid("log_probabilities", "floats of shape (n, classes)", found=found)
    log_probabilities = log_probabilities.double()
    if score == "lac":
        return -log_probabilities
    # A stable sort cannot be exported.
    ordered, classes = log_probabilities.exp().sort(dim=1, descending=True)
    scores = torch.zeros_like(ordered)
    scores[:, 1:] = ordered.cumsum(dim=1)[:, :-1]
    if score == "raps":
        ranks = torch.arange(1, ordered.shape[1] + 1, dtype=torch.float64)
        scores += RAPS_PENALTY * (ranks - RAPS_FREE_CLASSES).clamp(min=0)
    return torch.empty_like(scores).scatter_(1, classes, scores)


def prediction_sets(log_probabilities: Tensor, score: SetScore, quantiles: Sequence[float]) -> Tensor:
    """Return which classes are in the prediction set of each image, `(n, classes)`, bool.

    Args:
        log_probabilities: `(n, classes)`, floating point, natural logarithms.
        score: see `class_scores`.
        quantiles: for each class the highest score at which it is in a set.

    Example:
        >>> prediction_sets(torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log(), "lac", [1.0, 1.0])
        tensor([[ True, False],
                [ True,  True]])
    """
    return class_scores(log_probabilities, score) <= torch.tensor(quantiles, dtype=torch.float64)


def images_for_coverage(coverage: float, delta: float | None = None) -> int:
    """Return the smallest number of calibration images that allows a coverage c.

    On average it is the first n with ⌈(n + 1) c⌉ ≤ n; with probability 1 − δ, ⌈log δ / log c⌉.

    Args:
        coverage: share of the images whose set contains the label, in (0, 1).
        delta: probability that the coverage is less, in (0, 1); None for the coverage on average.

    Raises:
        ValueError: one of the two is outside (0, 1).

    Example:
        >>> images_for_coverage(0.9), images_for_coverage(0.99), images_for_coverage(0.9, delta=0.1)
        (9, 99, 22)
    """
    share = _as_written(coverage)
    if delta is not None:
        return answers_for_risk(float(1 - share), delta)
    return math.ceil(share / (1 - share))


def score_quantile(scores: Sequence[float] | Tensor, coverage: float, delta: float | None = None) -> float:
    """Return the finite-sample quantile of the scores of n labels: the ⌈(n + 1) c⌉-th smallest.

    Args:
        scores: n numbers, each of the label of a calibration image, see `class_scores`.
        coverage: share of the images whose set contains the label, in (0, 1).
        delta: probability, over the choice of the calibration images, that the coverage is less, in (0, 1).
            Default: the coverage is the mean over their choice.

    Returns:
        The quantile; infinity, which admits all classes, for fewer images than `images_for_coverage`.

    Raises:
        ValueError: the coverage or δ is outside (0, 1).

    Example:
        >>> score_quantile([0.1, 0.2, 0.3, 0.4], 0.6), score_quantile([0.1, 0.2], 0.9)
        (0.3, inf)
        >>> score_quantile(torch.arange(99.0), 0.9), score_quantile(torch.arange(99.0), 0.9, delta=0.1)
        (89.0, 93.0)
    """
    place = _quantile_place(len(scores), coverage, delta)
    if place is None:
        return math.inf
    # By NumPy, since a graph that is traced for a file takes no number out of a tensor.
    return float(np.sort(np.asarray(scores, dtype=np.float64))[place - 1])


@lru_cache(_PLACES)
def _quantile_place(n: int, coverage: float, delta: float | None) -> int | None:
    """Return the place of the quantile among n sorted scores, from 1 to n; None if they are too few."""
    if n < images_for_coverage(coverage, delta):
        return None
    if delta is None:
        return math.ceil((n + 1) * _as_written(coverage))
    # Outside their sets may be as many labels as has a probability of at most δ if a share of 1 − c is.
    risk = float(1 - _as_written(coverage))
    allowed = bisect_right(range(n), delta, key=lambda missed: binomial_tail(missed, n, risk))
    return n + 1 - max(allowed, 1)  # n images are enough, so that 0 is rounding: δ = cⁿ


def _as_written(coverage: float) -> Fraction:
    """Return the decimal that was written, so that ⌈20 · 0.55⌉ is 11, which it is not in floating point."""
    check_share("coverage", coverage, "a share of images")
    return Fraction(str(float(coverage)))
