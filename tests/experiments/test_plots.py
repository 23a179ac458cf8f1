import pytest

from netfission.experiments.grid_files import find_grid, read_grid
from netfission.experiments.plots import plot_against_setting
from netfission.experiments.statistics import COLUMNS, SeedValues

METRICS = {key: COLUMNS[key] for key in ("top1", "nll")}


def drawn_against(grid, setting):
    """The curves of the first panel: label → (x, y)."""
    names = list(grid.contenders)
    metrics = {
        name: {key: SeedValues({0: 0.01 * place, 1: 0.01 * place + 0.02}) for key in METRICS}
        for place, name in enumerate(names)
    }
    axes = plot_against_setting("a title", METRICS, metrics, grid.contenders, setting).axes[0]
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
