"""What each step of an exported cascade answers, of classes and of other tasks, and how it is checked."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from netfission.classifier import Classifier, Predictor
from netfission.ensemble import Average, mean_logits
from netfission.export.check import TOLERANCE
from netfission.inference.cascade import StoppingRule
from netfission.tasks import Task

Weights = Sequence[float] | None


class StepAnswers(ABC):
    """What a step answers, of the exits so far.

    Attributes:
        described: names of the answers → their descriptions.
    """

    described: Mapping[str, str]

    @abstractmethod
    def combined(self, outputs: Tensor, weights: Weights) -> Tensor:
        """Return the output of the ensemble of some exits, see `netfission.inference.Cascade.ensemble`.

        Args:
            outputs: of these exits, `(batch, exits, outputs, …)`.
            weights: of these exits; None if they weigh the same.
        """

    @abstractmethod
    def answers(self, outputs: Tensor, combined: Tensor, weights: Weights) -> dict[str, Tensor]:
        """Return the answers by name; arguments as of `combined`, and what that returned."""

    @abstractmethod
    def differences(
        self, found: Mapping[str, Tensor], outputs: Tensor, combined: Tensor, weights: Weights
    ) -> list[Tensor]:
        """Return how answers that a graph gave differ from those in PyTorch: at most 1e-4 by rounding.

        Args:
            found: the answers by name.
            outputs: of the exits in PyTorch, see `combined`, as the following.
            combined: what that returned.
            weights: see there.
        """


class ClassAnswers(StepAnswers):
    """The probabilities of the classes, and the most probable one.

    Args:
        temperature: divisor of the mean logits.

    Example:
        >>> import torch
        >>> answers = ClassAnswers(temperature=2.0)
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
        >>> answers.answers(logits, answers.combined(logits, None), None)["classes"]
        tensor([0])
    """

    described = {  # noqa: RUF012 (as in the base class)
        "probabilities": "(batch, classes), float32: of the ensemble of the exits so far, calibrated",
        "classes": "(batch,), int64: its most probable class",
    }

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def combined(self, outputs: Tensor, weights: Weights) -> Tensor:
        """Return the mean logits."""
        return mean_logits(outputs, weights)

    def answers(self, outputs: Tensor, combined: Tensor, weights: Weights) -> dict[str, Tensor]:
        """Return probabilities and classes."""
        probabilities = (combined / self.temperature).softmax(dim=1)
        return {"probabilities": probabilities, "classes": combined.argmax(dim=1)}

    def differences(
        self, found: Mapping[str, Tensor], outputs: Tensor, combined: Tensor, weights: Weights
    ) -> list[Tensor]:
        """Return the differences of the probabilities."""
        expected = self.answers(outputs, combined, weights)
        return [found["probabilities"] - expected["probabilities"]]


class TaskAnswers(StepAnswers):
    """What an exported file of another task gives for the ensemble, see `Task.exported_early`.

    Args:
        task: what the network learned.
        rule: its early exit.
        calibration: what was learned from validation images; None without it.

    Example:
        >>> import torch
        >>> from netfission.tasks import find_task
        >>> task = find_task("multilabel", ["car", "tree"])
        >>> answers = TaskAnswers(task, task.early_exit(), None)
        >>> outputs = torch.tensor([[[2.0, -2.0], [1.0, -1.0]]])
        >>> answers.answers(outputs, answers.combined(outputs, None), None)["labels"]
        tensor([[ True, False]])
    """

    def __init__(self, task: Task, rule: StoppingRule, calibration: Any) -> None:
        self.task = task
        self.rule = rule
        self.calibration = calibration
        self.described = {name: task.exported[name] for name in task.exported_early}

    def combined(self, outputs: Tensor, weights: Weights) -> Tensor:
        """Return what the rule makes of the outputs."""
        return self.rule.combined(outputs, weights)

    def answers(self, outputs: Tensor, combined: Tensor, weights: Weights) -> dict[str, Tensor]:
        """Return the answers, floating point as float32."""
        values = self._exported(outputs, weights)
        return {name: values[name] for name in self.described}

    def differences(
        self, found: Mapping[str, Tensor], outputs: Tensor, combined: Tensor, weights: Weights
    ) -> list[Tensor]:
        """Return the differences in shares of what rounding may change, times 1e-4."""
        expected = self._exported(outputs, weights)
        given = {name: found[name] for name in self.described}
        return [TOLERANCE * part for part in scaled_differences(self.task, given, expected, self.calibration)]

    def _exported(self, outputs: Tensor, weights: Weights) -> dict[str, Tensor]:
        average: Average = "logits" if weights is None else tuple(weights)
        found = self.task.export(outputs, average=average, calibration=self.calibration)
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def scaled_differences(
    task: Task, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], calibration: Any
) -> list[Tensor]:
    """Return the differences of values that a file gave, in shares of what rounding may change.

    Args:
        task: what the network learned.
        found: name → values of the file.
        expected: name → all values that `Task.export` gave.
        calibration: what was learned from validation images.

    Returns:
        At most 1 where rounding explains them; NaN where a value is.
    """
    allowed = task.rounding(expected, calibration)
    differences = []
    for name, values in found.items():
        if values.is_floating_point():
            differences.append((values - expected[name]) / allowed[name])
        else:
            differences.append(2.0 * ((values != expected[name]) & ~allowed[name]))
    return differences


def answers_of(network: Classifier | Predictor) -> tuple[StepAnswers, StoppingRule | None]:
    """Return what the steps of a network's cascade answer, and the rule of its task; None of classes."""
    task = network.spec.find_task()
    rule = task.early_exit()
    if rule is None:
        assert isinstance(network, Classifier)
        return ClassAnswers(network.temperature), None
    return TaskAnswers(task, rule, network.calibration), rule
