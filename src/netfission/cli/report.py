"""`netfission report`."""

from pathlib import Path

from jsonargparse import Namespace

from netfission.cli.parser import Parser


def parser() -> Parser:
    """The command's arguments."""
    own = Parser(description=run.__doc__)
    own.add_argument("run", type=str, nargs="+", help="the run's folder, or several to put side by side")
    own.add_argument(
        "--out",
        type=str | None,
        help="file to write, ending in .html (default: report.html in the run's folder; of several, here)",
    )
    own.add_argument(
        "--data", type=str | None, help="where the runs' data set is now (default: where it was)"
    )
    return own


def run(settings: Namespace) -> None:
    """Show a run, or several side by side, as one page with all their figures."""
    from netfission.report import write_report

    page = write_report(
        [Path(path) for path in settings.run], Path(settings.out) if settings.out else None, settings.data
    )
    print(f"wrote {page}, and its figures one by one in {page.with_suffix('')}")
