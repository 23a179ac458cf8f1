"""How the runs of a grid are done, and what is told of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from netfission.cli.settings import Parser

if TYPE_CHECKING:
    from netfission.experiments.comparison import Comparison


def add_means(parser: Parser) -> None:
    """Flags for `means`."""
    parser.add_argument("--workers", type=int, default=1, help="processes that share the runs")
    parser.add_argument(
        "--ray", type=str | None, help="address of a Ray cluster that does the runs: auto, local, HOST:PORT"
    )
    parser.add_argument("--rounds", type=int, default=15, help="how often each contender is timed")


def means(settings: Namespace) -> dict[str, Any]:
    """How a grid's runs are done and timed."""
    return {name: settings[name] for name in ("workers", "ray", "rounds")}


def tell(comparison: "Comparison", out: Path) -> None:
    """Print a comparison, and where it is."""
    print(f"\n{comparison.table()}\n\nwrote comparison.txt, .json, .png and .svg in {out}")
