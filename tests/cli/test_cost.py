"""`netfission cost`."""

import json
import re
from dataclasses import asdict

import pytest
import torch

import netfission as nf
from netfission.classifier.folder import NetworkSpec
from netfission.cli import main
from netfission.models import create_model
from netfission.runs.folder import RunFolder

QUICK = "--rounds 1 --batch-sizes [2]"


@pytest.fixture
def run(tmp_path):
    """A run's folder as far as its network goes: two exits, three classes, images of one channel."""
    chosen = nf.FissionConfig(exits=2, sparsity=0.5, criterion="magnitude")
    model = create_model("wrn-10-1", 3, in_channels=1)
    network = nf.fission(model, **asdict(chosen), example_input=torch.zeros(2, 1, 12, 12))
    spec = NetworkSpec("wrn-10-1", ["a", "b", "c"], [1, 12, 12], [0.5], [0.5], asdict(chosen), "0")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.save_network(network, spec)
    return folder.path, network


def read(path):
    return json.loads(path.read_text("utf-8"))


def test_a_model_is_fissioned_as_the_flags_say_beside_itself(tmp_path, capsys):
    out = tmp_path / "cost.json"
    flags = f"--exits 2 --sparsity 0.5 --seed 3 --classes 5 --image-size 16 {QUICK} --out {out}"
    state = torch.get_rng_state()
    assert main(["cost", "wrn-10-1", *flags.split()]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    printed, kept = capsys.readouterr().out, read(out)
    model = create_model("wrn-10-1", 5)
    assert kept["reference"]["size"]["parameters_stored"] == sum(p.numel() for p in model.parameters())
    assert len(kept["network"]["exits"]) == 2
    size = kept["network"]["size"]
    assert size["parameters_nonzero"] < 0.6 * kept["reference"]["size"]["parameters_nonzero"]
    assert kept["conditions"]["image_shape"] == [3, 16, 16]
    assert (kept["conditions"]["batch_sizes"], kept["conditions"]["rounds"]) == ([2], 1)
    assert f"{size['parameters_nonzero']:,}" in printed
    assert printed.startswith(
        "wrn-10-1, exits: 2, grouping: weights, sparsity: 0.5, beside the single network\n"
    )
    assert printed.endswith(f"wrote {out}\n")


def test_the_same_seed_costs_the_same_network(tmp_path):
    flags = f"wrn-10-1 --exits 2 --sparsity 0.9 --image-size 16 {QUICK}".split()
    sizes = []
    for name, seed in (("a.json", "1"), ("b.json", "1"), ("c.json", "2")):
        assert main(["cost", *flags, "--seed", seed, "--out", str(tmp_path / name)]) == 0
        sizes.append(read(tmp_path / name)["network"]["size"])
    assert sizes[0] == sizes[1] != sizes[2]


@pytest.mark.parametrize(
    ("model", "side"), [("wrn-10-1", 32), ("test_resnet", 160), ("torchvision/shufflenet_v2_x0_5", 224)]
)
def test_images_have_the_models_own_size(model, side, tmp_path):
    out = tmp_path / "cost.json"
    assert main(["cost", model, "--exits", "1", *QUICK.split(), "--out", str(out)]) == 0
    assert read(out)["conditions"]["image_shape"] == [3, side, side]


def test_a_runs_network_beside_its_model(run, tmp_path, capsys):
    path, network = run
    out = tmp_path / "cost.json"
    assert main(["cost", str(path), *QUICK.split(), "--out", str(out)]) == 0
    kept = read(out)
    assert kept["conditions"]["image_shape"] == [1, 12, 12]
    assert (
        kept["network"]["size"]
        == nf.cost(network, torch.zeros(1, 1, 12, 12), rounds=1).to_dict()["network"]["size"]
    )
    single = create_model("wrn-10-1", 3, in_channels=1)
    assert kept["reference"]["size"]["parameters_nonzero"] == sum(p.numel() for p in single.parameters())
    assert capsys.readouterr().out.startswith("wrn-10-1, exits: 2, grouping: weights, sparsity: 0.5, beside")


def test_threads_are_used_and_given_back(tmp_path):
    before = torch.get_num_threads()
    out = tmp_path / "cost.json"
    flags = f"wrn-10-1 --exits 1 --image-size 16 --threads {before + 1} {QUICK} --out {out}"
    assert main(["cost", *flags.split()]) == 0
    assert read(out)["conditions"]["threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "nothing-known",
            "model must be .*, a timm name, .*ENCODER or hf/NAME, got 'nothing-known'",
        ),
        (
            "no/such/run",
            "model must be .*, a timm name, .*ENCODER or hf/NAME, got 'no/such/run'",
        ),
        (".", "network must be a run's folder or a model's name, got \\. without a run$"),
        ("", "NETWORK must be given, got nothing"),
        (
            "wrn-10-1 --batch-sizes [1,0]",
            r"--batch-sizes must be one or more positive .*, got \[1, 0\]",
        ),
        ("wrn-10-1 --batch-sizes [x]", "--batch-sizes must be a list, each item an integer, got"),
        ("wrn-10-1 --rounds 0", "--rounds must be a positive integer, got 0"),
        ("wrn-10-1 --threads 0", "--threads must be a positive integer, got 0"),
        ("wrn-10-1 --classes 0", "--classes must be a positive integer, got 0"),
        ("wrn-10-1 --image-size 0", "--image-size must be a positive integer, got 0"),
        ("wrn-10-1 --exits 9", "--exits must be at most 3, one per stage"),
        ("wrn-10-1 --sparsity 1", r"--sparsity must be the share .*, got 1\.0"),
        ("wrn-10-1 --device tpu", "--device must be one of auto, cpu, cuda, got 'tpu'"),
        ("wrn-10-1 --device cuda", "--device must be auto or cpu, got 'cuda'; no GPU can be used here"),
        (
            "wrn-10-1 --out no/cost.json",
            "--out must be a file ending in .json, in a folder that exists, got no/cost.json",
        ),
        ("wrn-10-1 --out .", r"--out must be a file ending in .json, in a folder that exists, got \.$"),
        (
            "wrn-10-1 --out cost.csv",
            "--out must be a file ending in .json, in a folder that exists, got cost.csv",
        ),
    ],
)
def test_a_bad_request_ends_in_one_line_and_status_2(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["cost", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("netfission: ")
    assert re.search(message, error)


def test_on_a_terminal_it_says_what_it_does(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(["cost", str(run[0]), *QUICK.split(), "--device", "cpu"]) == 0
    told, bars = capsys.readouterr().err.split("\n", maxsplit=1)
    assert told == "measuring wrn-10-1, exits: 2, grouping: weights, sparsity: 0.5 on cpu …"
    assert re.findall(r"(\w[\w ]+):   0%", bars) == ["inference of 2 images", "training steps of 2 images"]


@pytest.mark.parametrize("flag", ["--exits 4", "--sparsity 0.9", "--classes 7", "--image-size 64"])
def test_a_runs_own_settings_are_not_overridden_in_silence(flag, run, capsys):
    assert main(["cost", str(run[0]), *flag.split()]) == 2
    name, value = flag.split()
    assert f"{name} must be left out for a run, which has its own, got {value}" in capsys.readouterr().err


def test_a_run_that_has_not_ended_is_named(run, capsys):
    path, _ = run
    (path / "model.safetensors").unlink()
    assert main(["cost", str(path)]) == 2
    assert "model.safetensors must be the weights of a network, got no such file" in capsys.readouterr().err
