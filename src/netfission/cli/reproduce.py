"""`netfission reproduce`."""

from pathlib import Path

from jsonargparse import Namespace

from netfission.cli.grid_options import add_run_options, print_comparison, run_options
from netfission.cli.parser import Parser, check_positive, found
from netfission.experiments.grids import named_grids
from netfission.utils.text import count_noun


def parser() -> Parser:
    """The command's arguments."""
    own = Parser(description=run.__doc__)
    own.add_argument("grid", type=str, help=f"{', '.join(named_grids())}, or a YAML file of your own")
    own.add_argument("--scale", type=str, default="laptop", help="paper: in full; laptop: hours on a CPU")
    own.add_argument("--seeds", type=int | None, help="runs of each contender (default: the grid's)")
    own.add_argument("--data", type=str | None, help="where the data set is (default: from the hub)")
    add_run_options(own)
    own.add_argument(
        "--out",
        type=str | None,
        help="folder of records, runs and figures (default: reproduce/GRID-SCALE)",
    )
    return own


def run(settings: Namespace) -> None:
    """Do a named grid of runs, the paper's or our own, and compare what it compares."""
    from netfission.experiments.compare import compare as compare_grid
    from netfission.experiments.grid_files import find_grid

    file = find_grid(settings.grid)
    changes = {} if settings.data is None else {"data": found(settings.data)}
    grid = file.at(settings.scale, seeds=settings.seeds, **changes)
    for name in ("workers", "rounds"):
        check_positive(name, settings[name])
    out = Path(settings.out or Path("reproduce") / f"{file.name}-{settings.scale}")
    print(f"{file.title}: {count_noun(len(grid.cells()), 'run')}, writing to {out}", flush=True)
    print_comparison(compare_grid(grid, out, **run_options(settings)), out)
