"""`netfission demo`."""

from argparse import Namespace
from pathlib import Path

from netfission.cli.parser import Parser


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(run.__doc__)
    parser.add("--out", str, "demo", "folder of the runs, table and picture", metavar="FOLDER")
    parser.add("--seeds", int, 5, "number of trainings of each network")
    parser.add("--grouping", str, "channels", "grouping of the fission: channels, weights or copies")
    return parser


def run(settings: Namespace) -> None:
    """Compare a network with its three-exit fission on real digits, in under 3 minutes."""
    from netfission.experiments.demo import run_demo

    run_demo(Path(settings.out), settings.seeds, settings.grouping)
