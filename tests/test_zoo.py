"""Every check of `make zoo` passes on seven networks, and fails on what it is there to find."""

import copy
import json
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn

import netfission as nf

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import zoo
import zoo_checks
from zoo_checks import CheckError, Network

_thorough = partial(pytest.param, marks=pytest.mark.thorough)
SAMPLE = [  # the smallest network of each kind that tests of channels do not divide
    "mobilenetv3_small_050",  # a head of several layers, which is divided
    _thorough("test_byobnet"),  # blocks by configuration
    _thorough("test_coatnet"),  # convolutions, then attention with biases of positions
    _thorough("test_mambaout"),  # gated convolutions
    _thorough("test_nfnet"),  # standardised weights
    "test_resnet",
    _thorough("starnet_s050"),  # products of two branches
]
SMALLEST = Network("timm", "resnet", "test_resnet")
MEASURED = {
    "macs",
    "macs_effective",
    "parameters",
    "parameters_nonzero",
    "restriction",
    "deployed",
    "seconds",
    "stages",
}


@cache
def row_by_channels(network):
    return zoo_checks.measure(network, "channels")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_network_passes_every_check_by_channels(name):
    row = row_by_channels(SMALLEST if name == SMALLEST.name else Network("timm", name, name))
    assert row.get("error") is None
    assert row["failed"] == {} and row.keys() >= MEASURED
    assert len(row["stages"]) >= 3
    assert row["restriction"] <= 1e-5 and row["deployed"] <= 1e-4


@pytest.mark.parametrize("grouping", ["weights", "copies"])
def test_a_network_passes_every_check_by_the_other_groupings(grouping):
    row = zoo_checks.measure(SMALLEST, grouping)
    assert row["failed"] == {} and row.keys() >= MEASURED
    assert row["repeated"] == []
    if grouping == "weights":
        assert row["macs_effective"] == pytest.approx(1, abs=0.01) and row["macs"] > 1.3
    else:
        assert row["macs_effective"] == row["macs"] > 1.3


def test_ratios_are_those_of_the_cost_report():
    row = row_by_channels(SMALLEST)
    model, images = SMALLEST.create(), torch.zeros(1, 3, row["size"], row["size"])
    net = nf.fission(model, 3, grouping="channels", example_input=images)
    report = nf.cost(net, images, model, batch_sizes=[1], rounds=1)
    assert report.reference is not None
    assert row["macs"] == report.network.size.macs_dense / report.reference.size.macs_dense
    assert row["model_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    layers = sum(len(of_stage) for of_stage in net.repeated.values())
    assert sum(entry["layers"] for entry in row["repeated"]) == layers > 0


# --- each check fails on what it is there to find -----------------------------------------------------


class Fissioned:
    """A network by one grouping, and the same model with one exit."""

    def __init__(self, grouping):
        self.grouping, self.narrowings = grouping, []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = SMALLEST.create()
        self.images = zoo_checks.accepted_images(self.model)
        zoo_checks.disturb_constants(self.model)
        settings = {"grouping": grouping, "example_input": self.images}
        with zoo_checks.recorded(self.narrowings):
            self.net = nf.fission(self.model, 3, **settings)
        self.whole = nf.fission(self.model, 1, **settings)

    def check_restriction(self):
        return zoo_checks.check_restriction(self.net, self.whole, self.images, self.grouping, self.narrowings)

    def path_layer(self, name):
        """A layer of the last path's share of stage layer4."""
        return self.net.stage_copies(3)[2].get_submodule(name)


@pytest.fixture(scope="module")
def divided():
    return Fissioned("channels")


@pytest.fixture
def by_channels(divided):
    """A copy that a test may damage."""
    return copy.deepcopy(divided)


def test_other_logits_with_one_exit_are_found(by_channels):
    zoo_checks.check_one_exit(by_channels.model, by_channels.whole, by_channels.images)
    wrong = copy.deepcopy(by_channels.whole)
    with torch.no_grad():
        wrong.exit_paths[0].head.get_parameter("fc.bias").add_(1e-3)
    with pytest.raises(CheckError, match="in eval mode, logits differ by"):
        zoo_checks.check_one_exit(by_channels.model, wrong, by_channels.images)
    frozen = copy.deepcopy(by_channels.whole)
    norm = frozen.exit_paths[0].stages[0].get_submodule("layer1.0.bn1").eval()
    norm.train = lambda mode=True: norm  # as if the trace had frozen its mode
    with pytest.raises(CheckError, match="in train mode, logits differ by"):
        zoo_checks.check_one_exit(by_channels.model, frozen, by_channels.images)


def test_a_training_step_that_misses_a_parameter_or_is_not_finite_is_found(by_channels):
    zoo_checks.check_training(by_channels.model, by_channels.net, by_channels.images)
    weight = by_channels.path_layer("layer4.0.conv1").weight
    weight.requires_grad_(False)
    with pytest.raises(CheckError, match=r"paths.2.stages.1.layer4.0.conv1.weight has no gradient"):
        zoo_checks.check_training(by_channels.model, by_channels.net, by_channels.images)
    weight.requires_grad_(True)
    with torch.no_grad():
        by_channels.path_layer("layer4.0.bn2").weight.fill_(float("inf"))
    with pytest.raises(CheckError, match="not finite"):
        zoo_checks.check_training(by_channels.model, by_channels.net, by_channels.images)


def swap_channels(fissioned):
    weight = fissioned.path_layer("layer4.0.conv1").weight
    weight.copy_(weight.flip(0))


def scale_a_layer(fissioned):
    fissioned.path_layer("layer4.0.conv2").weight.mul_(2)


def change_a_statistic(fissioned):
    fissioned.path_layer("layer4.0.bn1").running_mean.add_(1e-3)


def replace_an_activation(fissioned):
    fissioned.path_layer("layer4.0").act1 = nn.Identity()


def forget_what_was_kept(fissioned):
    fissioned.narrowings.clear()


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (swap_channels, "layer4.0.conv1.weight holds other values than the original"),
        (scale_a_layer, "layer4.0.conv2.weight holds other values than the original"),
        (change_a_statistic, "layer4.0.bn1.running_mean holds other values than the original"),
        (replace_an_activation, r"exit 2 in stage layer4 differs by \d"),
        (forget_what_was_kept, "channels of exit 0 in stage layer1 are unknown"),
    ],
)
def test_a_path_that_is_not_the_original_on_its_channels_is_found(by_channels, breaks, message):
    assert by_channels.check_restriction() < 1e-6
    with torch.no_grad():
        breaks(by_channels)
    with pytest.raises(CheckError, match=message):
        by_channels.check_restriction()


def test_a_weight_of_two_paths_or_of_none_is_found():
    by_weights = Fissioned("weights")
    assert by_weights.check_restriction() < 1e-6
    layer = by_weights.path_layer("layer4.0.conv1")
    removed = layer.weight_removed
    index = tuple(removed.nonzero()[0].tolist())
    removed[index] = False  # a weight of another path
    original = by_weights.whole.stage_copies(3)[0].get_submodule("layer4.0.conv1").weight
    with torch.no_grad():
        layer.weight[index] = original[index]
    with pytest.raises(CheckError, match=r"1 weights of layer4.0.conv1.weight do not belong to one path"):
        by_weights.check_restriction()


def test_a_copy_with_other_values_is_found():
    copies = Fissioned("copies")
    assert copies.check_restriction() < 1e-6
    with torch.no_grad():
        copies.path_layer("layer4.0.conv1").weight[0, 0, 0, 0] += 1
    with pytest.raises(CheckError, match=r"layer4.0.conv1.weight holds other values than the original"):
        copies.check_restriction()


def test_a_layer_that_reads_fewer_inputs_may_be_scaled_to_keep_the_variance():
    whole, part = torch.ones(2, 8), torch.full((2, 2), 2.0)
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert zoo_checks.variance_scale(part, whole[:, :2], mask, 8) == 2.0
    assert zoo_checks.variance_scale(1.1 * part, whole[:, :2], mask, 8) is None


def test_other_logits_when_deployed_are_found(by_channels, monkeypatch):
    assert zoo_checks.check_deployed(by_channels.net, by_channels.images) < 1e-5
    wrong = copy.deepcopy(by_channels.net).eval()
    monkeypatch.setattr(nf, "deploy", lambda net, images: lambda images: wrong(images) * 1.01)
    with pytest.raises(CheckError, match=r"logits differ by \S+ of their spread"):
        zoo_checks.check_deployed(by_channels.net, by_channels.images)


def test_other_logits_when_loaded_are_found(by_channels, monkeypatch):
    zoo_checks.check_saved(SMALLEST, by_channels.net, by_channels.images)
    load = nf.Classifier.from_pretrained

    def load_wrongly(*arguments, **settings):
        classifier = load(*arguments, **settings)
        with torch.no_grad():
            classifier.network.exit_paths[2].head.get_parameter("fc.bias").add_(1e-3)
        return classifier

    monkeypatch.setattr(nf.Classifier, "from_pretrained", load_wrongly)
    with pytest.raises(CheckError, match="logits differ by"):
        zoo_checks.check_saved(SMALLEST, by_channels.net, by_channels.images)


def test_a_check_that_fails_is_part_of_the_row(monkeypatch):
    def fail(*_):
        raise CheckError("wrong")

    monkeypatch.setattr(zoo_checks, "check_training", fail)
    monkeypatch.setattr(zoo_checks, "check_deployed", fail)
    row = zoo_checks.measure(SMALLEST, "copies")
    assert row["failed"] == {"deployed": "wrong", "training": "wrong"}
    assert not zoo.is_sound(row)


def test_a_network_that_is_refused_is_a_row_with_the_reason(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("model must be divisible")

    monkeypatch.setattr(nf, "fission", refuse)
    row = zoo_checks.measure(SMALLEST, "copies")
    assert row["error"] == "model must be divisible" and not zoo.is_sound(row)


# --- processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"seconds": 0.01}, "over 0.01 s of processor time"),
        ({"gib": 0.01}, "over 0.01 GiB of memory"),
        ({}, None),
    ],
)
def test_a_process_ends_at_its_limits(limits, reason):
    row = zoo.run_limited(SMALLEST, "channels", **limits)
    assert row.get("error") == reason
    assert reason or row["failed"] == {}


def test_a_process_that_dies_is_a_row():
    row = zoo.run_limited(Network("timm", "resnet", "no_such_network"), "channels")
    assert row["error"].startswith("RuntimeError: Unknown model")


# --- the file and the page ----------------------------------------------------------------------------


def row_of(network, grouping, **entries):
    row = {"library": network.library, "family": network.family, "name": network.name}
    row |= {"second": network.second, "grouping": grouping}
    whole = {"failed": {}, "stages": ["a", "b", "c"], "seconds": 0.5, "repeated": [], "model_macs": 100}
    whole |= {"macs": 1.04, "macs_effective": 1.0, "parameters": 1.2}
    return row | (entries if "error" in entries else whole | entries)


@pytest.fixture
def measured(monkeypatch):
    """Names of the rows that were measured, in order."""
    names = []

    def run_limited(network, grouping):
        names.append(f"{network.name} {grouping}")
        return row_of(network, grouping)

    monkeypatch.setattr(zoo, "run_limited", run_limited)
    return names


def test_rows_of_the_same_source_are_not_measured_again(measured, tmp_path, capsys, monkeypatch):
    flags = [
        "--networks",
        "resnet,convnext",
        "--groupings",
        "channels",
        "--out",
        str(tmp_path / "zoo.json"),
    ]
    assert zoo.main(flags) == 0
    assert measured == ["test_convnext channels", "test_resnet channels"]
    assert zoo.main(flags) == 0
    assert len(measured) == 2
    assert zoo.main([*flags[:3], "channels,weights", *flags[4:]]) == 0
    assert measured[2:] == ["test_convnext weights", "test_resnet weights"]
    assert zoo.main([*flags, "--again"]) == 0
    assert len(measured) == 6
    monkeypatch.setattr(zoo, "source", lambda grouping: "another")
    assert zoo.main(flags) == 0
    assert len(measured) == 8
    assert "2 rows of another version of the source" in capsys.readouterr().out
    assert zoo.main([*flags, "--second"]) == 0
    rows = json.loads((tmp_path / "zoo.json").read_text("utf-8"))["rows"]
    assert len(rows) == 6
    assert {row["name"] for row in rows if row["second"]} == {"resnet10t", "convnext_zepto_rms"}


def test_what_is_measured_survives_an_interruption(tmp_path, monkeypatch):
    def run_limited(network, grouping):
        if network.name == "test_resnet":
            raise KeyboardInterrupt
        return row_of(network, grouping)

    monkeypatch.setattr(zoo, "run_limited", run_limited)
    out = tmp_path / "zoo.json"
    with pytest.raises(KeyboardInterrupt):
        zoo.main(["--networks", "resnet,convnext", "--out", str(out)])
    assert [row["name"] for row in json.loads(out.read_text("utf-8"))["rows"]] == ["test_convnext"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--networks", "resnett"],
            "networks must be names of families or networks of this benchmark, got 'resnett'",
        ),
        (["--groupings", "channel"], "groupings must be one of"),
        (["--out", "nowhere/at/all.json"], "out must be a file in a folder that exists"),
        (["--out", __file__], "out must be a file of this benchmark, or not exist"),
    ],
)
def test_a_bad_request_ends_in_one_line(flags, message, capsys):
    assert zoo.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_every_network_exists_and_is_listed_once():
    import timm
    from torchvision import models

    smallest, second = zoo.networks(), zoo.networks(second=True)
    families = {network.family for network in smallest if network.library == "timm"}
    assert families == {family for family in timm.list_modules() if timm.list_models(module=family)}
    assert {network.family for network in second} <= families
    names = [network.name for network in (*smallest, *second) if network.library == "timm"]
    assert len(set(names)) == len(names)
    for network in (*smallest, *second):
        known = timm.list_models(module=network.family) if network.library == "timm" else models.list_models()
        assert network.name in known


ROWS = [
    row_of(
        SMALLEST,
        "channels",
        repeated=[
            {"stage": "b", "reason": "too | few (3)", "layers": 1, "macs": 2},
            {"stage": "c", "reason": "too | few (4)", "layers": 1, "macs": 3},
        ],
        restriction=2e-7,
    ),
    row_of(SMALLEST, "weights", failed={"training": "weight has no gradient"}),
    row_of(Network("timm", "vgg", "vgg11"), "channels", macs=1.3),
    row_of(Network("timm", "vit", "test_vit"), "channels", error="exits must be at most 1 (norm), got 3; x"),
    row_of(Network("timm", "pit", "pit_ti"), "channels", error="exits must be at most 2 (a, b), got 3; x"),
    row_of(Network("torchvision", "resnet18", "resnet18"), "channels"),
]


def test_the_summary_counts_and_groups_by_cause():
    text = zoo.summary(ROWS)
    assert zoo.counts(ROWS)[1] == ["timm, smallest network, by channels", "4", "2", "2", "1"]
    assert zoo.counts(ROWS)[2] == ["timm, smallest network, by weights", "1", "1", "0", "0"]
    assert "2 refused: exits must be at most n: test_vit, pit_ti" in text
    assert "1 training: weight has no gradient: test_resnet" in text


def test_the_page_has_a_row_per_network_and_each_reason():
    record = {"rows": ROWS, "environment": {"versions": {"timm": "1.0"}}}
    text = zoo.page(record)
    ratios = "| `test_resnet` | 1.04 | 1.20 | 1.00 ✗ | – | 0.5 | 2e-07 | – | a, b, c |"
    assert f"{ratios} 2 layers (5.0 %), as too \\| few |" in text
    assert "| `test_vit` | – | – | – | – | – | – | – | – | – |" in text
    assert "| `vgg11` | 1.30 | 1.20 | – | – | 0.5 | – | – | a, b, c | nothing |" in text
    assert "| test_vit by channels | exits must be at most 1 (norm), got 3; x |" in text
    assert "| test_resnet by weights | training: weight has no gradient |" in text
    assert text.index("## timm, smallest network") < text.index("## torchvision")
    assert "Measured with timm 1.0." in text
    assert "no results yet" in zoo.page(None)


def test_the_page_is_written_from_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "PAGE", tmp_path / "models.md")
    out = tmp_path / "zoo.json"
    out.write_text(json.dumps({"rows": ROWS, "environment": {"versions": {}}}))
    assert zoo.main(["--page", "--out", str(out)]) == 0
    assert "`test_resnet`" in (tmp_path / "models.md").read_text("utf-8")
