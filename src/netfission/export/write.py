"""Export a classifier to a file, which is checked or measured before it is written."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from netfission.classifier import AnswerLimits, Classifier
from netfission.data import ImageData
from netfission.export.check import TOLERANCE, AccuracyChange, check_images, check_outputs, measure_change
from netfission.export.formats import FORMATS, ExportedModel
from netfission.export.metadata import classifier_metadata, promises_metadata
from netfission.export.onnx import OnnxModel
from netfission.export.predictor import INPUT, OUTPUTS, Predictor, promised_outputs
from netfission.export.pt2 import Pt2Model
from netfission.export.samples import labelled_batches, sample_split
from netfission.utils.errors import invalid
from netfission.utils.files import choose_format, write_whole

Format = Literal["onnx", "pt2"]
Precision = Literal["float32", "fp16", "int8"]
CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class ExportResult:
    """An exported file, and how its outputs differ from the classifier's.

    Attributes:
        path: the file.
        difference: largest difference of a probability, of the ensemble or of an exit.
        change: of accuracy and negative log-likelihood; None in float32, whose difference is at most 1e-4.

    Example:
        >>> ExportResult(Path("model.onnx"), 2.4e-7).path.name
        'model.onnx'
    """

    path: Path
    difference: float
    change: AccuracyChange | None = None


def export(
    classifier: Classifier,
    path: Path,
    images: Tensor,
    *,
    format: Format = "onnx",
    opset: int | None = None,
    limits: AnswerLimits | None = None,
) -> ExportResult:
    """Export a classifier in float32 to a file: pixels → `OUTPUTS` by name, for any batch size.

    The file is written only if it gives what the classifier predicts on `images`.

    Args:
        classifier: on the CPU; not changed.
        path: the file; replaced if it exists.
        images: real images to check the file with, uint8 `(n, channels, height, width)`.
        format: `"onnx"`, with metadata as JSON in the model's property `netfission`; or `"pt2"`, of
            `torch.export`, with metadata in the extra file `netfission.json`.
        opset: version of ONNX's operators, 18 to 23; default 20.
        limits: that the answers keep to, from `Classifier.limits`; the file has further outputs, see
            `netfission.export.predictor.PROMISED`, and what they rest on in its metadata. Default: none.

    Returns:
        The file and the largest difference of a probability.

    Raises:
        ValueError: an argument is not valid.
        MissingExtraError: a package is not installed.
        RuntimeError: the network cannot be exported; or a probability of the file, in ONNX Runtime or
            PyTorch, differs from the classifier's by more than 1e-4. Nothing is written then.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> import netfission as nf
        >>> from netfission.models import create_model
        >>> network = nf.fission(create_model("wrn-10-1", 2), 2, example_input=torch.zeros(2, 3, 16, 16))
        >>> classifier = nf.Classifier.from_network(
        ...     network, model=None, classes=["cat", "dog"], shape=(3, 16, 16), mean=[0.5] * 3, std=[0.2] * 3
        ... )
        >>> images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = export(classifier, Path(folder) / "model.pt2", images, format="pt2")
        >>> result.difference < 1e-4
        True
    """
    check_images(classifier, images)
    choose_format("path", path, FORMATS, format)
    model = _make_model(classifier, format, opset, half=False, limits=limits)
    difference = check_outputs(model.load(model.to_bytes({})), classifier, images, limits)
    metadata = _metadata(classifier, "float32", limits)
    metadata["checked"] = {"images": len(images), "difference": difference, "tolerance": TOLERANCE}
    write_whole(path, model.to_bytes(metadata))
    return ExportResult(path, difference)


def export_reduced(
    classifier: Classifier,
    path: Path,
    data: ImageData,
    *,
    precision: Literal["fp16", "int8"],
    format: Format = "onnx",
    opset: int | None = None,
    workers: int = 0,
) -> ExportResult:
    """Export a classifier in fewer bits, and measure how its accuracy changes.

    The change is measured on the validation split, or on the test split if there is no validation split.

    Args:
        classifier: see `export`.
        path: see `export`.
        data: the data set that the classifier was trained on.
        precision: `"fp16"`, or `"int8"` for ONNX, which is calibrated on training images, see `quantise`.
            In both, normalisation and everything that follows the logits stays in float32.
        format: see `export`.
        opset: see `export`.
        workers: number of processes that decode images, for data sets too large for memory.

    Returns:
        The file, the largest difference of a probability, and the change of accuracy.

    Raises:
        ValueError: an argument is not valid, or there are no training images.
        MissingExtraError: a package is not installed.
        RuntimeError: the network cannot be exported, or the file gives probabilities that are not finite.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> import netfission as nf
        >>> from netfission.data import load_data
        >>> from netfission.models import create_model
        >>> data = load_data("digits")
        >>> model = create_model("wrn-10-1", 10, in_channels=1)
        >>> network = nf.fission(model, 2, example_input=torch.zeros(2, 1, 8, 8))
        >>> classifier = nf.Classifier.from_network(
        ...     network, model=None, classes=data.classes, shape=data.shape, mean=[0.3], std=[0.4]
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "model.pt2"
        ...     result = export_reduced(classifier, path, data, precision="fp16", format="pt2")
        >>> result.change.n == len(data.validation)
        True
    """
    choose_format("path", path, FORMATS, format)
    model = _make_model(classifier, format, opset, half=precision == "fp16")
    if precision == "int8":
        from netfission.export.quantise import quantise

        if not isinstance(model, OnnxModel):
            raise invalid("precision", "float32 or fp16 unless format='onnx'", "int8")
        if not len(data.train):
            hint = "int8 is calibrated on training images"
            raise invalid("data", "a data set with training images", data.name, hint=hint)
        model = quantise(model, sample_split(data.train, CALIBRATION_IMAGES))
    name, split = ("test", data.test) if data.validation is None else ("validation", data.validation)
    change = measure_change(model.load(model.to_bytes({})), classifier, labelled_batches(split, workers))
    metadata = _metadata(classifier, precision) | {"measured": asdict(change) | {"split": name}}
    write_whole(path, model.to_bytes(metadata))
    return ExportResult(path, change.difference, change)


def _make_model(
    classifier: Classifier,
    format: Format,
    opset: int | None,
    *,
    half: bool,
    limits: AnswerLimits | None = None,
) -> ExportedModel:
    if format == "pt2" and opset is not None:
        raise invalid("opset", "None unless format='onnx'", opset)
    example = {INPUT: torch.zeros(2, *classifier.spec.shape, dtype=torch.uint8)}
    predictor = Predictor.from_classifier(classifier, half=half, limits=limits)
    return (
        Pt2Model.from_module(predictor, example)
        if format == "pt2"
        else OnnxModel.from_module(predictor, example, opset)
    )


def _metadata(
    classifier: Classifier, precision: Precision, limits: AnswerLimits | None = None
) -> dict[str, Any]:
    outputs = OUTPUTS | (promised_outputs(limits) if limits else {})
    promises = promises_metadata(classifier, limits) if limits else None
    return classifier_metadata(classifier) | {
        "precision": precision,
        "outputs": outputs,
        "promises": promises,
    }
