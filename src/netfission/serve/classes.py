"""Answer requests for a classifier."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, get_args

import torch
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException

from netfission.classifier import Classifier
from netfission.classifier.answer_settings import AnswerSettings
from netfission.classifier.predictions import AnswerLimits
from netfission.evaluation.conformal import SetScore
from netfission.evaluation.p_values import DetectorScore
from netfission.serve.answerer import Answer, Answerer, ImageInput, ImageResult, Question, stack_outputs
from netfission.serve.drift import DriftWindow
from netfission.serve.limits import refusal
from netfission.serve.query import read_flag, read_number
from netfission.serve.responses import TOP, json_answers
from netfission.utils.errors import shortened

_REMEMBERED = 64  # settings of requests whose limits are kept


class ClassAnswerer(Answerer):
    """Answers with the classes of images.

    Args:
        classifier: the network, deployed and on its device.
        answers: what is asked of the answers to requests that ask for nothing else.
        drift_window: number of the last images that are tested for drift; default see `DriftWindow`.

    Raises:
        ValueError: the calibration does not allow what is asked.
    """

    parameters = ("all", *(field.name for field in fields(AnswerSettings)))

    def __init__(
        self, classifier: Classifier, answers: AnswerSettings | None = None, drift_window: int | None = None
    ) -> None:
        super().__init__(classifier)
        self.classifier = classifier
        self._settings = answers or AnswerSettings()
        self.limits_of = lru_cache(_REMEMBERED)(self._find_limits)
        self._limits = self._settings.limits(classifier)
        detector = self._limits.detector
        self.drift = DriftWindow(None if detector is None else detector.calibration, drift_window)

    def _find_limits(self, asked: AnswerSettings) -> AnswerLimits:
        return self._limits if asked == self._settings else asked.limits(self.classifier)

    def run(self, images: Sequence[ImageInput]) -> list[ImageResult]:
        """Run the network on images, and answer by the server's settings."""
        logits = self.classifier.logits(torch.stack([image.pixels for image in images]))
        if self._limits.detector is not None:
            self.drift.add(self._limits.detector.scores(logits, average=self.classifier.spec.average))
        predictions = self.classifier.interpret(logits, self._limits)
        answers = json_answers(predictions, self.classifier.spec.classes, limits=self._limits)
        return [ImageResult(answer, own.clone()) for answer, own in zip(answers, logits, strict=True)]

    def question(self, query: QueryParams) -> Question | None:
        """Return what a query asks for; None if that is what the server's settings say."""
        all_classes, asked = read_flag(query, "all"), _read_settings(query, self._settings)
        if asked == self._settings and not all_classes:
            return None
        return _ClassQuestion(self, asked, all_classes)

    def describe(self) -> dict[str, Any]:
        """Return what `GET /model` says of the network."""
        evaluation, limits = self.classifier.evaluation, self._limits
        return super().describe() | {
            "accuracy": None if evaluation is None else evaluation.ensemble["top1"],
            "test_images": 0 if evaluation is None else evaluation.n,
            "risk": limits.risk,
            "threshold": limits.threshold,
            # of the probabilities that the threshold applies to
            "threshold_temperature": self.classifier.temperature if limits.delta is None else 1.0,
            "delta": limits.delta,
            "coverage": limits.coverage,
            "class_wise": limits.class_wise,
            "accept_false_alarms": limits.accept_false_alarms,
        }


@dataclass(frozen=True)
class _ClassQuestion:
    """What a request asks of the answers of a classifier."""

    answerer: ClassAnswerer
    asked: AnswerSettings
    all_classes: bool

    def prepare(self) -> None:
        """Compute the limits, which are kept."""
        self.answerer.limits_of(self.asked)

    def answers(self, results: Sequence[ImageResult]) -> list[Answer]:
        """Return the answers for its images."""
        classifier, limits = self.answerer.classifier, self.answerer.limits_of(self.asked)
        names = classifier.spec.classes
        logits = stack_outputs(results)
        top = len(names) if self.all_classes else TOP
        return json_answers(classifier.interpret(logits, limits), names, top, limits=limits)


def _read_settings(query: QueryParams, default: AnswerSettings) -> AnswerSettings:
    """Return the settings of a request: those of the server, with what its query asks for instead."""
    asked: dict[str, Any] = {}
    for name in ("risk", "delta", "coverage", "accept_false_alarms"):
        if (number := read_number(query, name)) is not None:
            asked[name] = number
    for name, kind in (("score", SetScore), ("detector", DetectorScore)):
        if (text := query.get(name)) is not None:
            if text not in get_args(kind):
                raise refusal(400, name, f"one of {', '.join(get_args(kind))}", shortened(repr(text)))
            asked[name] = text
    if "class_wise" in query:
        asked["class_wise"] = read_flag(query, "class_wise")
    try:
        return replace(default, **asked)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
