import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from netfission import cli, config
from netfission.cli import COMMANDS, command_module, command_parser, main
from netfission.cli.parser import run_config
from netfission.cli.train import default_name
from netfission.config import RunConfig
from netfission.methods.effects import check_effects, chosen
from netfission.methods.registry import check_settings
from netfission.runs.folder import RunFolder
from netfission.utils.checksums import BLANK, stamp

CHECKED = stamp(f"epochs: 3\n# checksum: {BLANK}\n".encode())
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def parse(*flags: str) -> RunConfig:
    return run_config(command_parser("train").parse_args(flags))


def test_only_what_is_given_overrides_a_default(tmp_path):
    assert parse() == RunConfig()
    assert parse("--method", "born-again").fission.exits == 1
    assert default_name(parse("--method", "born-again")).endswith("born-again1-seed0")
    assert parse("--method", "born-again", "--exits", "3").fission.exits == 3
    (tmp_path / "run.yaml").write_text("method: born-again\nexits: 3\n")
    assert parse("--config", str(tmp_path / "run.yaml")).fission.exits == 3
    assert "default 3, or 1 with born-again" in " ".join(command_parser("train").format_help().split())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            "train --method born-again --exits 3",
            "^--exits must be 1 with method=born-again, got 3; it",
        ),
        ("compare --methods [single,treenet] --exits 1", "^contender treenet: exits must be at least 2 with"),
        ("train --exits x", "--exits must be an integer, got 'x'$"),
        ("train --exits", "--exits must be an integer, got nothing$"),
        ("train --exits null", "--exits must be an integer, got 'null'$"),
        ("train --ratio [a,b]", r"--ratio must be a list, each item a number, got '\[a,b\]'$"),
        ("train --ratio [1,2", r"--ratio must be a list, each item a number, got '\[1,2'$"),
        ("train --flip maybe", "--flip must be true or false, got 'maybe'$"),
        (
            "train --branch_after 3",
            "--branch-after must be a list, each item an integer or text, or one of auto, late, got '3'$",
        ),
        ("train --batch-size 1.5", "--batch-size must be an integer, got '1.5'$"),
        ("train --resume=3", "--resume must be given without a value, got one$"),
        ("evaluate RUN --max-accuracy-drop much", "--max-accuracy-drop must be a number, got 'much'$"),
        ("predict RUN FILE --format yaml", "--format must be one of table, csv, jsonl, got 'yaml'$"),
        ("predict RUN", "IMAGES must be given, got nothing; see netfission predict --help$"),
        ("evaluate", "RUN must be given, got nothing; see netfission evaluate --help$"),
        ("serve RUN --device tpu", "--device must be one of auto, cpu, cuda, got 'tpu'; did you mean cpu"),
        ("export RUN --format zip", "--format must be one of onnx, pt2, got 'zip'$"),
        ("train --exits 0", "^--exits must be a positive integer, got 0$"),
        ("train --exits 9", r"^--exits must be at most 3, one per stage \(block1, block2, bn\), got 9; "),
        ("train --mix-alpha 1", "^--mix-alpha must be left out unless mix=cutmix or mix=mixup, got 1.0$"),
        (
            "train --teacher logits --distillation-weight 0",
            "^--teacher must be left out unless --distillation-weight is above 0, got 'logits'$",
        ),
        (
            "train --exits 1 --reduction sum",
            "^--reduction must be left out unless exits is 2 or more, got 'sum'$",
        ),
        (
            "compare --methods [single,mimo] --sparsity 0 --criterion snip",
            "^--criterion must be left out, since it has no effect on any contender, got 'snip'$",
        ),
        ("train --seed -1", "^--seed must be an integer from 0 to 4294967295, got -1$"),
        ("train --seed 4294967296", "^--seed must be an integer from 0 to 4294967295, got 4294967296$"),
        (
            "train --batch-size 2147483648",
            "^--batch-size must be an integer from 1 to 2,147,483,647, got 2147483648$",
        ),
        ("train --weights=", r"^--weights must be a file, or the folder of a run, got ''$"),
        ("train --data=", r"^--data must be one of digits, .*, or a folder, got ''$"),
        ("train --sparsity 1", r"^--sparsity must be the share of weights to remove, in \[0, 1\), got 1\.0$"),
        ("train --sparsity -0.1", r"^--sparsity must be the share of weights .*, got -0\.1$"),
        ("train --ratio [1,2]", r"^--ratio must be 3 positive numbers, one per exit, got \[1\.0, 2\.0\]$"),
        (
            "train --criterion snop --sparsity 0.5",
            "^--criterion must be one of .*, got 'snop'; did you mean snip",
        ),
        ("train --grouping weight", "^--grouping must be one of .*, got 'weight'; did you mean weights"),
        ("train --model wrn-16-22x", "wrn-16-2"),
        ("train --data digitz", "^--data must be one of digits, .*, got 'digitz'; did you mean digits"),
        ("train --data ./nowhere", "nowhere"),
        (
            "train --optimizer sdg",
            r"^--optimizer must be one of sgd, adamw, .*, …, got 'sdg'; did you mean .*sgd.*\?$",
        ),
        ("train --clip -1e-3", r"^--clip must be .*, got -0\.001$"),
        ("train --temperature 1" + 400 * "0", "--temperature must be a number, got '1000"),
        ("train --epochs 0", "^--epochs must be a positive integer, got 0$"),
        ("train --bogus 1", "flag must be one that netfission train accepts, got '--bogus'; see "),
        ("train --exit 1", r"flag must be .*, got '--exit'; did you mean --exits\?$"),
        ("train --bach_size=1", r"flag must be .*, got '--bach_size'; did you mean --batch-size\?$"),
        ("train more", "argument must be one that netfission train accepts, got 'more'; see "),
        (
            "train --config nowhere.yaml",
            r"--config must be a file that can be read, got nowhere\.yaml \(No such",
        ),
        (
            "train --resume",
            "^--resume must be given for the folder of a run, got .*, which does not exist; leave it out",
        ),
        (
            "train --resume --out .",
            r"^--resume must be given for the folder of a run, got \., which holds no run; leave it out",
        ),
        ("evaluate nowhere", r"nowhere must be the folder of a run, got nothing there"),
        ("demo --seeds 0", "seeds"),
        ("compare --methods []", r"--methods must be one method or more, got \[\]$"),
        ("compare --seeds 0", "--seeds must be a positive integer, got 0$"),
        ("compare --workers 0", "--workers must be a positive integer, got 0$"),
        ("compare --rounds 0", "--rounds must be a positive integer, got 0$"),
        (
            "compare --reference fision",
            "--reference must be one of .*, got 'fision'; did you mean fission-channels",
        ),
        ("trian", r"command must be one of calibrate, .*, train, got 'trian'; did you mean train\?$"),
        ("", "command must be one of calibrate, .*, train, got nothing$"),
        ("--bogus", "flag must be one that netfission accepts, got '--bogus'; see netfission --help$"),
    ],
)
def test_a_bad_request_ends_in_one_line_and_status_2(request_, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(request_.split()) == 2
    printed, error = capsys.readouterr()
    assert error.count("\n") == 1
    assert error.startswith("netfission: ")
    assert printed == ""
    assert re.search(message, error.removeprefix("netfission: ").rstrip("\n"))
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: soon", 'epochs must be an integer, got "soon"$'),
        (
            "schedule: cosin",
            "schedule must be one of paper, cosine, one_cycle, got 'cosin'; did you mean cosine",
        ),
        ("ratio: [1, a]", r'ratio\[1\] must be a number, got "a"$'),
        ("exit: 2", "setting must be one that netfission train accepts, got 'exit'; did you mean exits"),
        ("batch-size: 2", r"setting must be .*, got 'batch-size'; did you mean batch_size\?$"),
        ("1: 2", "setting must be one that netfission train accepts, got '1'"),
        ("config: other.yaml", "setting must be one that netfission train accepts, got 'config'"),
    ],
)
def test_a_recipes_setting_that_is_not_valid_is_named_with_its_file(text, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{text}\n")
    assert main(["train", "--config", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"netfission: {recipe}: ")
    assert error.count("\n") == 1
    assert re.search(message, error.rstrip("\n"))


@pytest.mark.parametrize("command", ["train", "export run", "report run", "cost run", "predict run a.png"])
def test_an_empty_name_to_write_is_refused(command, capsys):
    assert main([*command.split(), "--out", ""]) == 2
    assert capsys.readouterr().err == "netfission: --out must be the name of what to write, got ''\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "must be YAML, got damaged text"),
        (b"\xff\xfe\x00", "must be YAML, got damaged text"),
        (CHECKED.replace(b"3", b"4", 1), r"must be YAML, got damaged text \(checksum must be that of the"),
        (b"false", "must be a mapping from settings to values, got False$"),
        (
            b"#" * (2**20 + 1),
            r"must be YAML, got damaged text \(it must be at most 1,048,576 bytes, got more\)$",
        ),
        (
            b"epochs: 1\nseed: 2\nepochs: 3",
            r"must be YAML, got damaged text \(epochs must be given once, got it",
        ),
        (b"a: {b: 1, b: 2}", r"must be YAML, got damaged text \(b must be given once, got it twice\)$"),
        (
            b"k0: &k0 []\n"
            + b"".join(b"k%d: &k%d [*k%d, *k%d]\n" % (i + 1, i + 1, i, i) for i in range(40))
            + b"a:\na:",
            r"must be YAML, got damaged text \(YAML must be at most 100,000 values, got more, as",
        ),
        (
            b"ratio: &a [*a]",
            r"must be YAML, got damaged text \(alias must be outside of what it names, got one within it\)$",
        ),
        (b"- a", r"must be a mapping from settings to values, got \['a'\]$"),
    ],
)
def test_a_recipe_that_holds_no_settings_is_refused(content, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    assert main(["train", "--config", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.match(rf"netfission: {re.escape(str(recipe))} {message}", error)


@pytest.mark.parametrize(
    ("request_", "rest"),
    [
        ("train", "the same command starts over"),  # if it had begun it says otherwise
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

    monkeypatch.setattr(command_module(request_.split()[0]), "run", stopped)
    assert main(request_.split()) == 130
    assert capsys.readouterr().err == f"netfission: stopped; {rest}\n"


def test_training_that_had_begun_goes_on_with_resume(tmp_path, capsys, monkeypatch):
    def stopped(config, out, resume, callbacks):
        RunFolder(out).claim(config, resume)
        raise KeyboardInterrupt

    monkeypatch.setattr("netfission.runs.train.train", stopped)
    assert main(["train", "--data", "digits", "--out", str(tmp_path / "run")]) == 130
    told = "netfission: stopped; the same command with --resume goes on\n"
    assert capsys.readouterr().err == told


@pytest.fixture
def trained(monkeypatch) -> list[RunConfig]:
    """The settings of the runs that `train` would do."""
    configs = []
    monkeypatch.setattr("netfission.runs.train.train", lambda config, out, **rest: configs.append(config))
    return configs


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        ("exits: 3\ngrouping: channels\n", "--exits 1"),
        ("momentum: 0.8\n", "--optimizer adamw"),
        ("mix_alpha: 0.5\n", "--mix cutmix"),
        ("ratio: [2, 1]\nsparsity: 0.0\n", "--exits 2"),
    ],
)
def test_flags_may_take_the_effect_of_a_files_settings(content, flags, tmp_path, trained):
    (tmp_path / "recipe.yaml").write_text(content)
    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), *flags.split()]) == 0
    assert len(trained) == 1


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (
            "mix_alpha: 0.5\n",
            "--exits 2",
            "--mix-alpha must be left out unless mix=cutmix or mix=mixup, got 0.5",
        ),
        ("ratio: [2, 1]\nmix_alpha: 0.5\n", "--exits 2", "--mix-alpha must be left out"),
        ("method: nothing\nmix_alpha: 0.5\n", "--method fission", "--mix-alpha must be left out"),
        ("exits: 3\n", "--exits 1 --grouping weights", "--grouping must be left out"),
    ],
)
def test_no_flag_gives_an_effect_to_what_has_none_in_a_file(
    content, flags, message, tmp_path, trained, capsys
):
    (tmp_path / "recipe.yaml").write_text(content)
    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert not trained


def test_a_run_that_began_with_a_setting_without_effect_is_resumed(tmp_path, trained):
    config, out = RunConfig.from_dict({"optimizer": "adamw", "momentum": 0.8}), tmp_path / "run"
    RunFolder(out).claim(config, resume=False)  # as an earlier version did
    flags = ["train", "--optimizer", "adamw", "--momentum", "0.8", "--out", str(out)]
    assert main([*flags, "--resume"]) == 0
    assert trained == [config]
    assert main(flags) == 2


def test_only_settings_of_the_command_are_written_as_flags():
    parser = command_parser("evaluate")
    assert parser.in_flags("max_cost must be above max_accuracy_drop") == (
        "--max-cost must be above --max-accuracy-drop"
    )
    for message in (
        "epochs must be 1",  # train's
        "data folder runs/data does not exist",
        "--data must be left out",
        "run must be a folder, got one without data",
        "",
    ):
        assert parser.in_flags(message) == message


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes as POSIX has them")
@pytest.mark.parametrize("flags", [["--help"], ["wrn-10-1", "--rounds", "1", "--batch-sizes", "[1]"]])
def test_a_closed_pipe_ends_a_command_in_silence(flags):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "netfission", "cost", *flags]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, env=buffered, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_a_help_that_cannot_be_written_is_an_error(arguments, capsys, monkeypatch):
    class Full(io.StringIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert main(arguments) == 1
    assert capsys.readouterr().err == "netfission: [Errno 28] No space left on device\n"


def test_a_broken_pipe_to_something_else_is_an_error(capsys, monkeypatch):
    def broken(_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(command_module("evaluate"), "run", broken)
    assert main(["evaluate", "RUN"]) == 2
    assert capsys.readouterr().err == "netfission: [Errno 32] Broken pipe\n"


def test_too_little_memory_is_said_in_plain_words(capsys, monkeypatch):
    def allocate(_):
        """As much as no machine has."""
        torch.empty(2**52, dtype=torch.uint8)

    monkeypatch.setattr("netfission.cli.cost.run", allocate)
    assert main(["cost", "wrn-10-1"]) == 1
    expected = "memory must be enough for the settings, got too little for 4,503,599,627,370,496 bytes more"
    assert capsys.readouterr().err == f"netfission: {expected}\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--threads 99999", "--threads must be an integer from 1 to 1,024, got 99999"),
        ("--rounds 9999999999999999999999", "--rounds must be an integer from 1 to 1,000,000, got 99999"),
        ("--classes 99999999999", "--classes must be an integer from 1 to 1,000,000, got 99999999999"),
        ("--seed -1", "--seed must be an integer from 0 to 4294967295, got -1"),
    ],
)
def test_numbers_of_a_cost_are_bounded(flags, message, capsys):
    assert main(["cost", "wrn-10-1", *flags.split()]) == 2
    assert f"netfission: {message}" in capsys.readouterr().err


def test_an_error_cannot_steer_the_terminal(capsys):
    assert cli._one_line("red\n\x1b[31m") == r"red \x1b[31m"
    assert main(["evaluate", "no\x1b[31m\nwhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(r"netfission: no\x1b[31m where must be the folder of a run, got nothing there")


@pytest.mark.parametrize("order", [1, -1])
def test_flags_override_a_recipe_wherever_they_stand(order, tmp_path):
    (tmp_path / "recipe.yaml").write_text("exits: 2\nepochs: 7\nratio: [2, 1]\n")
    parts = [["--config", str(tmp_path / "recipe.yaml")], ["--epochs", "9", "--branch-after", "[block1]"]]
    config = parse(*(flag for part in parts[::order] for flag in part))
    assert (config.fission.exits, config.training.epochs, config.fission.ratio) == (2, 9, [2.0, 1.0])
    assert config.fission.branch_after == ["block1"]


def test_a_flag_means_the_same_with_hyphens_and_underscores():
    hyphens = parse("--batch-size", "7", "--one-by-one=true", "--learning-rate", "1e-3")
    assert hyphens == parse("--batch_size", "7", "--one_by_one=true", "--learning_rate", "1e-3")
    assert (hyphens.training.batch_size, hyphens.method.one_by_one) == (7, True)
    assert hyphens.training.learning_rate == 0.001


def test_a_flag_of_several_values_adds_up_and_a_file_has_a_list_of_them(tmp_path, capsys):
    parser = command_parser("serve")
    once = parser.parse_args(["RUN", "--cors-origin", "https://a.example", "https://b.example"])
    twice = parser.parse_args(
        ["RUN", "--cors-origin", "https://a.example", "--cors-origin", "https://b.example"]
    )
    (tmp_path / "server.yaml").write_text("cors_origin: [https://a.example, https://b.example]")
    from_file = parser.parse_args(["RUN", "--config", str(tmp_path / "server.yaml")])
    origins = ["https://a.example", "https://b.example"]
    assert once.cors_origin == twice.cors_origin == from_file.cors_origin == origins
    assert parser.parse_args(["RUN"]).cors_origin == ()
    (tmp_path / "server.yaml").write_text("cors_origin: https://a.example")
    assert main(["serve", "RUN", "--config", str(tmp_path / "server.yaml")]) == 2
    assert 'server.yaml: --cors-origin must be a list, got "https://a.example"' in capsys.readouterr().err


def test_names_after_two_hyphens_stay_as_they_are():
    assert command_parser("predict").parse_args(["RUN", "--", "--a_b.png"]).images == ["--a_b.png"]


def test_no_setting_is_needed_and_null_is_none():
    assert parse() == RunConfig()
    assert parse("--ratio", "null", "--clip", "null", "--flip", "null") == RunConfig()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_shown_with_hyphens_and_explained(name):
    text = command_parser(name).format_help()
    flags = re.findall(r"^  (--\S+)", text, re.MULTILINE)
    assert flags
    assert not [flag for flag in flags if "_" in flag]
    parser = command_parser(name)
    assert [action.dest for action in parser._actions if not action.help] == []
    assert command_module(name).run.__doc__ in text


def test_the_flags_of_training_stand_in_groups():
    titles = re.findall(r"^(\w.*):$", command_parser("train").format_help(), re.MULTILINE)
    assert titles == ["options", "data", "model", "fission", "method", "training", "run"]


def test_a_file_of_all_settings_is_accepted_and_one_without_effect_is_not(tmp_path, trained, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(RunConfig().to_yaml())
    assert main(["train", "--config", str(file)]) == 0
    assert trained == [RunConfig()]
    file.write_text("momentum: 0.8\noptimizer: adamw\n")
    assert main(["train", "--config", str(file)]) == 2
    assert (
        "--momentum must be left out unless optimizer=sgd or another with momentum, got 0.8"
        in capsys.readouterr().err
    )


def test_flags_and_the_file_override_a_recipe_and_what_has_no_effect_is_left_out(tmp_path, trained):
    file = tmp_path / "config.yaml"
    file.write_text("epochs: 7\n")
    flags = ["--recipe", "finetune", "--config", str(file), "--learning-rate", "0.01"]
    assert main(["train", *flags]) == 0
    recipe = config.RECIPES["finetune"]
    expected = RunConfig.from_dict({**recipe, "epochs": 7, "learning_rate": 0.01})
    assert trained == [expected]
    assert main(["train", *flags, "--schedule", "one_cycle"]) == 0
    without = {name: value for name, value in recipe.items() if name != "warmup"}
    settings = {"epochs": 7, "learning_rate": 0.01, "schedule": "one_cycle"}
    assert trained[1] == RunConfig.from_dict({**without, **settings})


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_setting_of_a_recipe_has_an_effect(recipe):
    given = yaml.safe_load(recipe.read_text("utf-8"))
    config = RunConfig.from_dict(given)
    check_settings(config)
    check_effects(config, chosen(given))


def test_there_are_recipes():
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_holds_settings_of_the_command(recipe):
    config = parse("--config", str(recipe))
    assert config == RunConfig.from_dict(yaml.safe_load(recipe.read_text("utf-8")))
    if recipe.stem.startswith("paper"):  # arXiv 2408.02301, section 4
        t = config.training
        assert (t.epochs, t.batch_size, t.optimizer, t.momentum) == (200, 128, "sgd", 0.9)
        assert (t.learning_rate, t.weight_decay, t.schedule, t.temperature) == (0.1, 5e-4, "paper", 3.0)
        assert (config.data.crop_padding, config.data.flip, config.data.validation) == (4, True, 0.0)


def test_a_run_is_named_by_its_settings():
    config = parse("--data", "some/where/cifar100", "--sparsity", "0.5", "--seed", "2")
    assert default_name(config) == "cifar100-wrn-16-2-3exits-weights-snip0.5-seed2"
    config = parse("--grouping", "channels", "--linear-exits", "[1,block2]", "--reconstruct", "true")
    assert default_name(config) == "digits-wrn-16-2-3exits-channels-linear-1-block2-reconstructed-seed0"


def test_where_the_data_set_has_moved_evaluate_says_what_to_pass(finished_run, tmp_path, capsys):
    config = yaml.safe_load((finished_run / "config.yaml").read_text("utf-8")) | {
        "data": str(tmp_path / "gone")
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["evaluate", str(tmp_path)]) == 2
    told = f"--data must be a folder that exists, got {tmp_path}/gone; pass where it is now"
    assert capsys.readouterr().err == f"netfission: {told}\n"


def test_train_then_evaluate(tmp_path, capsys):
    run = str(tmp_path / "run")
    flags = "--model wrn-10-1 --limit-per-class 5 --epochs 1 --exits 2 --accelerator cpu --batch-size 25"
    assert main(["train", *flags.split(), "--out", run]) == 0
    trained = capsys.readouterr().out
    assert main(["evaluate", run]) == 0
    evaluated = capsys.readouterr().out
    table = evaluated[: evaluated.index("\nwrote")]
    assert "ensemble" in table
    assert table in trained
    assert f"wrote {run}" in trained
    found, remark, writing, *_ = trained.splitlines()
    assert remark.startswith("note: the training has only 2 steps; ")
    assert found == (
        "found 554 images of 10 classes (0, 1, 2, 3, …, 9) in digits: 50 training, 145 validation (cut from "
        "training), 359 test (cut from training); 5 training images per class; left out: 1,243 above "
        "the limit per class"
    )
    assert writing == f"writing to {run}"
    summary = RunFolder(Path(run)).load_data_summary()
    assert summary is not None
    assert summary.line() == found
    assert main(["train", *flags.split(), "--out", run]) == 2
    printed, error = capsys.readouterr()
    assert "netfission: --out must be a new or empty folder" in error
    assert printed == ""
