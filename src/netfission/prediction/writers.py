"""Predictions as a table, as CSV or as JSON lines, one line per image."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from netfission.classifier import AnswerLimits, Classifier
from netfission.evaluation.calibration import VALIDATION, count_images
from netfission.evaluation.conformal import SetScore
from netfission.evaluation.p_values import DetectorScore
from netfission.evaluation.selective import describe_risk
from netfission.prediction.images import Failure, ImagePrediction
from netfission.utils.text import printable, rounded, unsaturated

_FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # how they begin in spreadsheets
_UNCERTAINTIES = ("disagreement", "entropy", "mutual_information")


@dataclass(frozen=True)
class Layout:
    """What is written of each prediction.

    Attributes:
        classes: names of the classes.
        exits: number of exits.
        risk: accepted share of wrong answers; None if nothing is said of abstaining.
        threshold: probability below which the ensemble abstains; None without a risk.
        probabilities: whether the probabilities of all classes are written.
        images: number of characters of the longest file name, as `printable`.
        fitted_on: the images that the threshold is from, in words.
        calibration_images: their number; 0 if there is no calibration.
        delta: probability that risk or coverage does not hold; None without a bound.
        coverage: least share of prediction sets that contain the label; None without sets.
        score: by which classes enter a set.
        class_wise: whether the coverage is that of the images of each class.
        detector: score that p-values are of; None without p-values.
        accept_false_alarms: share of images that may be marked falsely; None if none is marked.

    Example:
        >>> layout = Layout(["cat", "dog"], 2, risk=0.05, threshold=0.9, probabilities=False, images=5)
        >>> print(next(Table(layout).footer()).partition(",")[0])
        abstains if p is below the threshold (0.900)
    """

    classes: Sequence[str]
    exits: int
    risk: float | None
    threshold: float | None
    probabilities: bool
    images: int
    fitted_on: str = VALIDATION
    calibration_images: int = 0
    delta: float | None = None
    coverage: float | None = None
    score: SetScore = "lac"
    class_wise: bool = False
    detector: DetectorScore | None = None
    accept_false_alarms: float | None = None

    @classmethod
    def from_classifier(
        cls,
        classifier: Classifier,
        images: Iterable[Path | Failure],
        *,
        limits: AnswerLimits,
        probabilities: bool,
    ) -> Self:
        """Return the layout for the predictions of a classifier; see `predict_images`."""
        example = torch.zeros(1, *classifier.spec.shape, dtype=torch.uint8)
        calibration = classifier.calibration
        names = (image.image if isinstance(image, Failure) else image for image in images)
        return cls(
            classes=classifier.spec.classes,
            exits=classifier.logits(example).shape[1],
            risk=limits.risk,
            threshold=limits.threshold,
            probabilities=probabilities,
            images=max(len(printable(name)) for name in names),
            fitted_on=VALIDATION if calibration is None else calibration.fitted_on,
            calibration_images=0 if calibration is None else calibration.n,
            delta=limits.delta,
            coverage=limits.coverage,
            score=limits.score,
            class_wise=limits.class_wise,
            detector=None if limits.detector is None else limits.detector.score,
            accept_false_alarms=limits.accept_false_alarms,
        )


class Writer:
    """Writes predictions as lines, without line ends.

    Attributes:
        for_people: whether the lines are `printable` text, for terminals of any encoding; else programs read
            them, and names of files are as Python has them.

    Example:
        >>> layout = Layout(["cat", "dog"], 2, risk=None, threshold=None, probabilities=False, images=5)
        >>> writer = FORMATS["csv"](layout)
        >>> for line in writer.header():
        ...     print(line)
        image,class,probability,exit_0,exit_1,disagreement,entropy,mutual_information,error
        >>> print(writer.line(Failure(Path("a.png"), "no such file or directory")))
        a.png,,,,,,,,no such file or directory
    """

    for_people = False

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def header(self) -> Iterator[str]:
        """Return the lines before the first prediction."""
        return iter(())

    def line(self, prediction: ImagePrediction | Failure) -> str:
        """Return the line of an image."""
        raise NotImplementedError

    def footer(self) -> Iterator[str]:
        """Return the lines after the last prediction."""
        return iter(())


class JsonLines(Writer):
    """One JSON object per line; an image without a prediction has only `image` and `error`."""

    def line(self, prediction: ImagePrediction | Failure) -> str:
        """Return the line of an image."""
        record: dict[str, Any] = {"image": str(prediction.image)}
        if isinstance(prediction, Failure):
            return json.dumps(record | {"error": prediction.error})
        record |= {
            "class": prediction.name,
            "probability": six_digits(prediction.probability),
            "votes": prediction.votes,
        }
        record |= {name: six_digits(getattr(prediction, name)) for name in _UNCERTAINTIES}
        if self.layout.risk is not None:
            record["abstain"] = prediction.abstain
        if self.layout.delta is not None:
            record |= {"risk": self.layout.risk, "delta": self.layout.delta}
        if self.layout.coverage is not None:
            record |= {"set": prediction.classes, "coverage": self.layout.coverage}
            record |= {"score": self.layout.score, "class_wise": self.layout.class_wise}
        if self.layout.detector is not None and prediction.p_value is not None:
            record |= {"p_value": six_digits(prediction.p_value), "detector": self.layout.detector}
        if self.layout.accept_false_alarms is not None:
            record["out_of_distribution"] = prediction.out_of_distribution
            record["accept_false_alarms"] = self.layout.accept_false_alarms
        if self.layout.probabilities:
            record["probabilities"] = {
                name: six_digits(share) for name, share in prediction.probabilities.items()
            }
        return json.dumps(record)


class Csv(Writer):
    """Comma-separated values; an image without a prediction has only `image` and `error`, the last column.

    A prediction set is a JSON list in one cell, as names of classes may hold any character. Text that a
    spreadsheet would run as a formula, such as a class named `=1+1`, has an apostrophe before it.
    """

    def header(self) -> Iterator[str]:
        """Return the names of the columns."""
        yield comma_separated(self._columns())

    def line(self, prediction: ImagePrediction | Failure) -> str:
        """Return the line of an image."""
        if isinstance(prediction, Failure):
            empty = len(self._columns()) - 2
            return comma_separated([str(prediction.image), *[""] * empty, prediction.error])
        cells = [
            str(prediction.image),
            prediction.name,
            six_digits(prediction.probability),
            *prediction.votes,
        ]
        cells += [six_digits(getattr(prediction, name)) for name in _UNCERTAINTIES]
        if self.layout.risk is not None:
            cells.append(int(bool(prediction.abstain)))
        if self.layout.delta is not None:
            cells += [self.layout.risk, self.layout.delta]
        if self.layout.coverage is not None:
            cells += [json.dumps(prediction.classes, ensure_ascii=False), self.layout.coverage]
            cells += [self.layout.score, int(self.layout.class_wise)]
        if self.layout.detector is not None and prediction.p_value is not None:
            cells += [six_digits(prediction.p_value), self.layout.detector]
        if self.layout.accept_false_alarms is not None:
            cells += [int(bool(prediction.out_of_distribution)), self.layout.accept_false_alarms]
        if self.layout.probabilities:
            cells += map(six_digits, prediction.probabilities.values())
        return comma_separated([*cells, ""])

    def _columns(self) -> list[str]:
        votes = [f"exit_{index}" for index in range(self.layout.exits)]
        abstain = ["abstain"] if self.layout.risk is not None else []
        abstain += ["risk", "delta"] if self.layout.delta is not None else []
        abstain += ["set", "coverage", "score", "class_wise"] if self.layout.coverage is not None else []
        abstain += ["p_value", "detector"] if self.layout.detector is not None else []
        if self.layout.accept_false_alarms is not None:
            abstain += ["out_of_distribution", "accept_false_alarms"]
        shares = [f"p_{name}" for name in self.layout.classes] if self.layout.probabilities else []
        return ["image", "class", "probability", *votes, *_UNCERTAINTIES, *abstain, *shares, "error"]


class Table(Writer):
    """Aligned columns of `printable` text, as wide as the longest file name and class name."""

    for_people = True

    def header(self) -> Iterator[str]:
        """Return the titles of the columns."""
        exits = [f"exit {index}" for index in range(self.layout.exits)]
        uncertainties = ["disagree", "entropy", "mutual inf."]
        if self.layout.detector is not None:
            uncertainties.append("p-value")
        yield self._aligned("image", "class", "p", exits, uncertainties, "outside", "abstain", "set")

    def line(self, prediction: ImagePrediction | Failure) -> str:
        """Return the line of an image."""
        image = printable(prediction.image)
        if isinstance(prediction, Failure):
            return f"{image:{self.layout.images}}  error: {printable(prediction.error)}"
        uncertainties = [rounded(getattr(prediction, name), 3) for name in _UNCERTAINTIES]
        if prediction.p_value is not None:
            uncertainties.append(rounded(prediction.p_value, 3))
        outside = "yes" if prediction.out_of_distribution else ""
        probability = rounded(unsaturated(prediction.probability), 3, most=1)
        abstain = "yes" if prediction.abstain else ""
        name, *votes = map(printable, (prediction.name, *prediction.votes))
        classes = ", ".join(map(printable, prediction.classes)) or "(empty)"
        return self._aligned(image, name, probability, votes, uncertainties, outside, abstain, classes)

    def footer(self) -> Iterator[str]:
        """Return what is promised of sets, marks and answers, and the threshold below which it abstains."""
        risk, threshold, images = self.layout.risk, self.layout.threshold, self._calibration_images()
        if self.layout.coverage is not None:
            yield self._covered(self.layout.coverage, images)
        if self.layout.accept_false_alarms is not None:
            yield self._marked(self.layout.accept_false_alarms, images)
        if risk is None or threshold is None:
            return
        kept = describe_risk(risk, self.layout.fitted_on)
        if self.layout.delta is not None:
            yield self._bounded(risk, threshold, images)
            return
        if threshold > 1:
            yield f"abstains on every image: no threshold of p keeps {kept}"
        else:
            shown = rounded(threshold, 3, most=1)
            yield f"abstains if p is below the threshold ({shown}), which keeps {kept}"

    def _covered(self, coverage: float, images: str) -> str:
        chance = self._chance() if self.layout.delta is not None else "on average"
        whose = "the images"
        if self.layout.class_wise:
            whose, chance = "the images of each class", f"for each class {chance}"
        share = f"{100 * coverage:g} %"
        promise = f"sets contain the true class of at least {share} of {whose}"
        return f"{promise}, {chance} over the choice of the {images}"

    def _marked(self, rate: float, images: str) -> str:
        chance = self._chance() if self.layout.delta is not None else "on average"
        return (
            f"outside: marked as out of distribution by {self.layout.detector}; so are at most "
            f"{100 * rate:g} % of images like the {images}, {chance} over their choice"
        )

    def _bounded(self, risk: float, threshold: float, images: str) -> str:
        bound = f"at most {100 * risk:g} % of the answers are wrong, {self._chance()}"
        if threshold > 1:
            return f"abstains on every image: by the {images}, no threshold promises that {bound}"
        if threshold == 0:
            return f"answers every image: by the {images}, {bound}"
        shown = rounded(threshold, 3, most=1)
        return f"abstains if p at temperature 1 is below {shown}: by the {images}, {bound}"

    def _chance(self) -> str:
        return f"with a probability of {100 * (1 - (self.layout.delta or 0)):g} %"

    def _calibration_images(self) -> str:
        return count_images(self.layout.calibration_images, self.layout.fitted_on)

    def _aligned(
        self,
        image: str,
        name: str,
        p: str,
        votes: Sequence[str],
        uncertainties: Sequence[str],
        outside: str,
        abstain: str,
        classes: str,
    ) -> str:
        wide = max(map(len, [*map(printable, self.layout.classes), "exit 0"]))
        cells = [image.ljust(self.layout.images), name.ljust(wide), p.rjust(7)]
        cells += [vote.ljust(wide) for vote in votes]
        cells += [uncertainty.rjust(11) for uncertainty in uncertainties]
        if self.layout.accept_false_alarms is not None:
            cells.append(outside.ljust(len("outside")))
        cells += [abstain.ljust(len("abstain"))] if self.layout.risk is not None else []
        cells += [classes] if self.layout.coverage is not None else []
        return "  ".join(cells).rstrip()


FORMATS: dict[str, type[Writer]] = {"table": Table, "csv": Csv, "jsonl": JsonLines}


def six_digits(number: float) -> float:
    """Round to six significant digits, which float32 holds."""
    return float(f"{number:.6g}")


def _without_formula(cell: Any) -> Any:
    """Return a cell that a spreadsheet shows as it is: text does not begin as a formula does."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULAS) else cell


def comma_separated(cells: Sequence[Any]) -> str:
    """Return a line of comma-separated values, without formulas for spreadsheets.

    Example:
        >>> print(comma_separated(["a, b", 0.5, "=1+1"]))
        "a, b",0.5,'=1+1
    """
    line = io.StringIO()
    # Python 3.11 quotes a cell for the line ends that it writes itself, so it must write both kinds.
    csv.writer(line, lineterminator="\r\n").writerow(map(_without_formula, cells))
    return line.getvalue().removesuffix("\r\n")
