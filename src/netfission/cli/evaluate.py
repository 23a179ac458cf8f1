"""`netfission evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from netfission.cli.parser import Parser, check_positive
from netfission.config import RunConfig

if TYPE_CHECKING:
    from netfission.runs.folder import RunFolder

LOSE = 0.2  # points of accuracy, of a cascade
CORRUPTION_IMAGES = 1000


def parser() -> Parser:
    """The command's arguments."""
    own = Parser(description=run.__doc__)
    own.add_argument("run", type=str, help="the run's folder")
    own.add_argument(
        "--data", type=str | None, help="where the run's data set is now (default: where it was)"
    )
    own.add_argument(
        "--cascade", action="store_true", help="run exits one after another and stop early when sure"
    )
    own.add_argument(
        "--max_accuracy_drop",
        type=float | None,
        help=f"points of accuracy that a cascade may lose relative to all exits (default: {LOSE})",
    )
    own.add_argument(
        "--max_cost",
        type=float | None,
        help="highest mean MACs of a cascade over the single network's (not with --max-accuracy-drop)",
    )
    own.add_argument(
        "--rule",
        type=Literal["margin", "confidence", "agreement"] | None,
        help="what makes a cascade sure: how far apart the two largest probabilities are (default), the "
        "largest one, or exits that agree",
    )
    own.add_argument(
        "--single", type=str | None, help="folder of a run of the same model with one exit, to show beside"
    )
    own.add_argument(
        "--ood",
        type=str,
        nargs="+",
        metavar="DATA",
        help="images from outside to be told from the test split by the network's doubt: names of data sets, "
        "folders, or its own test images inverted or rotated",
    )
    own.add_argument(
        "--corruptions", action="store_true", help="the standard corruptions of the test images, 5 strengths"
    )
    own.add_argument(
        "--corruption_images",
        type=int | None,
        help=f"test images to corrupt at most (default: {CORRUPTION_IMAGES})",
    )
    return own


def run(settings: Namespace) -> None:
    """Evaluate a run on its test split; or early stopping, images from outside, or corruptions."""
    from netfission.runs.folder import RunFolder

    folder = RunFolder(Path(settings.run))
    config = folder.load_config()
    if settings.data:
        config = RunConfig.from_dict(config.to_dict() | {"data": settings.data})
    elif Path(config.data.data).is_absolute() and not Path(config.data.data).exists():
        raise ValueError(f"data={config.data.data}: is there no more; takes --data, where it is now")
    _refuse(settings, ("max_accuracy_drop", "max_cost", "rule", "single"), unless="cascade")
    _refuse(settings, ("corruption_images",), unless="corruptions")
    check_positive("corruption_images", settings.corruption_images)
    if settings.cascade:
        _cascade(folder, config, settings)
    if settings.ood:
        _out_of_distribution(folder, config, settings.ood)
    if settings.corruptions:
        _corruptions(folder, config, settings.corruption_images or CORRUPTION_IMAGES)
    if not (settings.cascade or settings.ood or settings.corruptions):
        _test_split(folder, config)


def _refuse(settings: Namespace, names: Sequence[str], *, unless: str) -> None:
    for name in names:
        if settings[name] is not None and not settings[unless]:
            raise ValueError(f"{name}={settings[name]}: goes with --{unless}")


def _test_split(folder: "RunFolder", config: RunConfig) -> None:
    from netfission.runs.evaluate import evaluate as evaluate_run

    print(evaluate_run(folder, config).table())
    reliability = folder.load_reliability()
    assert reliability is not None
    print(reliability.summary())
    print(f"wrote {folder.evaluation.name} and {folder.reliability.name} in {folder.path}")


def _out_of_distribution(folder: "RunFolder", config: RunConfig, names: list[str]) -> None:
    from netfission.runs.shift import evaluate_ood

    for found in evaluate_ood(folder, config, names):
        print(f"{found.table()}\n")
    print(f"wrote {folder.out_of_distribution.name} in {folder.path}")


def _corruptions(folder: "RunFolder", config: RunConfig, images: int) -> None:
    from netfission.runs.shift import evaluate_corruptions

    print(evaluate_corruptions(folder, config, images=images).table())
    print(f"wrote {folder.corruptions.name} in {folder.path}")


def _cascade(folder: "RunFolder", config: RunConfig, settings: Namespace) -> None:
    from netfission.runs.evaluate import evaluate_cascade
    from netfission.runs.folder import RunFolder

    cascade = {name: settings[name] for name in ("max_accuracy_drop", "max_cost", "rule", "single")}
    if settings.max_accuracy_drop is None and settings.max_cost is None:
        cascade["max_accuracy_drop"] = LOSE
    cascade["rule"] = settings.rule or "margin"
    cascade["single"] = RunFolder(Path(settings.single)) if settings.single else None
    print(evaluate_cascade(folder, config, **cascade).table())
    png, svg = folder.cascade_figures
    print(f"wrote {folder.cascade.name}, {png.name} and {svg.name} in {folder.path}")
