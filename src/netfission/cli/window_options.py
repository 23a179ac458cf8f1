"""Options of the commands that predict photographs window by window."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from netfission.cli.parser import Parser
from netfission.utils.errors import invalid

if TYPE_CHECKING:  # slow to import, and parsing needs none of it
    from netfission.classifier import Predictor
    from netfission.inference.windows import Windows
    from netfission.tasks import Task

_SIZE = re.compile(r"(\d{1,6})\s*[xX×]\s*(\d{1,6})")
_DEFAULT_OVERLAP = 0.25  # as in `netfission.inference.windows`


def add_window_options(parser: Parser, group: Any = None) -> None:
    """Add `--window` and `--overlap`.

    Args:
        parser: of the command.
        group: what `add_argument_group` returned; default the parser's own options.
    """
    parser.add(
        "--window",
        str | None,
        help="with a class for each pixel, predict photographs at their own resolution, in windows of this "
        "height and width, such as 180x240 (default: photographs are scaled to the network's size)",
        group=group,
        metavar="HEIGHTxWIDTH",
    )
    parser.add(
        "--overlap",
        float | None,
        help="least share of its side that a window has in common with the next, in [0, 1) (default: "
        f"{_DEFAULT_OVERLAP})",
        group=group,
    )


def check_windows(settings: Namespace, find_task: Callable[[], Task]) -> None:
    """Check what is asked for of windows, before anything runs.

    Args:
        settings: of the command.
        find_task: finds the task of the run, if there are windows.

    Raises:
        ValueError: they have no meaning for the task, the size is not valid, or there is an overlap alone.
    """
    if settings.window is None:
        if settings.overlap is not None:
            raise invalid("--overlap", "left out unless --window is given", settings.overlap)
        return
    task = find_task()
    if not task.draws_maps:
        raise invalid("--window", f"left out for a run of task={task.name}", settings.window)
    parse_size(settings.window)
    if settings.overlap is not None and not 0 <= settings.overlap < 1:
        raise invalid("--overlap", "a share in [0, 1)", settings.overlap)


def find_windows(settings: Namespace, predictor: Predictor) -> Windows:
    """Return the windows that are asked for, see `Predictor.windows`.

    Raises:
        ValueError: the network does not take them.
    """
    return predictor.windows(*window_sizes(settings))


def window_sizes(settings: Namespace) -> tuple[tuple[int, int], float]:
    """Return the height and width of windows, and their overlap."""
    overlap = _DEFAULT_OVERLAP if settings.overlap is None else settings.overlap
    return parse_size(settings.window), overlap


class WindowProgress:
    """Shows in a progress bar of photographs how many windows of one are done.

    Attributes:
        bar: of `tqdm`; None until it is there.
    """

    bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Show the number of windows of a photograph so far, and of all of its windows."""
        if self.bar is not None and total > 1:
            self.bar.set_postfix_str(f"window {done:,} of {total:,}")

    def photographs(self, total: int) -> None:
        """Count photographs from 0 to a number."""
        if self.bar is not None:
            self.bar.reset(total)

    def next_photograph(self) -> None:
        """Count a photograph."""
        if self.bar is not None:
            self.bar.update()


def parse_size(text: str) -> tuple[int, int]:
    """Return the height and width of a window.

    Raises:
        ValueError: the text is something else.

    Example:
        >>> parse_size("180x240")
        (180, 240)
        >>> parse_size("180")
        Traceback (most recent call last):
        ValueError: --window must be a height and a width in pixels, such as 180x240, got '180'
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or "0" in map(str, map(int, found.groups())):
        raise invalid("--window", "a height and a width in pixels, such as 180x240", text)
    return int(found[1]), int(found[2])
