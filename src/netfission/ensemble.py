"""From the logits of every exit to one prediction, and to how much the exits differ."""

import math
from typing import Literal

import torch
from torch import Tensor

Average = Literal["logits", "probabilities"]
_OCTAVES = 5.0  # the temperature is searched from 2^-5 to 2^5
_HALVINGS = 30
_BELIEF = 2.0  # that T is 1: the curvature in ln T, for a standard deviation of 0.7


def as_logits(logits: Tensor) -> Tensor:
    """Check that a tensor is laid out as logits and give it in float32 or wider.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.

    Returns:
        The same values; float16 and bfloat16 become float32, which softmax and its logarithm need.

    Raises:
        ValueError: Fewer than three dimensions, or not floating point.
    """
    if logits.ndim < 3 or not logits.is_floating_point():
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and dtype {logits.dtype}; "
            "it takes (batch, exits, classes, ...) of floats"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def ensemble_log_probabilities(logits: Tensor, average: Average = "logits") -> Tensor:
    """Natural logarithms of the ensemble's class probabilities, without underflow.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.
        average: `"logits"` takes the softmax of the exits' mean logits (Lee & Lee 2024,
            arXiv 2408.02301); `"probabilities"` the mean of their softmaxes (Lakshminarayanan
            et al. 2017).

    Returns:
        `(batch, classes, ...)`, float32 or wider.

    Raises:
        ValueError: Logits of another layout, or an unknown average.
    """
    logits = as_logits(logits)
    if average == "logits":
        return logits.mean(dim=1).log_softmax(dim=1)
    if average == "probabilities":
        return logits.log_softmax(dim=2).logsumexp(dim=1) - math.log(logits.shape[1])
    raise ValueError(f"average is {average!r}; it takes 'logits' or 'probabilities'")


def ensemble_probabilities(logits: Tensor, average: Average = "logits") -> Tensor:
    """Class probabilities of the ensemble of exits.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.
        average: What is averaged over the exits; see `ensemble_log_probabilities`.

    Returns:
        `(batch, classes, ...)`, summing to 1 over classes, float32 or wider.

    Raises:
        ValueError: Logits of another layout, or an unknown average.
    """
    return ensemble_log_probabilities(logits, average).exp()


def disagreement(logits: Tensor) -> Tensor:
    """Share of the pairs of exits that predict different classes, per example.

    Fort et al. 2019 (arXiv 1912.02757) use its mean over examples as a measure of diversity.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.

    Returns:
        `(batch, ...)` in [0, 1], float32; 0 where there is one exit only.

    Raises:
        ValueError: Logits of another layout.
    """
    predictions = as_logits(logits).argmax(dim=2)
    exits = predictions.shape[1]
    ordered_pairs = predictions.unsqueeze(1) != predictions.unsqueeze(2)
    return ordered_pairs.sum(dim=(1, 2)) / max(exits * (exits - 1), 1)


def predictive_entropy(logits: Tensor, average: Average = "logits") -> Tensor:
    """Entropy of the ensemble's class probabilities, per example: its total uncertainty.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.
        average: What is averaged over the exits; see `ensemble_log_probabilities`.

    Returns:
        `(batch, ...)` in nats, from 0 to log(classes), float32 or wider.

    Raises:
        ValueError: Logits of another layout, or an unknown average.
    """
    return _entropy(ensemble_probabilities(logits, average), dim=1)


def mutual_information(logits: Tensor) -> Tensor:
    """Mutual information of class and exit, per example: the uncertainty exits disagree about.

    The entropy of the exits' mean probabilities less the mean of their entropies (Depeweg et al.
    2018, arXiv 1710.07283, equation 2), so it belongs to `average="probabilities"`.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.

    Returns:
        `(batch, ...)` in nats, from 0 to the predictive entropy of the mean probabilities and to
        log(exits), float32 or wider.

    Raises:
        ValueError: Logits of another layout.
    """
    of_each = _entropy(as_logits(logits).softmax(dim=2), dim=2).mean(dim=1)
    # Never negative (Jensen), save by rounding where the exits agree.
    return (predictive_entropy(logits, "probabilities") - of_each).clamp(min=0.0)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T whose softmax(logits / T) makes labels likeliest, as temperature scaling does.

    Temperature scaling (Guo et al. 2017) with the belief beforehand that T is 1 to a factor of two or so: a
    gamma prior on 1 / T whose mode is 1. Where all of a few examples are right, the likelihood alone is
    largest at T = 0, where the network would be sure of everything. Of a thousand examples, the belief is
    hardly seen.

    Of an ensemble it is fit on what the ensemble's probabilities are the softmax of, its exits' mean logits,
    not on each exit: averaging alone changes how sure a network is (Rahaman & Thiery 2021,
    arXiv 2007.08792). The logarithm of what is maximised is concave in 1 / T, and its top found by halving.

    Args:
        logits: `(n, classes)`, floating point, of images the network was not trained on.
        labels: `(n,)`, int64.

    Returns:
        T, from 1/32 to 32; above 1 for a network that is too sure.

    Raises:
        ValueError: there are no examples.
    """
    if not len(logits):
        raise ValueError("logits is empty; it takes at least one example")
    logits = logits.double()
    label_logits = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    low, high = -_OCTAVES, _OCTAVES  # the binary logarithm of 1 / T
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        expected = ((logits * 2**middle).softmax(dim=1) * logits).sum(dim=1)
        # The derivative, which falls as the factor on the logits grows.
        slope = (label_logits - expected).sum() + _BELIEF * (2**-middle - 1)
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(2**-low)


def _entropy(probabilities: Tensor, dim: int) -> Tensor:
    of_class: Tensor = torch.special.entr(probabilities)  # 0 at 0, where p log p would be NaN
    return of_class.sum(dim=dim)
