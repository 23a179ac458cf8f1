"""Calibrate a network of labels, numbers or pixels anew, on its own validation split or on other images."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from netfission.classifier.folder import figures_json
from netfission.config import RunConfig
from netfission.data import Batches, ImageData, Split
from netfission.data.matched import MatchedImages, Part
from netfission.evaluation.calibration import VALIDATION
from netfission.evaluation.evaluate import run_batches
from netfission.runs.calibrate import load_own
from netfission.runs.evaluate import (
    EVALUATION_BATCH,
    load_on_device,
    own_dependence,
    readable_calibration,
)
from netfission.runs.folder import RunFolder
from netfission.runs.overlap import images_dependence, overlap_with_test
from netfission.tasks.evaluation import TargetEvaluation
from netfission.utils.checksums import stamp_json
from netfission.utils.errors import invalid
from netfission.utils.files import write_together


@dataclass(frozen=True)
class TargetRecalibration:
    """A calibration, and what it has replaced.

    Attributes:
        calibration: what `calibration.json` holds now.
        replaced: what it held before; None if there was no readable file.
        evaluation: what `evaluation.json` holds now; None if the run was never evaluated.
        unmeasured: why that has no figures with the calibration; empty if it has some.
    """

    calibration: Any
    replaced: Any
    evaluation: TargetEvaluation | None
    unmeasured: str


def calibrate_targets(
    folder: RunFolder, config: RunConfig, name: str | None = None, *, split: Part | None = None
) -> TargetRecalibration:
    """Fit what a run of another task than classification learns from held-out images anew.

    `calibration.json` is written, and `evaluation.json` with the figures of the test split. If these cannot
    be measured, it has no calibrated ones.

    Args:
        folder: folder of a finished run.
        config: the run's settings.
        name: a table of other images with the run's labels or numbers, or a folder of other photographs and
            masks; by default the run's own validation split.
        split: its images to calibrate on, see `netfission.runs.calibrate.calibrate`.

    Raises:
        ValueError: the folder holds no finished run, the run has no validation split of its own, or see
            `netfission.tasks.Task.load_other`.
        OSError: the other images cannot be found, or a file cannot be written.
    """
    network, spec, device = load_on_device(folder, config, any_task=True)
    task = spec.find_task()
    data, unmeasured = load_own(folder, config, spec, required=name is None)

    def measure(accumulator: Any, splits: Sequence[Split]) -> Any:
        for images in splits:
            batches = Batches(
                images,
                task.batch_size(spec.shape, EVALUATION_BATCH),
                mean=spec.mean,
                std=spec.std,
                classes=len(spec.classes),
                device=device,
                workers=config.data.workers,
            )
            run_batches(network, batches, accumulator.add, device)
        return accumulator.result()

    if name is None:
        splits, about = _own_images(folder, config, data)
    else:
        images = task.load_other(name, spec.shape, config.data, part=split, preferred=("validation", "train"))
        splits, about = images.splits, _about(images, name, config, known=data is not None)
        unmeasured = unmeasured or about["overlap"]
    calibrator = task.calibrator(
        average=spec.average,
        dependence=about.pop("dependence"),
        sizes=[size for images in splits for size in images.photograph_sizes],
    )
    fitted = measure(calibrator, splits)
    calibration = replace(fitted, weights=folder.weights_sha256(), **about)
    replaced = readable_calibration(folder)
    if data is None or unmeasured:
        evaluation = folder.load_target_evaluation(spec)
        evaluation = None if evaluation is None else replace(evaluation, calibrated=None)
    else:
        evaluator = task.evaluator(average=spec.average, calibration=calibration)
        evaluation, _ = measure(evaluator, [data.test])
    files: dict[Path, str | bytes] = {folder.calibration: stamp_json(calibration.to_json())}
    if evaluation is not None:
        files[folder.evaluation] = stamp_json(figures_json(evaluation, calibration.weights))
    write_together(files)
    return TargetRecalibration(calibration, replaced, evaluation, unmeasured)


def _own_images(
    folder: RunFolder, config: RunConfig, data: ImageData | None
) -> tuple[Sequence[Split], dict[str, str]]:
    """Return the run's validation split, and what the calibration says of it."""
    assert data is not None
    if data.validation is None:
        expected = "a table of other images, as the run held out none for validation"
        raise invalid("data", expected, found="nothing")
    return [data.validation], {"dependence": own_dependence(folder, config), "fitted_on": VALIDATION}


def _about(images: MatchedImages, name: str, config: RunConfig, *, known: bool) -> dict[str, str]:
    """Return what the calibration says of other images; `known`: whether the run's own can be read."""
    if dependence := images_dependence(name, images.splits, config):
        warnings.warn(dependence, stacklevel=3)
    overlap = "whether it is calibrated on test images of its own was not checked; calibrate again"
    if known:
        overlap = overlap_with_test(name, images.splits, config)
    return {"dependence": dependence, "fitted_on": images.kind, "overlap": overlap}
