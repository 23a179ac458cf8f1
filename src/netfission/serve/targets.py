"""Answer requests for a network of another task than classification: labels, numbers, or maps of pixels."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from starlette.datastructures import QueryParams
from torch import Tensor

from netfission.classifier import Predictor
from netfission.classifier.answer_settings import AnswerSettings
from netfission.serve.answerer import Answer, Answerer, ImageInput, ImageResult, Question, stack_outputs
from netfission.serve.drift import DriftWindow
from netfission.serve.query import read_number
from netfission.tasks.base import EvaluationResult
from netfission.utils.errors import invalid


class TargetAnswerer(Answerer):
    """Answers with `Task.answers`: what `netfission predict` writes of each image.

    Args:
        predictor: the network, on its device.
        evaluation: its measures on the test split; None without them.
        answers: what is asked of the answers to requests that ask for nothing else; only the options of the
            task.
        drift_window: number of the last images that are tested for drift, by the ensemble's total uncertainty
            (`Task.total_uncertainty`); default see `DriftWindow`.

    Raises:
        ValueError: an option has no meaning for the task, the coverage cannot be kept, or a window is given
            and the calibration has no scores of images.
    """

    def __init__(
        self,
        predictor: Predictor,
        evaluation: EvaluationResult | None = None,
        answers: AnswerSettings | None = None,
        drift_window: int | None = None,
    ) -> None:
        super().__init__(predictor)
        self.predictor = predictor
        self._evaluation = evaluation
        settings = answers or AnswerSettings()
        self.task.check_options(asdict(settings))
        self.parameters = tuple(sorted(self.task.options))
        self._coverage = settings.coverage
        self.check(self._coverage)
        known = [] if predictor.calibration is None else predictor.calibration.uncertainty
        if drift_window is not None and not known:
            hint = "`netfission calibrate` records them, unless the network depends on the images"
            expected = "left out for a network without uncertainties of calibration images"
            raise invalid("drift_window", expected, drift_window, hint=hint)
        scores = torch.tensor(known, dtype=torch.float64) if known else None
        self.drift = DriftWindow(scores, drift_window)

    def check(self, coverage: float | None) -> None:
        """Raise ValueError if a coverage cannot be kept."""
        if coverage is not None:
            self.predictor.interpret(
                torch.zeros(1, self.predictor.spec.predictions, self.task.outputs), coverage
            )

    def run(self, images: Sequence[ImageInput]) -> Iterable[ImageResult]:
        """Run the network on images, and answer by the server's settings; maps are drawn one by one."""
        outputs = self.predictor.logits(torch.stack([image.pixels for image in images]))
        sizes = [image.size for image in images]
        if self.drift.keeps:
            average = self.predictor.spec.average
            self.drift.add(self.task.total_uncertainty(outputs, average=average, sizes=sizes))
        if self.task.draws_maps:
            return (self._results(outputs[row : row + 1], [size])[0] for row, size in enumerate(sizes))
        return self._results(outputs, sizes)

    def _results(self, outputs: Tensor, sizes: Sequence[tuple[int, int]]) -> list[ImageResult]:
        answers = self.task.answers(self.predictor.interpret(outputs, self._coverage, sizes))
        return [
            ImageResult(answer, own.clone() if self.parameters else None)
            for answer, own in zip(answers, outputs, strict=True)
        ]

    def question(self, query: QueryParams) -> Question | None:
        """Return what a query asks for; None if that is what the server's settings say."""
        coverage = read_number(query, "coverage")
        return None if coverage in (None, self._coverage) else _TargetQuestion(self, coverage)

    def describe(self) -> dict[str, Any]:
        """Return what `GET /model` says of the network."""
        task, evaluation = self.task, self._evaluation
        return super().describe() | {
            "measures": {} if evaluation is None else evaluation.ensemble,
            "quality": None if evaluation is None else self._quality(evaluation),
            "test_images": 0 if evaluation is None else evaluation.n,
            "coverage": self._coverage,
            "colors": task.colors(),
            "scale": task.scale,
        }

    def _quality(self, evaluation: EvaluationResult) -> str:
        """Return the headline with its note."""
        note = self.task.headline_note and f" ({self.task.headline_note})"
        return f"{self.task.in_short(evaluation.ensemble)}{note}"


@dataclass(frozen=True)
class _TargetQuestion:
    """Intervals of a coverage that a request asks for."""

    answerer: TargetAnswerer
    coverage: float | None

    def prepare(self) -> None:
        """Check that the coverage can be kept."""
        self.answerer.check(self.coverage)

    def answers(self, results: Sequence[ImageResult]) -> list[Answer]:
        """Return the answers for its images."""
        outputs = stack_outputs(results)
        return self.answerer.task.answers(self.answerer.predictor.interpret(outputs, self.coverage))
