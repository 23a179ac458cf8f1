"""Export a classifier in fewer bits to a file, which is measured before it is written."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from netfission.classifier import AnswerLimits, Classifier
from netfission.classifier.answer_settings import AnswerSettings
from netfission.data import ImageData, Split
from netfission.evaluation.calibration import VALIDATION, Calibration
from netfission.export.check import (
    NOT_FINITE,
    check_batches,
    check_promises,
    measure_change,
    with_progress,
)
from netfission.export.formats import FORMATS, ExportedModel, Runner
from netfission.export.onnx import OnnxModel
from netfission.export.predictor import INPUT
from netfission.export.samples import CHECK_IMAGES, labelled_batches, sample_split
from netfission.export.write import ExportResult, Format, file_metadata, make_model
from netfission.utils.errors import invalid
from netfission.utils.files import choose_format, write_whole

Reduced = Literal["fp16", "int8"]
QUANTISATION_IMAGES = 256

Make = Callable[[Classifier, AnswerLimits | None], ExportedModel]


def export_reduced(
    classifier: Classifier,
    path: Path,
    data: ImageData,
    *,
    precision: Reduced,
    format: Format = "onnx",
    opset: int | None = None,
    asked: AnswerSettings | None = None,
    workers: int = 0,
) -> ExportResult:
    """Export a classifier in fewer bits, and measure how its accuracy changes.

    Fewer bits give other logits, of which the classifier's calibration says nothing. So the file has a
    calibration of its own, fitted to its own logits of the validation images, if the classifier's was fitted
    to these. The change is measured on the validation split; without one, on the test split.

    Args:
        classifier: see `netfission.export.export`.
        path: see there.
        data: the data set that the classifier was trained on.
        precision: `"fp16"`, or `"int8"` for ONNX, which is quantised by training images, see `quantise`.
            In both, normalisation and everything that follows the logits stays in float32.
        format: see `netfission.export.export`.
        opset: see there.
        asked: what answers promise by the file's own calibration; the file has further outputs, see
            `netfission.export.predictor.PROMISED`. Default: none.
        workers: number of processes that decode images, for data sets too large for memory.

    Returns:
        The file, the largest difference of a probability, and the change of accuracy.

    Raises:
        ValueError: an argument is not valid, there are no training images, the calibration is on other
            images than the validation split and something is asked, or see `Classifier.limits`.
        MissingExtraError: a package is not installed.
        RuntimeError: the network cannot be exported, the file gives probabilities that are not finite, or its
            answers do not keep to its calibration.
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
    make = _maker(data, precision, format, opset)
    calibrated, run_plain = classifier, None
    if _is_on_validation(classifier.calibration) and data.validation is not None:
        plain = make(Classifier(classifier.network, classifier.spec), None)  # logits at temperature 1
        run_plain = plain.load(plain.to_bytes({}))
        calibrated = _calibrated(run_plain, classifier, data.validation, workers)
    limits = None
    if asked is not None and asked != AnswerSettings():
        if run_plain is None and classifier.calibration is not None:
            hint = f"the network in float32 was calibrated on {classifier.calibration.fitted_on}"
            raise invalid("precision", "float32 with this calibration", precision, hint=hint)
        limits = asked.limits(calibrated)
    model = make(calibrated, limits)
    run = model.load(model.to_bytes({}))
    if limits is not None:
        assert data.validation is not None and run_plain is not None
        _check(run, run_plain, calibrated, limits, sample_split(data.validation, CHECK_IMAGES))
    name, split = ("test", data.test) if data.validation is None else ("validation", data.validation)
    change = measure_change(run, classifier, labelled_batches(split, workers))
    metadata = file_metadata(calibrated, precision, limits)
    metadata["measured"] = asdict(change) | {"split": name}
    if classifier.calibration is not None:  # of the run, which tells if the file is older
        metadata["calibration"] = classifier.calibration.digest
    write_whole(path, model.to_bytes(metadata))
    return ExportResult(path, change.difference, change)


def _maker(data: ImageData, precision: Reduced, format: Format, opset: int | None) -> Make:
    """Return what makes the file of a classifier; ValueError if it cannot be made so."""
    if precision == "int8":
        if format != "onnx":
            raise invalid("precision", "float32 or fp16 unless format='onnx'", precision)
        if not len(data.train):
            hint = "int8 is calibrated on training images"
            raise invalid("data", "a data set with training images", data.name, hint=hint)

    def make(classifier: Classifier, limits: AnswerLimits | None) -> ExportedModel:
        model = make_model(classifier, format, opset, half=precision == "fp16", limits=limits)
        if precision == "fp16":
            return model
        from netfission.export.quantise import quantise

        assert isinstance(model, OnnxModel)
        return quantise(model, sample_split(data.train, QUANTISATION_IMAGES))

    return make


def _is_on_validation(calibration: Calibration | None) -> bool:
    return calibration is not None and calibration.fitted_on == VALIDATION


def _calibrated(run: Runner, classifier: Classifier, validation: Split, workers: int) -> Classifier:
    """Return the classifier with the calibration of a file that gives logits at temperature 1."""
    before = classifier.calibration
    assert before is not None
    answers = [
        (run(**{INPUT: pixels})["logits"], labels)
        for pixels, labels in with_progress(labelled_batches(validation, workers), "calibrating")
    ]
    logits, labels = (torch.cat(parts) for parts in zip(*answers, strict=True))
    if not logits.isfinite().all():
        raise RuntimeError(NOT_FINITE)
    fitted = Calibration.fit(logits, labels, average=classifier.spec.average, dependence=before.dependence)
    return Classifier(classifier.network, classifier.spec, replace(fitted, weights=before.weights))


def _check(
    run: Runner, run_plain: Runner, calibrated: Classifier, limits: AnswerLimits, images: Tensor
) -> None:
    """Check that the answers of a file are those that its calibration makes of its logits."""
    for pixels in check_batches(images, "checking"):
        expected = calibrated.interpret(run_plain(**{INPUT: pixels})["logits"], limits)
        check_promises(run(**{INPUT: pixels}), expected, limits, calibrated.temperature)
