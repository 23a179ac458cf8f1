"""How the runs of a grid are done, and what is told of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from netfission.cli.parser import Parser
from netfission.utils.text import count_noun

if TYPE_CHECKING:
    from netfission.experiments.results import Comparison


def add_run_options(parser: Parser) -> None:
    """Flags for `run_options`."""
    parser.add_argument("--workers", type=int, default=1, help="processes that share the runs")
    parser.add_argument(
        "--ray", type=str | None, help="address of a Ray cluster that does the runs: auto, local, HOST:PORT"
    )
    parser.add_argument(
        "--rounds", type=int | None, help="how often each contender is timed (default: as before, else 15)"
    )


def run_options(settings: Namespace) -> dict[str, Any]:
    """How a grid's runs are done and timed."""
    return {name: settings[name] for name in ("workers", "ray", "rounds")}


def print_comparison(comparison: "Comparison", out: Path) -> None:
    """Print a comparison, and where it is; RuntimeError where runs of it failed."""
    print(f"\n{comparison.table()}\n\nwrote comparison.txt, .md, .json, .png and .svg in {out}", flush=True)
    failed = [reason for own in comparison.failed.values() for reason in own.values()]
    if failed:
        raise RuntimeError(
            f"{count_noun(len(failed), 'run')} failed ({failed[0]}); see the table, and run the command again"
        )
