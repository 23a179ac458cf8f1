"""Cross-entropy of every exit plus distillation from their ensemble."""

import math
from typing import get_args

import torch
from torch import Tensor, nn
from torch.func import debug_unwrap

from netfission.config import Reduction, Teacher
from netfission.ensemble import as_logits, ensemble_log_probabilities
from netfission.utils.errors import check_choice, check_positive, describe, invalid


def ensemble_distillation_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 3.0,
    weight: float = 1.0,
    cross_entropy: bool = True,
    teacher: Teacher = "logits",
    reduction: Reduction = "sum",
    ignore_index: int | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Return the loss that trains every exit on the labels and on the prediction of their ensemble.

    With exits' logits z_i, temperature T and teacher q = softmax(mean_i z_i / T), through which
    no gradient flows, the loss is

        sum_i CE(z_i, y) + weight * T^2 * sum_i KL(q || softmax(z_i / T)),

    summed over exits, averaged over the batch and trailing dimensions (Lee & Lee 2024, arXiv
    2408.02301). Computed in float32 or wider, under autocast too. With one exit the second term
    and its gradient vanish. It works under `torch.func.vmap`, on one example at a time.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point, finite.
        labels: class indices `(batch, ...)`, int64, or probabilities `(batch, classes, ...)`,
            floating point.
        temperature: T above, > 0; default 3, the paper's.
        weight: factor on the distillation term, >= 0; default 1. 0 leaves the term out.
        cross_entropy: whether the loss has the first term; default True.
        teacher: `"logits"` as above; `"probabilities"`: q = mean_i softmax(z_i / T) instead;
            `"others"`: each exit has its own teacher, the softmax of the mean logits of all exits
            but itself.
        reduction: over exits, `"sum"` as above or `"mean"`. With the mean, the weights that all exits share
            get as much gradient as a single network's, beside the same weight decay.
        ignore_index: label of what counts in neither term, such as void pixels; the mean is over the rest,
            and 0 without any other. Only with class indices as labels; default: all labels count.
        class_weights: `(classes,)`, floating point, >= 0: factor on the cross-entropy of the labels of each
            class, of which a weighted mean is taken. Only with class indices as labels; default: equal ones.

    Returns:
        The loss, a scalar of float32 or wider.

    Raises:
        ValueError: a setting is not valid, both terms are switched off, logits or labels have another
            layout, there is one class only, or `ignore_index` or `class_weights` are given with
            probabilities.
            A label outside [0, classes) is found on a CPU only, where the check costs no wait.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])  # two exits that disagree about one image
        >>> labels = torch.tensor([0])
        >>> ensemble_distillation_loss(logits, labels, weight=0.0)  # cross-entropy alone
        tensor(2.2539)
        >>> ensemble_distillation_loss(logits, labels)
        tensor(3.2359)
    """
    _check_settings(temperature, weight, cross_entropy, teacher, reduction)
    logits = as_logits(logits)
    _check_labels(labels, logits, ignore_index)
    _check_class_weights(class_weights, logits, labels)
    counts = None
    if ignore_index is not None:
        counts = labels != ignore_index
        labels = torch.where(counts, labels, 0)
    loss = logits.new_zeros(())
    if cross_entropy:
        # Cross-entropy is linear in the log-probabilities, so the sum over exits goes first.
        log_probabilities = logits.log_softmax(dim=2).sum(dim=1)
        if labels.is_floating_point():
            label_log_probabilities = (labels * log_probabilities).sum(dim=1)
        else:
            label_log_probabilities = log_probabilities.gather(1, labels.unsqueeze(1))
        values = label_log_probabilities.view(labels.shape[:1] + logits.shape[3:])
        weights = None if class_weights is None else class_weights.to(logits)[labels]
        loss = loss - _mean(values, counts, weights)
    if weight:
        softened = logits / temperature
        student = softened.log_softmax(dim=2)
        # The gradient through the paper's teacher would sum to zero over exits; detached it costs nothing.
        target = _teacher_log_probabilities(softened.detach(), teacher)
        loss = loss + weight * temperature**2 * _mean(_divergence(target, student), counts)
    return loss / logits.shape[1] if reduction == "mean" else loss


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, *, temperature: float = 3.0, counts: Tensor | None = None
) -> Tensor:
    """Return the loss that trains exits on the prediction of another network (Hinton et al. 2015).

    With exits' logits z_i, teacher's logits t and temperature T, it is T^2 * sum_i KL(softmax(t / T) ||
    softmax(z_i / T)), summed over exits, averaged over the batch and trailing dimensions. No gradient flows
    through the teacher.

    Args:
        logits: `(batch, exits, classes, ...)`, floating point.
        teacher_logits: `(batch, 1 or exits, classes, ...)`, floating point.
        temperature: T above, > 0; default 3.
        counts: `(batch, ...)`, bool: where the loss counts; the mean is over these, and 0 without any.
            Default everywhere.

    Returns:
        The loss, a scalar of float32 or wider.

    Raises:
        ValueError: the temperature is not positive, or logits have another layout.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[3.0, 0.0]]])
        >>> distillation_loss(student, teacher)
        tensor(0.9985)
        >>> distillation_loss(teacher, teacher)
        tensor(0.)
    """
    check_positive("temperature", temperature)
    logits, teacher_logits = as_logits(logits), as_logits(teacher_logits)
    target = (teacher_logits.detach() / temperature).log_softmax(dim=2).expand_as(logits)
    student = (logits / temperature).log_softmax(dim=2)
    return temperature**2 * _mean(_divergence(target, student), counts)


def _divergence(target: Tensor, student: Tensor) -> Tensor:
    """Return KL(target ‖ student) of log-probabilities, summed over exits, `(batch, ...)`."""
    divergence = target.exp() * (target - student)  # as F.kl_div, which vmap would run in a loop
    return divergence.sum(dim=(1, 2))


def _mean(values: Tensor, counts: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Return the mean of values `(batch, ...)`; `counts` is True where they count, None if all do.

    Args:
        values: of any floating-point dtype.
        counts: bool, of their shape.
        weights: of their shape, by which they are weighted; None for equal weights.
    """
    if weights is not None:
        weights = weights if counts is None else torch.where(counts, weights, 0)
        values = values if counts is None else torch.where(counts, values, 0)
        return (values * weights).sum() / weights.sum().clamp(min=torch.finfo(values.dtype).tiny)
    if counts is None:
        return values.mean()
    # Not a product, as values that do not count may be infinite or NaN.
    return torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)


class EnsembleDistillationLoss(nn.Module):
    """`ensemble_distillation_loss` as a module that holds the settings.

    Arguments, defaults and errors are those of the function.

    Example:
        >>> loss = EnsembleDistillationLoss(temperature=4.0, reduction="mean")
        >>> loss(torch.zeros(2, 3, 10), torch.tensor([1, 7]))  # log 10
        tensor(2.3026)
    """

    def __init__(
        self,
        temperature: float = 3.0,
        weight: float = 1.0,
        cross_entropy: bool = True,
        teacher: Teacher = "logits",
        reduction: Reduction = "sum",
        ignore_index: int | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        """Check and store the settings."""
        super().__init__()
        _check_settings(temperature, weight, cross_entropy, teacher, reduction)
        self.temperature = temperature
        self.weight = weight
        self.cross_entropy = cross_entropy
        self.teacher = teacher
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.class_weights = class_weights

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits `(batch, exits, classes, ...)` for hard or soft labels."""
        return ensemble_distillation_loss(
            logits,
            labels,
            temperature=self.temperature,
            weight=self.weight,
            cross_entropy=self.cross_entropy,
            teacher=self.teacher,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            class_weights=self.class_weights,
        )

    def extra_repr(self) -> str:
        """Return the settings as the module's printed form shows them."""
        void = "" if self.ignore_index is None else f", ignore_index={self.ignore_index}"
        void += "" if self.class_weights is None else f", class_weights={self.class_weights.tolist()}"
        return (
            f"temperature={self.temperature}, weight={self.weight}, cross_entropy={self.cross_entropy}, "
            f"teacher={self.teacher!r}, reduction={self.reduction!r}{void}"
        )


def _teacher_log_probabilities(softened: Tensor, teacher: Teacher) -> Tensor:
    """Return the log-probabilities of each exit's teacher, `(batch, 1 or exits, classes, ...)`.

    Args:
        softened: logits divided by the temperature, `(batch, exits, classes, ...)`.
        teacher: see `ensemble_distillation_loss`.
    """
    exits = softened.shape[1]
    if teacher != "others":
        return ensemble_log_probabilities(softened, teacher).unsqueeze(1)
    if exits == 1:  # there are no others
        return softened.log_softmax(dim=2)
    others = softened.sum(dim=1, keepdim=True) - softened
    return (others / (exits - 1)).log_softmax(dim=2)


def _check_settings(
    temperature: float, weight: float, cross_entropy: bool, teacher: str, reduction: str
) -> None:
    check_positive("temperature", temperature)
    if not 0 <= weight < math.inf:
        raise invalid("weight", "a finite number of at least 0", weight)
    if not (weight or cross_entropy):
        raise invalid("weight", "above 0 if cross_entropy is False", weight)
    check_choice("teacher", teacher, get_args(Teacher))
    check_choice("reduction", reduction, get_args(Reduction))


def _check_labels(labels: Tensor, logits: Tensor, ignore_index: int | None) -> None:
    batch, _, classes, *trailing = logits.shape
    hard, soft = (batch, *trailing), (batch, classes, *trailing)
    if labels.is_floating_point() and labels.shape == soft:
        if ignore_index is not None:
            raise invalid("ignore_index", "None with probabilities as labels", ignore_index)
        return
    if labels.dtype != torch.int64 or labels.shape != hard:
        raise invalid("labels", f"int64 of shape {hard} or floats of shape {soft}", found=describe(labels))
    # A GPU's gather stops by an assertion instead.
    if (values := readable_values(labels)) is not None:
        wrong = (values < 0) | (values >= classes)
        outside = values[wrong if ignore_index is None else wrong & (values != ignore_index)]
        if len(outside):
            found = f"{int(outside[0])} ({len(outside)} of {values.numel()} labels out of range)"
            raise invalid("labels", f"class indices from 0 to {classes - 1}", found=found)


def _check_class_weights(weights: Tensor | None, logits: Tensor, labels: Tensor) -> None:
    if weights is None:
        return
    classes = logits.shape[2]
    if labels.is_floating_point():
        raise invalid("class_weights", "None with probabilities as labels", found=describe(weights))
    if weights.shape != (classes,) or not weights.is_floating_point():
        raise invalid("class_weights", f"floats of shape ({classes},)", found=describe(weights))
    values = readable_values(weights)
    if values is not None and not (values.isfinite() & (values >= 0)).all():
        raise invalid("class_weights", "finite and at least 0", found=f"{values.min():g} to {values.max():g}")


def readable_values(tensor: Tensor) -> Tensor | None:
    """Return the values of a tensor to check them, or None where a check would wait or is not possible.

    It would wait for another device than the CPU. It is not possible while a graph is compiled, or for
    tensors that hold no values. Under `torch.func.vmap` the values are those of all examples at once.

    Example:
        >>> readable_values(torch.ones(2)), readable_values(torch.ones(2, device="meta"))
        (tensor([1., 1.]), None)
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    values = debug_unwrap(tensor)
    return values if type(values) is Tensor else None  # others, such as FakeTensor, may hold no values
