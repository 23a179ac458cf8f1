"""What a network's exits, and their ensemble, are worth on labelled images."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import Tensor, nn

from netfission.ensemble import (
    Average,
    as_logits,
    disagreement,
    ensemble_log_probabilities,
    mutual_information,
    predictive_entropy,
)
from netfission.evaluation.metrics import classification_metrics
from netfission.utils.modes import in_mode
from netfission.utils.typed import typed

_IN_PERCENT = {"top1", "top5", "ece"}  # in table() alone


@dataclass(frozen=True)
class Evaluation:
    """Figures of one network on one labelled set.

    Attributes:
        n: Number of examples.
        average: What the ensemble averages over exits.
        exits: `classification_metrics` of every exit, exit 0 first.
        ensemble: `classification_metrics` of the ensemble.
        disagreement: Share of pairs of exits that predict different classes, mean over examples.
        predictive_entropy: Of the ensemble, in nats, mean over examples.
        mutual_information: Of class and exit, in nats, mean over examples.
    """

    n: int
    average: Average
    exits: list[dict[str, float]]
    ensemble: dict[str, float]
    disagreement: float
    predictive_entropy: float
    mutual_information: float

    def to_json(self) -> str:
        """Give the figures as JSON text, every digit kept."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; ValueError where it is not that."""
        return typed(cls, json.loads(text))

    def table(self) -> str:
        """Give the figures as aligned plain text, a line per exit and one for the ensemble."""
        rows = {f"exit {i}": metrics for i, metrics in enumerate(self.exits)}
        rows["ensemble"] = self.ensemble
        names = list(self.ensemble)
        lines = [f"{'':8}" + "".join(f"{_heading(name):>10}" for name in names)]
        for row, metrics in rows.items():
            lines.append(f"{row:8}" + "".join(f"{_cell(name, metrics):>10}" for name in names))
        lines.append(
            f"{self.n} examples, ensemble by mean of {self.average}: "
            f"disagreement {100 * self.disagreement:.2f} %, "
            f"predictive entropy {self.predictive_entropy:.4f} nats, "
            f"mutual information {self.mutual_information:.4f} nats"
        )
        return "\n".join(lines)


def collect_logits(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Run a network in eval mode, without gradients, over labelled batches.

    Args:
        network: On `device`; images to `(batch, exits, classes)` logits, or `(batch, classes)`,
            which counts as one exit. Its modules' training modes are put back afterwards.
        batches: Pairs of images and labels `(batch,)`; moved to `device` one by one.
        device: Where the network is; default the CPU.

    Returns:
        Logits `(n, exits, classes)`, float32, and labels `(n,)`, both on the CPU.

    Raises:
        ValueError: No batches, or an output of another layout.
    """
    all_logits, all_labels = [], []
    # Not inference_mode: what a network or loader caches here must still serve in training.
    with in_mode(network, training=False), torch.no_grad():
        for images, labels in batches:
            logits = network(images.to(device))
            if logits.ndim == 2:
                logits = logits.unsqueeze(1)
            if logits.ndim != 3:
                raise ValueError(
                    f"network gives shape {tuple(logits.shape)}; "
                    "it must give (batch, exits, classes) or (batch, classes)"
                )
            all_logits.append(logits.float().cpu())
            all_labels.append(labels.cpu())
    if not all_logits:
        raise ValueError("batches is empty; it takes at least one batch")
    return torch.cat(all_logits), torch.cat(all_labels)


def evaluate_logits(logits: Tensor, labels: Tensor, average: Average = "logits") -> Evaluation:
    """Evaluate every exit and their ensemble.

    Args:
        logits: `(n, exits, classes)`, floating point.
        labels: `(n,)`, int64, in [0, classes).
        average: What the ensemble averages; see `ensemble_log_probabilities`.

    Returns:
        The figures.

    Raises:
        ValueError: Logits or labels of another layout, labels out of range, an unknown average,
            or logits that are not finite, with the number of such examples.
    """
    logits = as_logits(logits)
    if logits.ndim != 3:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it takes (n, exits, classes)")
    broken = ~logits.isfinite().all(dim=2).all(dim=1)
    if broken.any():
        raise ValueError(
            f"logits has NaN or infinity in {int(broken.sum())} of {len(broken)} examples; "
            "it takes finite numbers"
        )
    return Evaluation(
        n=len(logits),
        average=average,
        exits=[
            classification_metrics(of_exit.log_softmax(dim=1), labels) for of_exit in logits.unbind(dim=1)
        ],
        ensemble=classification_metrics(ensemble_log_probabilities(logits, average), labels),
        disagreement=_mean(disagreement(logits)),
        predictive_entropy=_mean(predictive_entropy(logits, average)),
        mutual_information=_mean(mutual_information(logits)),
    )


def _mean(per_example: Tensor) -> float:
    return per_example.double().mean().item()


def _heading(name: str) -> str:
    return f"{name} %" if name in _IN_PERCENT else name


def _cell(name: str, metrics: dict[str, float]) -> str:
    return f"{100 * metrics[name]:.2f}" if name in _IN_PERCENT else f"{metrics[name]:.4f}"
