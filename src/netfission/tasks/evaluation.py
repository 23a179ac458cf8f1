"""The measures of a network whose images do not have one class each."""

import json
from dataclasses import asdict, dataclass, field
from typing import Self

from netfission.data.summary import listing
from netfission.ensemble import Average, describe_average
from netfission.evaluation.other_data import OtherFigures
from netfission.utils.checksums import parse_json
from netfission.utils.text import decimal, exit_names, percent, printable
from netfission.utils.typed import typed

_IN_PERCENT = {  # as people read them
    "map",
    "f1",
    "ece",
    "coverage",
    "mean_iou",
    "pixel_accuracy",
    "error_auroc",
    "aurc",
    "iou",
}
_SHORT = {  # there, too
    "map": "mAP",
    "f1": "F1",
    "mean_iou": "mIoU",
    "pixel_accuracy": "acc.",
    "error_auroc": "AUROC",
    "aurc": "AURC",
    "iou": "IoU",
}
_LONG = _SHORT | {
    "nll": "NLL",
    "ece": "ECE",
    "crps": "CRPS",
    "rmse": "RMSE",
    "mae": "MAE",
    "brier": "Brier score",
    "pixel_accuracy": "accuracy",
    "error_auroc": "AUROC of errors",
}


def measure_title(name: str) -> str:
    """Return the title of a measure as a heading of a column, with its unit if that is %.

    Example:
        >>> measure_title("mean_iou"), measure_title("nll")
        ('mIoU, %', 'NLL')
    """
    title = _LONG.get(name, name)
    return f"{title}, %" if name in _IN_PERCENT else title


def measure_factor(name: str) -> float:
    """Return by what a measure is multiplied for people: 100 if its unit is %, else 1.

    Example:
        >>> measure_factor("mean_iou"), measure_factor("nll")
        (100.0, 1.0)
    """
    return 100.0 if name in _IN_PERCENT else 1.0


def measure_number(name: str, value: float | None) -> str:
    """Return the value of a measure for a cell of a table; a dash if it is not defined.

    Example:
        >>> measure_number("mean_iou", 0.5), measure_number("nll", 0.5), measure_number("nll", None)
        ('50.00', '0.5000', '–')
    """
    return _cell(name, value) or "–"


def shown_measure(name: str, value: float | None) -> str:
    """Return a measure in words.

    Example:
        >>> shown_measure("mean_iou", 0.5), shown_measure("mae", 0.25)
        ('mIoU 50.00 %', 'MAE 0.2500')
    """
    unit = " %" if name in _IN_PERCENT and value is not None else ""
    return f"{_LONG.get(name, name)} {measure_number(name, value)}{unit}"


@dataclass(frozen=True)
class TargetEvaluation:
    """Measures of one network on one set of images with targets.

    Attributes:
        n: number of images.
        average: what the ensemble averages over exits, by its method.
        exits: measures of every exit, exit 0 first.
        ensemble: measures of the ensemble.
        by_target: target → measures of the ensemble for it alone.
        uncertainty: mean over images and targets of the ensemble's total uncertainty and of its part from
            disagreement.
        calibrated: measures of the ensemble with what was learned from validation images; None without them.
        rule: how the exits make one prediction, in words; empty for the mean that `average` names.

    Example:
        >>> evaluation = TargetEvaluation(4, "logits", [{"nll": 0.5}], {"nll": 0.5}, {}, {})
        >>> TargetEvaluation.from_json(evaluation.to_json()) == evaluation
        True
        >>> print(evaluation.table())
                         nll
        exit 0        0.5000
        ensemble      0.5000
        4 images, ensemble by mean of logits
    """

    n: int
    average: Average
    exits: list[dict[str, float]]
    ensemble: dict[str, float]
    by_target: dict[str, dict[str, float]]
    uncertainty: dict[str, float]
    calibrated: dict[str, float] | None = None
    rule: str = ""

    def to_json(self) -> str:
        """Return the figures as JSON text, every digit kept."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, or a run's file, which also says of which `weights` they are.

        Raises:
            ValueError: the text is not JSON, or a value is missing, unknown or of another type.
        """
        return typed(cls, parse_json(text, ("weights",)))

    def table(self, linear: int = 0) -> str:
        """Return the figures as aligned plain text.

        Args:
            linear: number of linear exits, which come last.
        """
        # Not a dictionary, as a target may be named "ensemble".
        rows = list(zip(exit_names(len(self.exits), linear), self.exits, strict=True))
        rows.append(("ensemble", self.ensemble))
        if self.calibrated is not None:
            rows.append(("calibrated", self.calibrated))
        if len(self.by_target) > 1:
            rows += [(printable(name), measures) for name, measures in self.by_target.items()]
        names = list(dict.fromkeys(name for _, measures in rows for name in measures))
        width = max(len(row) for row, _ in rows)
        lines = [f"{'':{width}}" + "".join(f"{_heading(name):>12}" for name in names)]
        for row, measures in rows:
            cells = (_cell(name, measures.get(name)) for name in names)
            lines.append((f"{row:{width}}" + "".join(f"{cell:>12}" for cell in cells)).rstrip())
        parts = [f"{name.replace('_', ' ')} {decimal(value, 4)}" for name, value in self.uncertainty.items()]
        rule = self.rule or f"mean of {describe_average(self.average)}"
        described = ", ".join([f"ensemble by {rule}", *parts])
        return "\n".join([*lines, f"{self.n} images, {described}"])


@dataclass(frozen=True)
class OtherTargetEvaluation(OtherFigures):
    """Figures of a network of labels, numbers or pixels on another data set than its own.

    Attributes:
        evaluation: measures on these images, calibrated as the network is.
        unknown: labels or numbers of the table that the network does not know and that are left out.

    Example:
        >>> evaluation = TargetEvaluation(4, "logits", [{"nll": 0.5}], {"nll": 0.5}, {}, {})
        >>> figures = OtherTargetEvaluation("b.csv", "all", ["car"], 0, evaluation, ["van"])
        >>> figures.title(known=3, noun="labels").partition(": ")[2]
        "all 4 images, 1 of the network's 3 labels; left out, as it does not know them: van"
    """

    evaluation: TargetEvaluation
    unknown: list[str] = field(default_factory=list)

    @property
    def n(self) -> int:
        """Number of images."""
        return self.evaluation.n

    def table(self, linear: int = 0) -> str:
        """Return the measures as aligned plain text."""
        return self.evaluation.table(linear)

    def title(self, known: int, noun: str = "classes") -> str:
        """Return what was evaluated in one line, see `OtherFigures.title`."""
        title = super().title(known, noun)
        if not self.unknown:
            return title
        return f"{title}; left out, as it does not know them: {listing(self.unknown)}"


def _heading(name: str) -> str:
    shown = _SHORT.get(name, name)
    return f"{shown} %" if name in _IN_PERCENT else shown


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return percent(value) if name in _IN_PERCENT else decimal(value, 4)
