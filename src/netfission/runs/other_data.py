"""A run's network on another data set than its own; the run's own figures stay as they are."""

import warnings
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from netfission.classifier.folder import NetworkSpec, figures_json, read_figures
from netfission.config import RunConfig
from netfission.data import Batches
from netfission.data.matched import MatchedImages, Part
from netfission.evaluation import run_batches
from netfission.evaluation.other_data import OtherFigures
from netfission.runs.evaluate import EVALUATION_BATCH, load_on_device
from netfission.runs.folder import RunFolder
from netfission.runs.overlap import warn_of_training_images
from netfission.utils.errors import invalid
from netfission.utils.files import write_json


def evaluate_other_data(
    folder: RunFolder, config: RunConfig, name: str, *, split: Part | None = None, out: Path | None = None
) -> tuple[OtherFigures, Path]:
    """Evaluate a run's network on another data set, with the calibration that the run has.

    Classes are matched by name, and images are converted to the network's size and channels. One file is
    written, see `RunFolder.evaluation_of`; it replaces the figures on the same data set.

    Args:
        folder: folder of a finished run.
        config: the run's settings.
        name: name or folder of the data set, see `netfission.data.load_data`.
        split: the images to evaluate: `train`, `validation`, `test` or `all`. By default the test split, or
            all images if there is no test split; none is held out.
        out: file to write, ending in `.json`; default in the run's folder.

    Returns:
        The figures, and the file that they are in.

    Raises:
        ValueError: the folder holds no finished run, `out` is not valid, or see
            `netfission.tasks.Task.load_other`.
        OSError: there is no such data set, or the file cannot be written.
    """
    network, spec, device = load_on_device(folder, config, any_task=True)
    task = spec.find_task()
    if out is not None:
        _check_out(out, task.other_evaluation_kind)
    calibration = folder.load_calibration_of(spec)
    images = task.load_other(name, spec.shape, config.data, part=split)
    warn_of_training_images(name, images.splits, config)
    if calibration is not None and (calibration.n, calibration.fitted_on) == (len(images), images.kind):
        warnings.warn(
            f"the run is calibrated on {images}: calibrated figures look better on them than on others",
            stacklevel=2,
        )
    evaluator = task.evaluator(average=spec.average, calibration=calibration)
    run_batches(network, matched_batches(spec, images, config, device), evaluator.add, device)
    result = task.other_evaluation(images, *evaluator.result())
    file = out or folder.evaluation_of(images.name)
    file.parent.mkdir(exist_ok=True)
    write_json(file, figures_json(result, folder.weights_sha256()))
    return result, file


def matched_batches(
    spec: NetworkSpec, images: MatchedImages, config: RunConfig, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of other images, normalised as the network's own, and their targets."""
    size = spec.find_task().batch_size(spec.shape, EVALUATION_BATCH)
    for split in images.splits:
        yield from Batches(
            split,
            size,
            mean=spec.mean,
            std=spec.std,
            classes=len(spec.classes),
            device=device,
            workers=config.data.workers,
        )


def _check_out(out: Path, kind: type[OtherFigures]) -> None:
    expected = "a new file ending in .json, or one with figures on another data set"
    if out.suffix != ".json" or not out.parent.is_dir():
        raise invalid("out", f"{expected}, in a folder that exists", found=str(out))
    try:
        read_figures(out, kind)
    except ValueError as error:
        raise invalid("out", expected, found=f"{out}, which holds something else") from error
