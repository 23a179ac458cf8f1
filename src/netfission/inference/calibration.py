"""The temperature that makes an ensemble's probabilities as likely as it can."""

from torch import Tensor

_OCTAVES = 5.0  # the temperature is searched from 2^-5 to 2^5
_HALVINGS = 30


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T whose softmax(logits / T) gives labels the largest likelihood (Guo et al. 2017).

    Of an ensemble it is fit on what the ensemble's probabilities are the softmax of, its exits' mean logits,
    not on each exit: averaging alone changes how sure a network is (Rahaman & Thiery 2021,
    arXiv 2007.08792). The likelihood is concave in 1 / T, and so found by halving.

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
        # The likelihood's derivative, which falls as the factor on the logits grows.
        low, high = (middle, high) if (label_logits - expected).sum() > 0 else (low, middle)
    return float(2**-low)
