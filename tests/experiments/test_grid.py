import re
from dataclasses import replace
from pathlib import Path

import pytest

from netfission.cli import compare as compare_command
from netfission.config import RunConfig
from netfission.experiments.compare import compare
from netfission.experiments.contenders import CONTENDERS, find_contender
from netfission.experiments.grid import Cell, Grid, chosen_settings
from netfission.methods.registry import METHODS


def test_whole_seeds_come_first(grid_of):
    cells = grid_of("single", "treenet", seeds=2).cells()
    assert [(cell.contender, cell.seed) for cell in cells] == [
        ("single", 0), ("treenet", 0), ("single", 1), ("treenet", 1),
    ]  # fmt: skip
    assert cells[0].config.fission.exits == 1
    assert cells[1].config.method.method == "treenet"
    assert len({cell.key for cell in cells}) == 4


def test_a_run_is_known_by_its_settings_wherever_its_data_lie_and_whatever_it_is_called(grid_of):
    (cell,) = grid_of("single", data="/here/cifar100").cells()
    (moved,) = grid_of("single", data="/there/cifar100").cells()
    assert Cell("another name", cell.config).key == cell.key == moved.key
    assert "/here" not in str(chosen_settings(cell.config))
    for other in ({"data": "/here/cifar10"}, {"epochs": 2}, {"learning_rate": 0.2}):
        assert grid_of("single", **{"data": "/here/cifar100", **other}).cells()[0].key != cell.key


def test_a_default_spelt_out_is_the_same_run(grid_of):
    (cell,) = grid_of("single").cells()
    (spelt,) = grid_of("single", momentum=RunConfig().training.momentum, criterion="snip").cells()
    assert spelt.key == cell.key


def test_members_that_start_from_trained_weights_are_trained_one_by_one(tmp_path, monkeypatch):
    weights = tmp_path / "weights.pt"
    weights.touch()
    grids = []
    monkeypatch.setattr("netfission.experiments.compare.compare", lambda grid, *_, **__: grids.append(grid))
    monkeypatch.setattr("netfission.cli.grid_options.print_comparison", lambda *_: None)
    trained = ["--weights", str(weights)]
    for flags in ([], trained, [*trained, "--one-by-one", "false"], [*trained, "--patience", "3"]):
        command = ["--methods", "[deep-ensemble]", "--out", str(tmp_path / "out"), *flags]
        compare_command.run(compare_command.parser().parse_args(command))
    assert [grid.cells()[0].config.method.one_by_one for grid in grids] == [False, True, False, False]


def test_an_unknown_setting_is_named(grid_of):
    with pytest.raises(ValueError, match=r"setting must be one of .*, got 'epoch'; did you mean epochs"):
        grid_of("single", epoch=3).cells()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "treenet", "exits": 1}, "exits must be at least 2 with method=treenet, got 1"),
        ({"method": "born-again", "exits": 3}, "exits must be 1 with method=born-again, got 3; it has one"),
        ({"method": "born-again", "generations": 3}, "epochs must be a multiple of generations=3, got 1"),
        ({"epoch": 3}, "setting must be one of "),
        ({"exits": 0}, "exits must be a positive integer, got 0"),
        ({"exits": "two"}, 'exits must be an integer, got "two"'),
        ({"method": "packed", "rho": 0.5}, "rho must be 0.0 unless method=mimo, got 0.5"),
    ],
)
def test_an_impossible_contender_is_named_before_the_first_run(settings, message, tmp_path):
    contenders = {"single": CONTENDERS["single"], "mine": settings}
    grid = Grid(contenders, range(2), {"data": "digits", "model": "wrn-10-1", "epochs": 1}, "single")
    with pytest.raises(ValueError, match=f"^contender mine: {re.escape(message)}"):
        compare(grid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_setting_of_all_contenders_is_named_alone(grid_of):
    with pytest.raises(ValueError, match=r"^exits must be a positive integer, got 0$"):
        grid_of("treenet", "packed", exits=0).cells()


def test_a_method_of_one_prediction_needs_no_number_of_exits():
    alone = Grid({"again": {"method": "born-again"}}, range(1), {"epochs": 2}, "again")
    among = Grid(
        {"again": {"method": "born-again"}, "fission": {}}, range(1), {"epochs": 2, "exits": 4}, "again"
    )
    spelt = Grid({"again": CONTENDERS["born-again"]}, range(1), {"epochs": 2}, "again")
    assert alone.cells()[0].key == among.cells()[0].key == spelt.cells()[0].key
    assert among.cells()[1].config.fission.exits == 4
    with pytest.raises(
        ValueError, match=r"^exits must be left out, since it has no effect on any contender, got 4$"
    ):
        Grid({"again": {"method": "born-again"}}, range(1), {"exits": 4, "epochs": 2}, "again").cells()


def test_values_that_switch_each_other_off_can_be_multiplied():
    swept = {
        f"weight {weight}, temperature {temperature}": {
            "distillation_weight": weight,
            "temperature": temperature,
        }
        for weight in (0.0, 1.0)
        for temperature in (1.0, 4.0)
    }
    assert len(Grid(swept, range(1), {"epochs": 2}, "weight 0.0, temperature 1.0").cells()) == 4
    off = {name: settings for name, settings in swept.items() if not settings["distillation_weight"]}
    with pytest.raises(
        ValueError, match="temperature must be left out unless distillation_weight is above 0"
    ):
        Grid(off, range(1), {"epochs": 2}, "weight 0.0, temperature 1.0").cells()


def test_every_method_can_be_compared():
    named = {settings.get("method", "fission") for settings in CONTENDERS.values()}
    assert named == set(METHODS)
    with pytest.raises(ValueError, match=r"methods must be one of .*, got 'singl'; did you mean single"):
        find_contender("singl")


def test_names_of_contenders_are_known_without_importing_a_trainer():
    import subprocess
    import sys

    code = "import sys, netfission.cli; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path.cwd()).returncode == 0


def test_settings_of_a_method_reach_only_those_who_read_them(grid_of):
    grid = grid_of("single", "mc-dropout", "fission-weights", dropout_rate=0.3, sparsity=0.5)
    cells = {cell.contender: cell.config for cell in grid.cells()}
    assert cells["mc-dropout"].method.dropout_rate == 0.3
    assert cells["single"].method.dropout_rate == cells["fission-weights"].method.dropout_rate == 0.1
    assert cells["single"].fission.sparsity == cells["fission-weights"].fission.sparsity == 0.5
    assert cells["mc-dropout"].fission.sparsity == 0.0
    grid = grid_of(
        "single", "fission-channels", "fission-weights", assignment="importance", keep_shortcuts=True
    )
    cells = {cell.contender: cell.config.fission for cell in grid.cells()}
    assert [cells[name].assignment for name in grid.contenders] == ["random", "importance", "random"]
    assert [cells[name].keep_shortcuts for name in grid.contenders] == [True, False, True]
    with pytest.raises(
        ValueError, match=r"rho must be left out, since it has no effect on any contender, got 0\.5"
    ):
        grid_of("single", "mc-dropout", rho=0.5).cells()


def test_a_contender_that_starts_from_one_of_several_exits_is_refused(grid_of):
    grid = replace(grid_of("treenet", "single"), starts={"single": "treenet"})
    with pytest.raises(
        ValueError, match=r"^contender single: from must be a contender of one exit, .* 2 exits$"
    ):
        grid.cells()


def test_runs_from_trained_weights_have_a_revision_of_their_own(grid_of, monkeypatch):
    keys = [[cell.key for cell in grid_of("single", weights=weights).cells()] for weights in (None, "a.pt")]
    monkeypatch.setattr("netfission.experiments.grid._START", 10**6)
    later = [[cell.key for cell in grid_of("single", weights=weights).cells()] for weights in (None, "a.pt")]
    assert later[0] == keys[0] and later[1] != keys[1]
