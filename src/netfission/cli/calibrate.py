"""`netfission calibrate`."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from netfission.cli.evaluate import older_exports, refuse_with_own_data, with_own_data
from netfission.cli.parser import Parser

if TYPE_CHECKING:
    from netfission.runs.calibrate import Recalibration
    from netfission.runs.folder import RunFolder


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
    """Fit a run's temperature and abstention anew, on its validation split or on other data."""
    from netfission.runs.calibrate import calibrate
    from netfission.runs.folder import RunFolder

    folder = RunFolder(Path(settings.run))
    config = folder.load_config()
    own = with_own_data(folder, config, settings.data)
    if own is None:
        result = calibrate(folder, config, settings.data, split=settings.split)
    else:
        refuse_with_own_data(settings, "split")
        result = calibrate(folder, own)
    print("\n".join(_lines(folder, result)))


def _lines(folder: "RunFolder", result: "Recalibration") -> list[str]:
    from netfission.data.summary import listing
    from netfission.runs.folder import RunFolder

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
    lines.append(f"wrote {' and '.join(file.name for file in files)} in {folder.path}")
    if result.replaced is not None and result.replaced.temperature != result.calibration.temperature:
        depends = (folder.out_of_distribution, folder.corruptions, folder.evaluations)
        if stale := [file.name for file in depends if file.exists()]:
            lines.append(f"still at the temperature before: {', '.join(stale)}; evaluate again to renew them")
    path = folder.path.resolve()
    above = RunFolder(path.parent)
    for run in (above, folder) if path == above.single.path else (folder,):  # a fine-tuning's networks
        if run.gain.is_file() and run.current_gain() is None:
            lines.append(f"with the calibration before: {run.gain}; `netfission finetune` again renews it")
    return [*lines, *older_exports(folder, result.calibration)]
