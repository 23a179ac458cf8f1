"""Calibrate a run's network anew, on its own validation split or on other data."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from netfission.classifier.folder import NetworkSpec, figures_json
from netfission.config import RunConfig
from netfission.data import ImageData, Split
from netfission.data.matched import Part, load_matched
from netfission.evaluation import collect_logits
from netfission.evaluation.calibration import Calibration
from netfission.evaluation.reliability import ReliabilityReport
from netfission.runs.evaluate import (
    EVALUATION_BATCH,
    load_matching_data,
    load_on_device,
    own_dependence,
    readable_calibration,
)
from netfission.runs.folder import RunFolder
from netfission.runs.other_data import matched_batches
from netfission.runs.overlap import images_dependence, overlap_with_test
from netfission.runs.setup import make_batches
from netfission.utils.checksums import stamp_json
from netfission.utils.errors import first_line, invalid
from netfission.utils.files import write_together


@dataclass(frozen=True)
class Recalibration:
    """A calibration, and what it has replaced.

    Attributes:
        calibration: what `calibration.json` holds now.
        replaced: what it held before; None if there was no readable file.
        reliability: on the run's test split; None if the run's own data set cannot be read, or if the network
            is calibrated on some of these images.
        unmeasured: why there are no figures on the test split; empty if there are some.
        missing: the network's classes without an image among those that it is calibrated on.
    """

    calibration: Calibration
    replaced: Calibration | None
    reliability: ReliabilityReport | None
    unmeasured: str
    missing: list[str]


def calibrate(
    folder: RunFolder, config: RunConfig, name: str | None = None, *, split: Part | None = None
) -> Recalibration:
    """Fit a run's temperature and thresholds for abstention anew, and replace those it has.

    `calibration.json` and `reliability.json` are written, see `RunFolder`. Without figures on the test split,
    `reliability.json` is removed, as it belongs to the calibration before.

    Args:
        folder: folder of a finished run.
        config: the run's settings.
        name: name or folder of the data set to calibrate on; by default the run's own validation split.
        split: its images to calibrate on: `train`, `validation`, `test` or `all`. By default the validation
            split, or else the training split, or all images if there are no splits.

    Raises:
        ValueError: the folder holds no finished run, the run has no validation split of its own, or see
            `netfission.data.matched.load_matched`.
        OSError: a data set cannot be found, or a file cannot be written.
    """
    network, spec, device = load_on_device(folder, config)
    data, unmeasured = load_own(folder, config, spec, required=name is None)
    if name is None:
        assert data is not None
        if data.validation is None:
            expected = "another data set, as the run held out no images for validation"
            raise invalid("data", expected, found="nothing")
        logits, labels = _logits(network, data.validation, data, config, device)
        dependence = own_dependence(folder, config)
        calibration = Calibration.fit(logits, labels, average=spec.average, dependence=dependence)
    else:
        images = load_matched(
            name,
            spec.classes,
            spec.shape,
            part=split,
            preferred=("validation", "train"),
            corrupt=config.data.corrupt,
        )
        if dependence := images_dependence(name, images.splits, config):
            warnings.warn(dependence, stacklevel=2)
        batches = matched_batches(spec, images, config, device)
        logits, labels = collect_logits(network, batches, device)
        calibration = Calibration.fit(logits, labels, average=spec.average, dependence=dependence)
        calibration = replace(calibration, fitted_on=images.kind)
        if data is None:
            overlap = "whether it is calibrated on test images of its own was not checked; calibrate again"
        else:
            unmeasured = overlap = overlap_with_test(name, images.splits, config)
        calibration = replace(calibration, overlap=overlap)
        data = None if unmeasured else data
    calibration = replace(calibration, weights=folder.weights_sha256())
    reliability = None
    if data is not None:
        test = _logits(network, data.test, data, config, device)
        reliability = ReliabilityReport.from_logits(*test, spec.classes, calibration, average=spec.average)
    replaced = readable_calibration(folder)
    files: dict[Path, str | bytes] = {folder.calibration: stamp_json(calibration.to_json())}
    if reliability is not None:
        files[folder.reliability] = stamp_json(figures_json(reliability, calibration.weights))
    write_together(files, removed=[folder.reliability])
    present = set(labels.tolist())
    missing = [name for number, name in enumerate(spec.classes) if number not in present]
    return Recalibration(calibration, replaced, reliability, unmeasured, missing)


def load_own(
    folder: RunFolder, config: RunConfig, spec: NetworkSpec, *, required: bool
) -> tuple[ImageData | None, str]:
    """Load a run's own data set; unless it is required, return None and a sentence if it cannot be read."""
    try:
        return load_matching_data(folder, config, spec), ""
    except (OSError, ValueError) as error:
        if required:
            raise
        found = f"the run's own data set cannot be read ({first_line(error)})"
        return None, f"{found}; `netfission evaluate` writes it again"


def _logits(
    network: nn.Module, split: Split, data: ImageData, config: RunConfig, device: str
) -> tuple[Tensor, Tensor]:
    batches = make_batches(split, data, EVALUATION_BATCH, device=device, workers=config.data.workers)
    return collect_logits(network, batches, device)
