import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from netfission.experiments.grid_files import find_grid, read_grid
from netfission.experiments.plots import plot_against_cost, plot_against_setting
from netfission.experiments.results import Comparison
from netfission.experiments.statistics import SeedValues
from netfission.tasks.classification import Classification
from netfission.utils.typed import typed

METRICS = {key: Classification.columns[key] for key in ("top1", "nll")}


def drawn_against(grid, setting):
    """The curves of the first panel: label → (x, y)."""
    names = list(grid.contenders)
    metrics = {
        name: {key: SeedValues({0: 0.01 * place, 1: 0.01 * place + 0.02}) for key in METRICS}
        for place, name in enumerate(names)
    }
    axes = plot_against_setting(r"a $\frac$ title", METRICS, metrics, grid.contenders, setting).axes[0]
    curves = {
        bar.get_label(): (list(bar.lines[0].get_xdata()), list(bar.lines[0].get_ydata()))
        for bar in axes.containers
    }
    return axes, names, curves


def test_contenders_that_differ_in_one_setting_alone_are_a_line():
    grid = find_grid("figure4").at("laptop")
    axes, names, curves = drawn_against(grid, "sparsity")
    criteria = ["random", "erk", "magnitude", "snip", "grasp", "synflow"]
    assert list(curves) == [f"fission, criterion {criterion}" for criterion in criteria]
    for label, (x, y) in curves.items():
        assert x == [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98]
        first = names.index(f"{label}, sparsity 0.1")
        assert y == pytest.approx([place + 1 for place in range(first, first + 8)])  # in per cent
    levels = {text.get_text(): text.xy[1] for text in axes.texts}
    assert list(levels) == [name for name in names if "sparsity" not in grid.contenders[name]]
    assert levels["single"] == pytest.approx(1.0)
    dashed = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == pytest.approx(list(levels.values()))


def test_numbers_run_upwards_whatever_the_contenders_are_called():
    grid = read_grid(
        "own", "contenders: {b: {sparsity: 0.9}, a: {sparsity: 0.5}, c: {sparsity: 0.1, exits: 2}}"
    )
    _, _, curves = drawn_against(grid.at("laptop"), "sparsity")
    assert [x for x, _ in curves.values()] == [[0.5, 0.9], [0.1]]


def test_levels_have_a_band_of_their_deviation():
    grid = find_grid("figure4").at("laptop")
    axes, names, _ = drawn_against(grid, "sparsity")
    bands = [patch.get_y() + patch.get_height() / 2 for patch in axes.patches]
    levels = [name for name in names if "sparsity" not in grid.contenders[name]]
    assert bands == pytest.approx([names.index(name) + 1 for name in levels])
    height = 100 * SeedValues({0: 0.0, 1: 0.02}).deviation * 2
    assert [patch.get_height() for patch in axes.patches] == pytest.approx([height] * len(levels))


@pytest.mark.parametrize("name", ["search", "figure3", "ablation-distillation", "grouping"])
def test_no_number_covers_another_or_a_point(name):
    folder = Path(__file__).parents[2] / "results" / f"{name}-laptop"
    shown = typed(Comparison, json.loads((folder / "comparison.json").read_text("utf-8")))
    picture = plot_against_cost("a title", METRICS, shown.metrics, shown.costs, shown.settings)
    picture.draw_without_rendering()
    for axes in picture.axes:
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
        points = [bar.lines[0].get_window_extent() for bar in axes.containers]
        assert len(boxes) == len(points) == len(shown.metrics)
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        assert not [pair for pair in itertools.product(boxes, points) if pair[0].overlaps(pair[1])]
    (legend,) = picture.legends
    names = [text.get_text().split("  ", 1)[1] for text in legend.get_texts()]
    assert names == list(shown.metrics)


def test_fission_of_whole_copies_is_round_and_hollow():
    metrics = {
        name: {key: SeedValues({0: 0.5}) for key in METRICS} for name in ("single", "channels", "copies")
    }
    settings = {
        "single": {"exits": 1},
        "channels": {"grouping": "channels"},
        "copies": {"grouping": "copies"},
    }
    grouping = Path(__file__).parents[2] / "results" / "grouping-laptop"
    costs = typed(Comparison, json.loads((grouping / "comparison.json").read_text("utf-8"))).costs
    costs = replace(costs, contenders={name: costs.contenders[name] for name in metrics})
    drawn = [
        bar.lines[0] for bar in plot_against_cost("", METRICS, metrics, costs, settings).axes[0].containers
    ]
    assert [line.get_marker() for line in drawn] == ["s", "o", "o"]
    assert [line.get_fillstyle() for line in drawn] == ["full", "full", "none"]


def test_values_that_are_no_numbers_stand_in_a_row():
    axes, _, curves = drawn_against(find_grid("figure5").at("laptop"), "ratio")
    assert curves["fission"][0] == list(range(7))
    assert [label.get_text() for label in axes.get_xticklabels()][:3] == ["1–1–1", "2–1–1", "1–2–1"]
    styles = [line.get_linestyle() for line in axes.lines]
    assert set(styles) == {"None", "--"}  # no curve runs between them
    assert styles.count("--") == len(axes.texts) == 4  # the controls
    assert axes.get_legend() is None  # one alone needs none


def test_an_x_axis_that_no_contender_sets_is_refused():
    grid = read_grid("own", "x_axis: sparsty\ncontenders: {single: }")
    with pytest.raises(ValueError, match=r"own\.x_axis must be a setting under contenders, got 'sparsty'"):
        grid.at("laptop")


def test_names_of_levels_that_are_alike_do_not_cover_each_other():
    grid = read_grid("own", "contenders: {b: {sparsity: 0.9}, c: {exits: 2}, d: {exits: 3}, e: {exits: 4}}")
    metrics = {name: dict.fromkeys(METRICS, SeedValues({0: 0.5})) for name in grid.contenders}
    picture = plot_against_setting("a title", METRICS, metrics, grid.at("laptop").contenders, "sparsity")
    picture.draw_without_rendering()
    for axes in picture.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 3
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
