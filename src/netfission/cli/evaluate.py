"""`netfission evaluate`."""

from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from netfission.cli.settings import Parser
from netfission.training.config import RunConfig

LOSE = 0.2  # points of accuracy, of a cascade


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
        "--lose",
        type=float | None,
        help=f"points of accuracy that a cascade may lose against all exits (default: {LOSE})",
    )
    own.add_argument(
        "--spend",
        type=float | None,
        help="MACs that a cascade may spend on average, over the single network's (instead of --lose)",
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
    return own


def run(settings: Namespace) -> None:
    """Evaluate a run on its test split; with --cascade, what stopping early saves and costs."""
    from netfission.training.folder import RunFolder
    from netfission.training.run import evaluate as evaluate_run
    from netfission.training.run import evaluate_cascade

    folder = RunFolder(Path(settings.run))
    config = folder.load_config()
    if settings.data:
        config = RunConfig.from_dict(config.to_dict() | {"data": settings.data})
    cascade = {name: settings[name] for name in ("lose", "spend", "rule", "single")}
    if not settings.cascade:
        for name, value in cascade.items():
            if value is not None:
                raise ValueError(f"{name}={value}: goes with --cascade")
        print(f"{evaluate_run(folder, config).table()}\nwrote {folder.evaluation}")
        return
    if settings.lose is None and settings.spend is None:
        cascade["lose"] = LOSE
    cascade["rule"] = settings.rule or "margin"
    cascade["single"] = RunFolder(Path(settings.single)) if settings.single else None
    print(evaluate_cascade(folder, config, **cascade).table())
    print(f"wrote cascade.json, cascade.png and cascade.svg in {folder.path}")
