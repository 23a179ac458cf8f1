"""Colours and settings that all figures share, and saving a figure as PNG and SVG.

Figures of two kinds use this module: pictures, which stand alone as files, and the figures of the report,
whose colours follow its page (see `netfission.report.style`).
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from netfission.utils.files import write_together

# Colours of pictures.
SERIES = ("#0b6e99", "#c8553d", "#5b8c5a", "#8e5ea2", "#b8860b", "#3d3d3d")  # of lines, in this order
PRIMARY = SERIES[0]  # fission
PRIMARY_LIGHT, PRIMARY_PALE = "#5f9fbb", "#9cc4d6"  # what belongs to it, and is less important
OTHER = "#666666"  # what fission is compared with
TEXT = "#333333"
REFERENCE = "#444444"  # the single network
FAINT = "#aaaaaa"  # lines that only connect
MARKERS = "osD^vP"  # of lines, in this order
TITLE_SIZE, LEGEND_SIZE = 10, 8  # points
DOTS_PER_INCH = 130  # of PNG files

# Colours of the report, light and dark: they differ in lightness as well as hue, after Okabe & Ito (2008),
# with a contrast of 4.5:1 to the paper.
LIGHT = {
    "ink": "#1c2128",
    "muted": "#59636e",
    "rule": "#d4d9df",
    "paper": "#ffffff",
    "panel": "#f4f6f8",
    "accent": "#4b3fc4",
    "exit0": "#0067a8",
    "exit1": "#b84a00",
    "exit2": "#00765a",
    "exit3": "#a33b78",
    "exit4": "#7a6200",
    "exit5": "#6a4fb0",
    "exit6": "#177583",
    "exit7": "#666666",
}
DARK = {
    "ink": "#e7eaee",
    "muted": "#a0a9b4",
    "rule": "#3a424c",
    "paper": "#14181d",
    "panel": "#1c2229",
    "accent": "#aba4ff",
    "exit0": "#5cb8f0",
    "exit1": "#ff9452",
    "exit2": "#35c69b",
    "exit3": "#ea9dca",
    "exit4": "#dfc243",
    "exit5": "#b7a5f5",
    "exit6": "#7fd0da",
    "exit7": "#b4b4b4",
}
EXIT_COLOURS = 8  # of LIGHT and of DARK; further exits repeat them
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# matplotlib types the keys of its settings by all the names it has, hence Any.
_SHARED: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "netfission",  # so that the same figure gives the same file
    "text.parse_math": False,  # a class may be called "$"
}
_REPORT: Any = _SHARED | {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.linewidth": 0.8,
    "grid.linewidth": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def new_figure(
    size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Make a picture with a grid of axes that have no spine at the top and right.

    Args:
        size: width and height in inches.
        rows: of the grid.
        columns: of the grid.
        options: more arguments for `Figure.subplots`.

    Returns:
        The figure, and its axes as an array `(rows, columns)` of objects.

    Example:
        >>> figure, axes = new_figure((6, 3), columns=2)
        >>> axes.shape
        (1, 2)
    """
    with mpl.rc_context(_SHARED):
        figure = Figure(figsize=size, layout="constrained")
        axes: np.ndarray[Any, Any] = figure.subplots(rows, columns, squeeze=False, **options)
        return figure, axes


def mark_reference(
    axes: Axes, *, x: float | None = None, y: float | None = None, label: str | None = None
) -> None:
    """Draw a dashed line at `x` or `y` for the single network, and name it `label` in the legend.

    Example:
        >>> _, axes = new_figure((3, 3))
        >>> mark_reference(axes[0, 0], x=1, label="single network's cost")
        >>> len(axes[0, 0].lines)
        1
    """
    style: dict[str, Any] = {"color": REFERENCE, "linestyle": "--", "linewidth": 1, "label": label}
    if x is not None:
        axes.axvline(x, **style)
    if y is not None:
        axes.axhline(y, **style)


def lay_out(figure: Figure) -> None:
    """Compute where all parts of a picture lie, for what is placed by that.

    Example:
        >>> figure, axes = new_figure((3, 3))
        >>> axes[0, 0].set_title("$x^$")  # no formula, which could not be drawn
        Text(0.5, 1.0, '$x^$')
        >>> lay_out(figure)
    """
    _leave_mathematics(figure)
    figure.draw_without_rendering()


def _leave_mathematics(figure: Figure) -> None:
    """Let texts between `$` be drawn as they are, as names are no formulas."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def picture_files(
    figure: Figure, path: Path, kinds: Sequence[str] = ("png", "svg")
) -> dict[Path, str | bytes]:
    """Return the contents of a picture's files; the same figure gives the same contents.

    Args:
        figure: the picture.
        path: of its files; the suffix is replaced.
        kinds: their suffixes, without a dot.

    Returns:
        Path → content, as `netfission.utils.files.write_together` accepts them.

    Example:
        >>> figure, _ = new_figure((3, 3))
        >>> [path.name for path in picture_files(figure, Path("cost"))]
        ['cost.png', 'cost.svg']
    """
    files: dict[Path, str | bytes] = {}
    _leave_mathematics(figure)
    for kind in kinds:
        file = BytesIO()
        with mpl.rc_context(_SHARED):
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(file, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
        files[path.with_suffix(f".{kind}")] = file.getvalue()
    return files


def save_picture(figure: Figure, path: Path, kinds: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write a picture as PNG and SVG, each whole or not at all.

    Args:
        figure: the picture.
        path: of its files; the suffix is replaced. Its folder must exist.
        kinds: their suffixes, without a dot.

    Returns:
        The files.

    Raises:
        OSError: a file cannot be written; none has changed then, see `write_together`.

    Example:
        >>> import tempfile
        >>> figure, _ = new_figure((3, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print([path.name for path in save_picture(figure, Path(folder) / "cost")])
        ['cost.png', 'cost.svg']
    """
    files = picture_files(figure, path, kinds)
    write_together(files)
    return list(files)


def report_settings(ink: str, muted: str, rule: str) -> Any:
    """Return matplotlib's settings for a figure of the report.

    Args:
        ink: colour of text.
        muted: colour of axes and their labels.
        rule: colour of grid lines.
    """
    return _REPORT | {
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": muted,
        "xtick.color": muted,
        "ytick.color": muted,
        "grid.color": rule,
    }
