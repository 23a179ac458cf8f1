"""A class for each pixel.

An exit has logits `(classes, height, width)`. The loss is the softmax form of ensemble distillation (Lee &
Lee 2024, arXiv 2408.02301) at each pixel, mean over the pixels that have a class. Exits are averaged, and the
uncertainty is split, at each pixel as for the class of an image. Sets are measured batch by batch: no outputs
are kept, except those of a random sample of validation pixels, from which a temperature is fitted.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from netfission.config import DataConfig, RunConfig, TrainingConfig
from netfission.data import ImageData
from netfission.data.batches import PairTransform
from netfission.data.images import size_within, to_pixels_within
from netfission.data.mask_data import load_mask_data
from netfission.data.mask_folders import VOID, MaskSplit
from netfission.data.mask_transforms import MaskTransform
from netfission.data.matched import MatchedImages, Part
from netfission.data.matched_masks import load_matched_masks
from netfission.data.targets import MASKS
from netfission.ensemble import (
    Average,
    check_average,
    disagreement,
    ensemble_log_probabilities,
    fit_temperature,
    mutual_information,
    predictive_entropy,
)
from netfission.evaluation.pixels import PixelScores, ResampledPixels
from netfission.evaluation.resampling import Resampled
from netfission.losses import EnsembleDistillationLoss, distillation_loss
from netfission.methods.base import Method
from netfission.tasks.base import NEAR, Accumulator, Document, Sizes, Task
from netfission.tasks.calibration import TargetCalibration
from netfission.tasks.columns import Column, Columns
from netfission.tasks.evaluation import TargetEvaluation
from netfission.tasks.figures import FigureData, InspectedImages, Inspection
from netfission.tasks.pixel_early_exit import PixelEarlyExit
from netfission.tasks.pixel_figures import inspect_pixels, iou_bars
from netfission.tasks.pixel_maps import MapScores, PhotographPrediction, joined
from netfission.utils.errors import check_finite, describe, invalid
from netfission.utils.png import png_address, png_bytes
from netfission.utils.text import percent

_PIXELS_AT_ONCE = 2**18  # of all images that go through a network together
_SAMPLED_PIXELS = 2**17  # from which a temperature is fitted
_CROP_SCALE = 0.5  # the default
_MAPS = {"": "classes", "-uncertainty": "uncertainty"}  # names of `PixelPredictions.maps` → in answers
_SUCH_AS = "torchvision/lraspp_mobilenet_v3_large, torchvision/deeplabv3_resnet50 or smp/unet/resnet18"


@dataclass(frozen=True, kw_only=True)
class PixelCalibration(TargetCalibration):
    """What was learned from validation images, beside what every calibration holds.

    Attributes:
        pixels: number of pixels of these images that the temperature was fitted to.
        temperature: what logits are divided by, see `netfission.ensemble.fit_temperature`.
    """

    pixels: int
    temperature: float

    def summary(self) -> str:
        """Return the temperature in one line."""
        return f"temperature {self.temperature:.3f}, by {self.pixels:,} pixels of {self.images}"


class PixelSample:
    """A uniform random sample, without replacement, of the labelled pixels of all batches.

    Each pixel draws a random number, and those with the smallest numbers stay. The numbers are drawn in the
    order of the pixels, so the sample does not depend on how images are put into batches. PyTorch's global
    random state does not change.

    Args:
        limit: number of pixels, if there are as many.
        seed: of the choice.

    Example:
        >>> sample = PixelSample(limit=2)
        >>> sample.add(torch.zeros(1, 3, 5, 1, 4), torch.tensor([[[0, 4, 1, 255]]]))  # 3 exits, 5 classes
        >>> logits, labels = sample.result()
        >>> logits.shape, len(labels)
        (torch.Size([2, 3, 5]), 2)
    """

    def __init__(self, limit: int = _SAMPLED_PIXELS, seed: int = 0) -> None:
        self.limit = limit
        self.images = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)
        self._logits: Tensor | None = None
        self._labels = torch.empty(0, dtype=torch.int64)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: logits `(batch, exits, classes, height, width)` and masks `(batch, height, width)`."""
        self.images += len(targets)
        labels = targets.flatten()
        keys = torch.rand(len(labels), generator=self._generator)
        places = (labels != VOID).cpu().nonzero().flatten()
        if len(self._keys) == self.limit:  # others cannot be among the smallest
            places = places[keys[places] < self._keys.max()]
        image, row, column = torch.unravel_index(places.to(outputs.device), targets.shape)
        logits = outputs[image, :, :, row, column].float().cpu()
        held = logits if self._logits is None else torch.cat([self._logits, logits])
        keys = torch.cat([self._keys, keys[places]])
        labels = torch.cat([self._labels, labels[places.to(labels.device)].cpu()])
        kept = keys.argsort(stable=True)[: self.limit]
        self._keys, self._logits, self._labels = keys[kept], held[kept], labels[kept]

    def result(self) -> tuple[Tensor, Tensor]:
        """Return logits `(pixels, exits, classes)` and classes `(pixels,)`; ValueError if there are none."""
        if self._logits is None or not len(self._labels):
            raise invalid("masks", "of at least one pixel that is not void", found="none")
        return self._logits, self._labels


class _Calibrator:
    """Fits the temperature to a sample of the pixels of all batches."""

    def __init__(self, task: "Segmentation", average: Average, dependence: str, sizes: Sizes = ()) -> None:
        self.task = task
        self.average = average
        self.dependence = dependence
        self.sizes = sizes
        self.sample = PixelSample()
        self.uncertainty: list[float] = []

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        check_finite("outputs", outputs)
        sizes = self.sizes[self.sample.images :][: len(targets)]
        self.sample.add(outputs, targets)
        self.uncertainty += self.task.sorted_uncertainty(
            outputs, average=self.average, dependence=self.dependence, sizes=sizes
        )

    def result(self) -> PixelCalibration:
        """Return the calibration."""
        logits, labels = self.sample.result()
        temperature = fit_temperature(logits, labels, self.average)
        return PixelCalibration(
            n=self.sample.images,
            average=self.average,
            dependence=self.dependence,
            uncertainty=sorted(self.uncertainty),
            pixels=len(labels),
            temperature=temperature,
        )


class _Evaluator:
    """Measures the maps of every exit, of the ensemble and of the calibrated ensemble, batch by batch."""

    def __init__(self, names: Sequence[str], average: Average, calibration: PixelCalibration | None) -> None:
        self.names = names
        self.average = average
        self.calibration = calibration
        self.images = 0
        self.exits: list[PixelScores] = []
        self.ensemble, self.calibrated = self._scores(), self._scores()
        self.sums = {"entropy": 0.0, "mutual_information": 0.0, "disagreement": 0.0}

    def _scores(self) -> PixelScores:
        return PixelScores(len(self.names), VOID)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        outputs, targets = outputs.float(), targets.to(outputs.device)
        check_finite("outputs", outputs)
        self.images += len(outputs)
        self.exits = self.exits or [self._scores() for _ in range(outputs.shape[1])]
        for scores, logits in zip(self.exits, outputs.unbind(dim=1), strict=True):
            scores.add(logits.log_softmax(dim=1), targets)
        self.ensemble.add(ensemble_log_probabilities(outputs, self.average), targets)
        if self.calibration is not None:
            scaled = outputs / self.calibration.temperature
            self.calibrated.add(ensemble_log_probabilities(scaled, self.average), targets)
        labelled = targets != VOID
        maps = (
            predictive_entropy(outputs, self.average),
            mutual_information(outputs),
            disagreement(outputs),
        )
        for name, values in zip(self.sums, maps, strict=True):
            self.sums[name] += values[labelled].double().sum().item()

    def result(self) -> tuple[TargetEvaluation, Document | None]:
        """Return the measures."""
        pixels = self.ensemble.pixels
        evaluation = TargetEvaluation(
            self.images,
            self.average,
            [_known(scores.result()) for scores in self.exits],
            _known(self.ensemble.result()),
            {
                name: _known({"iou": iou})
                for name, iou in zip(self.names, self.ensemble.class_iou().tolist(), strict=True)
            },
            {name: total / pixels for name, total in self.sums.items()},
            None if self.calibration is None else _known(self.calibrated.result()),
        )
        return evaluation, None


class _Resampler:
    """Measures the maps of the calibrated ensemble on sets of images that are drawn from all batches."""

    def __init__(self, names: Sequence[str], average: Average, calibration: PixelCalibration | None) -> None:
        self.average = average
        self.temperature = 1.0 if calibration is None else calibration.temperature
        self.scores = ResampledPixels(len(names), VOID)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        scaled = outputs.float() / self.temperature
        self.scores.add(ensemble_log_probabilities(scaled, self.average), targets.to(outputs.device))

    def result(self) -> Resampled:
        """Return the measures."""
        return self.scores.result()


def _known(measures: Mapping[str, float]) -> dict[str, float]:
    """Return measures without those that are not defined, which JSON cannot hold."""
    return {name: value for name, value in measures.items() if not math.isnan(value)}


@dataclass(frozen=True)
class PixelPredictions:
    """Predictions for a batch of images.

    Attributes:
        names: of the classes.
        numbers: of the classes in masks.
        logits: `(n, exits, classes, height, width)`, divided by the temperature, of the network's pixels.
        average: what the ensemble averages.
        sizes: height and width of each photograph; its maps have them. Black pixels that the network got
            beside it are left out.

    Example:
        >>> logits = torch.tensor([2.0, -1.0]).view(1, 1, 2, 1, 1).expand(1, 3, 2, 4, 4)
        >>> predictions = PixelPredictions(["road", "sky"], [0, 1], logits, "logits", [(8, 8)])
        >>> predictions.class_map(0).size, predictions.records()[0]["shares"]
        ((8, 8), {'road': 1.0, 'sky': 0.0})
    """

    names: Sequence[str]
    numbers: Sequence[int]
    logits: Tensor
    average: Average
    sizes: Sequence[tuple[int, int]]

    def class_map(self, row: int) -> Image.Image:
        """Return the most probable class of each pixel of a photograph.

        Pixels are numbers of classes as in masks, and have the colours of PASCAL VOC's masks
        (`voc_palette`). Probabilities between the network's pixels are interpolated.

        Args:
            row: number of the photograph in the batch.
        """
        table = torch.tensor(self.numbers, dtype=torch.uint8)
        image = Image.fromarray(table[self._most_probable(row)].numpy())
        image.putpalette(voc_palette())
        return image

    def uncertainty_map(self, row: int) -> Image.Image:
        """Return the entropy of the ensemble's prediction at each pixel of a photograph.

        Grey: 0 for a certain class, 255 if all classes are equally probable.

        Args:
            row: number of the photograph in the batch.
        """
        logits = self._of(row)
        entropy = predictive_entropy(logits, self.average) / math.log(len(self.names))
        values = self._resized(entropy, row)[0]
        return Image.fromarray((255 * values).round().clamp(0, 255).byte().numpy())

    def maps(self, row: int) -> dict[str, Image.Image]:
        """Return the maps of a photograph: what follows its name in that of the map's file → the map."""
        return {"": self.class_map(row), "-uncertainty": self.uncertainty_map(row)}

    def probabilities(self, row: int) -> Tensor:
        """Return the ensemble's probabilities for each pixel of a photograph, `(classes, height, width)`.

        Those between the network's pixels are interpolated.

        Args:
            row: number of the photograph in the batch.
        """
        return self._resized(ensemble_log_probabilities(self._of(row), self.average).exp()[0], row)

    def records(self) -> list[dict[str, Any]]:
        """Return what is written of each photograph: shares of its pixels, and means over them."""
        return [self._record(row) for row in range(len(self.logits))]

    def _record(self, row: int) -> dict[str, Any]:
        logits = self._of(row)
        log_probabilities = ensemble_log_probabilities(logits, self.average)
        confidence, classes = log_probabilities.exp().max(dim=1)
        counts = classes.flatten().bincount(minlength=len(self.names))
        shares = (counts / counts.sum()).tolist()
        return {
            "shares": dict(zip(self.names, shares, strict=True)),
            "confidence": confidence.mean().item(),
            "disagreement": disagreement(logits).mean().item(),
            "entropy": predictive_entropy(logits, self.average).mean().item(),
            "mutual_information": mutual_information(logits).mean().item(),
        }

    def _of(self, row: int) -> Tensor:
        """Return the logits of a photograph alone, `(1, exits, classes, height, width)`."""
        logits = self.logits[[row]]
        height, width = size_within(self.sizes[row], (logits.shape[3], logits.shape[4]))
        return logits[..., :height, :width]

    def _resized(self, values: Tensor, row: int) -> Tensor:
        """Return maps `(n, height, width)` in the size of a photograph."""
        size = tuple(self.sizes[row])
        if values.shape[1:] == size:
            return values
        return F.interpolate(values[None], size=size, mode="bilinear", align_corners=False)[0]

    def _most_probable(self, row: int) -> Tensor:
        """Return the most probable classes, `(height, width)` int64.

        Class by class, as the probabilities of all classes for a large photograph need much memory.
        """
        probabilities = ensemble_log_probabilities(self._of(row), self.average).exp()[0]
        best = self._resized(probabilities[:1], row)[0]
        classes = torch.zeros_like(best, dtype=torch.int64)
        for number in range(1, len(probabilities)):
            values = self._resized(probabilities[number : number + 1], row)[0]
            classes[values > best] = number
            best = torch.maximum(best, values)
        return classes


def median_frequency_weights(pixels: Sequence[int], images: Sequence[int], total: int) -> Tensor:
    """Return a weight for each class, so that rare ones count more (Eigen & Fergus 2015, arXiv 1411.4734).

    The frequency of a class is its share of the pixels of the images in which it occurs, taken to have as
    many labelled pixels as others. Its weight is the median of all frequencies over its own.

    Args:
        pixels: number of pixels of each class.
        images: number of images in which each class occurs.
        total: number of images.

    Returns:
        Float32 `(classes,)`; 1 for a class that does not occur.

    Example:
        >>> median_frequency_weights([800, 150, 50, 0], [10, 10, 5, 0], total=10)
        tensor([0.1875, 1.0000, 1.5000, 1.0000])
    """
    counted = torch.tensor(pixels, dtype=torch.float64), torch.tensor(images, dtype=torch.float64)
    frequencies = counted[0] * total / (counted[1].clamp(min=1) * counted[0].sum())
    occurs = frequencies > 0
    return torch.where(occurs, frequencies[occurs].median() / frequencies, 1.0).float()


def _address(image: Image.Image) -> str:
    return png_address(png_bytes(image))


def voc_palette() -> list[int]:
    """Return the colours of PASCAL VOC's masks, 256 times red, green and blue.

    Bit k of a colour's channel c, from the highest, is bit 3k + c of its number.

    Example:
        >>> voc_palette()[:9]
        [0, 0, 0, 128, 0, 0, 0, 128, 0]
    """
    return [
        sum((number >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
        for number in range(256)
        for channel in range(3)
    ]


class Segmentation(Task):
    """A class for each pixel, see the module.

    Example:
        >>> task = Segmentation(["road", "sky"])
        >>> masks = torch.tensor([[[0, 1, 255]]])  # the last pixel is void
        >>> evaluation = task.evaluate(torch.zeros(1, 2, 2, 1, 3), masks, average="logits")
        >>> evaluation.ensemble["pixel_accuracy"], evaluation.by_target
        (0.5, {'road': {'iou': 0.5}, 'sky': {'iou': 0.0}})
    """

    name = "segmentation"
    targets = MASKS
    class_weights: Tensor | None = None
    unused = (
        *(setting for setting in Task.unused if setting not in ("void", "balance")),
        "crop_padding",
        "rand_augment",
        "erase",
        "corrupt",
    )
    exported: ClassVar[Mapping[str, str]] = {
        "classes": "(batch, height, width), uint8: most probable class of each pixel, its number in masks",
        "probabilities": "(batch, classes, height, width), float32: of the ensemble, calibrated",
        "entropy": "(batch, height, width), float32: of the probabilities, in nats",
        "mutual_information": "(batch, height, width), float32: of class and exit, in nats",
        "disagreement": "(batch, height, width), float32: share of the pairs of exits that differ",
    }
    exported_early = ("classes", "probabilities", "entropy")
    draws_maps = True
    crops = False
    progress_title = "pixels right, %"
    remark = "All are over pixels that are not void; mIoU is the mean over the classes that occur."
    headline = "mean_iou"
    columns: ClassVar[Columns] = {
        "mean_iou": Column("mIoU %", 100, 2, higher_is_better=True),
        "pixel_accuracy": Column("accuracy %", 100, 2, higher_is_better=True, brief=False),
        "nll": Column("NLL", 1, 3),
        "ece": Column("ECE %", 100, 2),
        "brier": Column("Brier", 1, 4, paired=False, brief=False),
        "error_auroc": Column("AUROC of errors %", 100, 2, higher_is_better=True),
        "aurc": Column("AURC %", 100, 2),
        "disagreement": Column("disagreement %", 100, 2, paired=False, brief=False),
    }
    evaluation_kind = TargetEvaluation
    calibration_kind = PixelCalibration

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Check that the settings of a run suit the task, see `Task.check`."""
        super().check(config)
        if config.data.balance == "sampler":
            raise invalid("balance", f"none or weights with task={cls.name}", config.data.balance)

    @classmethod
    def load_data(cls, config: DataConfig, seed: int, *, training: bool) -> ImageData:
        """Load a folder of photographs and masks, see `netfission.data.mask_data.load_mask_data`."""
        return load_mask_data(
            config.data,
            image_size=config.image_size,
            validation=config.validation,
            seed=seed,
            void=config.void,
            checks=training,
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
        """Load photographs and masks of another folder, see `load_matched_masks`."""
        return load_matched_masks(name, self.names, shape, part=part, preferred=preferred, void=config.void)

    @classmethod
    def load_unscaled(cls, config: DataConfig, seed: int) -> tuple[ImageData, MaskSplit]:
        """Load a folder, and its test photographs in their own sizes, see `Task.load_unscaled`."""
        data = load_mask_data(
            config.data,
            image_size=config.image_size,
            validation=config.validation,
            seed=seed,
            void=config.void,
            memory_limit=0,
            checks=False,
        )
        assert isinstance(data.test, MaskSplit)  # with this limit of memory
        return data, data.test.unscaled()

    @classmethod
    def from_data(cls, data: ImageData, *, balance: bool = False) -> Self:
        """Return the task of a data set, with the numbers of its classes in masks."""
        numbers = data.numbers or list(range(len(data.classes)))
        task = cls(data.classes, {"numbers": [float(number) for number in numbers]})
        if balance and data.pixels is not None:
            train = data.summary.train
            task.class_weights = median_frequency_weights(data.pixels, train.images_per_class, train.images)
        return task

    @property
    def numbers(self) -> list[int]:
        """The number of each class in masks."""
        found = self.scale.get("numbers")
        return list(range(len(self.names))) if found is None else [int(number) for number in found]

    @classmethod
    def transform(cls, config: DataConfig, data: ImageData) -> PairTransform:
        """Return random scaling, cropping, mirroring and recolouring of a photograph and its mask."""
        factor = math.sqrt(config.crop_scale or _CROP_SCALE)
        return MaskTransform(
            (data.shape[1], data.shape[2]),
            scale=(factor, 1 / factor),
            flip=config.flip is not False,
            color_jitter=config.color_jitter,
            void=VOID,
        )

    @classmethod
    def batch_size(cls, shape: Sequence[int], limit: int) -> int:
        """Return a number of images whose logits take little memory."""
        return max(1, min(limit, _PIXELS_AT_ONCE // (shape[1] * shape[2])))

    @classmethod
    def to_pixels(cls, image: Image.Image, shape: Sequence[int]) -> Tensor:
        """Convert a photograph to pixels; it is fitted into the network's size, and nothing is cut off."""
        return to_pixels_within(image, "L" if shape[0] == 1 else "RGB", (shape[1], shape[2]))

    def check_model(self, name: str, model: nn.Module, shape: Sequence[int]) -> None:
        """Check that a network has logits for each pixel; it runs once."""
        outputs = self._output_of(name, model, shape, "photographs")
        expected = (1, self.outputs, *shape[1:])
        if not isinstance(outputs, Tensor) or outputs.shape != expected:
            found = describe(outputs) if isinstance(outputs, Tensor) else type(outputs).__name__
            kind = f"a network that classifies each pixel, such as {_SUCH_AS}"
            raise invalid("model", kind, found=f"{name}, whose output is {found}")

    def loss(self, method: Method, training: TrainingConfig) -> nn.Module:
        """Return the method's own loss, mean over the pixels that are not void."""
        loss = method.loss(training)
        assert isinstance(loss, EnsembleDistillationLoss)
        loss.ignore_index = VOID
        loss.class_weights = self.class_weights
        return loss

    def distil(self, outputs: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the divergence from another network's classes, mean over the pixels that are not void."""
        return distillation_loss(outputs, teacher, temperature=temperature, counts=targets != VOID)

    def progress(self, outputs: Tensor, targets: Tensor, average: Average) -> tuple[Tensor, Tensor]:
        """Return the share of labelled pixels that are right, and their mean NLL, times the images."""
        ensemble = ensemble_log_probabilities(outputs, average)
        labelled = targets != VOID
        factor = len(targets) / labelled.sum().clamp(min=1)
        votes = torch.cat([outputs.argmax(dim=2), ensemble.argmax(dim=1, keepdim=True)], dim=1)
        right = (votes == targets.unsqueeze(1)).sum(dim=(0, 2, 3))  # never at void pixels
        return right * factor, F.nll_loss(ensemble, targets, ignore_index=VOID, reduction="sum") * factor

    def shown(self, score: float) -> str:
        """Return a share of pixels in %."""
        return f"{percent(score, 1)} %"

    def total_uncertainty(self, outputs: Tensor, *, average: Average, sizes: Sizes = ()) -> Tensor:
        """Return the entropy, mean over the pixels of the photographs."""
        entropy = predictive_entropy(outputs, average).double()
        if not sizes:
            return entropy.mean(dim=(1, 2))
        inner = [size_within(size, (outputs.shape[-2], outputs.shape[-1])) for size in sizes]
        means = [
            values[:height, :width].mean() for values, (height, width) in zip(entropy, inner, strict=True)
        ]
        return torch.stack(means)

    def uncertainty_scores(self, outputs: Tensor, *, average: Average) -> dict[str, Tensor]:
        """Return means over pixels: negative logarithm of the confidence, entropy, mutual information."""
        maps = {
            "maximum probability": -ensemble_log_probabilities(outputs, average).amax(dim=1),
            "entropy": predictive_entropy(outputs, average),
        }
        if outputs.shape[1] > 1:
            maps["mutual information"] = mutual_information(outputs)
        return {name: values.double().mean(dim=(1, 2)) for name, values in maps.items()}

    def blank_targets(self, images: Tensor) -> Tensor:
        """Return the first class for each pixel, `(batch, height, width)` int64."""
        return images.new_zeros(len(images), *images.shape[2:], dtype=torch.int64)

    def figures(self, evaluation: TargetEvaluation) -> list[FigureData]:
        """Return the IoU of each class."""
        return [iou_bars(evaluation.by_target, evaluation.n)]

    def inspect(self, images: InspectedImages, *, average: Average, calibration: Any = None) -> Inspection:
        """Return the reliability over pixels, and photographs with their masks and maps."""
        found = inspect_pixels(
            images,
            partial(self.predict, average=average, calibration=calibration),
            self.numbers,
            voc_palette(),
            average=average,
            temperature=None if calibration is None else calibration.temperature,
        )
        colors = self.colors()
        others = {
            f"{title} (without a class)" if title in colors else title: color
            for title, color in found.legend.items()
        }
        return replace(found, legend=colors | others)

    def answers(self, predictions: PixelPredictions) -> list[dict[str, Any]]:
        """Return the records with the maps of each photograph, the files that `netfission predict` writes."""
        return [
            record | {"maps": {_MAPS[name]: _address(image) for name, image in predictions.maps(row).items()}}
            for row, record in enumerate(predictions.records())
        ]

    def colors(self) -> dict[str, str]:
        """Return the color of each class in maps."""
        palette = bytes(voc_palette())
        return {
            name: f"#{palette[3 * number : 3 * number + 3].hex()}"
            for name, number in zip(self.names, self.numbers, strict=True)
        }

    def calibrator(
        self, *, average: Average, dependence: str = "", sizes: Sizes = ()
    ) -> Accumulator[PixelCalibration]:
        """Return what fits a temperature to a sample of validation pixels."""
        return _Calibrator(self, average, dependence, sizes)

    def evaluator(
        self, *, average: Average, calibration: Any = None
    ) -> Accumulator[tuple[TargetEvaluation, Document | None]]:
        """Return what measures maps batch by batch."""
        return _Evaluator(self.names, average, calibration)

    def resampler(self, *, average: Average, calibration: Any = None) -> Accumulator[Resampled]:
        """Return what measures sets of photographs, see `Task.resampled`; no map is kept."""
        return _Resampler(self.names, average, calibration)

    def calibrate(
        self, outputs: Tensor, targets: Tensor, *, average: Average, dependence: str = ""
    ) -> PixelCalibration:
        """Fit a temperature to a sample of pixels."""
        calibrator = _Calibrator(self, average, dependence)
        calibrator.add(outputs, targets)
        return calibrator.result()

    def evaluate(
        self, outputs: Tensor, targets: Tensor, *, average: Average, calibration: Any = None
    ) -> TargetEvaluation:
        """Measure every exit and the ensemble, and with the temperature."""
        evaluator = _Evaluator(self.names, average, calibration)
        evaluator.add(outputs, targets)
        return evaluator.result()[0]

    def export(
        self, outputs: Tensor, *, average: Average, calibration: Any = None, coverage: float | None = None
    ) -> dict[str, Tensor]:
        """Return the maps of the network's pixels, see `Task.export`."""
        assert coverage is None
        logits = outputs if calibration is None else outputs / calibration.temperature
        log_probabilities = ensemble_log_probabilities(logits, average)
        numbers = torch.tensor(self.numbers, dtype=torch.uint8)
        return {
            "classes": numbers[log_probabilities.argmax(dim=1)],
            "probabilities": log_probabilities.exp(),
            "entropy": predictive_entropy(logits, average),
            "mutual_information": mutual_information(logits),
            "disagreement": disagreement(logits),
        }

    def joined(self, strips: Iterable[PixelPredictions], size: tuple[int, int]) -> PhotographPrediction:
        """Join the predictions for strips of one photograph, see `Task.joined`."""
        return joined(strips, size)

    def map_scores(self) -> MapScores:
        """Return what measures maps in the size of the photographs."""
        return MapScores(len(self.names), VOID)

    def early_exit(self) -> PixelEarlyExit:
        """Return the mean of logits, and the certainty of pixels."""
        return PixelEarlyExit()

    def rounding(self, values: Mapping[str, Tensor], calibration: Any = None) -> dict[str, Tensor]:
        """Return how much values may differ by rounding, see `Task.rounding`."""
        best = values["probabilities"].topk(2, dim=1).values
        tolerance = super().rounding(values)
        # Exits that are undecided differ in one rounding or another: their votes have no values of their own.
        undecided = torch.full_like(values["disagreement"], 1.0)
        return tolerance | {"classes": best[:, 0] - best[:, 1] <= NEAR, "disagreement": undecided}

    def predict(
        self,
        outputs: Tensor,
        *,
        average: Average,
        calibration: Any = None,
        coverage: float | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> PixelPredictions:
        """Predict the classes of pixels.

        Raises:
            ValueError: a coverage is given, which pixels do not have, outputs are not finite, or there is not
                one size per image.
        """
        if coverage is not None:
            raise invalid("coverage", f"left out with task={self.name}", coverage)
        check_finite("outputs", outputs)
        check_average(average, outputs.shape[1])
        temperature = 1.0 if calibration is None else calibration.temperature
        if sizes is None:
            sizes = [(outputs.shape[3], outputs.shape[4])] * len(outputs)
        if len(sizes) != len(outputs):
            raise invalid("sizes", f"{len(outputs)}, one per image", found=str(len(sizes)))
        return PixelPredictions(self.names, self.numbers, outputs / temperature, average, sizes)
