"""Answers as a table, as CSV and as JSON lines, a line at a time."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from netfission.classifier import Classifier
from netfission.prediction.images import Failure, ImagePrediction
from netfission.utils.text import printable

_FIGURES = ("disagreement", "entropy", "mutual_information")


@dataclass(frozen=True)
class Layout:
    """What is written of each answer.

    Attributes:
        classes: names of the classes.
        exits: number of exits.
        risk: the share of wrong answers that is borne; None where answers do not say whether they abstain.
        threshold: the least probability to answer; likewise.
        probabilities: whether those of all classes are written.
        images: characters of the longest file name, as `printable`.
    """

    classes: Sequence[str]
    exits: int
    risk: float | None
    threshold: float | None
    probabilities: bool
    images: int

    @classmethod
    def from_classifier(
        cls,
        classifier: Classifier,
        images: Iterable[Path | Failure],
        *,
        risk: float | None,
        probabilities: bool,
    ) -> Self:
        """The layout for the answers of a classifier; see `answers`."""
        nothing = torch.zeros(1, *classifier.spec.shape, dtype=torch.uint8)
        names = (each.image if isinstance(each, Failure) else each for each in images)
        return cls(
            classes=classifier.spec.classes,
            exits=classifier.logits(nothing).shape[1],
            risk=risk,
            threshold=classifier.threshold(risk),
            probabilities=probabilities,
            images=max(len(printable(str(name))) for name in names),
        )


class Writer:
    """Turns answers into lines without their ends."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def header(self) -> Iterator[str]:
        """The lines before the first answer."""
        return iter(())

    def line(self, answer: ImagePrediction | Failure) -> str:
        """The line of an answer."""
        raise NotImplementedError

    def footer(self) -> Iterator[str]:
        """The lines after the last answer."""
        return iter(())


class JsonLines(Writer):
    """An object a line; an image without an answer has `image` and `error` alone."""

    def line(self, answer: ImagePrediction | Failure) -> str:
        """The line of an answer."""
        record: dict[str, Any] = {"image": str(answer.image)}
        if isinstance(answer, Failure):
            return json.dumps(record | {"error": answer.error})
        record |= {"class": answer.name, "probability": _short(answer.probability), "votes": answer.votes}
        record |= {name: _short(getattr(answer, name)) for name in _FIGURES}
        if self.layout.risk is not None:
            record["abstain"] = answer.abstain
        if self.layout.probabilities:
            record["probabilities"] = {name: _short(own) for name, own in answer.probabilities.items()}
        return json.dumps(record)


class Csv(Writer):
    """Comma-separated values; an image without an answer has `image` and, in the last column, `error`."""

    def header(self) -> Iterator[str]:
        """The names of the columns."""
        yield _comma_separated(self._columns())

    def line(self, answer: ImagePrediction | Failure) -> str:
        """The line of an answer."""
        if isinstance(answer, Failure):
            empty = len(self._columns()) - 2
            return _comma_separated([str(answer.image), *[""] * empty, answer.error])
        cells = [str(answer.image), answer.name, _short(answer.probability), *answer.votes]
        cells += [_short(getattr(answer, name)) for name in _FIGURES]
        if self.layout.risk is not None:
            cells.append(int(bool(answer.abstain)))
        if self.layout.probabilities:
            cells += map(_short, answer.probabilities.values())
        return _comma_separated([*cells, ""])

    def _columns(self) -> list[str]:
        votes = [f"exit_{index}" for index in range(self.layout.exits)]
        abstain = ["abstain"] if self.layout.risk is not None else []
        each = [f"p_{name}" for name in self.layout.classes] if self.layout.probabilities else []
        return ["image", "class", "probability", *votes, *_FIGURES, *abstain, *each, "error"]


class Table(Writer):
    """Aligned text to be read, as `printable`; widths are those of the longest file and class name."""

    def header(self) -> Iterator[str]:
        """The titles of the columns."""
        exits = [f"exit {index}" for index in range(self.layout.exits)]
        yield self._aligned("image", "class", "p", exits, ["disagree", "entropy", "mutual inf."], "abstain")

    def line(self, answer: ImagePrediction | Failure) -> str:
        """The line of an answer."""
        image = printable(str(answer.image))
        if isinstance(answer, Failure):
            return f"{image:{self.layout.images}}  error: {printable(answer.error)}"
        figures = [f"{getattr(answer, name):.3f}" for name in _FIGURES]
        abstain = "yes" if answer.abstain else ""
        name, *votes = map(printable, (answer.name, *answer.votes))
        return self._aligned(image, name, f"{answer.probability:.3f}", votes, figures, abstain)

    def footer(self) -> Iterator[str]:
        """Where the ensemble abstains, and why there."""
        risk, threshold = self.layout.risk, self.layout.threshold
        if risk is None or threshold is None:
            return
        share = f"at most {100 * risk:g} % of the answers for validation images were wrong"
        where = f"where p is below {threshold:.3f}; above it" if threshold <= 1 else "always; above no p"
        yield f"abstain: {where} {share}"

    def _aligned(
        self, image: str, name: str, p: str, votes: Sequence[str], figures: Sequence[str], abstain: str
    ) -> str:
        wide = max(map(len, [*map(printable, self.layout.classes), "exit 0"]))
        cells = [image.ljust(self.layout.images), name.ljust(wide), p.rjust(5)]
        cells += [vote.ljust(wide) for vote in votes]
        cells += [figure.rjust(11) for figure in figures]
        return "  ".join([*cells, *([abstain] if self.layout.risk is not None else [])]).rstrip()


FORMATS: dict[str, type[Writer]] = {"table": Table, "csv": Csv, "jsonl": JsonLines}


def _short(figure: float) -> float:
    """Six significant digits, which float32 holds."""
    return float(f"{figure:.6g}")


def _comma_separated(cells: Sequence[Any]) -> str:
    line = io.StringIO()
    # Python 3.11 quotes a cell for the line ends it writes itself, so it is to write both kinds.
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n")
