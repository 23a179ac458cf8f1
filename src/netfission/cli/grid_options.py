"""Options of the commands that do the runs of a grid, and how they print its comparison."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netfission.cli.parser import Parser
from netfission.utils.errors import MOST_ROUNDS, check_positive, check_positive_integer
from netfission.utils.outputs import check_comparison_folder
from netfission.utils.quick import without_collection
from netfission.utils.text import count_noun, printable

if TYPE_CHECKING:
    from netfission.experiments.grid import Grid
    from netfission.experiments.results import Comparison


def add_run_options(parser: Parser, *, out: str, default: str | None = None) -> None:
    """Add the flags of `run_options`, and `--out`.

    Args:
        parser: of the command.
        out: help of `--out`.
        default: of `--out`.
    """
    group = parser.add_argument_group("run")
    parser.add("--workers", int, 1, "number of processes that share the runs", group=group)
    parser.add(
        "--ray",
        str | None,
        help="address of a Ray cluster that does the runs: auto, local or HOST:PORT",
        group=group,
    )
    parser.add(
        "--rounds",
        int | None,
        help="number of times that each contender is timed (default: as before, or 15)",
        group=group,
    )
    parser.add(
        "--minutes",
        float | None,
        help="stop after about so long, at the end of an epoch, with exit status 75 if runs are missing; the "
        "same command goes on (default: no limit)",
        group=group,
    )
    parser.add("--out", str | None if default is None else str, default, out, group=group, metavar="FOLDER")


def run_options(settings: Namespace) -> dict[str, Any]:
    """Return how a grid's runs are done and timed.

    Raises:
        ValueError: a number is not positive.
    """
    check_positive_integer("--workers", settings.workers)
    if settings.minutes is not None:
        check_positive("--minutes", settings.minutes)
    if settings.rounds is not None:
        check_positive_integer("--rounds", settings.rounds, MOST_ROUNDS)
    return {name: getattr(settings, name) for name in ("workers", "ray", "rounds", "minutes")}


def compare_and_print(grid: "Grid", out: Path, options: dict[str, Any], title: str = "") -> None:
    """Do the runs of a grid and print the comparison.

    Args:
        grid: the runs.
        out: folder of records, runs and figures.
        options: see `run_options`.
        title: what is compared, printed before the number of runs.

    Raises:
        ValueError: the folder has files of something else than a comparison.
        RuntimeError: some of its runs failed.
        OutOfTimeError: the time is over, and runs are missing.
    """
    with without_collection():
        from netfission.experiments.compare import compare

        runs = count_noun(len(grid.cells()), "run")
    check_comparison_folder("--out", out)
    print(f"{title}{': ' if title else ''}{runs}, writing to {printable(out)}", flush=True)
    print_comparison(compare(grid, out, **options), out)


def print_comparison(comparison: "Comparison", out: Path) -> None:
    """Print a comparison, and the folder that holds it.

    Raises:
        RuntimeError: some of its runs failed.
    """
    print(
        f"\n{comparison.table()}\n\nwrote comparison.txt, .md, .json, .png and .svg in {printable(out)}",
        flush=True,
    )
    failed = [
        f"{name}, seed {seed}: {reason}"
        for name, runs in comparison.failed.items()
        for seed, reason in runs.items()
    ]
    if failed:
        raise RuntimeError(
            f"{count_noun(len(failed), 'run')} failed ({failed[0]}); see the table, and run the command again"
        )
