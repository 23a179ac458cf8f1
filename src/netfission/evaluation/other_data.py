"""Figures of a network on another data set than the one it was trained on."""

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Literal

from netfission.evaluation.evaluate import Evaluation
from netfission.evaluation.reliability import ReliabilityReport


@dataclass(frozen=True)
class OtherFigures(ABC):
    """What a file in `evaluations/` holds of any task: figures of a run's network on another data set.

    Attributes:
        data: name of the data set, or the full path of its folder or table.
        split: which of its images were evaluated.
        classes: the classes of these images, in the network's order, see
            `netfission.data.matched.MatchedImages`.
        left_out: number of images that cannot be read.
    """

    data: str
    split: Literal["train", "validation", "test", "all"]
    classes: list[str]
    left_out: int

    @property
    @abstractmethod
    def n(self) -> int:
        """Number of images."""

    @abstractmethod
    def table(self, linear: int = 0) -> str:
        """Return the figures as plain text; the last `linear` exits are linear ones."""

    def to_json(self) -> str:
        """Return the figures as JSON text, every digit kept."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def title(self, known: int, noun: str = "classes") -> str:
        """Return what was evaluated in one line.

        Args:
            known: number of the classes that the network knows.
            noun: what they are.
        """
        images = f"{'all ' if self.split == 'all' else ''}{self.n} images"
        if self.split != "all":
            images += f" of the {self.split} split"
        left_out = f" ({self.left_out} more cannot be read)" if self.left_out else ""
        return (
            f"{self.data}, which is not the run's own data set: {images}{left_out}, "
            f"{len(self.classes)} of the network's {known} {noun}"
        )


@dataclass(frozen=True)
class OtherEvaluation(OtherFigures):
    """Figures of a classifier on another data set than its own.

    Attributes:
        evaluation: metrics on these images.
        reliability: the same at the run's own temperature, and with its own thresholds for abstention.

    Example:
        >>> import torch
        >>> from netfission.evaluation import evaluate_logits
        >>> logits, labels = torch.zeros(4, 2, 3), torch.zeros(4, dtype=torch.int64)
        >>> reliability = ReliabilityReport.from_logits(
        ...     logits, labels, ["ant", "bee", "cow"], calibration=None, average="logits"
        ... )
        >>> evaluation = evaluate_logits(logits, labels, average="logits")
        >>> figures = OtherEvaluation("/b", "all", ["ant"], 0, evaluation, reliability)
        >>> figures.title(known=3)
        "/b, which is not the run's own data set: all 4 images, 1 of the network's 3 classes"
    """

    evaluation: Evaluation
    reliability: ReliabilityReport

    @property
    def n(self) -> int:
        """Number of images."""
        return self.evaluation.n

    def table(self, linear: int = 0) -> str:
        """Return the metrics, and two lines of reliability."""
        return f"{self.evaluation.table(linear)}\n{self.reliability.summary()}"
