import importlib
import json
import random
from statistics import quantiles

import pytest
import torch
from torch import nn

import netfission as nf
from netfission.models import create_model
from netfission.network import ExitPath
from netfission.profiling.cost import Exit, NetworkCost, Part, Size, count_parameters
from netfission.profiling.macs import count_macs
from netfission.profiling.timing import Quartiles
from netfission.surgery.masks import apply_masks

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def fissioned(model="wrn-10-1", side=16, **settings):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        single = create_model(model, 4)
    images = torch.randn(2, 3, side, side)
    return nf.fission(single, 3, example_input=images, criterion="magnitude", **settings), single, images


@pytest.fixture(scope="module")
def pruned():
    """A pruned network of three exits, its single network, and their cost."""
    network, single, _ = fissioned(sparsity=0.5)
    return network, single, nf.cost(network, IMAGES, single, batch_sizes=[1, 3], rounds=3)


def size_of(module, images=IMAGES[:1]):
    return Size(*count_parameters(module), *count_macs(module, images))


# --- counting ---------------------------------------------------------------------------------------


def test_parameters_of_a_small_network_by_hand():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(100, 7))
    assert count_parameters(network) == (2 * 4 * 9 + 4 + 700 + 7,) * 2
    kept = torch.ones(7, 100, dtype=torch.bool)
    kept[0] = False
    apply_masks(network, {"2.weight": kept})
    assert count_parameters(network) == (783, 683)


def test_the_whole_networks_size(pruned):
    network, single, cost = pruned
    assert cost.network.size == size_of(network)
    assert cost.reference.size == size_of(single)
    assert cost.network.size.macs_effective < cost.network.size.macs_dense
    assert (cost.reference.parts, cost.reference.exits) == ((), ())


@pytest.mark.parametrize(
    ("model", "side", "settings"),
    [
        ("wrn-10-1", 16, {"sparsity": 0.5}),
        ("wrn-10-1", 16, {"branch_after": [2, 1]}),
        ("timm/mobilenetv3_small_100", 64, {"branch_after": ["blocks.1", "blocks.1"], "sparsity": 0.2}),
    ],
)
def test_parts_add_up_and_each_exit_costs_what_it_does_alone(model, side, settings):
    network, _, images = fissioned(model, side, **settings)
    cost = nf.cost(network, images, batch_sizes=[1], rounds=1).network
    assert [part.name for part in cost.parts] == ["stem", *network.stage_names, "head"]
    assert sum((part.total for part in cost.parts), Size()) == cost.size
    for part in cost.parts:
        assert sum((size for size in part.paths if size is not None), Size()) == part.total
    trunk = network.paths[0].stages
    for number, (path, after) in enumerate(zip(network.paths, (0, *network.branch_after), strict=True)):
        shared = nn.Sequential(network.stem, *trunk[:after])
        assert cost.exits[number].alone == size_of(nn.Sequential(shared, path), images[:1])
        if number:
            assert cost.exits[number].shared == size_of(shared, images[:1])
    last = max(network.branch_after)
    assert cost.exits[0].shared == size_of(nn.Sequential(network.stem, *trunk[:last]), images[:1])


def test_sizes_by_stage_and_exit_by_hand():
    network = nf.FissionNetwork(
        nn.Flatten(),
        [
            ExitPath([nn.Linear(2, 3, bias=False), nn.Linear(3, 5, bias=False)], nn.Linear(5, 7, bias=False)),
            ExitPath([nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU())], nn.Linear(4, 7, bias=False)),
        ],
        branch_after=[1],
        stage_names=["first", "second"],
    )
    cost = nf.cost(network, torch.randn(1, 2), batch_sizes=[1], rounds=1).network

    def size(number):
        return Size(number, number, number, number)

    assert cost.parts == (
        Part("stem", size(0), (size(0), None)),
        Part("first", size(6), (size(6), None)),
        Part("second", size(27), (size(15), size(12))),
        Part("head", size(63), (size(35), size(28))),
    )
    assert cost.exits == (Exit(size(56), size(6)), Exit(size(46), size(6)))
    assert cost.size == size(96)


def test_with_one_exit_nothing_is_shared():
    model = create_model("wrn-10-1", 4)
    cost = nf.cost(nf.fission(model, 1, example_input=IMAGES), IMAGES, model, batch_sizes=[1], rounds=1)
    assert cost.network.exits == (Exit(cost.reference.size, Size()),)
    assert cost.network.size == cost.reference.size


def test_an_ensemble_is_broken_down_as_its_network(pruned):
    network, _, cost = pruned
    ensemble = nf.cost(network.ensemble(), IMAGES, batch_sizes=[1], rounds=1).network
    assert (ensemble.size, ensemble.parts, ensemble.exits) == (
        cost.network.size,
        cost.network.parts,
        cost.network.exits,
    )


def test_uncounted_operations_are_named_in_result_and_table():
    class Spectrum(nn.Linear):
        def forward(self, images):
            return super().forward(torch.fft.fft(images).abs())

    cost = nf.cost(Spectrum(3, 4), torch.randn(2, 3), nn.Linear(3, 4), batch_sizes=[1], rounds=1)
    assert cost.network.uncounted == {"aten._fft_r2c": 1}
    assert cost.reference.uncounted == {}
    assert "MACs of the network leave out aten._fft_r2c ×1" in cost.table()
    assert "MACs of the reference" not in cost.table()


# --- measuring --------------------------------------------------------------------------------------


def test_measurements_hold_together(pruned):
    cost = pruned[2]
    for each in (cost.network, cost.reference):
        measurements = [*each.inference, each.training]
        assert [m.batch_size for m in measurements] == [1, 3, 3]
        for m in measurements:
            for quartiles in (m.seconds, m.ratio):
                assert 0 < quartiles.lower <= quartiles.median <= quartiles.upper
            assert m.images_per_second == m.batch_size / m.seconds.median
        peaks = [m.peak_bytes for m in measurements]
        assert 0 < peaks[0] < peaks[1] < peaks[2]
        assert peaks[2] > 2 * 4 * each.size.parameters_stored  # gradients and momentum
    for m in (*cost.reference.inference, cost.reference.training):
        assert m.ratio == Quartiles(1, 1, 1)


def test_medians_quartiles_and_ratios_are_those_of_the_rounds(monkeypatch):
    draw = random.Random(0)
    times = {name: [draw.uniform(1, 9) for _ in range(6)] for name in ("network", "reference")}
    module = importlib.import_module("netfission.profiling.cost")
    monkeypatch.setattr(module, "inference_times", lambda *_, **__: times)
    monkeypatch.setattr(module, "training_times", lambda *_, **__: times)
    cost = nf.cost(nn.Linear(3, 4), torch.randn(2, 3), nn.Linear(3, 4), batch_sizes=[5], rounds=6)
    ratios = [a / b for a, b in zip(times["network"], times["reference"], strict=True)]
    for m in (cost.network.inference[0], cost.network.training):
        for measured, values in ((m.seconds, times["network"]), (m.ratio, ratios)):
            expected = quantiles(values, n=4, method="inclusive")
            assert [measured.lower, measured.median, measured.upper] == pytest.approx(expected)
        assert m.images_per_second == pytest.approx(5 / m.seconds.median)
    assert cost.reference.training.ratio == Quartiles(1, 1, 1)


def test_without_a_reference_there_are_no_ratios():
    cost = nf.cost(nn.Linear(3, 4), torch.randn(2, 3), batch_sizes=[1], rounds=1)
    assert cost.reference is None
    assert cost.network.inference[0].ratio is None
    assert cost.network.training.ratio is None
    header, parameters, *_ = cost.table().splitlines()
    assert header.split() == ["network"]
    assert parameters.split() == ["parameters", "stored", "16"]


def test_batches_are_filled_with_the_images_given():
    batches = []

    class Note(nn.Linear):
        def forward(self, images):
            batches.append((self.training, images.clone()))
            return super().forward(images)

    images = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    nf.cost(Note(2, 4), images, batch_sizes=[1, 5], rounds=1)
    assert {(training, len(batch)) for training, batch in batches} == {(False, 1), (False, 5), (True, 5)}
    assert all(torch.equal(batch, images[[0, 1, 0, 1, 0]]) for _, batch in batches if len(batch) == 5)
    batches.clear()
    nf.cost(Note(2, 4), images, batch_sizes=[1], rounds=1)
    assert {len(batch) for training, batch in batches if training} == {
        2
    }  # a batch norm cannot train on one image


def frozen():
    return nn.Linear(3, 4).requires_grad_(False)


@pytest.mark.parametrize(
    ("network", "images"),
    [(nn.ReLU(), torch.randn(2, 3)), (frozen(), torch.randn(2, 3)), (nn.Conv2d(3, 4, 3), IMAGES)],
    ids=["nothing to train", "frozen", "no logits"],
)
def test_what_cannot_be_trained_is_not(network, images):
    cost = nf.cost(network, images, batch_sizes=[1], rounds=1)
    assert cost.network.training is None
    assert "training" not in cost.table()


def test_a_cascade_that_records_no_gradients_is_timed_in_inference_alone():
    net = nf.fission(create_model("wrn-10-1", 4).eval(), 2, example_input=IMAGES)
    cascade = nf.Cascade(net, [0.5], order=[0, 1])
    assert nf.cost(cascade, IMAGES, batch_sizes=[1], rounds=1).network.training is None


def test_a_step_is_measured_where_gradients_are_off():
    with torch.no_grad():
        cost = nf.cost(nn.Linear(3, 4), torch.randn(2, 3), batch_sizes=[1], rounds=1)
    assert cost.network.training is not None


@pytest.mark.parametrize("network", [nn.Linear(3, 4), nn.Linear(2, 4)])
def test_images_that_a_network_does_not_take(network):
    images = torch.randn(2, 2).double()
    with pytest.raises(
        ValueError, match=r"^example_input must be accepted by the network, got float64 of shape \(1, 2\) \("
    ):
        nf.cost(nn.Linear(2, 4).double(), images, network, rounds=1)


def test_without_a_references_step_the_networks_is_kept():
    cost = nf.cost(nn.Linear(3, 4), torch.randn(2, 3), frozen(), batch_sizes=[1], rounds=1)
    assert cost.reference.training is None
    assert cost.network.training.ratio is None
    assert "training" not in cost.table()


def test_nothing_given_is_changed():
    single = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(784, 4)
    )
    network = nf.fission(create_model("wrn-10-1", 4), 2, example_input=IMAGES)
    single[1].eval()
    before = [
        (
            {name: value.clone() for name, value in module.state_dict().items()},
            [m.training for m in module.modules()],
        )
        for module in (network, single)
    ]
    generator = torch.get_rng_state()
    images = IMAGES.clone()
    nf.cost(network, images, single, batch_sizes=[2], rounds=1)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(images, IMAGES)
    for module, (state, modes) in zip((network, single), before, strict=True):
        assert module.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert [m.training for m in module.modules()] == modes
        assert all(parameter.grad is None for parameter in module.parameters())


# --- the result -------------------------------------------------------------------------------------


def test_conditions_are_named(pruned):
    conditions = pruned[2].conditions
    assert (conditions.batch_sizes, conditions.rounds, conditions.warm_up) == ((1, 3), 3, 3)
    assert (conditions.image_shape, conditions.dtype) == ((3, 16, 16), "float32")
    assert conditions.threads == torch.get_num_threads()
    assert conditions.torch == torch.__version__
    assert "CPU" in conditions.device


def test_the_json_holds_every_figure(pruned):
    cost = pruned[2]
    read = json.loads(cost.to_json())
    assert read == json.loads(json.dumps(cost.to_dict()))
    assert set(read) == {"network", "reference", "conditions"}
    assert set(read["network"]) == set(NetworkCost.__dataclass_fields__)
    assert read["network"]["exits"][1]["alone"]["macs_dense"] == cost.network.exits[1].alone.macs_dense
    assert read["network"]["parts"][0]["paths"][1:] == [None, None]
    assert read["network"]["inference"][0]["ratio"]["median"] == cost.network.inference[0].ratio.median


def test_the_table_shows_the_figures_aligned(pruned):
    cost = pruned[2]
    whole, macs, parameters, conditions = cost.table().split("\n\n")
    size, step = cost.network.size, cost.network.training
    assert f"{size.parameters_stored:,}" in whole
    assert f"{size.macs_effective / 1e6:,.2f}" in whole
    ratio = size.macs_dense / cost.reference.size.macs_dense
    (line,) = (line for line in whole.splitlines() if line.startswith("MACs dense"))
    assert line.endswith(f"{ratio:.2f}×")
    (line,) = (line for line in whole.splitlines() if line.startswith("training step of 3"))
    lower, median, upper = (
        f"{1e3 * value:,.2f}" for value in (step.seconds.lower, step.seconds.median, step.seconds.upper)
    )
    assert f"{median} ({lower}–{upper})" in line
    assert line.endswith(f"{step.ratio.median:.2f}× ({step.ratio.lower:.2f}–{step.ratio.upper:.2f})")
    for block in (macs, parameters):
        header, *_, last_stage, head, alone, shared = block.splitlines()
        assert len({len(line) for line in (header, last_stage, head, alone, shared)}) == 1
    assert [line.split()[0] for line in macs.splitlines()[1:-2]] == ["stem", "block1", "block2", "bn", "head"]
    alone = cost.network.exits[2].alone
    assert f"{alone.parameters_stored:,} ({alone.parameters_nonzero:,})" in parameters
    assert "3 rounds in turn after 3 of warm-up" in conditions
    assert "images 3 × 16 × 16 float32" in conditions


def test_linear_exits_are_named_so() -> None:
    network, _, images = fissioned(linear_exits=[2])
    measured = nf.cost(network, images, batch_sizes=[1], rounds=1)
    assert [item.linear for item in measured.network.exits] == [False, False, False, True]
    (header,) = (line for line in measured.table().splitlines() if line.startswith("MACs dense (effective)"))
    assert header.split("all")[1].split() == ["exit", "0", "exit", "1", "exit", "2", "exit", "3", "(linear)"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sizes": []}, r"^batch_sizes must be one or more positive integers, got \[\]$"),
        ({"batch_sizes": [4, 0]}, r"^batch_sizes must be one or more positive integers, got \[4, 0\]$"),
        ({"rounds": 0}, "^rounds must be a positive integer, got 0$"),
        (
            {"example_input": torch.zeros(0, 3)},
            r"example_input must be at least one image, got shape \(0, 3\)",
        ),
    ],
)
def test_bad_requests(settings, message):
    with pytest.raises(ValueError, match=message):
        nf.cost(nn.Linear(3, 4), **{"example_input": torch.zeros(1, 3)} | settings)
