"""What is particular to `netfission demo`: its grouping can be chosen, and it shows the exits one by one."""

from collections.abc import Sequence
from dataclasses import replace

from netfission.experiments.grid import Grid
from netfission.experiments.grid_files import find_grid
from netfission.experiments.statistics import SeedValues
from netfission.grouping import GROUPINGS
from netfission.tasks.base import EvaluationResult
from netfission.tasks.classification import Classification
from netfission.tasks.columns import paired
from netfission.utils.errors import check_choice
from netfission.utils.text import align_columns

ENSEMBLE = "three exits"  # the contender that is fissioned


def demo_grid(seeds: int | None = None, grouping: str = "channels") -> Grid:
    """Return the grid `demo`.

    Args:
        seeds: number of runs of each network; default 5.
        grouping: how the stages of the three exits are divided, see `netfission.fission`.

    Raises:
        ValueError: `seeds` is not positive, or the grouping is unknown.

    Example:
        >>> demo_grid(seeds=1, grouping="weights").contenders["three exits"]
        {'grouping': 'weights'}
    """
    check_choice("grouping", grouping, GROUPINGS)
    grid = find_grid("demo").at("demo", seeds=seeds)
    return replace(grid, contenders={**grid.contenders, ENSEMBLE: {"grouping": grouping}})


def exit_table(evaluations: Sequence[EvaluationResult]) -> str:
    """Return a table with a row per exit: mean ± standard deviation over the evaluations, one per seed."""
    columns = paired(Classification.columns)
    rows = [["exit by exit", *(column.title for column in columns.values())]]
    for number in range(len(evaluations[0].exits)):
        metrics = {
            key: SeedValues({seed: run.exits[number][key] for seed, run in enumerate(evaluations)})
            for key in columns
        }
        cells = [metrics[key].cell(column) for key, column in columns.items()]
        rows.append([f"exit {number}", *cells])
    return align_columns(rows)
