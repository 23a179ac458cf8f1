"""Measure accuracy, likelihood and calibration of class probabilities."""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from netfission.evaluation.smooth_calibration import smooth_calibration_error
from netfission.utils.errors import describe, invalid

CALIBRATION_BINS = 15


def accuracy_error(accuracy: float, n: int) -> float:
    """Return the standard error of an accuracy on `n` images, the one that all tables and pages show.

    It is sqrt(p (1 - p) / (n + 4)), where p counts two more correct and two more wrong answers (Agresti &
    Coull 1998). Without them, the error of a network that is right on all images, or on none, would be 0.

    Args:
        accuracy: share of the images, in [0, 1].
        n: number of images, at least 1.

    Example:
        >>> round(accuracy_error(0.5, 96), 3), round(accuracy_error(1.0, 96), 3)
        (0.05, 0.014)
    """
    n += 4
    share = (accuracy * (n - 4) + 2) / n
    return sqrt(share * (1 - share) / n)


def classification_metrics(log_probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Measure predicted class probabilities against labels.

    - `top1` and `top5`: accuracy in [0, 1]; `top5` is left out for 5 classes or fewer, as it is always 1.
    - `nll`: mean negative log-likelihood in nats.
    - `ece`: expected calibration error in [0, 1], with 15 bins of equal width over the largest probability
      (Guo et al. 2017).
    - `brier`: mean squared error summed over classes, in [0, 2] (Brier 1950).
    - `adaptive_ece`: expected calibration error with 15 bins of equal numbers of examples (Nguyen & O'Connor
      2015, arXiv 1508.05154). Examples of equal confidence count as the mean of them.
    - `class_wise_ece`: expected calibration error of the probability of each class, with 15 bins of equal
      width; mean over classes (Kull et al. 2019, arXiv 1910.12656).
    - `smooth_ece`: calibration error of the largest probability by a kernel in place of bins (Błasiok &
      Nakkiran 2024, arXiv 2309.12236), see
      `netfission.evaluation.smooth_calibration.smooth_calibration_error`.
    - `augrc`: area under the generalised risk–coverage curve, in [0, 1/2]: the mean, over all thresholds of
      confidence, of the share of all examples that is answered and wrong (Traub et al. 2024, arXiv
      2407.01032).

    Args:
        log_probabilities: `(n, classes)`, floating point, natural logarithms.
        labels: `(n,)`, int64, in [0, classes).

    Returns:
        Name → value, computed in float64, except `ece` in float32.

    Raises:
        ValueError: a shape or dtype differs, there are no examples or fewer than two classes, labels are
            outside [0, classes), or rows of probabilities do not sum to 1 (NaN, raw logits).

    Example:
        >>> log_probabilities = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
        >>> metrics = classification_metrics(log_probabilities, torch.tensor([0, 1]))
        >>> {name: round(value, 3) for name, value in metrics.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'top1': 0.5, 'nll': 0.57, 'ece': 0.4, 'brier': 0.4, 'adaptive_ece': 0.4, 'class_wise_ece': 0.4,
         'smooth_ece': 0.208, 'augrc': 0.125}
    """
    _check_layout(log_probabilities, labels)
    log_probabilities = log_probabilities.double()
    probabilities = log_probabilities.exp()
    _check_sums(probabilities)
    classes = probabilities.shape[1]
    metrics = {"top1": _top_k(probabilities, labels, 1)}
    if classes > 5:
        metrics["top5"] = _top_k(probabilities, labels, 5)
    one_hot = F.one_hot(labels, classes)
    confidence, correct = _by_confidence(probabilities, labels)
    return metrics | {
        "nll": F.nll_loss(log_probabilities, labels).item(),
        "ece": _calibration_error(probabilities, labels),
        "brier": (probabilities - one_hot).square().sum(dim=1).mean().item(),
        "adaptive_ece": _adaptive_calibration_error(confidence, correct),
        "class_wise_ece": _class_wise_calibration_error(probabilities, labels),
        "smooth_ece": smooth_calibration_error(confidence, correct),
        "augrc": _generalised_risk_area(correct),
    }


def _top_k(probabilities: Tensor, labels: Tensor, k: int) -> float:
    from torchmetrics.functional.classification import multiclass_accuracy  # which imports matplotlib

    correct: Tensor = multiclass_accuracy(
        probabilities,
        labels,
        num_classes=probabilities.shape[1],
        average="micro",
        top_k=k,
        validate_args=False,
    )
    return correct.item()


def _calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    from torchmetrics.functional.classification import multiclass_calibration_error

    # torchmetrics bins in float32, puts a confidence of exactly 1 into a 16th bin and treats larger values as
    # logits. Just below 1 the confidence is in the 15th bin, where it belongs.
    below_one = probabilities.clamp(max=1.0 - torch.finfo(torch.float32).eps)
    error: Tensor = multiclass_calibration_error(
        below_one,
        labels,
        num_classes=probabilities.shape[1],
        n_bins=CALIBRATION_BINS,
        norm="l1",
        validate_args=False,
    )
    return error.item()


def _by_confidence(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return falling confidence `(n,)`, and the share of its examples that is right, float64."""
    confidence, answers = probabilities.max(dim=1)
    confidence, order = confidence.sort(descending=True)
    _, block, sizes = confidence.unique_consecutive(return_inverse=True, return_counts=True)
    right = block.bincount(weights=(answers == labels)[order].double())
    return confidence, (right / sizes)[block]  # examples of equal confidence have no order


def _adaptive_calibration_error(confidence: Tensor, correct: Tensor) -> float:
    gaps = (confidence - correct).tensor_split(CALIBRATION_BINS)
    return sum(gap.sum().abs().item() for gap in gaps) / len(confidence)


def _class_wise_calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    n, classes = probabilities.shape
    total = 0.0
    for number in range(classes):  # one by one, as memory would not hold the bins of all
        column = probabilities[:, number]
        bins = (column * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        gaps = bins.bincount(weights=column - (labels == number).double())
        total += gaps.abs().sum().item()
    return total / (n * classes)


def _generalised_risk_area(correct: Tensor) -> float:
    """Return the area under the curve whose points are joined by lines, the first of them (0, 0)."""
    wrong = 1 - correct
    area: Tensor = (wrong.cumsum(0) - wrong / 2).sum() / len(wrong) ** 2
    return area.item()


def _check_layout(log_probabilities: Tensor, labels: Tensor) -> None:
    if log_probabilities.ndim != 2 or not log_probabilities.is_floating_point():
        expected = "floating point of shape (n, classes)"
        raise invalid("log_probabilities", expected, found=describe(log_probabilities))
    n, classes = log_probabilities.shape
    if n == 0:
        raise invalid("log_probabilities", "of at least one example", found="none")
    if classes < 2:
        raise invalid("log_probabilities", "of two classes or more", found=describe(log_probabilities))
    if labels.shape != (n,) or labels.dtype != torch.int64:
        raise invalid("labels", f"int64 of shape ({n},)", found=describe(labels))
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        found = f"{len(wrong)} of {n} outside, first {int(wrong[0])}"
        raise invalid("labels", f"class indices in [0, {classes})", found=found)


def _check_sums(probabilities: Tensor) -> None:
    # Negated so that NaN fails too; a tolerance of 1e-3 accepts log-probabilities in half precision.
    wrong = ~((probabilities.sum(dim=1) - 1).abs() <= 1e-3)
    if wrong.any():
        found = f"{int(wrong.sum())} of {len(wrong)} rows whose probabilities do not sum to 1"
        raise invalid("log_probabilities", "the output of log_softmax", found=found)
