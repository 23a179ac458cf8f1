"""Pictures of a comparison: metrics against cost, or against a setting."""

import math
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from netfission.experiments.contenders import Settings, readable
from netfission.experiments.costs import Costs
from netfission.experiments.statistics import SeedValues
from netfission.methods.registry import METHODS
from netfission.tasks.columns import Column
from netfission.utils.plot_style import (
    FAINT,
    LEGEND_SIZE,
    MARKERS,
    OTHER,
    PRIMARY,
    REFERENCE,
    SERIES,
    TEXT,
    TITLE_SIZE,
    lay_out,
    mark_reference,
    new_figure,
)

_LEVEL_GAP = 10.0  # points between the names of two level lines
_NUMBER_GAP = 5.0  # points between a point and its number
Points = Mapping[str, tuple[float, SeedValues]]  # contender → its place on the x-axis and its values


def plot_against_cost(
    title: str,
    columns: Mapping[str, Column],
    metrics: Mapping[str, Mapping[str, SeedValues]],
    costs: Costs,
    settings: Mapping[str, Settings],
) -> Figure:
    """Draw each metric against multiply-accumulates and against time, over the single network's.

    Args:
        title: of the picture.
        columns: the metrics to draw, and how to show them.
        metrics: contender → metric → values.
        costs: of the contenders.
        settings: contender → its own settings.
    """
    size, single_macs = costs.batch_sizes[-1], costs.single.size.macs_dense
    x_by_kind = {
        "MACs (dense)": {name: c.size.macs_dense / single_macs for name, c in costs.contenders.items()},
        f"time at batch {size}": {name: c.inference[size].median for name, c in costs.contenders.items()},
    }
    picture, rows = new_figure((11.5, 4.2 * len(columns)), len(columns), 2, sharey="row")
    panels = [
        (axes, key, kind, {name: (x[name], values[key]) for name, values in metrics.items()})
        for row, key in zip(rows, columns, strict=True)
        for axes, (kind, x) in zip(row, x_by_kind.items(), strict=True)
    ]
    for axes, key, kind, points in panels:
        _draw_points(axes, columns[key], points, settings)
        axes.set_xlabel(f"{kind} ÷ single network's")
        axes.set_ylabel(_described(columns[key]))
    kinds = "round: fission, hollow: of whole copies; square: other methods"
    picture.suptitle(f"{title}; {kinds}; dashed: the single network's cost", fontsize=TITLE_SIZE)
    numbers = {name: f"{number}" for number, name in enumerate(metrics, start=1)}
    names = [
        Line2D([], [], linestyle="none", label=f"{number}  {name}", **_marker(settings[name]))
        for name, number in numbers.items()
    ]
    picture.legend(handles=names, loc="outside right center", fontsize=LEGEND_SIZE, frameon=False)
    lay_out(picture)
    for axes, key, _, points in panels:
        _number_points(axes, columns[key], points, numbers)
    return picture


def _marker(settings: Settings) -> dict[str, Any]:
    """Return how the points of a contender are drawn: those of fission round."""
    is_fission = settings.get("method", "fission") not in METHODS.keys() - {"fission"}
    if not is_fission or settings.get("exits") == 1:
        return {"marker": "s", "color": OTHER, "markersize": 5}
    return {
        "marker": "o",
        "color": PRIMARY,
        "markersize": 5,
        "fillstyle": "none" if settings.get("grouping") == "copies" else "full",
    }


def _draw_points(axes: Axes, column: Column, points: Points, settings: Mapping[str, Settings]) -> None:
    for name, (x, values) in points.items():
        y, error = column.scale * values.mean, column.scale * (values.deviation or 0)
        axes.errorbar(x, y, yerr=error, linestyle="none", elinewidth=1, **_marker(settings[name]))
    mark_reference(axes, x=1)
    axes.margins(x=0.2)
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, 0.5), max(right, 1.5))  # else a cost of 0.99 would look far from 1


def _number_points(axes: Axes, column: Column, points: Points, numbers: Mapping[str, str]) -> None:
    """Write a number to the right of each point, as far from it as no number covers another or a point.

    The picture's layout must have been computed.
    """
    y = {name: column.scale * values.mean for name, (_, values) in points.items()}
    pixels = {name: axes.transData.transform((x, y[name])) for name, (x, _) in points.items()}
    figure = axes.get_figure(root=True)
    assert figure is not None
    point = figure.dpi / 72  # in pixels
    taken = [(*position, 5.0) for position in pixels.values()]
    for name in sorted(points, key=lambda name: -y[name]):
        (across, up), shift = pixels[name], _NUMBER_GAP
        half = 2.5 * len(numbers[name])  # of the number's width in points
        while any(
            abs(across / point + shift + half - x / point) < half + width / 2 + 1
            and abs(up - above) / point < 9
            for x, above, width in taken
        ):
            shift += 2
        taken.append((across + point * (shift + half), up, 2 * half))
        place = (points[name][0], y[name])
        style: dict[str, Any] = {"xytext": (shift, 0), "textcoords": "offset points", "va": "center"}
        if shift > _NUMBER_GAP:
            line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", place, **style, arrowprops=line, zorder=1)
        box = {"facecolor": "white", "linewidth": 0, "pad": 0.3}  # hides lines to other numbers
        axes.annotate(numbers[name], place, **style, fontsize=7.5, color=TEXT, bbox=box, zorder=4)


def plot_against_setting(
    title: str,
    columns: Mapping[str, Column],
    metrics: Mapping[str, Mapping[str, SeedValues]],
    settings: Mapping[str, Settings],
    x_axis: str,
) -> Figure:
    """Draw each metric against a setting; a contender without the setting is a level line.

    Contenders that differ in the setting alone are joined to a line, or are a row of points if its values
    are not numbers.

    Args:
        title: of the picture.
        columns: the metrics to draw, and how to show them.
        metrics: contender → metric → values.
        settings: contender → its own settings.
        x_axis: the setting.
    """
    lines = _lines(metrics, settings, x_axis)
    x_of_value = _x_of_values([settings[name][x_axis] for name in metrics if x_axis in settings[name]])
    is_row = list(x_of_value.values()) == list(range(len(x_of_value)))  # nothing lies between the values
    picture, axes_rows = new_figure((5.8 * len(columns), 4.8), columns=len(columns))
    panels = axes_rows[0]
    for axes, (key, column) in zip(panels, columns.items(), strict=True):
        for (line, members), color, marker in zip(lines.items(), cycle(SERIES), cycle(MARKERS), strict=False):
            values = [metrics[name][key] for name in members]
            axes.errorbar(
                [x_of_value[readable(settings[name][x_axis])] for name in members],
                [column.scale * value.mean for value in values],
                yerr=[column.scale * (value.deviation or 0) for value in values],
                label=line,
                color=color,
                marker=marker,
                markersize=4,
                capsize=2,
                linewidth=1.2,
                linestyle="none" if is_row else "solid",
            )
        if is_row:
            axes.set_xticks(list(x_of_value.values()), list(x_of_value))
        axes.set_xlabel(readable(x_axis))
        axes.set_ylabel(_described(column))
        level = [name for name in metrics if x_axis not in settings[name]]
        _draw_levels(axes, column, {name: metrics[name][key] for name in level})
    if len(panels[0].get_legend_handles_labels()[1]) > 1:
        panels[0].legend(fontsize=LEGEND_SIZE, frameon=False)
    picture.suptitle(title, fontsize=TITLE_SIZE)
    lay_out(picture)
    for axes, (key, column) in zip(panels, columns.items(), strict=True):
        levels = {name: column.scale * metrics[name][key].mean for name in metrics}
        _name_levels(axes, {name: levels[name] for name in metrics if x_axis not in settings[name]})
    return picture


def _draw_levels(axes: Axes, column: Column, levels: Mapping[str, SeedValues]) -> None:
    """Draw level lines in a band of ± their standard deviation."""
    for values in levels.values():
        y, error = column.scale * values.mean, column.scale * (values.deviation or 0)
        mark_reference(axes, y=y)
        axes.axhspan(y - error, y + error, color=REFERENCE, alpha=0.12, linewidth=0)


def _name_levels(axes: Axes, levels: Mapping[str, float]) -> None:
    """Write the name of each level line at its right end, or as far above as it covers no other name.

    The picture's layout must have been computed.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    lowest = -math.inf
    for name, y in sorted(levels.items(), key=lambda one: one[1]):
        height = axes.transData.transform((0, y))[1] * 72 / figure.dpi
        lowest = max(height, lowest + _LEVEL_GAP)
        axes.annotate(
            name,
            (1, y),
            xycoords=axes.get_yaxis_transform(),
            xytext=(3, lowest - height),
            textcoords="offset points",
            va="center",
            fontsize=LEGEND_SIZE,
            color=TEXT,
        )


def _lines(contenders: Iterable[str], settings: Mapping[str, Settings], x_axis: str) -> dict[str, list[str]]:
    """Line → the contenders on it, which differ in the setting alone; numbers in ascending order."""
    groups: dict[str, list[str]] = {}
    for name in contenders:
        if x_axis in settings[name]:
            others = {key: value for key, value in settings[name].items() if key != x_axis}
            groups.setdefault(repr(sorted(others.items())), []).append(name)
    lines = {}
    for members in groups.values():
        values = [settings[name][x_axis] for name in members]
        if all(isinstance(value, int | float) for value in values):
            members.sort(key=lambda name: float(settings[name][x_axis]))
        words = f", {readable(x_axis)} {readable(settings[members[0]][x_axis])}"
        lines[members[0].replace(words, "")] = members
    return lines


def _x_of_values(values: Iterable[Any]) -> dict[str, float]:
    """Value in words → x: the number itself, or, for other values, its place in a row."""
    different = {readable(value): value for value in values}
    if all(isinstance(value, int | float) for value in different.values()):
        return different
    return {words: place for place, words in enumerate(different)}


def _described(column: Column) -> str:
    return f"{column.title} ({column.direction})"
