"""`netfission demo`."""

from pathlib import Path

from jsonargparse import Namespace

from netfission.cli.parser import Parser


def parser() -> Parser:
    """The command's arguments."""
    own = Parser(description=run.__doc__)
    own.add_argument("--out", type=str, default="demo", help="folder for its runs, table and picture")
    own.add_argument("--seeds", type=int, default=5, help="how many times each network is trained")
    own.add_argument("--grouping", type=str, default="channels", help="channels, weights or copies")
    return own


def run(settings: Namespace) -> None:
    """Compare a network with its three-exit fission on real digits, in under 3 minutes."""
    from netfission.experiments.demo import run_demo

    run_demo(Path(settings.out), settings.seeds, settings.grouping)
