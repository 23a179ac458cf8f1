import json
import re
from pathlib import Path

import pytest

from netfission.cli import main
from netfission.config import RunConfig
from netfission.experiments.grid_files import find_grid, read_grid
from netfission.experiments.grids import named_grids

GRID = """
title: A small grid
x_axis: temperature
reference: single
seeds: 1
settings: {data: digits, limit_per_class: 5, validation: 0.0, model: wrn-10-1, batch_size: 25, exits: 2}
scales:
  short: {epochs: 1}
contenders:
  single:
  treenet: {grouping: copies, each: {temperature: [1.0, 3.0]}}
"""


@pytest.mark.parametrize("name", named_grids())
def test_every_named_grid_has_sound_settings_at_every_scale(name):
    file = find_grid(name)
    assert {"paper", "laptop"} <= set(file.scales) or name in ("camvid", "demo", "finetune", "middle")
    for scale in file.scales:
        grid = file.at(scale)
        cells = grid.cells()
        assert len({cell.key for cell in cells}) == len(cells)
        assert all(isinstance(cell.config, RunConfig) for cell in cells)
        assert all(cell.config.data.validation == 0 or name == "pretrained" for cell in cells)


def test_the_documented_grid_is_one():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "compare.md").read_text("utf-8")
    (text,) = re.findall(r"```yaml\n(title.*?)```", page, re.DOTALL)
    grid = read_grid("documented", text).at("laptop")
    assert len(grid.cells()) == 3 * (5 + 4)
    assert grid.contenders["single, half the rate"] == {"exits": 1, "learning_rate": 0.05}
    assert grid.contenders["fission, temperature 10.0"] == {"grouping": "channels", "temperature": 10.0}


def test_a_contender_starts_from_an_earlier_one():
    text = "contenders: {single: , further: {from: %s, exits: 1}}\nsettings: {pretrained: true}"
    grid = read_grid("g", text % "single").at("laptop")
    single, further = grid.cells()[:2]
    assert (further.start, single.start) == (single, None)
    assert single.config.model.pretrained and not further.config.model.pretrained
    assert further.config.model.weights == f"runs/{single.key}"
    assert grid.contenders["further"] == {"exits": 1}
    assert grid.affected("pretrained") == ["single"]
    with pytest.raises(ValueError, match=r"^g\.contenders\.further\.from must be .*single.*, got 'further'"):
        read_grid("g", text % "further").at("laptop")
    for setting in ("weights: w.safetensors", "pretrained: true", "each: {weights: [w.safetensors]}"):
        with pytest.raises(
            ValueError, match=r"^g\.contenders\.further.*\.\w+ must be left out with from, got "
        ):
            read_grid("g", text % f"single, {setting}").at("laptop")


def test_scales_differ_in_settings_alone():
    paper, laptop = (find_grid("figure4").at(scale) for scale in ("paper", "laptop"))
    assert list(paper.contenders) == list(laptop.contenders)
    assert len(paper.contenders) == 1 + 6 * 8 + 4
    assert paper.cells()[0].config.training.epochs == 200
    assert paper.cells()[0].config.model.model == "cifar-resnet18"  # as in the paper
    assert laptop.cells()[0].config.data.limit_per_class == 20
    settings = paper.contenders["fission, criterion snip, sparsity 0.5"]
    assert settings == {"criterion": "snip", "sparsity": 0.5}


def test_controls_are_contenders_besides_a_files_own():
    text = "controls: %s\ncontenders: {single: , multi-exit: {method: multi-exit, exits: 2}}"
    assert list(read_grid("g", text % "false").contenders) == ["single", "multi-exit"]
    grid = read_grid("g", text % "true").at("laptop")
    names = ["single, 3× the epochs", "born-again, equal training", "born-again, 2.6× the epochs"]
    assert list(grid.contenders) == ["single", "multi-exit", *names]
    configs = {name: grid.config(name, 0) for name in grid.contenders}
    assert configs["multi-exit"].fission.exits == 2  # the file's own
    assert [configs[name].training.epochs for name in names] == [60, 20, 52]
    assert all(configs[name].fission.exits == 1 for name in names)
    with pytest.raises(ValueError, match=r"^g: epochs must be a multiple of 5 with controls: true, got 1$"):
        read_grid("g", f"settings: {{epochs: 1}}\n{text % 'true'}").at("laptop")


@pytest.mark.parametrize(
    "name", sorted(set(named_grids()) - {"camvid", "demo", "finetune", "middle"})
)  # these choose their own controls
def test_the_strongest_controls_are_in_every_comparison(name):
    contenders = find_grid(name).contenders
    assert {"single, 3× the epochs", "born-again, equal training", "multi-exit"} <= set(contenders)


def test_factors_multiply_the_value_at_the_scale():
    text = "scales: {laptop: , paper: , own: }\ncontenders: {long: {exits: 1, multiply: {%s}}}"
    assert read_grid("g", text % "epochs: 1.15").at("paper").config("long", 0).training.epochs == 230
    for scale, epochs in (("laptop", 30), ("paper", 300), ("own", 45)):  # 30 epochs unless set
        assert read_grid("g", text % "epochs: 1.5").at(scale).config("long", 0).training.epochs == epochs
    wider = read_grid("g", text % "learning_rate: 3").at("laptop").config("long", 0)
    assert wider.training.learning_rate == pytest.approx(0.3)
    for factor, message in (
        (
            "epochs: 1.01",
            r"g.contenders.long.multiply.epochs must be a factor that makes 20 an integer, got 1.01",
        ),
        (
            "model: 2",
            r"g.contenders.long.multiply.model must be a setting that is a number, got 'cifar-resnet18-w16'",
        ),
        ("flip: 2", r"g.contenders.long.multiply.flip must be a setting that is a number, got True"),
        ("epoch: 2", r"g.contenders.long.multiply.epoch must be a setting that is a number, got None"),
        (
            "exits: 3",
            r"g.contenders.long.multiply.exits must be left out, as the contender sets",
        ),
        ("epochs: two", r"g.contenders.long.multiply.epochs must be a number, got \"two\""),
    ):
        with pytest.raises(ValueError, match=message):
            read_grid("g", text % factor).at("laptop")


def test_a_files_own_settings_go_before_those_that_scales_have_in_common():
    text = "settings: {epochs: 7}\nscales: {laptop: {model: wrn-10-1}, long: }\ncontenders: {single: }"
    common = read_grid("own", text).at("laptop").common
    assert (common["epochs"], common["model"], common["schedule"]) == (7, "wrn-10-1", "one_cycle")
    assert read_grid("own", text).at("long").common == {"epochs": 7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "contendrs: {single: }",
            "entry of small must be one of contenders, .*, got 'contendrs'; did you mean contenders",
        ),
        ("title: x", "small.contenders must be given, got nothing"),
        ("[1, 2]", r"the YAML file of grid small must be a mapping with contenders, got \[1, 2\]"),
        ("a: [", r"small must be YAML, got damaged text \("),
        ("contenders: {}", "small.contenders must be an object with at least one contender, got {}"),
        ("seeds: many\ncontenders: {single: }", 'small.seeds must be an integer, got "many"'),
        ("contenders: {single: 5}", "small.contenders.single must be an object, got 5"),
        (r'contenders: {"\e[31ma": {exits: 1}}', r"small must be a grid whose title .*, got '\\x1b\[31ma'"),
        ("contenders: {a: {each: {exits: 3}}}", "small.contenders.a.each.exits must be a list, got 3"),
        ("contenders: {a: {each: 3}}", "small.contenders.a.each must be an object, got 3"),
        (
            "contenders: {a: {each: {exits: []}}}",
            r"small.contenders.a.each.exits must be a list of at least one value, got \[\]",
        ),
        (
            "contenders: {a: {seed: 5}}",
            "small.seed must be left out, got a setting; seeds is the number of runs of each",
        ),
        (
            "contenders: {a: {each: {seed: [1, 2]}}}",
            "small.seed must be left out, got a setting; seeds is the number of runs",
        ),
        (
            "settings: {seed: 5}\ncontenders: {single: }",
            "small.seed must be left out, got a setting; seeds is the number of runs",
        ),
        (
            "settings: {foo: 1}\ncontenders: {single: }",
            "setting in small.settings must be one of .*, got 'foo'",
        ),
        ("contenders: {'': {exits: 1}}", "name in small.contenders must be text that is not empty, got ''"),
        (
            "contenders: {single: }\nscales: {../../up: {}}",
            r"name in small.scales must be letters and digits, with .* between them, got '../../up'",
        ),
        ("contenders: {single: }\nscales: {a/b: {}}", "name in small.scales must be .*, got 'a/b'"),
        ("contenders: {single: }\nscales: {.a: {}}", "name in small.scales must be .*, got '.a'"),
        (
            "contenders: {singel: }",
            "name in small.contenders without settings must be one of single, .*, got 'singel'; did",
        ),
    ],
)
def test_a_file_that_is_no_grid_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_grid("small", text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("figure44", "got 'figure44'; did you mean figure4"),
        ("/etc/passwd", "tiny-imagenet-resnet, or a .yaml file, got '/etc/passwd'"),
        ("empty.yaml", "the YAML file of grid empty must be a mapping with contenders, got nothing"),
        ("finetune", "--scale must be given, one of cifar100, flowers-40, flowers-200, got nothing"),
        (
            "nowhere.yaml",
            "grid must be a YAML file that can be read, got nowhere.yaml (No such file or directory)",
        ),
        (
            "latin.yaml",
            "grid must be a YAML file that can be read, got latin.yaml ('utf-8' codec can't decode byte 0xe9",
        ),
        ("grid.yaml --scale lapdog", "scale must be one of short, got 'lapdog'"),
        ("camvid", "data must be the folder of the data set, got camvid, which does not exist"),
        ("grid.yaml --seeds 0", "seeds must be a positive integer, got 0"),
        ("grid.yaml --scale short --workers 0", "--workers must be a positive integer, got 0"),
        ("misspelt.yaml --scale short", "setting in misspelt.scales.short must be one of "),
        ("misspelt.yaml --scale short", "got 'epoch'; did you mean epochs or teacher?"),
        (
            "elsewhere.yaml --scale short",
            "elsewhere.reference must be one of single, treenet, temperature 1.0, treenet",
        ),
    ],
)
def test_a_bad_request_ends_in_one_line_and_status_2(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "misspelt.yaml").write_text(GRID.replace("epochs", "epoch"))
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "latin.yaml").write_bytes(b"title: caf\xe9")
    (tmp_path / "elsewhere.yaml").write_text(GRID.replace("reference: single", "reference: none"))
    assert main(["reproduce", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "reproduce").exists()


def test_tables_and_pictures_are_drawn_again_from_records_and_costs_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID)
    assert main(["reproduce", "grid.yaml", "--scale", "short", "--rounds", "1"]) == 0
    out = tmp_path / "reproduce" / "grid-short"
    assert "A small grid: 3 runs, writing to reproduce/grid-short" in capsys.readouterr().out
    table = (out / "comparison.txt").read_text("utf-8")
    assert table.startswith(
        "A small grid (short scale)\n"
        "wrn-10-1 on digits, 5 training images per class, 1 epoch, 1 seed; test split\n"
    )
    assert "treenet, temperature 3.0" in table
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("records", "costs.json"):
        (out / name).rename(kept / name)
    assert main(["reproduce", "grid.yaml", "--scale", "short", "--out", "kept"]) == 0
    assert (kept / "comparison.txt").read_text("utf-8") == table
    assert not (kept / "runs").exists()
    (kept / "costs.json").write_text((kept / "costs.json").read_text("utf-8")[:-50])
    assert main(["reproduce", "grid.yaml", "--scale", "short", "--out", "kept"]) == 2
    assert "costs.json must be a valid JSON file, got damaged content" in capsys.readouterr().err
    assert json.loads((kept / "comparison.json").read_text("utf-8"))["reference"] == "single"
