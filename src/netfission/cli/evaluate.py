"""`netfission evaluate`."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from netfission.cli.parser import Parser, flag_name
from netfission.cli.window_options import WindowProgress, add_window_options, check_windows, window_sizes
from netfission.config import CORRUPTION_IMAGES, RunConfig
from netfission.utils.errors import check_positive_integer, check_share, invalid
from netfission.utils.text import printable

if TYPE_CHECKING:
    from netfission.evaluation.calibration import Calibration
    from netfission.runs.folder import RunFolder

MAX_ACCURACY_DROP = 0.2  # points of accuracy or another measure, of a cascade
_OTHER_FIGURES = ("cascade", "ood", "corruptions", "corrupted", "window")  # than those of the test split
_OF_CASCADE = ("max_accuracy_drop", "max_cost", "delta", "rule", "single", "tile", "halo")


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(run.__doc__)
    parser.add("run", str, help="the run's folder")
    parser.add(
        "--data",
        str | None,
        help="another labelled data set, whose figures go to a file of their own, or the folder to which the "
        "run's own data set has moved (default: the run's own)",
        metavar="DATA",
    )
    other = parser.add_argument_group("another data set")
    parser.add(
        "--split",
        Literal["train", "validation", "test", "all"] | None,
        help="images to evaluate (default: test, or all images if there is no test split)",
        group=other,
    )
    parser.add(
        "--out",
        str | None,
        help="file to write, ending in .json (default: one in the run's folder, in evaluations/)",
        group=other,
        metavar="FILE",
    )
    cascade = parser.add_argument_group("early exit")
    parser.add("--cascade", True, help="run the exits in turn, and stop once confident", group=cascade)
    parser.add(
        "--max-accuracy-drop",
        float | None,
        help="points of accuracy, or of what the task is measured by, that a cascade may lose against all "
        f"exits (default: {MAX_ACCURACY_DROP})",
        group=cascade,
    )
    parser.add(
        "--max-cost",
        float | None,
        help="highest mean MACs of a cascade relative to the single network, instead of --max-accuracy-drop",
        group=cascade,
    )
    parser.add(
        "--delta",
        float | None,
        help="probability, such as 0.1, that a cascade may lose more than --max-accuracy-drop on new images "
        "(default: the drop is bounded on the validation images alone)",
        group=cascade,
    )
    parser.add(
        "--rule",
        Literal["margin", "confidence", "agreement"] | None,
        help="measure of confidence: difference of the two largest probabilities (default), the largest one, "
        "or agreement of exits; only with one class per image",
        group=cascade,
    )
    parser.add(
        "--tile",
        int | None,
        help="with a class for each pixel, height and width of the tiles that stop by themselves (default: "
        "whole images stop)",
        group=cascade,
    )
    parser.add(
        "--halo",
        int | None,
        help="pixels around a tile that later exits see as well (default: 0)",
        group=cascade,
    )
    parser.add(
        "--single",
        str | None,
        help="folder of a run of the same model with one exit, to compare with (default: that of a "
        "fine-tuning's own single network)",
        group=cascade,
        metavar="RUN",
    )
    add_window_options(parser, parser.add_argument_group("large photographs"))
    shift = parser.add_argument_group("distribution shift")
    parser.add(
        "--ood",
        str,
        help="out-of-distribution images to detect by uncertainty: data sets, hf/OWNER/NAME for others on "
        "the hub, folders, inverted or rotated",
        group=shift,
        metavar="DATA",
        several=True,
    )
    parser.add(
        "--feature-detectors",
        Literal["mahalanobis", "knn", "vim", "react"],
        help="detectors by features of the exits, fitted to training images, to compare with the uncertainty",
        group=shift,
        several=True,
    )
    parser.add(
        "--corruptions", True, help="apply the standard corruptions to test images, 5 severities", group=shift
    )
    parser.add(
        "--corrupted",
        str | None,
        help="in place of --corruptions, measure published images: the folder of CIFAR-10-C or CIFAR-100-C, "
        "or hf/OWNER/NAME, a copy of them on the hub",
        group=shift,
        metavar="DATA",
    )
    parser.add(
        "--corruption-images",
        int | None,
        help=f"largest number of images (default: {CORRUPTION_IMAGES} to corrupt, or all of --corrupted)",
        group=shift,
    )
    return parser


def run(settings: Namespace) -> None:
    """Evaluate a run on its test split or other data, with early exit, out of distribution or corrupted."""
    from netfission.runs.folder import RunFolder

    _refuse(settings, _OF_CASCADE, unless="cascade")
    _refuse(settings, ("feature_detectors",), unless="ood")
    if settings.corrupted == "":
        raise invalid("--corrupted", "a folder or hf/OWNER/NAME", "")
    if not settings.corrupted:
        _refuse(settings, ("corruption_images",), unless="corruptions")
    if settings.corrupted is not None and settings.corruptions:
        raise invalid("--corrupted", "left out with --corruptions", settings.corrupted)
    if settings.max_cost is not None and settings.max_accuracy_drop is not None:
        raise invalid("--max-cost", "left out if --max-accuracy-drop is given", settings.max_cost)
    if settings.delta is not None:
        check_share("--delta", settings.delta)
    if settings.delta is not None and settings.max_cost is not None:
        raise invalid("--delta", "left out with --max-cost", settings.delta)
    if settings.corruption_images is not None:
        check_positive_integer("--corruption-images", settings.corruption_images)
    folder = RunFolder(Path(settings.run))
    config = folder.load_config()
    check_windows(settings, lambda: folder.load_spec(any_task=True).find_task())
    own = with_own_data(folder, config, settings.data)
    if own is None:
        _other_data(folder, config, settings)
    else:
        _own_data(folder, own, settings)


def with_own_data(folder: "RunFolder", config: RunConfig, data: str | None) -> RunConfig | None:
    """Return a run's settings with the place of its own data set; None if `data` is another data set.

    Args:
        folder: the run's folder.
        config: the run's settings.
        data: the value of `--data`; None if it was not given.

    Raises:
        ValueError: it was not given, and the folder in the settings does not exist any more.
    """
    from netfission.runs.setup import is_run_data

    if data is not None:
        is_own = is_run_data(config, folder.load_spec(any_task=True), data)
        return RunConfig.from_dict(config.to_dict() | {"data": data}) if is_own else None
    if Path(config.data.data).is_absolute() and not Path(config.data.data).exists():
        hint = "pass where it is now"
        raise invalid("--data", "a folder that exists", found=config.data.data, hint=hint)
    return config


def refuse_with_own_data(settings: Namespace, *names: str) -> None:
    """Raise ValueError if a flag is given that applies to other data sets than the run's own alone."""
    for name in names:
        if (value := getattr(settings, name)) is not None:
            raise invalid(flag_name(name), "left out unless --data is another data set than the run's", value)


def _refuse(settings: Namespace, names: Sequence[str], *, unless: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not getattr(settings, unless):
            raise invalid(flag_name(name), f"left out unless --{unless} is given", value)


def _own_data(folder: "RunFolder", config: RunConfig, settings: Namespace) -> None:
    refuse_with_own_data(settings, "split", "out")
    if settings.cascade:
        _cascade(folder, config, settings)
    if settings.ood:
        _out_of_distribution(folder, config, settings)
    if settings.corruptions or settings.corrupted:
        _corruptions(folder, config, settings)
    if settings.window:
        _windows(folder, config, settings)
    if not any(getattr(settings, name) for name in _OTHER_FIGURES):
        _test_split(folder, config)


def _test_split(folder: "RunFolder", config: RunConfig) -> None:
    from netfission.runs.evaluate import evaluate as evaluate_run
    from netfission.runs.evaluate import readable_calibration

    print(evaluate_run(folder, config).table(config.fission.linear))
    reliability = folder.load_reliability()
    if reliability is not None:
        print(reliability.summary())
    written = [folder.evaluation.name, *([] if reliability is None else [folder.reliability.name])]
    print(f"wrote {' and '.join(written)} in {printable(folder.path)}")
    for line in older_exports(folder, readable_calibration(folder)):
        print(line)


def older_exports(folder: "RunFolder", calibration: "Calibration | None") -> list[str]:
    """Say which exported files in a run's folder hold another calibration than the run."""
    if calibration is None:
        return []
    old = [file.name for file in folder.exports if not _holds(file, calibration.digest)]
    return [f"not exported with this calibration: {', '.join(old)}; export again to renew"] if old else []


def _holds(exported: Path, digest: str) -> bool:
    """Return whether an exported file, or the folder of a cascade, holds a text."""
    file = exported / "cascade.json" if exported.is_dir() else exported
    return file.is_file() and digest.encode() in file.read_bytes()


def _other_data(folder: "RunFolder", config: RunConfig, settings: Namespace) -> None:
    from netfission.data.summary import listing
    from netfission.runs.other_data import evaluate_other_data

    for name in _OTHER_FIGURES:
        if getattr(settings, name):
            expected = "left out if --data is another data set than the run's"
            raise invalid(flag_name(name), expected, found="both", hint="it is measured on the run's own")
    out = Path(settings.out) if settings.out else None
    result, file = evaluate_other_data(folder, config, settings.data, split=settings.split, out=out)
    spec = folder.load_spec(any_task=True)
    known = spec.classes
    print(result.title(len(known), spec.find_task().targets.noun))
    if missing := [name for name in known if name not in result.classes]:
        print(f"no images of {listing(missing)}")
    print(f"\n{result.table(config.fission.linear)}")
    print(f"wrote {printable(file)}; the run's own figures stay as they are")


def _windows(folder: "RunFolder", config: RunConfig, settings: Namespace) -> None:
    from tqdm import tqdm

    from netfission.runs.windows import evaluate_windows

    progress = WindowProgress()
    with tqdm(unit="photograph", disable=None, leave=False) as progress.bar:
        found = evaluate_windows(folder, config, *window_sizes(settings), progress=progress)
    print(found.table(config.fission.linear))
    print(f"wrote {folder.window_evaluation.name} in {printable(folder.path)}")


def _out_of_distribution(folder: "RunFolder", config: RunConfig, settings: Namespace) -> None:
    from netfission.runs.shift import evaluate_ood

    for found in evaluate_ood(
        folder, config, settings.ood, feature_detectors=settings.feature_detectors or ()
    ):
        print(f"{found.table()}\n")
    print(f"wrote {folder.out_of_distribution.name} in {printable(folder.path)}")


def _corruptions(folder: "RunFolder", config: RunConfig, settings: Namespace) -> None:
    from netfission.runs.shift import evaluate_corruptions

    images = settings.corruption_images
    print(evaluate_corruptions(folder, config, images=images, published=settings.corrupted).table())
    print(f"wrote {folder.corruptions.name} in {printable(folder.path)}")


def _cascade(folder: "RunFolder", config: RunConfig, settings: Namespace) -> None:
    from netfission.runs.evaluate import evaluate_cascade
    from netfission.runs.folder import RunFolder

    cascade = {name: getattr(settings, name) for name in _OF_CASCADE}
    if settings.max_accuracy_drop is None and settings.max_cost is None:
        cascade["max_accuracy_drop"] = MAX_ACCURACY_DROP
    cascade["single"] = None
    if settings.single:
        cascade["single"] = RunFolder(Path(settings.single))
    elif folder.is_finetuning(config) and folder.single.weights.is_file():
        cascade["single"] = folder.single
    print(evaluate_cascade(folder, config, **cascade).table())
    png, svg = folder.cascade_figures
    print(f"wrote {folder.cascade.name}, {png.name} and {svg.name} in {printable(folder.path)}")
