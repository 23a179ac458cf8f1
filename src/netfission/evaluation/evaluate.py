"""Evaluate a network's exits and their ensemble on labelled images."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import Tensor, nn

from netfission.ensemble import (
    Average,
    AverageRule,
    as_logits,
    describe_average,
    disagreement,
    ensemble_log_probabilities,
    mutual_information,
    predictive_entropy,
)
from netfission.evaluation.metrics import classification_metrics
from netfission.utils.checksums import parse_json
from netfission.utils.errors import check_finite, describe, invalid
from netfission.utils.modes import in_mode
from netfission.utils.text import decimal, exit_names, percent
from netfission.utils.typed import typed

_IN_PERCENT = {"top1", "top5", "ece", "adaptive_ece", "class_wise_ece", "smooth_ece"}  # in table() alone
_SHORT = {"adaptive_ece": "aECE", "class_wise_ece": "cwECE", "smooth_ece": "smECE"}  # there, too


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one network on one labelled set of images.

    Attributes:
        n: number of examples.
        average: what the ensemble averages over exits, by its method.
        exits: `classification_metrics` of every exit, exit 0 first.
        ensemble: `classification_metrics` of the ensemble.
        disagreement: share of pairs of exits that predict different classes, mean over examples.
        mutual_information: of class and exit, in nats, mean over examples. It is defined by the mean of the
            exits' probabilities, whatever the ensemble averages.
        predictive_entropy: the entropy of the mean of the exits' probabilities, of which the mutual
            information is a part; in nats, mean over examples. None in evaluations of older versions, which
            took the entropy of the ensemble's own probabilities.
        other_average: `classification_metrics` of the same exits by the other rule. None in evaluations of
            older versions.

    Example:
        >>> labels = torch.zeros(4, dtype=torch.int64)
        >>> evaluation = evaluate_logits(torch.zeros(4, 2, 3), labels, average="logits")
        >>> Evaluation.from_json(evaluation.to_json()) == evaluation
        True
    """

    n: int
    average: Average
    exits: list[dict[str, float]]
    ensemble: dict[str, float]
    disagreement: float
    mutual_information: float
    predictive_entropy: float | None = None
    other_average: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.other_average is None:  # written by an older version
            object.__setattr__(self, "predictive_entropy", None)

    def to_json(self) -> str:
        """Return the figures as JSON text, every digit kept."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, or a run's file, which also says of which `weights` they are.

        Raises:
            ValueError: the text is not JSON, or a value is missing, unknown or of another type.
        """
        return typed(cls, parse_json(text, ("weights",)))

    def by_exit(self, linear: int = 0) -> dict[str, dict[str, float]]:
        """Return the metrics of each exit by its name; the last `linear` ones are linear exits."""
        return dict(zip(exit_names(len(self.exits), linear), self.exits, strict=True))

    def table(self, linear: int = 0) -> str:
        """Return the figures as aligned plain text, one line per exit and one or two for the ensemble.

        Args:
            linear: number of linear exits, which come last.
        """
        rows = self.by_exit(linear)
        rows["ensemble"] = self.ensemble
        if self.other_average is not None and len(self.exits) > 1:
            rows[f"by mean of {other_rule(self.average)}"] = self.other_average
        names, width = list(self.ensemble), max(map(len, rows))
        lines = [f"{'':{width}}" + "".join(f"{_heading(name):>10}" for name in names)]
        for row, metrics in rows.items():
            lines.append(f"{row:{width}}" + "".join(f"{_cell(name, metrics):>10}" for name in names))
        entropy = "" if self.predictive_entropy is None else f" of {self.predictive_entropy:.4f} nats"
        lines += [
            f"{self.n} examples, ensemble by mean of {describe_average(self.average)}: disagreement "
            f"{percent(self.disagreement)} %, mutual information {self.mutual_information:.4f}{entropy} "
            "(by mean of probabilities)"
        ]
        return "\n".join(lines)


def run_batches(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    take: Callable[[Tensor, Tensor], object],
    device: torch.device | str = "cpu",
) -> None:
    """Run a network in eval mode, without gradients, over batches.

    Args:
        network: on `device`; images → outputs `(batch, exits, …)`, or `(batch, outputs)`, which counts as one
            exit. The modes of its modules are restored afterwards.
        batches: pairs of images and targets; images are moved to `device` one batch at a time.
        take: called with the outputs for each batch, on `device`, and its targets.
        device: where the network is; default the CPU.

    Example:
        >>> batches = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))] * 2
        >>> run_batches(nn.Linear(3, 4), batches, lambda outputs, targets: print(outputs.shape))
        torch.Size([2, 1, 4])
        torch.Size([2, 1, 4])
    """
    # Not inference_mode: tensors that a network or loader caches must still work in training.
    with in_mode(network, training=False), torch.no_grad():
        for images, targets in batches:
            outputs = network(images.to(device))
            take(outputs.unsqueeze(1) if outputs.ndim == 2 else outputs, targets)


def collect_logits(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Run a network in eval mode, without gradients, over labelled batches.

    Args:
        network: on `device`; images → logits `(batch, exits, classes)`, or `(batch, classes)`, which counts
            as one exit. The modes of its modules are restored afterwards.
        batches: pairs of images and labels `(batch,)`; moved to `device` one by one.
        device: where the network is; default the CPU.

    Returns:
        Logits `(n, exits, classes)`, float32, and labels `(n,)`, both on the CPU.

    Raises:
        ValueError: there are no batches, or the output has another shape.

    Example:
        >>> batches = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))] * 5
        >>> logits, labels = collect_logits(nn.Linear(3, 4), batches)
        >>> logits.shape, labels.shape
        (torch.Size([10, 1, 4]), torch.Size([10]))
    """
    all_logits: list[Tensor] = []
    all_labels: list[Tensor] = []

    def take(logits: Tensor, labels: Tensor) -> None:
        if logits.ndim != 3:
            expected = "of shape (batch, exits, classes) or (batch, classes)"
            raise invalid("the network's output", expected, found=describe(logits))
        all_logits.append(logits.float().cpu())
        all_labels.append(labels.cpu())

    run_batches(network, batches, take, device)
    if not all_logits:
        raise invalid("batches", "at least one batch", found="none")
    return torch.cat(all_logits), torch.cat(all_labels)


def evaluate_logits(logits: Tensor, labels: Tensor, *, average: Average) -> Evaluation:
    """Evaluate every exit and their ensemble.

    Args:
        logits: `(n, exits, classes)`, floating point.
        labels: `(n,)`, int64, in [0, classes).
        average: what the ensemble averages, by its method (`Method.average_of`).

    Raises:
        ValueError: logits or labels have another shape or dtype, labels are out of range, the average is
            unknown, or logits are not finite.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])  # two exits that disagree about one image
        >>> evaluation = evaluate_logits(logits, torch.tensor([0]), average="logits")
        >>> [metrics["top1"] for metrics in evaluation.exits], evaluation.ensemble["top1"]
        ([1.0, 0.0], 1.0)
    """
    logits = as_logits(logits)
    if logits.ndim != 3:
        raise invalid("logits", "of shape (n, exits, classes)", found=describe(logits))
    check_finite("logits", logits, "examples")
    return Evaluation(
        n=len(logits),
        average=average,
        exits=[
            classification_metrics(exit_logits.log_softmax(dim=1), labels)
            for exit_logits in logits.unbind(dim=1)
        ],
        ensemble=classification_metrics(ensemble_log_probabilities(logits, average), labels),
        disagreement=_mean(disagreement(logits)),
        mutual_information=_mean(mutual_information(logits)),
        predictive_entropy=_mean(predictive_entropy(logits, "probabilities")),
        other_average=classification_metrics(ensemble_log_probabilities(logits, other_rule(average)), labels),
    )


def other_rule(average: Average) -> AverageRule:
    """Return the rule that an average is compared with: logits with equal weights, if it is another one.

    Example:
        >>> other_rule("logits"), other_rule((1.0, 0.5))
        ('probabilities', 'logits')
    """
    return "probabilities" if average == "logits" else "logits"


def _mean(per_example: Tensor) -> float:
    return per_example.double().mean().item()


def _heading(name: str) -> str:
    short = _SHORT.get(name, name)
    return f"{short} %" if name in _IN_PERCENT else short


def _cell(name: str, metrics: dict[str, float]) -> str:
    return percent(metrics[name]) if name in _IN_PERCENT else decimal(metrics[name], 4)
