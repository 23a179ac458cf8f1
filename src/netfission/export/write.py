"""Export a classifier to a file, which is checked before it is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from netfission.classifier import AnswerLimits, Classifier
from netfission.export.check import TOLERANCE, AccuracyChange, check_images, check_outputs
from netfission.export.formats import FORMATS, ExportedModel
from netfission.export.metadata import classifier_metadata, promises_metadata
from netfission.export.onnx import OnnxModel
from netfission.export.predictor import INPUT, OUTPUTS, Predictor, promised_outputs
from netfission.export.pt2 import Pt2Model
from netfission.utils.errors import invalid
from netfission.utils.files import choose_format, write_whole

Format = Literal["onnx", "pt2"]
Precision = Literal["float32", "fp16", "int8"]


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
    model = make_model(classifier, format, opset, half=False, limits=limits)
    difference = check_outputs(model.load(model.to_bytes({})), classifier, images, limits)
    metadata = file_metadata(classifier, "float32", limits)
    metadata["checked"] = {"images": len(images), "difference": difference, "tolerance": TOLERANCE}
    write_whole(path, model.to_bytes(metadata))
    return ExportResult(path, difference)


def make_model(
    classifier: Classifier,
    format: Format,
    opset: int | None,
    *,
    half: bool,
    limits: AnswerLimits | None = None,
) -> ExportedModel:
    """Return a classifier in an export format; `half` computes in float16 between pixels and logits."""
    predictor = Predictor.from_classifier(classifier, half=half, limits=limits)
    return export_module(predictor, classifier.spec.shape, format, opset)


def export_module(
    module: nn.Module, shape: Sequence[int], format: Format, opset: int | None
) -> ExportedModel:
    """Return a module in an export format; its input is pixels, uint8 `(batch, *shape)`."""
    if format == "pt2" and opset is not None:
        raise invalid("opset", "None unless format='onnx'", opset)
    example = {INPUT: torch.zeros(2, *shape, dtype=torch.uint8)}
    if format == "pt2":
        return Pt2Model.from_module(module, example)
    return OnnxModel.from_module(module, example, opset)


def file_metadata(
    classifier: Classifier, precision: Precision, limits: AnswerLimits | None = None
) -> dict[str, Any]:
    """Return the metadata of a file of one graph, of types that JSON has."""
    outputs = OUTPUTS | (promised_outputs(limits) if limits else {})
    promises = promises_metadata(classifier, limits) if limits else None
    return classifier_metadata(classifier) | {
        "precision": precision,
        "outputs": outputs,
        "promises": promises,
    }
