"""How good, how likely and how well calibrated class probabilities are."""

import torch
import torch.nn.functional as F
from torch import Tensor

CALIBRATION_BINS = 15


def classification_metrics(log_probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Figures of merit of predicted class probabilities.

    Args:
        log_probabilities: `(n, classes)`, floating point, natural logarithms.
        labels: `(n,)`, int64, in [0, classes).

    Returns:
        `top1` and `top5`, shares of examples in [0, 1] (`top5` is left out where there are 5
        classes or fewer, as it could not but be 1); `nll`, mean negative log-likelihood in nats;
        `ece`, expected calibration error in [0, 1], 15 bins of equal width over the largest
        probability (Guo et al. 2017); `brier`, mean squared error summed over classes, in [0, 2]
        (Brier 1950). Computed in float64, but for `ece`: float32.

    Raises:
        ValueError: Shapes or dtypes that differ from these, no examples, labels outside
            [0, classes), or rows whose probabilities do not sum to 1 (NaN, raw logits).
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
    return metrics | {
        "nll": F.nll_loss(log_probabilities, labels).item(),
        "ece": _calibration_error(probabilities, labels),
        "brier": (probabilities - one_hot).square().sum(dim=1).mean().item(),
    }


def _top_k(probabilities: Tensor, labels: Tensor, k: int) -> float:
    from torchmetrics.functional.classification import multiclass_accuracy  # brings matplotlib with it

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

    # torchmetrics bins in float32, puts a confidence of exactly 1 into a 16th bin and takes
    # anything beyond for logits. Just below 1 it falls into the 15th, where it belongs.
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


def _check_layout(log_probabilities: Tensor, labels: Tensor) -> None:
    if log_probabilities.ndim != 2 or not log_probabilities.is_floating_point():
        raise ValueError(
            f"log_probabilities has shape {tuple(log_probabilities.shape)} and dtype "
            f"{log_probabilities.dtype}; it takes (n, classes) of floats"
        )
    n, classes = log_probabilities.shape
    if n == 0:
        raise ValueError("log_probabilities has 0 examples; it takes at least one")
    if labels.shape != (n,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; it takes ({n},) of torch.int64"
        )
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise ValueError(
            f"labels has {len(outside)} of {n} outside [0, {classes}), first {int(outside[0])}; "
            "it takes class indices"
        )


def _check_sums(probabilities: Tensor) -> None:
    # Written so that NaN fails too; 1e-3 lets log-probabilities of half precision pass.
    wrong = ~((probabilities.sum(dim=1) - 1).abs() <= 1e-3)
    if wrong.any():
        raise ValueError(
            f"log_probabilities has {int(wrong.sum())} of {len(wrong)} rows that do not sum to 1 "
            "as probabilities; it takes what log_softmax gives"
        )
