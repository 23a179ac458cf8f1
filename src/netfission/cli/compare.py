"""`netfission compare`."""

from pathlib import Path

from jsonargparse import Namespace

from netfission.cli.grid_options import add_run_options, print_comparison, run_options
from netfission.cli.parser import PARTS, Parser, check_positive, chosen
from netfission.experiments.contenders import CONTENDERS
from netfission.utils.errors import check_choice


def parser() -> Parser:
    """The command's arguments."""
    own = Parser(description=run.__doc__)
    own.add_argument("--config", action="config", help="YAML file of settings; flags override it")
    own.add_argument(
        "--methods",
        type=list[str],
        default=["single", "deep-ensemble", "fission-channels"],
        help=f"as a list, of {', '.join(CONTENDERS)}",
    )
    own.add_argument("--seeds", type=int, default=3, help="runs of each method, from seeds 0, 1, …")
    own.add_argument(
        "--reference", type=str | None, help="the method to take differences to (default: the first)"
    )
    for part in PARTS:
        own.add_class_arguments(part, skip={"method", "seed", "workers"})
    add_run_options(own)
    own.add_argument("--out", type=str, default="compare", help="folder of records, runs and figures")
    return own


def run(settings: Namespace) -> None:
    """Compare methods over seeds under one recipe: accuracy, likelihood, calibration and cost."""
    from netfission.experiments.compare import compare as compare_grid
    from netfission.experiments.contenders import find_contender
    from netfission.experiments.grid import Grid

    contenders = {name: find_contender(name) for name in settings.methods}
    if not contenders:
        raise ValueError("methods=[]: takes one method or more")
    for name in ("seeds", "workers", "rounds"):
        check_positive(name, settings[name])
    reference = check_choice("reference", settings.reference or next(iter(contenders)), contenders)
    common = chosen(settings, {"methods", "seeds", "reference", "workers", "ray", "rounds"})
    out = Path(settings.out)
    print(f"writing to {out}", flush=True)
    grid = Grid(contenders, range(settings.seeds), common, reference)
    print_comparison(compare_grid(grid, out, **run_options(settings)), out)
