"""A cascade's accuracy drawn against its cost: the picture `cascade.png` and `cascade.svg` of a run."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from netfission.evaluation.cascade import CascadeEvaluation, Kind, Point
from netfission.utils.plot_style import (
    LEGEND_SIZE,
    SERIES,
    TITLE_SIZE,
    lay_out,
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
_NAME_SIZE, _LETTER, _LINE, _ABOVE = 8, 5.0, 10.0, 6.0  # of the names of exits, in points


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
    figure, axes = new_figure((11.5, 5.4), columns=2, sharey=True)
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
        _draw_bound(side, evaluation)
        # Below the axes, as there may be a point in each corner.
        side.legend(fontsize=LEGEND_SIZE, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3, frameon=False)
    figure.suptitle(
        f"Exits {', '.join(map(str, evaluation.order))} run one after another until {_whose(evaluation)} "
        f"{evaluation.rule} is above its threshold: {evaluation.test_images} test images, thresholds from "
        f"{evaluation.validation_images} validation images",
        fontsize=TITLE_SIZE,
    )
    lay_out(figure)
    _name_exits(counted, points)
    return save_picture(figure, path)


def _whose(evaluation: CascadeEvaluation) -> str:
    """Name the parts of images that stop by themselves, if they do."""
    if evaluation.tile is None:
        return "the"
    return f"a tile's ({evaluation.tile}×{evaluation.tile} pixels, {evaluation.halo} around)"


def _draw_bound(axes: Axes, evaluation: CascadeEvaluation) -> None:
    """Draw and name the accuracy that the chosen cascade keeps to; only name it if it is far below."""
    if evaluation.least_accuracy is None:
        return
    promise = "" if evaluation.delta is None else f" (kept with probability {1 - evaluation.delta:g})"
    label = f"accepted loss, {evaluation.max_accuracy_drop:g} points{promise}"
    bound = evaluation.drawn_bound
    if bound is None:
        axes.plot([], [], linestyle="none", label=f"{label}: below the picture")
    else:
        axes.axhline(100 * bound, linestyle=":", color=SERIES[0], label=label)


def _name_exits(axes: Axes, points: Sequence[Point]) -> None:
    """Write the name of each exit above its point, or as far below as no name covers another.

    The picture's layout must have been computed.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    exits = [
        (point, 100 * point.accuracy)
        for point in points
        if point.kind == "exit" and point.accuracy is not None
    ]
    taken: list[tuple[float, float, float]] = []  # left, right and bottom of names, in points
    for point, accuracy in sorted(exits, key=lambda one: -one[1]):
        left, height = axes.transData.transform((point.macs, accuracy)) * 72 / figure.dpi
        right, bottom = left + _LETTER * len(point.name), height + _ABOVE
        for start, end, other in taken:
            if left < end and start < right:
                bottom = min(bottom, other - _LINE)
        taken.append((left, right, bottom))
        axes.annotate(
            point.name,
            (point.macs, accuracy),
            (8, bottom - height),
            textcoords="offset points",
            fontsize=_NAME_SIZE,
            zorder=4,
            bbox={"facecolor": "white", "linewidth": 0, "pad": 0.3},  # hides the line of the cascade
        )


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
