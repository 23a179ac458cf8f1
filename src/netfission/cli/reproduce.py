"""`netfission reproduce`."""

from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

from netfission.cli.grid_options import add_run_options, compare_and_print, run_options
from netfission.cli.parser import Parser, absolute_data
from netfission.experiments.grids import named_grids
from netfission.utils.errors import invalid
from netfission.utils.quick import without_collection


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(run.__doc__)
    parser.add("grid", str, help=f"{', '.join(named_grids())}, or a YAML file of your own")
    group = parser.add_argument_group("comparison")
    parser.add(
        "--scale",
        str | None,
        help="paper: in full; laptop: hours on a CPU (default: laptop, or the grid's only scale)",
        group=group,
    )
    parser.add(
        "--seeds", int | None, help="number of runs of each contender (default: the grid's)", group=group
    )
    parser.add(
        "--data",
        str | None,
        help="folder of the data set (default: from the Hugging Face hub)",
        group=group,
        metavar="FOLDER",
    )
    parser.add(
        "--weights",
        str | None,
        help="file of trained weights that the networks start from, in place of published ones",
        group=group,
        metavar="FILE",
    )
    add_run_options(parser, out="folder of records, runs and figures (default: reproduce/GRID-SCALE)")
    return parser


def run(settings: Namespace) -> None:
    """Do the runs of a named grid, the paper's or your own, and compare its contenders."""
    with without_collection():
        from netfission.experiments.grid_files import find_grid

    file = find_grid(settings.grid)
    changes: dict[str, Any] = {} if settings.data is None else {"data": absolute_data(settings.data)}
    if (weights := settings.weights) is not None:  # an empty name stays one, to be refused
        changes |= {"pretrained": False, "weights": weights and str(Path(weights).absolute())}
    scale = _usual_scale(file.scales) if settings.scale is None else settings.scale
    grid = file.at(scale, seeds=settings.seeds, **changes)
    options = run_options(settings)
    out = Path(settings.out or Path("reproduce") / f"{file.name}-{scale}")
    compare_and_print(grid, out, options, file.title)


def _usual_scale(scales: Collection[str]) -> str:
    """Return the scale of a grid whose user has chosen none; ValueError if they have to."""
    if len(scales) > 1 and "laptop" not in scales:
        raise invalid("--scale", f"given, one of {', '.join(scales)}", found="nothing")
    return "laptop" if len(scales) > 1 else next(iter(scales))
