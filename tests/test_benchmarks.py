"""The benchmarks run, keep their cells, and say which contenders are not available."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import netfission as nf
from netfission.models import create_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import cells
import contenders
import false_alarms
import folders
import full_size
import guarantees
import inference
import masks
import tabular
import training

MODEL = "cifar-resnet18-w16"
BENCHMARKS = {"inference": inference, "training": training}
SIZE = {"parameters", "parameters_nonzero", "macs_dense", "macs_effective"}
TIMES = {"seconds", "seconds_median", "ratio_median", "ratio_quartiles", "peak_bytes"}


@pytest.fixture
def no_peers(monkeypatch):
    for name in ("", ".models.classification", ".transforms"):
        monkeypatch.setitem(sys.modules, contenders.PEERS + name, None)


def run(benchmark, out, *flags):
    """Exit status of the smallest cell there is."""
    few = ["--networks", MODEL, "--rounds", "1", "--out", str(out)]
    few += ["--batches", "1"] if benchmark == "inference" else ["--batch", "2"]
    return BENCHMARKS[benchmark].main([*few, *flags])


def contenders_in(out, number=0):
    return json.loads(out.read_text("utf-8"))["cells"][number]["contenders"]


def test_inference_measures_what_it_can_and_says_what_it_cannot(tmp_path, capsys, no_peers):
    out = tmp_path / "inference.json"
    asked = ["--runtimes", "eager,deployed", "--contenders", "channels-2,deep-ensemble-3,packed-4-gamma1"]
    assert run("inference", out, *asked) == 0
    content = json.loads(out.read_text("utf-8"))
    assert content["benchmark"] == "inference"
    assert [cell["settings"]["runtime"] for cell in content["cells"]] == ["eager", "deployed"]
    for cell in content["cells"]:
        assert cell["settings"]["image_shape"] == [3, 32, 32]
        assert cell["settings"]["environment"]["versions"][contenders.PEERS] == "missing"
        assert (cell["rounds"], cell["runs_per_round"]) == (1, cells.IMAGES_PER_ROUND)
        single, two, deep, packed = cell["contenders"].values()
        for row in (single, two, deep):
            assert row.keys() >= SIZE | TIMES
            assert row["ratio_median"] == row["seconds"][0] / single["seconds"][0]
            assert row["peak_bytes"] > 0
        assert deep["macs_dense"] == 3 * single["macs_dense"]
        assert two["macs_dense"] == pytest.approx(single["macs_dense"], rel=0.1)
        assert "pip install 'netfission[peers]'" in packed["unavailable"]
        assert not packed.keys() & TIMES
    printed = capsys.readouterr().out
    assert printed.count("not available: Packed-Ensembles of 4, α 2, γ 1: torch_uncertainty cannot be") == 2
    assert printed.count("fission by channels, 2 exits") == 2


def test_training_says_what_masks_add(tmp_path, capsys):
    out = tmp_path / "training.json"
    assert run("training", out, "--runtimes", "eager", "--contenders", "weights-3,copies-3") == 0
    cell = json.loads(out.read_text("utf-8"))["cells"][0]
    assert list(cell["contenders"]) == ["single", "weights-3", "copies-3"]
    for row in cell["contenders"].values():
        assert row.keys() >= SIZE | TIMES | {"trains_on"}
    (weights, copies) = (cell["contenders"][name]["seconds"][0] for name in ("weights-3", "copies-3"))
    assert cell["added_to_step"].keys() == {"masks"}
    assert cell["added_to_step"]["masks"]["median"] == pytest.approx(weights / copies - 1)
    printed = capsys.readouterr().out
    assert f"masks add {weights / copies - 1:.1%} (quartiles" in printed
    assert "fission by copies, 3 exits: no masks: cross-entropy of every exit and ensemble" in printed


def test_masks_are_compared_with_hooks_alone(tmp_path, capsys):
    out = tmp_path / "masks.json"
    masks.main(["--models", "wrn-10-1", "--batch", "2", "--rounds", "2", "--out", str(out)])
    cells = json.loads(out.read_text("utf-8"))["cells"]
    assert [(cell["grouping"], cell["measured"]) for cell in cells] == [
        (grouping, what)
        for grouping in ("channels", "weights")
        for what in ("training step", "inference of one image")
    ]
    for cell in cells:
        assert list(cell["networks"]) == ["now", "hooks", "none"]
        assert cell["networks"]["hooks"]["ratio_median"] == 1
    assert "wrn-10-1, by weights, training step, now" in capsys.readouterr().out


def test_hooks_alone_train_as_masks_do():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    net = nf.fission(create_model("wrn-10-1", 10), 3, example_input=images)
    others = [masks.with_hooks(net), masks.without_masks(net)]
    for network in (net, *others):
        step = masks.training_step(network, images, labels)
        step()
        step()
    hooks, none = (
        [torch.equal(*pair) for pair in zip(net.parameters(), other.parameters(), strict=True)]
        for other in others
    )
    assert all(hooks) and not all(none)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_cell_that_is_there_is_not_run_again(benchmark, tmp_path, capsys, monkeypatch):
    out = tmp_path / "cells.json"
    module = BENCHMARKS[benchmark]
    measured = []

    def measure(entrants, *_, **__):
        measured.append(list(entrants))
        row = {"title": "…", "unavailable": "not measured"}
        return {"rounds": 0, "contenders": {name: dict(row) for name in entrants}}

    monkeypatch.setattr(module, "measure", measure)
    alone = ["--runtimes", "eager", "--contenders", "single"]
    assert run(benchmark, out, *alone) == run(benchmark, out, *alone) == 0
    first, second = capsys.readouterr().out.split("wrote")[:2]
    assert first.strip() in second
    assert measured == [["single"]]
    monkeypatch.setitem(module.RUNTIMES, "other", module.RUNTIMES["eager"])
    assert run(benchmark, out, "--runtimes", "eager,other", "--contenders", "single") == 0
    assert len(measured) == 2  # the other runtime's cell alone
    assert run(benchmark, out, *alone, "--channels-last") == 0
    assert len(measured) == 3  # another setting is another cell
    assert len(json.loads(out.read_text("utf-8"))["cells"]) == 3


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--networks", "resnet18,resnet19"],
            "or a model's name, got 'resnet19'",
        ),
        (["--contenders", "chanels-3"], "got 'chanels-3'; did you mean channels-3"),
        (["--runtimes", "fast"], "runtimes must be one of"),
        (["--rounds", "0"], "rounds must be a positive integer, got 0"),
        (["--rounds", "some"], "some"),
        (["--threads", "-1"], "threads must be a positive integer, got -1"),
        (["--device", "tpu"], "tpu"),
        (["--fast"], "--fast"),
        (
            ["--out", "nowhere/at/all.json"],
            "out must be a file in a folder that exists, got",
        ),
        (["--out", __file__], "must be a file of this benchmark, got damaged JSON"),
    ],
)
def test_a_bad_request_ends_in_one_line(benchmark, flags, message, tmp_path, capsys):
    assert run(benchmark, tmp_path / "cells.json", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("benchmark", "flags"), [("inference", ["--batches", "1,x"]), ("training", ["--batch", "0"])]
)
def test_a_batch_size_is_a_positive_integer(benchmark, flags, tmp_path, capsys):
    assert run(benchmark, tmp_path / "cells.json", *flags) == 2
    assert f"{flags[0][2:]} must be" in capsys.readouterr().err


def test_another_benchmarks_file_is_left_alone(tmp_path, capsys):
    out = tmp_path / "training.json"
    out.write_text('{"benchmark": "training", "cells": []}')
    assert run("inference", out) == 2
    assert "training.json must be a file of this benchmark, or not exist" in capsys.readouterr().err
    assert out.read_text("utf-8") == '{"benchmark": "training", "cells": []}'


def test_what_gives_other_logits_is_not_timed(tmp_path, monkeypatch):
    def wrong(network, images):
        return lambda: network(images) * (1.1 if isinstance(network, nf.FissionNetwork) else 1)

    monkeypatch.setitem(inference.RUNTIMES, "wrong", wrong)
    out = tmp_path / "inference.json"
    assert run("inference", out, "--runtimes", "wrong", "--contenders", "channels-2,deep-ensemble-3") == 0
    single, two, deep = contenders_in(out).values()
    assert "logits differ" in two["unavailable"]
    assert single["ratio_median"] == 1 and deep["ratio_median"] > 0


def test_without_a_single_network_nothing_is_compared(tmp_path, capsys, monkeypatch):
    def refuse(network, images):
        if not isinstance(network, nf.FissionNetwork):
            raise RuntimeError("\n too new\nfor this")
        return lambda: network(images)

    monkeypatch.setitem(inference.RUNTIMES, "refuse", refuse)
    out = tmp_path / "inference.json"
    assert run("inference", out, "--runtimes", "refuse", "--contenders", "channels-2") == 0
    single, two = contenders_in(out).values()
    assert single["unavailable"] == "too new"
    assert "no single network" in two["unavailable"] and not two.keys() & TIMES
    assert "not available: single network: too new" in capsys.readouterr().out


def test_exits_beyond_the_stages_leave_at_the_last_branch_point():
    network = contenders.CONTENDERS["channels-4"].build(contenders.find_network("wrn-16-1"))
    assert isinstance(network, nf.FissionNetwork)
    assert network.branch_after == (1, 2, 2)


def test_a_training_step_reaches_every_member_and_moves_nothing():
    ensemble = contenders.DeepEnsemble([nn.Linear(3, 4) for _ in range(2)])
    before = copy.deepcopy(ensemble.state_dict())
    seen = []
    for parameter in ensemble.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.abs().sum().item()))
    learners = [training.Learner(member, contenders.cross_entropy) for member in ensemble.members]
    training.training_step(learners, torch.randn(5, 3), torch.arange(5) % 4)()
    assert len(seen) == 4 and min(seen) > 0
    assert all(parameter.grad is None for parameter in ensemble.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in ensemble.state_dict().items())


# --- peers ------------------------------------------------------------------------------------------


class Members(nn.Module):
    """As torch_uncertainty's networks do: logits `(members · batch, classes)`, one member after another."""

    def __init__(self):
        super().__init__()
        self.body = nn.Flatten()
        self.linear = nn.Linear(12, 3 * 5)

    def forward(self, images):
        return self.linear(self.body(images)).unflatten(1, (3, 5)).transpose(0, 1).flatten(0, 1)


def test_a_peers_logits_are_divided_by_member():
    network, images = Members(), torch.randn(2, 3, 2, 2)
    logits = contenders.Peer(network, 3)(images)
    assert torch.equal(logits, network.linear(images.flatten(1)).unflatten(1, (3, 5)))


def test_packed_members_all_train_on_every_image():
    network, images, labels = Members(), torch.randn(2, 3, 2, 2), torch.tensor([1, 4])
    peer = contenders.Packed(network, 3)
    each = [nn.functional.cross_entropy(peer(images)[:, member], labels) for member in range(3)]
    torch.testing.assert_close(peer.loss(images, labels), sum(each) / 3)


@pytest.mark.parametrize(
    "name", ["packed-4-gamma2", "mimo-3", "batchensemble-4", "masksembles-4", "peers-single"]
)
def test_peers_of_the_library_take_part(name):
    network = contenders.find_network(MODEL)
    contender = contenders.CONTENDERS[name]
    try:
        peer = contender.build(network)
    except contenders.UnavailableError as error:
        pytest.skip(str(error))
    images, labels = network.images(4), torch.arange(4)
    contender.loss(peer.train(), images, labels).backward()
    assert all(parameter.dtype is torch.float32 for parameter in peer.parameters())
    with torch.no_grad():
        logits = peer.eval()(images)
        if name in ("batchensemble-4", "masksembles-4"):
            with pytest.raises(contenders.UnavailableError, match="cannot be folded"):
                inference.deployed(peer, images)
        else:
            torch.testing.assert_close(
                inference.deployed(peer, images)().reshape(logits.shape), logits, rtol=1e-4, atol=1e-5
            )
    members = [] if name == "peers-single" else [int(name[-1]) if name[-2] == "-" else 4]
    assert logits.shape == (4, *members, 100)


def test_folders_are_timed_beside_torchvision(tmp_path, capsys):
    out = tmp_path / "folders.json"
    flags = ["--images", "1000", "--read", "50", "--workers", "0", "--rounds", "1", "--out", str(out)]
    folders.main(flags)
    record = json.loads(out.read_text("utf-8"))
    assert record["start_up_ratios"].keys() == {
        "ImageFolder",
        "find_source",
        "find_source and fingerprint",
        "load_data without checks",
        "load_data",
    }
    ours, theirs = (record["reading_seconds"][name][0] for name in ("netfission", "ImageFolder"))
    assert record["reading_ratios"]["netfission"] == [ours / theirs]
    assert "reading  netfission" in capsys.readouterr().out


def test_images_are_shifted_with_zeros_around_them_and_flipped():
    images = torch.arange(1, 1 + 3 * 6 * 6, dtype=torch.uint8).view(1, 3, 6, 6).expand(200, -1, -1, -1)
    padded = torch.nn.functional.pad(images[0], [4] * 4)
    windows = padded.unfold(1, 6, 1).unfold(2, 6, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    expected = {window.numpy().tobytes() for window in (*windows, *windows.flip(3))}
    moved = full_size._shifted_and_flipped(images, torch.Generator().manual_seed(0))
    found = {image.numpy().tobytes() for image in moved}
    assert len(windows) == 81 and found <= expected and len(found) > 80


def test_a_run_at_full_size_writes_its_record_and_the_table_has_the_deep_ensemble(tmp_path, capsys):
    content = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6)
    for split in ("train", "test"):
        torch.save(content, tmp_path / f"{split}.pt")
    for run in ("single-0", "single-1", "multi-exit-late-0"):
        full_size.train_run(run, tmp_path, tmp_path, 1, 4)
    record = json.loads((tmp_path / "multi-exit-late-0.json").read_text("utf-8"))
    assert (record["epochs"], record["images"], len(record["evaluation"]["exits"])) == (1, 4, 3)
    logits = [torch.load(tmp_path / f"single-{seed}.pt").float() for seed in (0, 1)]
    assert logits[0].shape == (4, 1, 100) and not torch.equal(*logits)
    ensemble = torch.cat(logits, 1).softmax(2).mean(1)
    nll = -ensemble[range(4), range(4)].log().mean().item()
    lines = full_size.table(tmp_path, torch.arange(4)).splitlines()
    assert f"{nll:.3f}" in lines[-1] and lines[-1].startswith("deep ensemble of 2")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("singel-0", "kind must be one of .*, got 'singel'; did you mean single"),
        ("single", "kind must be one of .*, got ''"),
        ("single-x", "run must be a kind and a seed, such as single-0, got 'single-x'"),
    ],
)
def test_a_run_at_full_size_has_a_known_kind_and_a_seed(run, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        full_size.main(["train", str(tmp_path), str(tmp_path / "out"), run])
    assert not (tmp_path / "out").exists()


def test_false_alarms_are_measured_at_every_number_of_images(tmp_path):
    logits = 3 * torch.randn(600, 2, 4, generator=torch.Generator().manual_seed(0))
    kept = {f"{name}.logits": logits.clone() for name in guarantees.RISKS}
    kept |= {f"{name}.labels": torch.zeros(600).long() for name in guarantees.RISKS}
    save_file(kept, tmp_path / "logits.safetensors")
    out = tmp_path / "out.json"
    flags = ["--data", "nowhere", "--draws", "3", "--logits", str(tmp_path / "logits.safetensors")]
    false_alarms.main([*flags, "--out", str(out)])
    first, _ = json.loads(out.read_text("utf-8"))["data"]
    assert {row["n"] for row in first["rows"]} == {100, 500, 2000}
    detectors = {row["detector"] for row in first["rows"] if "detector" in row}
    assert detectors == {"energy", "entropy", "maximum-probability", "mutual-information"}
    assert all(0 <= row["rate_mean"] < 0.2 for row in first["rows"] if "detector" in row)
    assert [row["drift"]["images"] for row in first["rows"] if "drift" in row] == [20, 200] * 3


def test_guarantees_are_measured_at_every_number_of_images(tmp_path):
    logits = 3 * torch.randn(600, 2, 4, generator=torch.Generator().manual_seed(0))
    labels = logits.mean(dim=1).argmax(dim=1)
    kept = {f"{name}.logits": logits for name in guarantees.RISKS}
    kept |= {f"{name}.labels": labels.clone() for name in guarantees.RISKS}
    kept["cifar100.logits"] = logits.clone()
    save_file(kept, tmp_path / "logits.safetensors")
    out = tmp_path / "out.json"
    guarantees.main(
        [
            "--data",
            "nowhere",
            "--draws",
            "3",
            "--logits",
            str(tmp_path / "logits.safetensors"),
            "--out",
            str(out),
        ]
    )
    first, _ = json.loads(out.read_text("utf-8"))["data"]
    assert first["accuracy"] == 1
    assert {row["n"] for row in first["rows"]} == {100, 500, 2000}
    for row in first["rows"]:
        if "abstention" in row:  # no answer is wrong
            assert row["abstention"]["bound"]["answered_mean"] == 1
            assert row["abstention"]["no_bound"]["broken"]["share"] == 0


def test_tables_are_learned_by_mlps_and_by_their_paths(tmp_path, capsys):
    out = tmp_path / "tabular.json"
    few = ["--tables", "breast cancer", "diabetes", "--contenders", "single", "channels-3"]
    tabular.main([*few, "--seeds", "2", "--width", "12", "--epochs", "2", "--out", str(out)])
    rows = json.loads(out.read_text("utf-8"))["cells"]
    assert [(row["table"], row["contender"]) for row in rows] == [
        (table, contender)
        for table in ("breast cancer", "diabetes")
        for contender in ("single", "channels-3")
    ]
    classifiers = 2 * 12 * 2  # of two more exits
    assert rows[1]["macs"] <= 1.05 * (rows[0]["macs"] + classifiers)
    assert [sorted(row["runs"][1]) for row in rows[1:3]] == [
        ["accuracy", "nll", "seed"],
        ["nll", "rmse", "seed"],
    ]
    assert rows[1]["runs"][0] != rows[1]["runs"][1]
    assert "breast cancer channels-3" in capsys.readouterr().out


def test_a_table_is_scaled_by_its_training_rows_and_divided_by_the_seed():
    table = tabular.load("diabetes", seed=0)
    assert [len(rows) for rows in table.rows] == [266, 88, 88]
    torch.testing.assert_close(table.rows[0].mean(dim=0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(table.targets[0].std(), torch.tensor(1.0))
    assert not torch.equal(table.rows[0], tabular.load("diabetes", seed=1).rows[0])


def test_tabm_is_asked_for_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(tabular, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        tabular.main(["--contenders", "single", "tabm-3"])
    assert "--contenders tabm-3 needs the extra peers: pip install" in capsys.readouterr().err


def test_the_page_on_speed_has_the_measured_budgets_in_time():
    root = Path(__file__).parents[1]
    page = (root / "docs/speed.md").read_text(encoding="utf-8")
    cells = json.loads((root / "results/benchmark_time_budget.json").read_text("utf-8"))["cells"]
    for cell in cells:
        settings = cell["settings"]
        if "unmet" in cell:
            least = re.search(r"at least (\d\.\d\d)", cell["unmet"])[1]
            assert f"the narrowest paths take {least} times" in page
            continue
        of_runtimes = (
            f"{time['median']:.2f} ({time['lower']:.2f}–{time['upper']:.2f})"
            for time in cell["again"].values()
        )
        row = [settings["exits"], settings["batch_size"], f"{cell['macs']:.2f}", *of_runtimes]
        assert f"| {' | '.join(map(str, row))} |" in page
