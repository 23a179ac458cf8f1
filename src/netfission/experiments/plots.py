"""Pictures of a comparison: figures of merit against cost, or along a setting."""

from collections.abc import Iterable, Mapping, Set
from itertools import cycle
from typing import Any

from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from netfission.experiments.contenders import Settings, readable
from netfission.experiments.costs import BATCH_SIZES, Costs
from netfission.experiments.statistics import Column, SeedValues
from netfission.methods.registry import METHODS
from netfission.utils.plot_style import (
    FAINT,
    LEGEND_SIZE,
    MARKERS,
    OTHER,
    PRIMARY,
    SERIES,
    TEXT,
    TITLE_SIZE,
    mark_reference,
    new_figure,
)


def against_cost(
    title: str,
    merits: Mapping[str, Column],
    figures: Mapping[str, Mapping[str, SeedValues]],
    costs: Costs,
    settings: Mapping[str, Settings],
) -> Figure:
    """Each figure of merit against multiply-accumulates and against time, over the single network's.

    Args:
        title: of the picture.
        merits: those to draw, by key.
        figures: contender → key → values.
        costs: of the contenders.
        settings: contender → its own.
    """
    size, unit = BATCH_SIZES[-1], costs.single.size.macs_dense
    own = costs.contenders
    places = {
        "MACs (dense)": {name: cost.size.macs_dense / unit for name, cost in own.items()},
        f"time at batch {size}": {name: cost.inference[size].median for name, cost in own.items()},
    }
    picture, rows = new_figure((11.5, 4.2 * len(merits)), len(merits), 2, sharey="row")
    panels = [
        (axes, key, kind, {name: (at[name], own[key]) for name, own in figures.items()})
        for row, key in zip(rows, merits, strict=True)
        for axes, (kind, at) in zip(row, places.items(), strict=True)
    ]
    ours = {name for name, own in settings.items() if _is_fission(own)}
    for axes, key, kind, points in panels:
        _points(axes, merits[key], points, ours)
        axes.set_xlabel(f"{kind} ÷ single network's")
        _finish(axes, merits[key], key)
    picture.suptitle(f"{title}; round: fission; dashed: the single network's cost", fontsize=TITLE_SIZE)
    picture.draw_without_rendering()
    for axes, key, _, points in panels:
        _name_points(axes, merits[key], points, ours)
    return picture


def _is_fission(own: Settings) -> bool:
    """Whether a contender is what this project is about: divided among several exits."""
    divided = own.get("grouping") != "copies" and own.get("exits") != 1
    return divided and own.get("method", "fission") not in METHODS.keys() - {"fission"}


def _points(
    axes: Axes, column: Column, points: Mapping[str, tuple[float, SeedValues]], ours: Set[str]
) -> None:
    for name, (place, own) in points.items():
        axes.errorbar(
            place,
            column.scale * own.mean,
            yerr=column.scale * (own.deviation or 0),
            fmt="o" if name in ours else "s",
            markersize=5,
            color=PRIMARY if name in ours else OTHER,
            elinewidth=1,
        )
    mark_reference(axes, x=1)
    axes.margins(x=0.2)


def _name_points(
    axes: Axes, column: Column, points: Mapping[str, tuple[float, SeedValues]], ours: Set[str]
) -> None:
    """Names beside points, moved until none lies on another; to be done when the picture is laid out."""
    places = [place for place, _ in points.values()]
    heights = [column.scale * own.mean for _, own in points.values()]
    names = [
        axes.text(place, height, name, fontsize=7.5, color=PRIMARY if name in ours else TEXT)
        for name, place, height in zip(points, places, heights, strict=True)
    ]
    adjust_text(
        names,
        x=places,
        y=heights,
        ax=axes,
        expand=(1.1, 1.6),
        force_text=(0.2, 0.5),
        iter_lim=500,  # not a time, so that the same figures give the same picture
        arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.5},
    )


def lines(
    title: str,
    merits: Mapping[str, Column],
    figures: Mapping[str, Mapping[str, SeedValues]],
    settings: Mapping[str, Settings],
    along: str,
) -> Figure:
    """Each figure of merit along a setting; contenders without it are level.

    Those that differ in it alone are a line, or points where its values are no numbers.

    Args:
        title: of the picture.
        merits: those to draw, by key.
        figures: contender → key → values.
        settings: contender → its own.
        along: the setting.
    """
    of_lines = _lines(figures, settings, along)
    places = _places([settings[name][along] for name in figures if along in settings[name]])
    in_a_row = list(places.values()) == list(range(len(places)))  # there is nothing between them
    picture, axes_rows = new_figure((5.8 * len(merits), 4.8), columns=len(merits))
    panels = axes_rows[0]
    for axes, (key, column) in zip(panels, merits.items(), strict=True):
        for (line, members), color, mark in zip(
            of_lines.items(), cycle(SERIES), cycle(MARKERS), strict=False
        ):
            own = [figures[name][key] for name in members]
            axes.errorbar(
                [places[readable(settings[name][along])] for name in members],
                [column.scale * each.mean for each in own],
                yerr=[column.scale * (each.deviation or 0) for each in own],
                label=line,
                color=color,
                marker=mark,
                markersize=4,
                capsize=2,
                linewidth=1.2,
                linestyle="none" if in_a_row else "solid",
            )
        for name in figures:
            if along not in settings[name]:
                level = column.scale * figures[name][key].mean
                mark_reference(axes, y=level, label=name)
        if in_a_row:
            axes.set_xticks(list(places.values()), list(places))
        axes.set_xlabel(along.replace("_", " "))
        _finish(axes, column, key)
    if len(panels[0].get_legend_handles_labels()[1]) > 1:
        panels[0].legend(fontsize=LEGEND_SIZE, frameon=False)
    picture.suptitle(title, fontsize=TITLE_SIZE)
    return picture


def _lines(contenders: Iterable[str], settings: Mapping[str, Settings], along: str) -> dict[str, list[str]]:
    """Line → the contenders on it, which differ in that setting alone; numbers from the least on."""
    found: dict[str, list[str]] = {}
    for name in contenders:
        if along in settings[name]:
            others = {key: value for key, value in settings[name].items() if key != along}
            found.setdefault(repr(sorted(others.items())), []).append(name)
    named = {}
    for members in found.values():
        values = [settings[name][along] for name in members]
        if all(isinstance(value, int | float) for value in values):
            members.sort(key=lambda name: float(settings[name][along]))
        own = f", {readable(along)} {readable(settings[members[0]][along])}"
        named[members[0].replace(own, "")] = members
    return named


def _places(values: Iterable[Any]) -> dict[str, float]:
    """Value in words → where it stands: numbers where they are, others in a row."""
    different = {readable(value): value for value in values}
    if all(isinstance(value, int | float) for value in different.values()):
        return different
    return {words: place for place, words in enumerate(different)}


def _finish(axes: Axes, column: Column, key: str) -> None:
    axes.set_ylabel(column.title + (" (higher is better)" if key == "top1" else " (lower is better)"))
