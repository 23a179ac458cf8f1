"""The interface of every task: targets, loss, prediction, uncertainty and measures of a network."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from netfission.config import DataConfig, RunConfig, TrainingConfig
from netfission.data import ImageData, load_data
from netfission.data.batches import PairTransform
from netfission.data.images import to_pixels
from netfission.data.mask_folders import MaskSplit
from netfission.data.matched import MatchedImages, Part, load_matched_targets
from netfission.data.targets import Targets
from netfission.ensemble import Average, describe_average
from netfission.evaluation.other_data import OtherFigures
from netfission.evaluation.resampling import Resampled
from netfission.losses import distillation_loss
from netfission.methods.base import Method
from netfission.pruning.prune import CRITERIA
from netfission.tasks.columns import Columns
from netfission.tasks.early_exit import EarlyExit
from netfission.tasks.evaluation import OtherTargetEvaluation, shown_measure
from netfission.tasks.figures import FigureData, InspectedImages, Inspection
from netfission.tasks.pixel_maps import MapScores, PhotographPrediction
from netfission.utils.errors import describe, first_line, invalid
from netfission.utils.modes import in_mode


class EvaluationResult(Protocol):
    """The measures of a network on labelled images."""

    @property
    def n(self) -> int:
        """Number of images."""

    @property
    def average(self) -> Average:
        """What the ensemble averages over exits."""

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


TOLERANCE = 1e-4  # of what an exported file gives
NEAR = 1e-3  # of a threshold, within which rounding may decide

Result = TypeVar("Result")
ResultOf = TypeVar("ResultOf", covariant=True)


Sizes = Sequence[tuple[int, int]]


class Accumulator(Protocol[ResultOf]):
    """Takes the outputs for a set of images batch by batch, and returns what they amount to."""

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: outputs of the network `(batch, exits, outputs, …)` and targets, on any device."""

    def result(self) -> ResultOf:
        """Return the result for all batches; ValueError without a batch."""


class Collected(Generic[Result]):
    """An accumulator that holds all outputs, in float32 on the CPU, for a function of the whole set.

    Args:
        function: outputs `(n, exits, outputs)` and targets → the result.

    Example:
        >>> count = Collected(lambda outputs, targets: len(outputs))
        >>> for _ in range(3):
        ...     count.add(torch.zeros(4, 2, 10), torch.zeros(4))
        >>> count.result()
        12
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Result]) -> None:
        self._function = function
        self._outputs: list[Tensor] = []
        self._targets: list[Tensor] = []

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        self._outputs.append(outputs.float().cpu())
        self._targets.append(targets.cpu())

    def result(self) -> Result:
        """Return the function's result for all batches."""
        if not self._outputs:
            raise invalid("batches", "at least one batch", found="none")
        return self._function(torch.cat(self._outputs), torch.cat(self._targets))


class Task:
    """What a network learns from an image. A subclass is one file.

    Attributes:
        name: as in the setting `task`.
        targets: what the images are labelled with, and how a table says so.
        methods: the methods that can be trained for it; None for all.
        unused: settings that have no meaning here.
        options: what can be asked of its predictions, among the fields of `AnswerSettings`.
        exported: outputs of an exported file: attributes of its predictions → their descriptions.
        exported_early: those of them that an exported cascade gives, of the exits that an image ran.
        draws_maps: whether its predictions are images, which `netfission predict` writes into a folder.
        crops: whether a network sees the centre of an image that has another shape than its own; False if it
            sees all of it, with black beside it.
        progress_title: what the score of `progress` is, for the axis of a figure.
        progress_factor: by which the score is multiplied there.
        remark: what a table of its measures needs to say, in a sentence or two.
        headline: the measure that stands for all others in one line, among those of `EvaluationResult`.
        columns: what a comparison of networks shows, the headline and the NLL among it, see `compared`.
        columns_remark: what a comparison needs to say of its columns, beside `remark`, as part of a sentence.
        evaluation_kind: the type that `evaluate` returns.
        other_evaluation_kind: the type of figures on another data set than the network's own.
        calibration_kind: the type that `calibrate` returns.

    Args:
        names: of the classes, labels or numbers.
        scale: what the values of targets stand for, as `scale` of the task that the network was trained for.

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
        "void",
        "limit_per_class",
        "mix",
        "label_smoothing",
        "balance",
    )
    options: ClassVar[frozenset[str]] = frozenset()
    exported: ClassVar[Mapping[str, str]] = {}
    exported_early: ClassVar[tuple[str, ...]] = ()
    draws_maps: ClassVar[bool] = False
    crops: ClassVar[bool] = True
    progress_title: ClassVar[str] = "accuracy, %"
    progress_factor: ClassVar[float] = 100.0
    remark: ClassVar[str] = ""
    headline: ClassVar[str]
    columns: ClassVar[Columns]
    columns_remark: ClassVar[str] = ""
    evaluation_kind: ClassVar[type]
    other_evaluation_kind: ClassVar[type[OtherFigures]] = OtherTargetEvaluation
    calibration_kind: ClassVar[type]

    def __init__(self, names: Sequence[str], scale: Mapping[str, list[float]] | None = None) -> None:
        self.names = list(names)
        self.scale: dict[str, list[float]] = dict(scale or {})

    @classmethod
    def load_data(cls, config: DataConfig, seed: int, *, training: bool) -> ImageData:
        """Load the data set that settings name, see `netfission.runs.setup.load_run_data`.

        Args:
            config: the settings.
            seed: that chooses the validation split.
            training: prepare what a training alone needs.
        """
        return load_data(
            config.data,
            image_size=config.image_size,
            validation=config.validation,
            seed=seed,
            corrupt=config.corrupt,
            limit_per_class=config.limit_per_class,
            checks=training,
            crop_scale=config.crop_scale if training else None,
            targets=cls.targets,
        )

    def load_other(
        self,
        name: str,
        shape: Sequence[int],
        config: DataConfig,
        *,
        part: Part | None = None,
        preferred: Sequence[Part] = ("test",),
    ) -> MatchedImages:
        """Load images of another data set, with targets that are matched to the network's by name.

        Args:
            name: of the data set.
            shape: of the network's images: channels, height and width.
            config: the settings of the network's own data set.
            part: which of the images, see `netfission.data.matched.load_matched`.
            preferred: the parts that are chosen by default, see there.

        Raises:
            ValueError: it is no such data set, there is no such part, or its targets are others.
            OSError: it does not exist.
        """
        return load_matched_targets(
            name, self.names, shape, self.targets, part=part, preferred=preferred, corrupt=config.corrupt
        )

    @classmethod
    def from_data(cls, data: ImageData, *, balance: bool = False) -> Self:
        """Return the task of a data set.

        Args:
            data: the data set.
            balance: whether the loss gives rare classes larger weights; with one class per image, the
                batches do (`netfission.data.Batches`).
        """
        return cls(data.classes)

    @classmethod
    def transform(cls, config: DataConfig, data: ImageData) -> PairTransform | None:
        """Return what changes a training image and its target together; None to augment images alone."""
        return None

    @classmethod
    def batch_size(cls, shape: Sequence[int], limit: int) -> int:
        """Return how many images go through a network at once when it is evaluated or predicts.

        Args:
            shape: of an image: channels, height and width.
            limit: the number that is asked for.
        """
        return limit

    @classmethod
    def to_pixels(cls, image: Image.Image, shape: Sequence[int]) -> Tensor:
        """Convert an image to the pixels of a network, uint8 `(channels, height, width)`.

        Args:
            image: in any of Pillow's modes.
            shape: channels, height and width.
        """
        channels, height, width = shape
        return to_pixels(image, "L" if channels == 1 else "RGB", (height, width))

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
    def check_options(cls, given: Mapping[str, Any], named: Callable[[str], str] = str) -> None:
        """Check what is asked of predictions.

        Args:
            given: option → its value; those that are None or False are not asked for.
            named: an option → its name in a message.

        Raises:
            ValueError: an option has no meaning for the task.
        """
        for name, value in given.items():
            if value is not None and value is not False and name not in cls.options:
                raise invalid(named(name), f"left out for a run of task={cls.name}", value)

    @classmethod
    def training(cls, training: TrainingConfig) -> TrainingConfig:
        """Return the settings of a training, with the task's own value of what is left open."""
        return training

    def check_model(self, name: str, model: nn.Module, shape: Sequence[int]) -> None:
        """Check that a network has the outputs of the task.

        Args:
            name: of the network.
            model: images → outputs, on the CPU.
            shape: of an image: channels, height and width.

        Raises:
            ValueError: it has others.
        """
        if self.targets.exclusive:  # which have a reader of their own
            return
        outputs = self._output_of(name, model, shape, "images")
        if isinstance(outputs, Tensor) and outputs.ndim > 2:
            kind = f"a network of whole images with task={self.name}"
            raise invalid("model", kind, found=f"{name}, whose output is {describe(outputs)}")

    def _output_of(self, name: str, model: nn.Module, shape: Sequence[int], images: str) -> Any:
        """Return what a network makes of one blank image; ValueError if it does not accept its size.

        Args:
            name: see `check_model`, as `model` and `shape`.
            images: what images are called in the message.
        """
        with in_mode(model, training=False), torch.no_grad():
            try:
                output: Any = model(torch.zeros(1, *shape))
            except Exception as error:  # of any kind, from the code of the network
                found = f"{images} of {shape[1]}×{shape[2]} ({first_line(error)})"
                raise invalid("image_size", f"a size that {name} accepts", found=found) from error
        return output.get("out") if isinstance(output, Mapping) else output

    def loss(self, method: Method, training: TrainingConfig) -> nn.Module:
        """Return the loss of a method: outputs `(batch, exits, outputs)` and targets → a scalar."""
        raise NotImplementedError

    def distil(self, outputs: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the loss of exits that learn what another network predicts; it has no gradient there.

        Args:
            outputs: `(batch, exits, outputs)`.
            teacher: outputs of the other network, `(batch, 1, outputs)`.
            targets: of the batch, of which those without a meaning are left out.
            temperature: by which both are softened, as in `netfission.losses.distillation_loss`.

        Returns:
            A scalar, summed over exits.
        """
        return distillation_loss(outputs, teacher, temperature=temperature)

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

    def in_short(self, measures: Mapping[str, float]) -> str:
        """Return the headline of the measures of an exit or of the ensemble, in words."""
        return shown_measure(self.headline, measures.get(self.headline))

    @property
    def headline_note(self) -> str:
        """What a reader of the headline has to know beside it, in words; empty if nothing."""
        return ""

    @classmethod
    def compared(cls, evaluation: Any) -> dict[str, float | None]:
        """Return the measures of `columns`.

        Args:
            evaluation: that `evaluate` returned.

        Returns:
            Measure → its value for the ensemble; None where it is not defined, or was not measured.
        """
        measures = {**evaluation.uncertainty, **evaluation.ensemble}
        return {name: measures.get(name) for name in cls.columns}

    @classmethod
    def averaged(cls, average: Average) -> str:
        """Return in a word or two what is averaged over exits."""
        return describe_average(average)

    def rule(self, average: Average) -> str:
        """Return in words how the exits make one prediction."""
        return f"mean of {self.averaged(average)}"

    def blank_targets(self, images: Tensor) -> Tensor:
        """Return targets for images of which the cost of a training step is measured, on their device.

        Args:
            images: `(batch, channels, height, width)`.
        """
        return images.new_zeros(len(images), len(self.names))

    def total_uncertainty(self, outputs: Tensor, *, average: Average, sizes: Sizes = ()) -> Tensor:
        """Return how uncertain an ensemble is about images, all in all, by which a server tests for drift.

        Args:
            outputs: `(n, exits, outputs, …)`, not calibrated.
            average: what the ensemble averages.
            sizes: height and width of each photograph that was fitted into the network's size, whose other
                pixels do not count; default all count.

        Returns:
            One of the scores of `uncertainty_scores`, `(n,)` float64.
        """
        raise NotImplementedError

    def sorted_uncertainty(
        self, outputs: Tensor, *, average: Average, dependence: str, sizes: Sizes = ()
    ) -> list[float]:
        """Return what a calibration keeps of `total_uncertainty`; nothing if the network depends on it."""
        if dependence:
            return []
        scores: list[float] = self.total_uncertainty(outputs, average=average, sizes=sizes).tolist()
        return sorted(scores)

    def uncertainty_scores(self, outputs: Tensor, *, average: Average) -> dict[str, Tensor]:
        """Score images by how uncertain an ensemble is about them, to tell those of another kind.

        Args:
            outputs: `(n, exits, outputs, …)`, not calibrated.
            average: what the ensemble averages.

        Returns:
            Name → scores `(n,)`, float64, higher for images that the ensemble is less certain about.
        """
        raise NotImplementedError

    def figures(self, evaluation: Any) -> list[FigureData]:
        """Return what a report draws of measures, see `evaluate`."""
        return []

    def inspect(self, images: InspectedImages, *, average: Average, calibration: Any = None) -> Inspection:
        """Return what a report shows of test images and their predictions.

        Args:
            images: of the test split, at least one.
            average: what the ensemble averages.
            calibration: what `calibrate` returned.
        """
        return Inspection()

    def answers(self, predictions: Any) -> list[dict[str, Any]]:
        """Return what a server answers for each image, of types that JSON has.

        Args:
            predictions: that `predict` returned.
        """
        found: list[dict[str, Any]] = predictions.records()
        return found

    def colors(self) -> dict[str, str]:
        """Return the color of each class in maps, such as `#800000`; none if predictions are not maps."""
        return {}

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

    def other_evaluation(
        self, images: MatchedImages, evaluation: Any, reliability: Document | None
    ) -> OtherFigures:
        """Return the figures on another data set, of `other_evaluation_kind`.

        Args:
            images: the data set.
            evaluation: what `evaluate` returned for them.
            reliability: what `reliability` returned for them.
        """
        about = (images.name, images.part, images.classes, images.left_out)
        return OtherTargetEvaluation(*about, evaluation, images.unknown)

    def reliability(
        self, outputs: Tensor, targets: Tensor, *, average: Average, calibration: Any = None
    ) -> Document | None:
        """Return a report on the uncertainty in a file of its own; None if `evaluate` says it all."""
        return None

    def early_exit(self) -> EarlyExit | None:
        """Return what a cascade needs; None for classes, which `netfission.inference.Cascade` knows."""
        return None

    def calibrator(
        self, *, average: Average, dependence: str = "", sizes: Sizes = ()
    ) -> Accumulator[CalibrationResult]:
        """Return what learns from batches of images that were held out, as `calibrate` does from all.

        Args:
            average: what the ensemble averages.
            dependence: see `calibrate`.
            sizes: of all images, see `total_uncertainty`.
        """
        return Collected(partial(self.calibrate, average=average, dependence=dependence))

    def evaluator(
        self, *, average: Average, calibration: Any = None
    ) -> Accumulator[tuple[EvaluationResult, Document | None]]:
        """Return what measures batches of images, as `evaluate` and `reliability` do all at once."""

        def measure(outputs: Tensor, targets: Tensor) -> tuple[EvaluationResult, Document | None]:
            known: dict[str, Any] = {"average": average, "calibration": calibration}
            return self.evaluate(outputs, targets, **known), self.reliability(outputs, targets, **known)

        return Collected(measure)

    def resampled(
        self, outputs: Tensor, targets: Tensor, *, average: Average, calibration: Any = None
    ) -> Resampled:
        """Return the measures of the ensemble on sets of images that are drawn from these.

        They are those of `columns` of which a change is better or worse, as `evaluate` measures them.

        Args:
            outputs: `(n, exits, outputs)`.
            targets: of the images.
            average: what the ensemble averages.
            calibration: what `calibrate` returned.
        """
        raise NotImplementedError

    def resampler(self, *, average: Average, calibration: Any = None) -> Accumulator[Resampled]:
        """Return what makes of batches of images what `resampled` makes of all at once."""
        return Collected(partial(self.resampled, average=average, calibration=calibration))

    def export(
        self, outputs: Tensor, *, average: Average, calibration: Any = None, coverage: float | None = None
    ) -> dict[str, Tensor]:
        """Return what an exported file gives for outputs of the network; its graph is traced from this.

        Args:
            outputs: `(n, exits, outputs)`.
            average: see `predict`, as the following.
            calibration: what `calibrate` returned.
            coverage: of intervals.

        Returns:
            Name → values, with the names of `exported`; intervals only with a coverage.
        """
        predictions = self.predict(outputs, average=average, calibration=calibration, coverage=coverage)
        values = {name: getattr(predictions, name) for name in self.exported}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def load_unscaled(cls, config: DataConfig, seed: int) -> tuple[ImageData, MaskSplit]:
        """Load the data set of settings, and its test images in their own sizes, of a task that draws maps.

        Args:
            config: the settings.
            seed: that chooses the validation split.

        Returns:
            The data set, and the images with their masks; all are decoded at each access.
        """
        raise NotImplementedError

    def joined(self, strips: Iterable[Any], size: tuple[int, int]) -> PhotographPrediction:
        """Join the predictions for strips of rows of one image, of a task that draws maps.

        Args:
            strips: what `predict` returned for each, a batch of one, from top to bottom.
            size: height and width of the image.
        """
        raise NotImplementedError

    def map_scores(self) -> MapScores:
        """Return what measures maps in the size of the images, of a task that draws them."""
        raise NotImplementedError

    def rounding(self, values: Mapping[str, Tensor], calibration: Any = None) -> dict[str, Tensor]:
        """Return how much values that `export` returned may differ by rounding, by name.

        Args:
            values: name → values.
            calibration: what `calibrate` returned.

        Returns:
            Name → the tolerance of numbers, which broadcasts, or for labels and classes whether each may be
            another one.
        """
        return {name: torch.tensor(TOLERANCE) for name in values}

    def predict(
        self,
        outputs: Tensor,
        *,
        average: Average,
        calibration: Any = None,
        coverage: float | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> TargetPredictions:
        """Predict the targets of images.

        Args:
            outputs: `(n, exits, outputs)`.
            average: what the ensemble averages.
            calibration: what `calibrate` returned; None without images to calibrate on.
            coverage: least share of the images whose target is in its interval, in (0, 1); default none.
            sizes: height and width of the images before they were scaled, if maps are predicted; default
                those of the outputs.

        Raises:
            ValueError: the coverage is out of range or cannot be kept.
        """
        raise NotImplementedError
