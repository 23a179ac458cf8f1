"""Cross-entropy of every exit plus distillation from their ensemble."""

import math
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netfission.config import Reduction, Teacher
from netfission.ensemble import as_logits, ensemble_log_probabilities


def ensemble_distillation_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 3.0,
    weight: float = 1.0,
    cross_entropy: bool = True,
    teacher: Teacher = "logits",
    reduction: Reduction = "sum",
) -> Tensor:
    """Train every exit on the labels and on what the exits predict together.

    With exits' logits z_i, temperature T and teacher q = softmax(mean_i z_i / T), through which
    no gradient flows, the loss is

        sum_i CE(z_i, y) + weight * T^2 * sum_i KL(q || softmax(z_i / T)),

    summed over exits, averaged over the batch and trailing dimensions (Lee & Lee 2024, arXiv
    2408.02301). Computed in float32 or wider, under autocast too. With one exit the second term
    and its gradient vanish.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point, finite.
        labels: Class indices `(batch, ...)`, int64, or probabilities `(batch, classes, ...)`,
            floating point.
        temperature: T above, > 0; default 3, the paper's.
        weight: Of the distillation term, >= 0; default 1. 0 leaves the term out.
        cross_entropy: Whether the first term is in; default True.
        teacher: `"logits"` as above; `"probabilities"` takes q = mean_i softmax(z_i / T) instead;
            `"others"` gives every exit a teacher of its own, softmax of the mean logits of all exits
            but itself.
        reduction: over exits, `"sum"` as above, or `"mean"`: what exits share then gets as much gradient
            as a single network's, beside the same weight decay.

    Returns:
        The loss, a scalar of float32 or wider.

    Raises:
        ValueError: A setting outside its range, an unknown teacher or reduction, both terms switched off,
            logits or labels of another layout, or (on a CPU, where looking costs nothing) a label
            outside [0, classes).
    """
    _check_settings(temperature, weight, cross_entropy, teacher, reduction)
    logits = as_logits(logits)
    _check_labels(labels, logits)
    loss = logits.new_zeros(())
    if cross_entropy:
        # Cross-entropy is linear in the log-probabilities, so the sum over exits goes first.
        log_probabilities = logits.log_softmax(dim=2).sum(dim=1)
        if labels.is_floating_point():
            of_label = (labels * log_probabilities).sum(dim=1)
        else:
            of_label = log_probabilities.gather(1, labels.unsqueeze(1))
        loss = loss - of_label.mean()
    if weight:
        softened = logits / temperature
        student = softened.log_softmax(dim=2)
        # The gradient through the paper's teacher would sum to zero over exits; detached it costs nothing.
        taught = _teacher_log_probabilities(softened.detach(), teacher).expand_as(student)
        divergence = F.kl_div(student, taught, reduction="none", log_target=True)
        loss = loss + weight * temperature**2 * divergence.sum(dim=(1, 2)).mean()
    return loss / logits.shape[1] if reduction == "mean" else loss


class EnsembleDistillationLoss(nn.Module):
    """`ensemble_distillation_loss` with its settings kept; arguments and errors are the same."""

    def __init__(
        self,
        temperature: float = 3.0,
        weight: float = 1.0,
        cross_entropy: bool = True,
        teacher: Teacher = "logits",
        reduction: Reduction = "sum",
    ) -> None:
        """Keep the settings; ValueError where `ensemble_distillation_loss` would refuse them."""
        super().__init__()
        _check_settings(temperature, weight, cross_entropy, teacher, reduction)
        self.temperature = temperature
        self.weight = weight
        self.cross_entropy = cross_entropy
        self.teacher = teacher
        self.reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Give the loss of logits `(batch, exits, classes, ...)` for hard or soft labels."""
        return ensemble_distillation_loss(
            logits,
            labels,
            temperature=self.temperature,
            weight=self.weight,
            cross_entropy=self.cross_entropy,
            teacher=self.teacher,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the settings in the module's printed form."""
        return (
            f"temperature={self.temperature}, weight={self.weight}, cross_entropy={self.cross_entropy}, "
            f"teacher={self.teacher!r}, reduction={self.reduction!r}"
        )


def _teacher_log_probabilities(softened: Tensor, teacher: Teacher) -> Tensor:
    """`(batch, 1 or exits, classes, ...)`, of logits over the temperature, `(batch, exits, classes, ...)`."""
    exits = softened.shape[1]
    if teacher != "others":
        return ensemble_log_probabilities(softened, teacher).unsqueeze(1)
    if exits == 1:  # it has none but itself
        return softened.log_softmax(dim=2)
    others = softened.sum(dim=1, keepdim=True) - softened
    return (others / (exits - 1)).log_softmax(dim=2)


def _check_settings(
    temperature: float, weight: float, cross_entropy: bool, teacher: str, reduction: str
) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it takes a finite number above 0")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight is {weight}; it takes a finite number of 0 or more")
    if not (weight or cross_entropy):
        raise ValueError("weight is 0 and cross_entropy is False; one term must stay")
    if teacher not in get_args(Teacher):
        raise ValueError(f"teacher is {teacher!r}; it takes one of {', '.join(get_args(Teacher))}")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}; it takes one of {', '.join(get_args(Reduction))}")


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    batch, _, classes, *trailing = logits.shape
    hard, soft = (batch, *trailing), (batch, classes, *trailing)
    if labels.is_floating_point() and labels.shape == soft:
        return
    if labels.dtype != torch.int64 or labels.shape != hard:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; "
            f"it takes {hard} of torch.int64 or {soft} of floats"
        )
    # Elsewhere the look would wait for the device; a GPU's gather stops by an assertion instead.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (labels < 0) | (labels >= classes)
        if outside.any():
            raise ValueError(
                f"labels has {int(outside.sum())} outside [0, {classes}), "
                f"first {int(labels[outside][0])}; it takes class indices"
            )
