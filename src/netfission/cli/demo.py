"""`netfission demo`."""

from argparse import Namespace
from pathlib import Path

from netfission.cli.grid_options import print_comparison
from netfission.cli.parser import Parser
from netfission.utils.text import printable


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(run.__doc__)
    parser.add("--out", str, "demo", "folder of records, runs, tables and pictures", metavar="FOLDER")
    parser.add("--seeds", int, 5, "number of trainings of each network")
    parser.add("--grouping", str, "channels", "grouping of the fission: channels, weights or copies")
    return parser


def run(settings: Namespace) -> None:
    """Compare a network with its three-exit fission on real digits, in under 3 minutes."""
    from netfission.experiments.compare import compare
    from netfission.experiments.demo import ENSEMBLE, demo_grid, exit_table
    from netfission.experiments.records import Records, run_folder

    out = Path(settings.out)
    grid = demo_grid(settings.seeds, settings.grouping)
    print_comparison(compare(grid, out), out)
    runs = [cell for cell in grid.cells() if cell.contender == ENSEMBLE]
    records = [record for cell in runs if (record := Records(out / "records").find(cell))]
    print(f"\n{exit_table([record.read_evaluation() for record in records])}\n")
    print(f"to see a run of the three exits: netfission report {printable(run_folder(runs[0], out).path)}")
