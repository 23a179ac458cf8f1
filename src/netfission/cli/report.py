"""`netfission report`."""

from argparse import Namespace
from pathlib import Path

from netfission.cli.parser import Parser
from netfission.utils.text import printable


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(run.__doc__)
    parser.add("run", str, help="the run's folder, or several to put side by side", several=True)
    parser.add(
        "--out",
        str | None,
        help="file to write, ending in .html (default: report.html in the run's folder; of several, here)",
        metavar="FILE",
    )
    parser.add(
        "--data", str | None, help="where the runs' data set is now (default: where it was)", metavar="FOLDER"
    )
    return parser


def run(settings: Namespace) -> None:
    """Show a run, or several side by side, as one page with all their figures."""
    from netfission.report import write_report

    page = write_report(
        [Path(path) for path in settings.run], Path(settings.out) if settings.out else None, settings.data
    )
    print(f"wrote {printable(page)}, and its figures one by one in {printable(page.with_suffix(''))}")
