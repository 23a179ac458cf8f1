"""The temperature that makes an ensemble's probabilities as likely as it can."""

from torch import Tensor

_OCTAVES = 5.0  # the temperature is searched from 2^-5 to 2^5
_HALVINGS = 30
_BELIEF = 2.0  # that T is 1: the curvature in ln T, for a standard deviation of 0.7


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
