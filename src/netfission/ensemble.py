"""From the logits of all exits to one prediction, its uncertainty, and its temperature."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from netfission.utils.errors import check_choice, describe, invalid

AverageRule = Literal["logits", "probabilities"]
# What an ensemble averages: logits or probabilities of all exits alike, or logits by weights of the exits.
Average = AverageRule | tuple[float, ...]
TWO_LOGITS = "give a binary classifier two logits"
_OCTAVES = 5.0  # the temperature is searched from 2^-5 to 2^5
_BISECTIONS = 30
_STARTS = 21  # temperatures tried before the bisection, if there may be several maxima
_PRIOR = 2.0  # curvature of the log prior in ln T at T = 1, for a standard deviation of 0.7


def as_logits(logits: Tensor) -> Tensor:
    """Check that a tensor is laid out as logits, and return it in float32 or wider.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.

    Returns:
        The same values; float16 and bfloat16 become float32, which softmax and its logarithm need.

    Raises:
        ValueError: the tensor has fewer than three dimensions, is not floating point, or has one class only.

    Example:
        >>> as_logits(torch.zeros(1, 3, 10, dtype=torch.float16)).dtype
        torch.float32
    """
    if logits.ndim < 3 or not logits.is_floating_point():
        raise invalid("logits", "floats of shape (batch, exits, classes, ...)", found=describe(logits))
    if logits.shape[2] < 2:  # the probability of a single class is always 1
        raise invalid("logits", "of two classes or more", found=describe(logits), hint=TWO_LOGITS)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def mean_logits(logits: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Return the mean of the exits' logits.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.
        weights: a weight of at least 0 per exit, not all 0, of any sum; default equal weights.

    Returns:
        `(batch, classes, ...)`, of the dtype of `logits`.

    Raises:
        ValueError: the weights are not one per exit.

    Example:
        >>> mean_logits(torch.tensor([[[4.0, 0.0], [0.0, 4.0]]]), weights=[3, 1])
        tensor([[3., 1.]])
    """
    if weights is None:
        return logits.mean(dim=1)
    check_weights("weights", weights, logits.shape[1])
    total = sum(weights)
    # Without a tensor of weights, which would wait for a GPU and be an input of an exported graph.
    parts = zip(logits.unbind(dim=1), weights, strict=True)
    return torch.stack([exit_logits * (weight / total) for exit_logits, weight in parts]).sum(dim=0)


def weights_of(average: Average) -> tuple[float, ...] | None:
    """Return the weights of the exits by which logits are averaged; None if all exits weigh the same.

    Example:
        >>> weights_of((3.0, 1.0)), weights_of("logits")
        ((3.0, 1.0), None)
    """
    return None if isinstance(average, str) else tuple(average)


def describe_average(average: Average) -> str:
    """Return in words what an ensemble averages.

    Example:
        >>> describe_average("probabilities"), describe_average((1.0, 0.3))
        ('probabilities', 'logits weighted 1 : 0.3')
    """
    if isinstance(average, str):
        return average
    return f"logits weighted {' : '.join(f'{weight:g}' for weight in average)}"


def check_average(average: Average, exits: int | None = None) -> None:
    """Raise a `ValueError` unless `average` is a rule or weights of exits.

    Args:
        average: what is checked.
        exits: number of exits that weights must be of; default any.
    """
    if isinstance(average, tuple | list):
        check_weights("average", average, exits)
    else:
        check_choice("average", average, get_args(AverageRule))


def check_weights(name: str, weights: Sequence[float], exits: int | None) -> None:
    """Raise a `ValueError` unless there is a number of at least 0 per exit, and not all are 0."""
    numbers = all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in weights)
    if not numbers or not any(weights) or len(weights) != (exits or len(weights)):
        count = "a weight" if exits is None else f"{exits} weights, one"
        raise invalid(name, f"{count} of at least 0 per exit, not all 0", weights)


def ensemble_log_probabilities(logits: Tensor, average: Average = "logits") -> Tensor:
    """Return the natural logarithms of the ensemble's class probabilities, without underflow.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.
        average: `"logits"` for the softmax of the exits' mean logits (Lee & Lee 2024,
            arXiv 2408.02301); `"probabilities"` for the mean of their softmaxes (Lakshminarayanan
            et al. 2017); a tuple of weights, one per exit, for the softmax of the logits' weighted mean.

    Returns:
        `(batch, classes, ...)`, float32 or wider.

    Raises:
        ValueError: the logits have another layout, or the average is unknown.

    Example:
        >>> logits = torch.tensor([[[200.0, 0.0], [200.0, 0.0]]])
        >>> ensemble_log_probabilities(logits)
        tensor([[   0., -200.]])
    """
    logits = as_logits(logits)
    check_average(average, logits.shape[1])
    if average != "probabilities":
        return mean_logits(logits, weights_of(average)).log_softmax(dim=1)
    return logits.log_softmax(dim=2).logsumexp(dim=1) - math.log(logits.shape[1])


def ensemble_probabilities(logits: Tensor, average: Average = "logits") -> Tensor:
    """Return the class probabilities of the ensemble of exits.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.
        average: what is averaged over the exits; see `ensemble_log_probabilities`.

    Returns:
        `(batch, classes, ...)`, float32 or wider; they sum to 1 over classes.

    Raises:
        ValueError: the logits have another layout, or the average is unknown.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])  # one image, two exits, two classes
        >>> ensemble_probabilities(logits)  # softmax of (1, 0)
        tensor([[0.7311, 0.2689]])
        >>> ensemble_probabilities(logits, average="probabilities")
        tensor([[0.6904, 0.3096]])
    """
    return ensemble_log_probabilities(logits, average).exp()


def disagreement(logits: Tensor) -> Tensor:
    """Return the share of the pairs of exits that predict different classes, per example.

    Fort et al. 2019 (arXiv 1912.02757) use its mean over examples as a measure of diversity.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.

    Returns:
        `(batch, ...)` in [0, 1], float32; 0 if there is one exit only.

    Raises:
        ValueError: the logits have another layout.

    Example:
        >>> disagreement(torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]))  # 2 of 3 pairs differ
        tensor([0.6667])
    """
    predictions = as_logits(logits).argmax(dim=2)
    exits = predictions.shape[1]
    ordered_pairs = predictions.unsqueeze(1) != predictions.unsqueeze(2)
    return ordered_pairs.sum(dim=(1, 2)) / max(exits * (exits - 1), 1)


def predictive_entropy(logits: Tensor, average: Average = "logits") -> Tensor:
    """Return the entropy of the ensemble's class probabilities per example: its total uncertainty.

    With `average="probabilities"` it is the sum of `mutual_information` and the exits' mean entropy.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.
        average: what is averaged over the exits; see `ensemble_log_probabilities`.

    Returns:
        `(batch, ...)` in nats, from 0 to log(classes), float32 or wider.

    Raises:
        ValueError: the logits have another layout, or the average is unknown.

    Example:
        >>> predictive_entropy(torch.zeros(1, 3, 2))  # log 2
        tensor([0.6931])
    """
    return _entropy(ensemble_probabilities(logits, average), dim=1)


def mutual_information(logits: Tensor) -> Tensor:
    """Return the mutual information of class and exit per example: uncertainty from disagreement.

    It is the entropy of the exits' mean probabilities minus the mean of their entropies (Depeweg et al.
    2018, arXiv 1710.07283, equation 2), so it belongs to `average="probabilities"`.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.

    Returns:
        `(batch, ...)` in nats, from 0 to the predictive entropy of the mean probabilities and to
        log(exits), float32 or wider.

    Raises:
        ValueError: the logits have another layout.

    Example:
        >>> agree, differ = [[9.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [0.0, 9.0]]
        >>> mutual_information(torch.tensor([agree, differ]))
        tensor([0.0000, 0.6919])
    """
    exit_entropies = _entropy(as_logits(logits).softmax(dim=2), dim=2)
    # Never negative (Jensen), except by rounding if the exits agree.
    return (predictive_entropy(logits, "probabilities") - exit_entropies.mean(dim=1)).clamp(min=0.0)


def fit_temperature(logits: Tensor, labels: Tensor, average: Average = "logits") -> float:
    """Return the temperature T that makes the labels most likely, if all exits' logits are divided by it.

    This is temperature scaling (Guo et al. 2017) of the ensemble, not of its exits: averaging alone changes
    how confident a network is (Rahaman & Thiery 2021, arXiv 2007.08792). It has a prior: a gamma distribution
    of 1 / T with its mode at 1 and a standard deviation of ln T of 0.7. Without a prior, a few examples that
    are all classified correctly would give T = 0, and confidence 1 in every prediction. With a thousand
    examples the prior hardly matters.

    The maximum of the log posterior is found by bisection. For the mean of logits, it is concave in 1 / T.
    For the mean of probabilities it may have several maxima, so the bisection starts around the best of 21
    temperatures.

    Args:
        logits: `(n, exits, classes)`, floating point, of images that the network was not trained on.
        labels: `(n,)`, int64.
        average: what the ensemble averages over the exits; see `ensemble_log_probabilities`.

    Returns:
        T, from 1/32 to 32; above 1 for an overconfident ensemble.

    Raises:
        ValueError: there are no examples, the logits have another layout, or the average is unknown.

    Example:
        >>> logits = torch.tensor([[[4.0, 0.0]]] * 100)  # confident, yet wrong for every fourth image
        >>> labels = torch.tensor([0, 0, 0, 1] * 25)
        >>> round(fit_temperature(logits, labels), 2)
        3.43
    """
    logits = as_logits(logits)
    check_average(average, logits.shape[1])
    if not len(logits):
        raise invalid("logits", "at least one example", found=describe(logits))
    logits = logits.double()
    low, high = -_OCTAVES, _OCTAVES  # the binary logarithm of 1 / T
    if average != "probabilities":
        logits = mean_logits(logits, weights_of(average)).unsqueeze(1)
    else:
        low, high = _around_best(logits, labels, low, high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        slope = _posterior_slope(logits, labels, 2**middle)
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(2**-low)


def _posterior_slope(logits: Tensor, labels: Tensor, inverse: float) -> float:
    """The derivative by 1 / T of the log posterior of the exits' mean probabilities."""
    log_probabilities = (logits * inverse).log_softmax(dim=2)
    index = labels[:, None, None].expand(-1, logits.shape[1], 1)
    # Each exit counts by its share of the probability of the label.
    shares = log_probabilities.gather(2, index).squeeze(2).softmax(dim=1)
    expected = (log_probabilities.exp() * logits).sum(dim=2)
    label_logits = logits.gather(2, index).squeeze(2)
    slope = (shares * (label_logits - expected)).sum() + _PRIOR * (1 / inverse - 1)
    return slope.item()


def _around_best(logits: Tensor, labels: Tensor, low: float, high: float) -> tuple[float, float]:
    """Return the neighbours of the best of several values between two binary logarithms of 1 / T."""
    step = (high - low) / (_STARTS - 1)
    starts = [low + number * step for number in range(_STARTS)]

    def log_posterior(start: float) -> float:
        log_probabilities = ensemble_log_probabilities(logits * 2**start, "probabilities")
        prior = _PRIOR * (start * math.log(2) - 2**start)
        return log_probabilities.gather(1, labels.unsqueeze(1)).sum().item() + prior

    best = max(starts, key=log_posterior)
    return max(low, best - step), min(high, best + step)


def _entropy(probabilities: Tensor, dim: int) -> Tensor:
    terms = -torch.xlogy(probabilities, probabilities)  # 0 at 0, where p log p would be NaN
    return terms.sum(dim=dim)
