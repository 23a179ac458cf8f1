"""Export a network of another task than classification: labels, numbers, or a class of each pixel."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netfission.classifier import Predictor
from netfission.data.batches import Normalisation
from netfission.ensemble import Average
from netfission.export.cascade_answers import scaled_differences
from netfission.export.check import check_batches, check_images, largest_magnitude
from netfission.export.formats import FORMATS, Runner
from netfission.export.metadata import target_metadata
from netfission.export.predictor import INPUT, make_exportable
from netfission.export.write import ExportResult, Format, export_module
from netfission.tasks.base import TOLERANCE, Task
from netfission.utils.files import choose_format, write_whole


class TargetModule(nn.Module):
    """A module that returns what `Task.export` makes of a network's outputs, by name.

    Its input is pixels, uint8 `(batch, channels, height, width)`.

    Args:
        network: normalised images → outputs `(batch, exits, outputs, …)`.
        normalise: pixels → normalised images, float32.
        task: what the network learned.
        average: what the ensemble averages over the exits.
        calibration: what was learned from validation images; None without it.
        coverage: of intervals; None without them.
    """

    def __init__(
        self,
        network: nn.Module,
        normalise: Normalisation,
        task: Task,
        *,
        average: Average,
        calibration: Any,
        coverage: float | None,
    ) -> None:
        super().__init__()
        self.network = network
        self.normalise = normalise
        self.task = task
        self.average = average
        self.calibration = calibration
        self.coverage = coverage
        self.training = network.training

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return outputs by name."""
        return self.outputs(self.network(self.normalise(images)).float())

    def outputs(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return what a file gives for outputs of the network, floating point as float32."""
        found = self.task.export(
            outputs, average=self.average, calibration=self.calibration, coverage=self.coverage
        )
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def export_targets(
    predictor: Predictor,
    path: Path,
    images: Tensor,
    *,
    format: Format = "onnx",
    opset: int | None = None,
    coverage: float | None = None,
) -> ExportResult:
    """Export a network of another task than classification in float32: pixels → `Task.exported` by name.

    The file is written only if it gives what the network predicts on `images`.

    Args:
        predictor: on the CPU; not changed.
        path: the file; replaced if it exists.
        images: real images to check the file with, uint8 `(n, channels, height, width)`.
        format: `"onnx"` or `"pt2"`, see `netfission.export.export`.
        opset: version of ONNX's operators, 18 to 23; default 20.
        coverage: of intervals of numbers, see `Predictor.predict`; default none.

    Returns:
        The file and the largest difference of an output; of numbers, in their standard deviations.

    Raises:
        ValueError: an argument is not valid, or the coverage cannot be kept.
        MissingExtraError: a package is not installed.
        RuntimeError: the network cannot be exported, or the file gives something else. Nothing is written
            then.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> import netfission as nf
        >>> from netfission.classifier.folder import NetworkSpec
        >>> spec = NetworkSpec("wrn-10-1", ["car", "tree"], [3, 8, 8], [0.5] * 3, [0.2] * 3,
        ...                    fission={"exits": 2}, netfission="0.1.0", task="multilabel")
        >>> predictor = nf.Predictor(spec.build(), spec)
        >>> images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = export_targets(predictor, Path(folder) / "model.pt2", images, format="pt2")
        >>> result.difference < 1e-4
        True
    """
    choose_format("path", path, FORMATS, format)
    check_images(predictor, images)
    if coverage is not None:
        predictor.predict(images[:1], coverage=coverage)  # which refuses one that cannot be kept
    module = TargetModule(
        make_exportable(predictor.network, torch.zeros(2, *predictor.spec.shape)),
        Normalisation(predictor.spec.mean, predictor.spec.std),
        predictor.task,
        average=predictor.spec.average,
        calibration=predictor.calibration,
        coverage=coverage,
    )
    model = export_module(module, predictor.spec.shape, format, opset)
    difference = _check(model.load(model.to_bytes({})), module, predictor, images)
    metadata = target_metadata(predictor, coverage) | {
        "precision": "float32",
        "outputs": {name: predictor.task.exported[name] for name in module(images[:1])},
        "checked": {"images": len(images), "difference": difference, "tolerance": TOLERANCE},
    }
    write_whole(path, model.to_bytes(metadata))
    return ExportResult(path, difference)


@torch.no_grad()
def _check(run: Runner, module: TargetModule, predictor: Predictor, images: Tensor) -> float:
    """Return the largest difference of the file's values in tolerances; RuntimeError if it is above 1."""
    differences = []
    for pixels in check_batches(images, "checking"):
        found, expected = run(**{INPUT: pixels}), module.outputs(predictor.logits(pixels))
        differences += scaled_differences(module.task, found, expected, module.calibration)
    largest = largest_magnitude(differences)  # NaN if a value is
    if not largest <= 1:
        raise RuntimeError(
            "the exported file is discarded: its values differ from PyTorch's by more than rounding"
        )
    return largest * TOLERANCE
