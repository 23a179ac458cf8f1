import re
from pathlib import Path

import pytest
import yaml

from netfission.cli import COMMANDS, main
from netfission.cli import parser as whole_parser
from netfission.cli.parser import run_config
from netfission.cli.train import default_name
from netfission.config import RunConfig
from netfission.runs.folder import RunFolder

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def parse(*flags: str) -> RunConfig:
    return run_config(whole_parser().parse_args(["train", *flags])["train"])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("train --exits x", "exits=x: takes an integer$"),
        ("train --ratio [a,b]", r"ratio=\['a', 'b'\]: takes a list \[a, b, …\], each a number$"),
        ("train --flip maybe", "flip=maybe: takes true or false$"),
        ("train --branch_after 3", "branch_after=3: takes a list .*, each an integer or text$"),
        ("evaluate RUN --max_accuracy_drop much", "max_accuracy_drop=much: takes a number$"),
        ("predict RUN FILE --format yaml", "format=yaml: takes table, csv or jsonl$"),
        ("serve RUN --device tpu", "device=tpu: takes auto, cpu or cuda$"),
        ("export RUN --format zip", "format=zip: takes onnx or pt2$"),
        ("train --exits 0", "exits=0: takes a whole number from 1"),
        ("train --exits 9", "exits=9: takes at most 3, one a stage"),
        ("train --sparsity 1", r"sparsity=1\.0: takes the share of weights to remove, in \[0, 1\)"),
        ("train --sparsity -0.1", r"sparsity=-0\.1: takes"),
        ("train --ratio [1,2]", r"ratio=\[1\.0, 2\.0\]: takes 3 positive numbers"),
        ("train --criterion snop --sparsity 0.5", "criterion='snop' is not known; did you mean snip"),
        ("train --grouping weight", "grouping='weight' is not known; did you mean weights"),
        ("train --model wrn-16-22x", "wrn-16-2"),
        ("train --data digitz", "digits"),
        ("train --data ./nowhere", "nowhere"),
        ("train --optimizer sdg", "optimizer=sdg: takes sgd or adamw$"),
        ("train --epochs 0", "epochs=0: takes a whole number from 1"),
        ("train --bogus 1", "unrecognized arguments: --bogus"),
        ("train --config nowhere.yaml", r"netfission: config: .*nowhere\.yaml"),
        ("train --resume", r"config\.yaml: is missing"),
        ("evaluate nowhere", r"nowhere/config\.yaml: is missing"),
        ("demo --seeds 0", "seeds=0: takes a whole number from 1"),
        ("dance", "invalid choice: 'dance'"),
    ],
)
def test_a_bad_request_ends_in_one_line_and_status_2(request_, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(request_.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("netfission: ")
    assert re.search(message, error)
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_recipe_with_a_value_of_another_type_is_refused_in_the_same_words(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("epochs: soon\n")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert capsys.readouterr().err == "netfission: epochs=soon: takes an integer\n"


@pytest.mark.parametrize(
    ("request_", "rest"),
    [
        ("train", "the same command starts over"),  # where it had begun it says otherwise
        ("compare", "the same command goes on"),
        ("reproduce grouping", "the same command goes on"),
        ("demo", "the same command goes on"),
        ("evaluate RUN", "the same command starts over"),
        ("report RUN", "the same command starts over"),
        ("predict RUN FILE", "the same command starts over"),
    ],
)
def test_a_command_that_is_stopped_says_what_goes_on(request_, rest, capsys, monkeypatch):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS[request_.split()[0]], "run", stopped)
    assert main(request_.split()) == 130
    assert capsys.readouterr().err == f"netfission: stopped; {rest}\n"


def test_training_that_had_begun_goes_on_with_resume(tmp_path, capsys, monkeypatch):
    def stopped(config, out, resume):
        RunFolder(out).claim(config, resume)
        raise KeyboardInterrupt

    monkeypatch.setattr("netfission.runs.train.train", stopped)
    assert main(["train", "--data", "digits", "--out", str(tmp_path / "run")]) == 130
    told = "netfission: stopped; the same command with --resume goes on\n"
    assert capsys.readouterr().err == told


def test_an_error_cannot_steer_the_terminal(capsys):
    assert main(["evaluate", "no\x1b[31m\nwhere"]) == 2
    assert capsys.readouterr().err.startswith(r"netfission: no\x1b[31m where/config.yaml: is missing")


def test_flags_override_a_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("exits: 2\nepochs: 7\nratio: [2, 1]\n")
    config = parse("--config", str(tmp_path / "recipe.yaml"), "--epochs", "9", "--branch_after", "[block1]")
    assert (config.fission.exits, config.training.epochs, config.fission.ratio) == (2, 9, [2.0, 1.0])
    assert config.fission.branch_after == ["block1"]


def test_a_recipe_with_an_unknown_setting_is_refused(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("exit: 2\n")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "exit" in capsys.readouterr().err


def test_there_are_recipes():
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_holds_settings_of_the_command(recipe):
    config = parse("--config", str(recipe))
    assert config == RunConfig.from_dict(yaml.safe_load(recipe.read_text()))
    if recipe.stem.startswith("paper"):  # arXiv 2408.02301, section 4
        t = config.training
        assert (t.epochs, t.batch_size, t.optimizer, t.momentum) == (200, 128, "sgd", 0.9)
        assert (t.learning_rate, t.weight_decay, t.schedule, t.temperature) == (0.1, 5e-4, "paper", 3.0)
        assert (config.data.crop_padding, config.data.flip, config.data.validation) == (4, True, 0.0)


def test_a_run_is_named_by_its_settings():
    config = parse("--data", "some/where/cifar100", "--sparsity", "0.5", "--seed", "2")
    assert default_name(config) == "cifar100-wrn-16-2-3exits-weights-snip0.5-seed2"


def test_where_the_data_set_has_moved_evaluate_says_what_to_pass(finished_run, tmp_path, capsys):
    config = yaml.safe_load((finished_run / "config.yaml").read_text()) | {"data": str(tmp_path / "gone")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["evaluate", str(tmp_path)]) == 2
    told = f"data={tmp_path}/gone: is there no more; takes --data, where it is now"
    assert capsys.readouterr().err == f"netfission: {told}\n"


def test_train_then_evaluate(tmp_path, capsys):
    run = str(tmp_path / "run")
    flags = "--model wrn-10-1 --limit_per_class 5 --epochs 1 --exits 2 --accelerator cpu --batch_size 25"
    assert main(["train", *flags.split(), "--out", run]) == 0
    trained = capsys.readouterr().out
    assert main(["evaluate", run]) == 0
    evaluated = capsys.readouterr().out
    table = evaluated[: evaluated.index("\nwrote")]
    assert "ensemble" in table
    assert table in trained
    assert f"wrote {run}" in trained
    assert main(["train", *flags.split(), "--out", run]) == 2
    assert "out must be a new or empty folder" in capsys.readouterr().err
