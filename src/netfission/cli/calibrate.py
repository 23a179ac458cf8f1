"""`netfission calibrate`."""

import re
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from netfission.cli.evaluate import older_exports, refuse_with_own_data, with_own_data
from netfission.cli.parser import Parser
from netfission.utils.text import printable

if TYPE_CHECKING:
    from netfission.config import RunConfig
    from netfission.runs.calibrate import Recalibration
    from netfission.runs.calibrate_targets import TargetRecalibration
    from netfission.runs.folder import RunFolder
    from netfission.tasks.base import CalibrationResult

_TEMPERATURE = re.compile(r'"temperature": ([-+.\deE]+)')


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(run.__doc__)
    parser.add("run", str, help="the run's folder")
    parser.add(
        "--data",
        str | None,
        help="another labelled data set to calibrate on, or the folder that the run's own has moved to "
        "(default: the run's own validation split)",
        metavar="DATA",
    )
    parser.add(
        "--split",
        Literal["train", "validation", "test", "all"] | None,
        help="images of another data set (default: validation, or else train, or all if it has no splits)",
    )
    return parser


def run(settings: Namespace) -> None:
    """Fit a run's calibration anew, on its validation split or on other data."""
    from netfission.runs.calibrate import calibrate
    from netfission.runs.folder import RunFolder

    folder = RunFolder(Path(settings.run))
    config = folder.load_config()
    classifies = folder.load_spec(any_task=True).find_task().targets.exclusive
    own = with_own_data(folder, config, settings.data)
    if not classifies:
        _calibrate_targets(folder, config, own, settings)
        return
    if own is None:
        result = calibrate(folder, config, settings.data, split=settings.split)
    else:
        refuse_with_own_data(settings, "split")
        result = calibrate(folder, own)
    print("\n".join(_lines(folder, result)))


def _calibrate_targets(
    folder: "RunFolder", config: "RunConfig", own: "RunConfig | None", settings: Namespace
) -> None:
    """Fit what a run of labels, numbers or pixels learns from held-out images anew."""
    from netfission.runs.calibrate_targets import calibrate_targets

    if own is None:
        result = calibrate_targets(folder, config, settings.data, split=settings.split)
    else:
        refuse_with_own_data(settings, "split")
        result = calibrate_targets(folder, own)
    lines = [f"calibrated: {result.calibration.summary()}"]
    if result.replaced is not None:
        lines.append(f"before:     {result.replaced.summary()}")
    if result.unmeasured:
        lines.append(f"no calibrated figures in {folder.evaluation.name}: {result.unmeasured}")
    elif result.evaluation is not None:
        lines += ["", result.evaluation.table(config.fission.linear), ""]
    files = [folder.calibration] if result.evaluation is None else [folder.calibration, folder.evaluation]
    lines.append(f"wrote {' and '.join(file.name for file in files)} in {printable(folder.path)}")
    print("\n".join([*lines, *_older_files(folder, result)]))


def _lines(folder: "RunFolder", result: "Recalibration") -> list[str]:
    from netfission.data.summary import listing

    lines = [f"calibrated: {result.calibration.summary()}"]
    if result.replaced is not None:
        lines.append(f"before:     {result.replaced.summary()}")
    if result.missing:
        lines.append(f"calibrated on no images of {listing(result.missing)}")
    if result.reliability is not None:
        lines += ["", f"on the {result.reliability.n} images of the run's test split:"]
        lines += [result.reliability.summary(), ""]
    else:
        lines.append(f"no {folder.reliability.name} any more: {result.unmeasured}")
    files = [folder.calibration] if result.reliability is None else [folder.calibration, folder.reliability]
    lines.append(f"wrote {' and '.join(file.name for file in files)} in {printable(folder.path)}")
    return [*lines, *_older_files(folder, result)]


def _is_at_another(file: Path, calibration: "CalibrationResult") -> bool:
    """Return whether a file, or one in a folder, has figures at another temperature than a calibration's.

    Figures that do not state a temperature count, as it is not known which calibration they have.
    """
    files = [*file.glob("*.json")] if file.is_dir() else [file] if file.is_file() else []
    own = getattr(calibration, "temperature", None)
    stated = [_TEMPERATURE.findall(each.read_text("utf-8", errors="replace")) for each in files]
    return any(not found or any(float(one) != own for one in found) for found in stated)


def _older_files(folder: "RunFolder", result: "Recalibration | TargetRecalibration") -> list[str]:
    """Say which files still hold the calibration before, or figures with it."""
    from netfission.evaluation.calibration import Calibration
    from netfission.runs.folder import RunFolder

    lines = []
    if result.replaced is not None and result.replaced.digest != result.calibration.digest:
        depends = [folder.evaluations, folder.window_evaluation]
        if isinstance(result.calibration, Calibration):  # other tasks measure it without a calibration
            depends = [folder.corruptions, *depends]
        if stale := [file.name for file in depends if _is_at_another(file, result.calibration)]:
            lines.append(f"still at the calibration before: {', '.join(stale)}; evaluate again to renew them")
    path = folder.path.resolve()
    above = RunFolder(path.parent)
    for run in (above, folder) if path == above.single.path else (folder,):  # a fine-tuning's networks
        if run.gain.is_file() and run.current_gain() is None:
            lines.append(f"with the calibration before: {run.gain}; `netfission finetune` again renews it")
    return [*lines, *older_exports(folder, result.calibration)]
