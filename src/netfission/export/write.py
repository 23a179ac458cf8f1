"""From a classifier to a file that was checked before it was written."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from netfission.classifier import Classifier
from netfission.data import ImageData
from netfission.export.check import TOLERANCE, Change, check, check_images, compare
from netfission.export.formats import Model
from netfission.export.metadata import metadata
from netfission.export.onnx import OnnxModel
from netfission.export.predictor import INPUT, OUTPUTS, Predictor
from netfission.export.pt2 import Pt2Model
from netfission.export.samples import batches_of, spread
from netfission.utils.files import write_whole

Format = Literal["onnx", "pt2"]
Precision = Literal["float32", "fp16", "int8"]
CALIBRATED = 256  # images


@dataclass(frozen=True)
class Exported:
    """How far an exported file's answers are from the classifier's.

    Attributes:
        path: the file.
        difference: the largest of a probability, of the ensemble or of an exit.
        change: of accuracy and NLL; None in float32, where there is none to speak of.
    """

    path: Path
    difference: float
    change: Change | None = None


def export(
    classifier: Classifier,
    path: Path,
    images: Tensor,
    *,
    format: Format = "onnx",
    opset: int | None = None,
) -> Exported:
    """Export a classifier in float32: pixels → `OUTPUTS` by name, for any batch size.

    Args:
        classifier: on the CPU; not changed.
        path: the file; what it held is replaced.
        images: real ones, to check the file with, uint8 `(n, channels, height, width)`.
        format: `"onnx"`, with metadata as JSON in the model's property `netfission`; or `"pt2"`, of
            `torch.export`, with it in the extra file `netfission.json`.
        opset: of ONNX, 18 to 23; default 20.

    Raises:
        ValueError: an argument is not what it takes, or a package is missing.
        RuntimeError: the network cannot be exported; or the file, in ONNX Runtime or in PyTorch, gives
            probabilities that are more than 1e-4 from the classifier's. Nothing is written then.
        OSError: the file cannot be written.
    """
    check_images(classifier, images)
    model = _model(classifier, format, opset, half=False)
    difference = check(model.load(model.content({})), classifier, images)
    about = _about(classifier, "float32")
    about["checked"] = {"images": len(images), "difference": difference, "tolerance": TOLERANCE}
    write_whole(path, model.content(about))
    return Exported(path, difference)


def export_reduced(
    classifier: Classifier,
    path: Path,
    data: ImageData,
    *,
    precision: Literal["fp16", "int8"],
    format: Format = "onnx",
    opset: int | None = None,
    workers: int = 0,
) -> Exported:
    """Export a classifier in fewer bits, and measure what that changes on the validation (else test) split.

    Args:
        classifier: see `export`.
        path: see there.
        data: what it was trained on.
        precision: `"fp16"`, or, of ONNX, `"int8"`, which is calibrated on training images, see `quantise`.
            In both, images are normalised and logits turned into outputs in float32.
        format: see `export`.
        opset: see there.
        workers: processes that decode images, for data sets too large for memory.

    Raises:
        ValueError: an argument is not what it takes, a package is missing, or there are no training images.
        RuntimeError: the network cannot be exported, or the file gives probabilities that are not finite.
        OSError: the file cannot be written.
    """
    model = _model(classifier, format, opset, half=precision == "fp16")
    if precision == "int8":
        from netfission.export.quantise import quantise

        if not isinstance(model, OnnxModel):
            raise ValueError("precision=int8: goes with format=onnx")
        if not len(data.train):
            raise ValueError(f"data={data.name}: has no training images, which int8 is calibrated on")
        model = quantise(model, spread(data.train, CALIBRATED))
    name, split = ("test", data.test) if data.validation is None else ("validation", data.validation)
    change = compare(model.load(model.content({})), classifier, batches_of(split, workers))
    about = _about(classifier, precision) | {"measured": asdict(change) | {"split": name}}
    write_whole(path, model.content(about))
    return Exported(path, change.difference, change)


def _model(classifier: Classifier, format: Format, opset: int | None, half: bool) -> Model:
    if format == "pt2" and opset is not None:
        raise ValueError(f"opset={opset}: goes with format=onnx")
    example = {INPUT: torch.zeros(2, *classifier.spec.shape, dtype=torch.uint8)}
    predictor = Predictor.from_classifier(classifier, half=half)
    return (
        Pt2Model.from_module(predictor, example)
        if format == "pt2"
        else OnnxModel.from_module(predictor, example, opset)
    )


def _about(classifier: Classifier, precision: Precision) -> dict[str, Any]:
    outputs = {name: output.meaning for name, output in OUTPUTS.items()}
    return metadata(classifier) | {"precision": precision, "outputs": outputs}
