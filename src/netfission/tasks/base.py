"""The interface of every task: targets, loss, prediction, uncertainty and measures of a network."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from netfission.config import RunConfig, TrainingConfig
from netfission.data import ImageData
from netfission.data.targets import Targets
from netfission.ensemble import Average
from netfission.methods.base import Method
from netfission.pruning.prune import CRITERIA
from netfission.utils.errors import invalid


class EvaluationResult(Protocol):
    """The measures of a network on labelled images."""

    @property
    def n(self) -> int:
        """Number of images."""

    @property
    def exits(self) -> list[dict[str, float]]:
        """Measures of every exit, exit 0 first."""

    @property
    def ensemble(self) -> dict[str, float]:
        """Measures of the ensemble."""

    def to_json(self) -> str:
        """Return the figures as JSON text."""

    def table(self, linear: int = 0) -> str:
        """Return the figures as aligned plain text; the last `linear` exits are linear ones."""


class Document(Protocol):
    """Something that is written to a file."""

    def to_json(self) -> str:
        """Return it as JSON text."""


class CalibrationResult(Document, Protocol):
    """What was learned from images that were held out."""

    @property
    def n(self) -> int:
        """Number of images."""

    @property
    def average(self) -> Average:
        """What the ensemble averages."""

    @property
    def weights(self) -> str:
        """SHA-256 of the network's weights."""


class TargetPredictions(Protocol):
    """Predictions for a batch of images."""

    def records(self) -> list[dict[str, Any]]:
        """Return what is written of each image: name → a number, or names, or target → a number."""


class Task:
    """What a network learns from an image. A subclass is one file.

    Attributes:
        name: as in the setting `task`.
        targets: what the images are labelled with, and how a table says so.
        methods: the methods that can be trained for it; None for all.
        unused: settings that have no meaning here.
        options: what can be asked of its predictions, among the fields of `AnswerSettings`.
        evaluation_kind: the type that `evaluate` returns.
        calibration_kind: the type that `calibrate` returns.

    Args:
        names: of the classes, labels or numbers.
        scale: of the targets, as `scale` of the task that the network was trained for.

    Example:
        >>> from netfission.tasks import find_task
        >>> task = find_task("regression", ["road", "sky"])
        >>> task.outputs  # a mean and a variance for each
        4
    """

    name: ClassVar[str]
    targets: ClassVar[Targets]
    methods: ClassVar[frozenset[str] | None] = frozenset(
        {"fission", "multi-exit", "deep-ensemble", "treenet"}
    )
    unused: ClassVar[tuple[str, ...]] = (
        "limit_per_class",
        "mix",
        "label_smoothing",
        "balance",
        "reconstruct",
        "parent_weight",
    )
    options: ClassVar[frozenset[str]] = frozenset()
    evaluation_kind: ClassVar[type]
    calibration_kind: ClassVar[type]

    def __init__(self, names: Sequence[str], scale: Mapping[str, list[float]] | None = None) -> None:
        self.names = list(names)
        self.scale: dict[str, list[float]] = dict(scale or {})

    @classmethod
    def from_data(cls, data: ImageData) -> Self:
        """Return the task of a data set."""
        return cls(data.classes)

    @property
    def outputs(self) -> int:
        """The number of outputs of an exit."""
        return len(self.names)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Check that the settings of a run suit the task.

        Raises:
            ValueError: the method or another setting does not.
        """
        method, fission = config.method.method, config.fission
        if cls.methods is not None and method not in cls.methods:
            raise invalid("method", f"{' or '.join(sorted(cls.methods))} with task={cls.name}", method)
        values, defaults = config.to_dict(), RunConfig().to_dict()
        for name in cls.unused:
            if values[name] != defaults[name]:
                valid = "left out" if defaults[name] is None else repr(defaults[name])
                raise invalid(name, f"{valid} with task={cls.name}", values[name])
        scored = fission.sparsity > 0 or fission.assignment == "importance"
        if cls.methods is not None and scored and CRITERIA[fission.criterion].needs == "data":
            others = " or ".join(name for name in CRITERIA if CRITERIA[name].needs != "data")
            raise invalid("criterion", f"{others} with task={cls.name}", fission.criterion)

    @classmethod
    def training(cls, training: TrainingConfig) -> TrainingConfig:
        """Return the settings of a training, with the task's own value of what is left open."""
        return training

    def loss(self, method: Method, training: TrainingConfig) -> nn.Module:
        """Return the loss of a method: outputs `(batch, exits, outputs)` and targets → a scalar."""
        raise NotImplementedError

    def progress(self, outputs: Tensor, targets: Tensor, average: Average) -> tuple[Tensor, Tensor]:
        """Return what is shown while training, as sums over a batch.

        Args:
            outputs: `(batch, exits, outputs)`.
            targets: of the batch.
            average: what the ensemble averages.

        Returns:
            A score of each exit and of the ensemble, `(exits + 1,)`, and the ensemble's NLL, a scalar.
        """
        raise NotImplementedError

    def shown(self, score: float) -> str:
        """Return a mean score of `progress` as text."""
        raise NotImplementedError

    def calibrate(
        self, outputs: Tensor, targets: Tensor, *, average: Average, dependence: str = ""
    ) -> CalibrationResult:
        """Learn from images that were held out; see `netfission.evaluation.calibration.Calibration.fit`."""
        raise NotImplementedError

    def evaluate(
        self, outputs: Tensor, targets: Tensor, *, average: Average, calibration: Any = None
    ) -> EvaluationResult:
        """Measure every exit and their ensemble, and what `calibrate` returned if there is any."""
        raise NotImplementedError

    def reliability(
        self, outputs: Tensor, targets: Tensor, *, average: Average, calibration: Any = None
    ) -> Document | None:
        """Return a report on the uncertainty in a file of its own; None if `evaluate` says it all."""
        return None

    def predict(
        self, outputs: Tensor, *, average: Average, calibration: Any = None, coverage: float | None = None
    ) -> TargetPredictions:
        """Predict the targets of images.

        Args:
            outputs: `(n, exits, outputs)`.
            average: what the ensemble averages.
            calibration: what `calibrate` returned; None without images to calibrate on.
            coverage: least share of the images whose target is in its interval, in (0, 1); default none.

        Raises:
            ValueError: the coverage is out of range or cannot be kept.
        """
        raise NotImplementedError
