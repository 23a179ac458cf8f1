"""The temperature that makes an ensemble's probabilities as likely as it can."""

import torch
from torch import Tensor

_OCTAVES = 5.0  # the temperature is searched from 2^-5 to 2^5
_HALVINGS = 30


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T whose softmax(logits / T) makes labels likeliest, as temperature scaling does.

    Temperature scaling (Guo et al. 2017) with the targets of Platt (1999): where all of a few examples are
    right, the likelihood is largest at T = 0, where the network would be sure of everything. So each of n
    labels is taken to be wrong with probability 1 / (n + 2), the most probable other class being right then.
    Of a thousand examples and more, that is hardly seen.

    Of an ensemble it is fit on what the ensemble's probabilities are the softmax of, its exits' mean logits,
    not on each exit: averaging alone changes how sure a network is (Rahaman & Thiery 2021,
    arXiv 2007.08792). The logarithm of the likelihood is concave in 1 / T, and its top found by halving.

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
    label_logits = _expected_label_logits(logits, labels.unsqueeze(1))
    low, high = -_OCTAVES, _OCTAVES  # the binary logarithm of 1 / T
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        expected = ((logits * 2**middle).softmax(dim=1) * logits).sum(dim=1)
        # The likelihood's derivative, which falls as the factor on the logits grows.
        low, high = (middle, high) if (label_logits - expected).sum() > 0 else (low, middle)
    return float(2**-low)


def _expected_label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits of labels `(n, 1)` that may be wrong, `(n,)`."""
    own = logits.gather(1, labels).squeeze(1)
    others = logits.scatter(1, labels, -torch.inf).amax(dim=1)
    return own + (others - own) / (len(logits) + 2)
