"""A cascade's accuracy drawn against its cost: the picture `cascade.png` and `cascade.svg` of a run."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from netfission.evaluation.cascade import CascadeEvaluation, Kind, Point
from netfission.utils.plot_style import (
    LEGEND_SIZE,
    SERIES,
    TITLE_SIZE,
    mark_reference,
    new_figure,
    save_picture,
)

_MARKERS: dict[Kind, tuple[str, int]] = {  # shape and size
    "single": ("D", 7),
    "ensemble": ("*", 13),
    "exit": ("s", 6),
    "curve": (".", 7),
    "chosen": ("o", 10),
}
_LEGEND: dict[Kind, str] = {
    "single": "single network",
    "ensemble": "all exits",
    "exit": "one exit alone",
    "curve": "cascade",
    "chosen": "cascade as chosen",
}


def draw_cascade(evaluation: CascadeEvaluation, path: Path) -> list[Path]:
    """Draw accuracy against MACs and against measured time.

    Args:
        evaluation: what `evaluate_cascade` measured.
        path: of the picture; its suffix is replaced by png and svg. Its folder must exist.

    Returns:
        The files written, all or none.

    Raises:
        OSError: a file cannot be written.
    """
    points = evaluation.points
    figure, axes = new_figure((11.5, 5), columns=2, sharey=True)
    counted, timed = axes[0]
    _draw_points(counted, points, None, SERIES[0])
    counted.set(
        xlabel="MACs (dense, mean) ÷ single network's", ylabel=f"{evaluation.measure} on test images, %"
    )
    for size, colour in zip(evaluation.rounds, SERIES, strict=False):
        _draw_points(timed, [point for point in points if point.times], size, colour)
    timed.set(xlabel="measured time ÷ single network's, both deployed (median, quartiles)")
    for side in (counted, timed):
        mark_reference(side, x=1, label="single network's cost")
        if evaluation.least_accuracy is not None:
            side.axhline(
                100 * evaluation.least_accuracy, linestyle=":", color=SERIES[0], label=_bound(evaluation)
            )
        side.legend(fontsize=LEGEND_SIZE, loc="lower right")
    figure.suptitle(
        f"Exits {', '.join(map(str, evaluation.order))} run one after another until {_whose(evaluation)} "
        f"{evaluation.rule} is above its threshold: {evaluation.test_images} test images, thresholds from "
        f"{evaluation.validation_images} validation images",
        fontsize=TITLE_SIZE,
    )
    return save_picture(figure, path)


def _whose(evaluation: CascadeEvaluation) -> str:
    """Name the parts of images that stop by themselves, if they do."""
    if evaluation.tile is None:
        return "the"
    return f"a tile's ({evaluation.tile}×{evaluation.tile} pixels, {evaluation.halo} around)"


def _bound(evaluation: CascadeEvaluation) -> str:
    """Name the line of the accuracy that the chosen cascade keeps to."""
    promise = "" if evaluation.delta is None else f" (kept with probability {1 - evaluation.delta:g})"
    return f"accepted loss, {evaluation.max_accuracy_drop:g} points{promise}"


def _draw_points(axes: Axes, points: Sequence[Point], size: int | None, colour: str) -> None:
    """Draw points by their MACs, with a legend of their kinds, or by their time at a batch size."""
    for kind, (marker, marker_size) in _MARKERS.items():
        shown = [
            (point, 100 * point.accuracy)
            for point in points
            if point.kind == kind and point.accuracy is not None
        ]
        if not shown:
            continue
        accuracies = [accuracy for _, accuracy in shown]
        costs = [point.macs if size is None else point.times[size].median for point, _ in shown]
        axes.plot(
            costs,
            accuracies,
            marker,
            markersize=marker_size,
            color=colour,
            linestyle="-" if kind == "curve" else "none",
            fillstyle="none" if kind == "chosen" else "full",
            label=_LEGEND[kind] if size is None else f"batch {size}" if kind == "curve" else None,
        )
        if size is not None:
            times = [point.times[size] for point, _ in shown]
            bars = [[t.median - t.lower for t in times], [t.upper - t.median for t in times]]
            axes.errorbar(costs, accuracies, xerr=bars, fmt="none", ecolor=colour, elinewidth=0.8)
        elif kind == "exit":
            for index, (point, accuracy) in enumerate(shown):
                position = (point.macs, accuracy)
                axes.annotate(
                    point.name, position, (8, 6 - 9 * index), textcoords="offset points", fontsize=8
                )
