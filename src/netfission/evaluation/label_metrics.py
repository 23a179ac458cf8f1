"""Measure probabilities of labels, of which an image has any number, and choose thresholds for them."""

import torch
from torch import Tensor

from netfission.evaluation.metrics import CALIBRATION_BINS
from netfission.evaluation.resampling import Resampled

UNDECIDED = 0.5  # threshold of a label without images


def multilabel_metrics(log_probabilities: Tensor, labels: Tensor, thresholds: Tensor) -> dict[str, float]:
    """Measure predicted probabilities of labels.

    - `map`: mean over labels of the average precision (area under the precision–recall curve).
    - `f1`: mean over labels of the F1 score, with the given thresholds.
    - `nll`: mean negative log-likelihood of a label, in nats.
    - `ece`: expected calibration error of the probability of a label, over all pairs of image and label, with
      15 bins of equal width.
    - `brier`: mean squared error of the probability of a label, in [0, 1].

    `map` and `f1` are means over the labels that occur in these images, and left out if none does.

    Args:
        log_probabilities: of absence and presence, `(n, 2, labels)`, floating point.
        labels: `(n, labels)`, 0 or 1.
        thresholds: `(labels,)`; a label is predicted if its probability reaches its threshold.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.2], [0.4, 0.6]])
        >>> pairs = torch.stack([1 - probabilities, probabilities], dim=1).log()
        >>> metrics = multilabel_metrics(pairs, torch.tensor([[1, 0], [1, 1]]), torch.tensor([0.5, 0.5]))
        >>> {name: round(value, 3) for name, value in metrics.items()}
        {'map': 1.0, 'f1': 0.833, 'nll': 0.439, 'ece': 0.325, 'brier': 0.142}
    """
    from torchmetrics.functional.classification import (
        binary_average_precision,
        binary_calibration_error,
        binary_f1_score,
    )

    log_probabilities, truth = log_probabilities.double(), labels.long()
    probabilities = log_probabilities[:, 1].exp()
    predicted = (probabilities >= thresholds).long()
    occurring = truth.any(dim=0).nonzero().flatten().tolist()
    precision = [binary_average_precision(probabilities[:, label], truth[:, label]) for label in occurring]
    scores = [binary_f1_score(predicted[:, label], truth[:, label]) for label in occurring]
    metrics = {}
    if occurring:
        metrics = {"map": torch.stack(precision).mean().item(), "f1": torch.stack(scores).mean().item()}
    below_one = probabilities.clamp(max=1.0 - torch.finfo(torch.float32).eps)  # see `classification_metrics`
    ece = binary_calibration_error(
        below_one.flatten(), truth.flatten(), n_bins=CALIBRATION_BINS, validate_args=False
    )
    return metrics | {
        "nll": -log_probabilities.gather(1, truth.unsqueeze(1)).mean().item(),
        "ece": ece.item(),
        "brier": (probabilities - truth).square().mean().item(),
    }


def resampled_label_metrics(log_probabilities: Tensor, labels: Tensor, thresholds: Tensor) -> Resampled:
    """Return the measures of `multilabel_metrics` on sets of images that are drawn from these.

    Args:
        log_probabilities: see `multilabel_metrics`, as the following.
        labels: `(n, labels)`.
        thresholds: `(labels,)`.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.2], [0.4, 0.6]])
        >>> pairs = torch.stack([1 - probabilities, probabilities], dim=1).log()
        >>> of_sets = resampled_label_metrics(pairs, torch.tensor([[1, 0], [1, 1]]), torch.tensor([0.5, 0.5]))
        >>> of_sets(torch.tensor([[1.0, 1.0], [2.0, 0.0]]).double())["brier"]  # both images, the first twice
        tensor([0.1425, 0.0250], dtype=torch.float64)
    """
    log_probabilities, truth = log_probabilities.double(), labels.double()
    probabilities = log_probabilities[:, 1].exp()
    predicted = (probabilities >= thresholds).double()
    nll = -log_probabilities.gather(1, labels.long().unsqueeze(1)).squeeze(1).mean(dim=1)
    brier = (probabilities - truth).square().mean(dim=1)
    bounds = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=torch.float64)
    bins = torch.bucketize(probabilities, bounds, right=True).sub(1).clamp(max=CALIBRATION_BINS - 1)
    gaps = torch.zeros(len(labels), CALIBRATION_BINS, dtype=torch.float64)
    gaps.scatter_add_(1, bins, (probabilities - truth) / labels.shape[1])
    columns = list(zip(probabilities.T, truth.T, strict=True))

    def measure(weights: Tensor) -> dict[str, Tensor]:
        totals = weights.sum(dim=1)
        there = weights @ truth
        scores = 2 * (weights @ (truth * predicted)) / (there + weights @ predicted)
        precision = torch.stack([_average_precision(*column, weights) for column in columns], dim=1)
        return {
            "map": precision.nanmean(dim=1),
            "f1": torch.where(there > 0, scores, torch.nan).nanmean(dim=1),
            "nll": weights @ nll / totals,
            "ece": (weights @ gaps).abs().sum(dim=1) / totals,
            "brier": weights @ brier / totals,
        }

    return measure


def _average_precision(probabilities: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the average precision of a label in sets of images; NaN where it does not occur, `(sets,)`."""
    ordered, order = probabilities.sort(descending=True)
    last = torch.cat([ordered[1:] != ordered[:-1], torch.tensor([True])])  # of images of equal probability
    weights = weights[:, order]
    right = (weights * truth[order]).cumsum(dim=1)[:, last]
    predicted = weights.cumsum(dim=1)[:, last]
    steps = right.diff(dim=1, prepend=torch.zeros(len(right), 1, dtype=right.dtype))
    return (steps * right / predicted.clamp(min=1)).sum(dim=1) / right[:, -1]


def best_thresholds(probabilities: Tensor, labels: Tensor) -> list[float]:
    """Return for each label the threshold with the highest F1 score on these images (Lipton et al. 2014).

    It is 0.5 if no other one is better (arXiv 1402.1892 says why it rarely is), or for a label that no image
    has; else it lies in the middle between the probabilities of two images, or is 0 if all are to have it.

    Args:
        probabilities: `(n, labels)`.
        labels: `(n, labels)`, 0 or 1.

    Example:
        >>> best_thresholds(torch.tensor([[1.0], [0.375], [0.125]]), torch.tensor([[1], [1], [0]]))
        [0.25]
    """
    return [_best_threshold(column, truth) for column, truth in zip(probabilities.T, labels.T, strict=True)]


def _best_threshold(probabilities: Tensor, labels: Tensor) -> float:
    if not labels.any():
        return UNDECIDED
    ordered, order = probabilities.double().sort(descending=True)
    right = labels[order].double().cumsum(0)
    predicted = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    scores = 2 * right / (predicted + right[-1])
    below = torch.cat([ordered[1:], ordered.new_tensor([-1.0])])
    scores[ordered == below] = -1  # images of equal probability are predicted alike
    best = int(scores.argmax())
    above = int((ordered >= UNDECIDED).sum())
    if above and scores[above - 1] == scores[best]:
        return UNDECIDED
    return max(((ordered[best] + below[best]) / 2).item(), 0.0)
