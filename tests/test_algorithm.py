import copy
import dataclasses
import inspect
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn

import netfission as nf
from netfission.config import FissionConfig, FissionSettings, MethodConfig
from netfission.grouping import CopyGrouping, Grouping, StageSplit, WeightGrouping
from netfission.methods.base import BuildPlan
from netfission.methods.multi_exit import MultiExitMethod
from netfission.models import create_model
from netfission.network import LinearExit
from netfission.profiling.macs import run_counted

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(4, 3, 8, 8, generator=GENERATOR)
BATCHES = [(IMAGES, torch.tensor([0, 1, 2, 3]))]


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model("wrn-10-1", 10)


def same(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return list(one.state_dict()) == list(state) and all(
        torch.equal(value, state[name]) for name, value in one.state_dict().items()
    )


def test_the_default_branch_points_are_one_a_stage(model: nn.Module) -> None:
    for exits in (1, 2, 3):
        net = nf.fission(model, exits, example_input=IMAGES)
        assert net.branch_after == tuple(range(1, exits))
        assert net(IMAGES).shape == (4, exits, 10)


@pytest.mark.parametrize(
    "branch_after",
    [["block1", "block2"], [1, "block2"], ("block1", 2)],
    ids=str,
)
def test_branch_points_by_name_and_by_number(model: nn.Module, branch_after: Any) -> None:
    net = nf.fission(model, 3, branch_after=branch_after, example_input=IMAGES)
    assert net.branch_after == (1, 2)
    assert same(net, nf.fission(model, 3, example_input=IMAGES))


def test_branch_points_follow_the_stages_named(model: nn.Module) -> None:
    net = nf.fission(model, 2, stages=["block2", "block3"], branch_after=["block2"], example_input=IMAGES)
    assert net.stage_names == ("block2", "block3")
    assert [len(path.stages) for path in net.paths] == [2, 1]


class _Block(nn.Module):
    """Features at half the size, and what two convolutions add to them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 1))

    def forward(self, features: Tensor) -> Tensor:
        smaller = F.avg_pool2d(features, 2)
        added: Tensor = self.inner(smaller)
        return smaller + added


class _Wide(nn.Module):
    """Three stages, a convolution as wide as asked for, and a classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1, self.stage2, self.stage3 = (_Block() for _ in range(3))
        self.wide = nn.Conv2d(8, width, 1)
        self.classifier = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.wide(self.stage3(self.stage2(self.stage1(self.stem(images)))))
        logits: Tensor = self.classifier(features.relu().mean((2, 3)))
        return logits


@pytest.mark.parametrize(("width", "last"), [(16, "wide"), (4096, "stage3")])
def test_a_wide_layer_before_the_pooling_belongs_to_the_head_if_copies_cost_much(
    width: int, last: str
) -> None:
    images = torch.randn(2, 3, 32, 32)
    net = nf.fission(_Wide(width), grouping="channels", example_input=images)
    assert net.stage_names == ("stage1", "stage2", last)
    assert net.config is not None and (net.config.stages is None) == (last == "wide")
    macs = [run_counted(module, images[:1]).total.dense for module in (_Wide(width), net)]
    assert macs[1] <= 1.05 * macs[0]


@pytest.mark.parametrize("grouping", ["weights", "channels", "copies"])
def test_linear_exits_read_the_features_of_their_stage(model: nn.Module, grouping: str) -> None:
    images = torch.randn(2, 3, 16, 16)
    settings: dict[str, Any] = {"grouping": grouping, "example_input": images, "branch_after": [2]}
    without = nf.fission(model, 2, **settings).eval()
    net = nf.fission(model, 2, linear_exits=[1, "block2", 3], **settings).eval()
    logits = net(images)
    assert torch.equal(logits[:, :2], without(images))
    assert net.branch_after == (2, 1, 2, 3) and net.exits == 5
    features = net.stem(images)
    for number, stage in enumerate(net.exit_paths[0].stages):
        features = stage(features)
        linear = net.exit_paths[2 + number].head.linear
        assert torch.allclose(logits[:, 2 + number], linear(features.mean((2, 3))), atol=1e-6)
    alone = (sum(part.numel() for part in path.parameters()) for path in net.exit_paths[2:])
    assert list(alone) == [10 * (width + 1) for width in (16, 32, 64)]


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (32, 32)])
def test_linear_exits_average_over_the_positions_of_images_of_any_shape(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    net = nf.fission(create_model("wrn-10-2", 10), 1, linear_exits=[1, 2, 3], example_input=images)
    heads = [path.head for path in net.exit_paths[1:]]
    assert [(head.positions, head.linear.in_features) for head in heads] == [
        ((2, 3), 32), ((2, 3), 64), ((2, 3), 128)
    ]  # fmt: skip
    last = torch.zeros(2, *(side // 4 for side in size), 24)  # channels last, as in Swin
    assert LinearExit(last, 10, images).positions == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_linear_exits_have_the_type_and_the_mode_of_the_model(model: nn.Module, dtype: torch.dtype) -> None:
    images = torch.randn(2, 3, 16, 16, dtype=dtype)
    copied = copy.deepcopy(model).to(dtype)
    for training in (False, True):
        net = nf.fission(copied.train(training), 1, linear_exits=[1, 2], example_input=images)
        assert net(images).dtype == dtype
        assert {part.training for part in net.paths[1].modules()} == {training}


def test_linear_exits_may_be_named_by_the_end_that_the_last_stage_gets() -> None:
    images = torch.randn(2, 3, 32, 32)
    net = nf.fission(_Wide(4096), grouping="channels", linear_exits=["stage3"], example_input=images)
    assert net.stage_names == ("stage1", "stage2", "stage3") and net.exits == 4


def test_an_undivided_network_with_linear_exits_is_multi_exit(model: nn.Module) -> None:
    images = torch.randn(2, 3, 16, 16)
    net = nf.fission(model, 1, linear_exits=[1, 2], example_input=images, seed=3).eval()
    plan = BuildPlan(lambda seed: copy.deepcopy(model), FissionConfig(exits=3, seed=3), images)
    assert torch.equal(net(images), MultiExitMethod(MethodConfig()).build(plan).eval()(images))


def test_exits_of_trained_weights_leave_late_and_the_summary_says_why(model: nn.Module) -> None:
    batches = [(IMAGES, torch.zeros(len(IMAGES), dtype=torch.long))]
    trained = nf.fission(model, grouping="channels", branch_after="auto", reconstruct=True, batches=batches)
    assert trained.branch_after == (2, 2)
    assert "exits leave after block2: late, so that most of the network stays whole" in trained.summary()
    assert nf.fission(model, branch_after="late", example_input=IMAGES).branch_after == (2, 2)
    default = nf.fission(model, example_input=IMAGES)
    new = nf.fission(model, branch_after="auto", example_input=IMAGES)
    assert torch.equal(new.eval()(IMAGES), default.eval()(IMAGES)) and new.branch_after == (1, 2)
    assert "exits leave after block1, block2: early, as nothing says" in new.summary()
    assert "exits leave" not in default.summary()
    with pytest.raises(ValueError, match=r"^exits must be 1 for a network of one stage \(block1\)"):
        nf.fission(model, stages=["block1"], branch_after="late", example_input=IMAGES)


def test_three_exits_of_a_network_of_two_stages_share_the_branch_point(model: nn.Module) -> None:
    assert nf.fission(model, 3, stages=["block1", "block2"], example_input=IMAGES).branch_after == (1, 1)


def test_several_exits_at_one_branch_point(model: nn.Module) -> None:
    net = nf.fission(model, 4, branch_after=[1, "block1", 2], example_input=IMAGES)
    assert net.branch_after == (1, 1, 2)
    logits = net.eval()(IMAGES)
    assert len({tuple(logits[0, k].tolist()) for k in range(4)}) == 4


def test_every_exit_starts_with_the_head_given(model: nn.Module) -> None:
    net = nf.fission(model, 3, example_input=IMAGES)
    heads = [path.head.get_parameter("fc.weight") for path in net.paths]
    assert all(torch.equal(head, model.get_parameter("fc.weight")) for head in heads)
    assert len({head.data_ptr() for head in heads}) == 3


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow", "magnitude"])
def test_neither_the_model_nor_the_images_nor_the_global_generator_change(
    model: nn.Module, criterion: str
) -> None:
    before, images = copy.deepcopy(model), IMAGES.clone()
    state = torch.get_rng_state()
    steps = 3 if criterion == "synflow" else None
    nf.fission(model, 3, sparsity=0.5, criterion=criterion, batches=BATCHES, pruning_steps=steps)
    assert same(model, before)
    assert torch.equal(IMAGES, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_the_models(model: nn.Module, training: bool) -> None:
    net = nf.fission(model.train(training), 3, example_input=IMAGES)
    assert {module.training for module in net.modules()} == {training}


def test_a_norm_frozen_by_the_user_stays_frozen(model: nn.Module) -> None:
    model.block2[0].bn1.eval()
    net = nf.fission(model, 3, example_input=IMAGES)
    frozen = [name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.training]
    assert frozen == ["paths.0.stages.1.block2.0.bn1", "paths.1.stages.0.block2.0.bn1"]


def test_frozen_parameters_may_be_fissioned_and_stay_frozen(model: nn.Module) -> None:
    for parameter in (*model.block1.parameters(), *model.block2.parameters()):
        parameter.requires_grad_(False)
    net = nf.fission(model, 3, sparsity=0.5, criterion="magnitude", example_input=IMAGES)
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad != ("block1" in name or "block2" in name)


def test_a_backbone_of_ones_own() -> None:
    backbone = nf.Backbone(
        nn.Flatten(),
        [nn.Sequential(nn.Linear(192, 8), nn.Tanh()), nn.Linear(8, 6)],
        nn.Linear(6, 5),
        ["first", "second"],
    )
    before = copy.deepcopy(backbone)
    net = nf.fission(backbone, 2, branch_after=["first"], sparsity=0.5, batches=BATCHES)
    assert same(backbone, before)
    assert net(IMAGES).shape == (4, 2, 5)
    assert torch.equal(nf.fission(backbone, 1, batches=BATCHES)(IMAGES)[:, 0], backbone(IMAGES))


def test_a_backbone_of_ones_own_names_its_own_stages() -> None:
    backbone = nf.Backbone(nn.Flatten(), [nn.Linear(192, 8), nn.Linear(8, 6)], nn.Linear(6, 5), ["a", "b"])
    with pytest.raises(ValueError, match=r"^stages must be None for a Backbone, .*, got \['a'\]$"):
        nf.fission(backbone, 2, stages=["a"], example_input=IMAGES)


def _computing_its_weight(conv: nn.Module) -> nf.Backbone:
    """A network whose second stage has a layer that computes its weight from another."""
    stages = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(conv, nn.ReLU())]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    return nf.Backbone(nn.Identity(), stages, head, ["a", "b"])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("standardised", {}),
        ("standardised", {"grouping": "copies", "sparsity": 0.5}),
        ("parametrized", {}),
        ("parametrized", {"grouping": "copies"}),  # its weight is no parameter: copies would stay equal
    ],
)
def test_layers_that_compute_their_weight_are_refused(kind: str, settings: dict[str, Any]) -> None:
    conv: nn.Module = StdConv2d(4, 6, 3)
    if kind == "parametrized":
        conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    message = r"^model must be made of plain .*, got layer '.*0' .* computes its weight from another"
    with pytest.raises(ValueError, match=message):
        nf.fission(_computing_its_weight(conv), 2, example_input=IMAGES, batches=BATCHES, **settings)


def test_copies_of_layers_that_standardise_their_weight_are_made() -> None:
    backbone = _computing_its_weight(StdConv2d(4, 6, 3))
    net = nf.fission(backbone, 2, grouping="copies", example_input=IMAGES)
    first, second = net(IMAGES).unbind(1)
    assert torch.equal(first, backbone(IMAGES)) and not torch.allclose(first, second)


def test_layers_that_only_pad_otherwise_are_taken() -> None:
    stages = [nn.Sequential(Conv2dSame(3, 4, 3), nn.ReLU()), nn.Sequential(Conv2dSame(4, 6, 3), nn.ReLU())]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    backbone = nf.Backbone(nn.Identity(), stages, head, ["a", "b"])
    assert nf.fission(backbone, 2, example_input=IMAGES)(IMAGES).shape == (4, 2, 5)


def test_the_example_is_found_in_the_batches_and_in_timm_models(model: nn.Module) -> None:
    assert same(nf.fission(model, 2, batches=BATCHES), nf.fission(model, 2, example_input=IMAGES))
    timm_model = create_model("timm/resnet10t", 5)
    assert nf.fission(timm_model, 2)(torch.randn(2, 3, 32, 32)).shape == (2, 2, 5)


def test_synflow_needs_no_batches(model: nn.Module) -> None:
    settings = {"sparsity": 0.8, "criterion": "synflow", "pruning_steps": 3}
    net = nf.fission(model, 2, example_input=IMAGES, **settings)
    assert same(net, nf.fission(model, 2, batches=BATCHES, **settings))


def test_pruning_leaves_heads_whole_and_removes_the_exact_share(model: nn.Module) -> None:
    net = nf.fission(model, 1, sparsity=0.9, batches=BATCHES)
    removed = {name: mask for name, mask in net.named_buffers() if name.endswith("_removed")}
    prunable = sum(mask.numel() for mask in removed.values())
    convolutions = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert prunable == sum(convolutions)
    assert sum(int(mask.sum()) for mask in removed.values()) == round(0.9 * prunable)
    assert net.paths[0].head.get_parameter("fc.weight").all()


def test_the_criterion_the_steps_and_the_seed_reach_pruning(model: nn.Module) -> None:
    def build(**options: Any) -> nf.FissionNetwork:
        return nf.fission(model, 1, sparsity=0.5, example_input=IMAGES, **options)

    erk = build(criterion="erk")
    assert not same(erk, build(criterion="random"))
    assert not same(erk, build(criterion="erk", seed=1))
    assert not same(erk, build(criterion="erk", pruning_steps=2))


@pytest.mark.parametrize("grouping", [WeightGrouping(keep_shortcuts=True), CopyGrouping()], ids=repr)
def test_a_grouping_may_be_an_object(model: nn.Module, grouping: Any) -> None:
    name = "copies" if isinstance(grouping, CopyGrouping) else "weights"
    net = nf.fission(model, 2, grouping=grouping, example_input=IMAGES)
    by_name = nf.fission(model, 2, grouping=name, keep_shortcuts=name == "weights", example_input=IMAGES)
    assert same(net, by_name)


def test_the_settings_are_those_of_the_config() -> None:
    function = inspect.signature(nf.fission).parameters
    for field in dataclasses.fields(nf.FissionConfig):
        if field.name in ("exits", "grouping"):
            assert field.default == function[field.name].default
    settings = {field.name for field in dataclasses.fields(nf.FissionConfig)} - {"exits", "grouping"}
    assert settings == set(FissionSettings.__annotations__)
    assert all(f"`{name}`" in str(nf.fission.__doc__) for name in settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": 0}, "exits must be a positive integer, got 0"),
        ({"exits": -3}, "exits must be a positive integer, got -3"),
        ({"exits": 2.5}, "exits must be a positive integer, got 2.5"),
        (
            {"exits": 4},
            r"exits must be at most 3, one per stage \(block1, block2, bn\), got 4; .*stages=.*branch_after=",
        ),
        ({"exits": 2, "stages": ["block3"]}, r"exits must be at most 1, one per stage \(block3\), got 2"),
        ({"exits": 3, "ratio": [1, 2]}, r"ratio must be 3 positive numbers, one per exit, got \[1, 2\]"),
        (
            {"exits": 2, "ratio": [1, 2, 3]},
            r"ratio must be 2 positive numbers, one per exit, got \[1, 2, 3\]",
        ),
        ({"exits": 2, "ratio": [1, -1]}, r"ratio must be 2 positive numbers, .* got \[1, -1\]"),
        ({"exits": 2, "ratio": [1, 0]}, r"ratio must be 2 positive numbers, .* got \[1, 0\]"),
        ({"exits": 2, "ratio": [1, float("nan")]}, r"ratio must be 2 positive numbers, .* got \[1, nan\]"),
        ({"exits": 2, "ratio": [1, float("inf")]}, r"ratio must be 2 positive numbers, .* got \[1, inf\]"),
        ({"exits": 2, "sparsity": 1.0}, r"sparsity must be .* in \[0, 1\), got 1.0"),
        ({"exits": 2, "sparsity": -0.1}, r"sparsity must be .* in \[0, 1\), got -0.1"),
        ({"exits": 2, "sparsity": float("nan")}, r"sparsity must be .* in \[0, 1\), got nan"),
        ({"exits": 2, "sparsity": 50}, r"sparsity must be .* in \[0, 1\), got 50"),
        (
            {"exits": 2, "criterion": "snap", "sparsity": 0.5},
            r"criterion must be one of .*, got 'snap'; did you mean snip",
        ),
        ({"exits": 2, "criterion": "snap"}, r"criterion must be one of .*, got 'snap'; did you mean snip"),
        (
            {"exits": 2, "criterion": "zzz", "sparsity": 0.5},
            r"criterion must be one of random, erk, .*, got 'zzz'$",
        ),
        (
            {"linear_exits": [4]},
            r"^linear_exits must be stages, each a number from 1 to 3 or one of block1, block2, bn, got \[4",
        ),
        ({"linear_exits": ["block"]}, "linear_exits must be stages, .*, got \\['block'\\]"),
        (
            {"exits": 2, "grouping": "wieghts"},
            r"grouping must be one of .*, got 'wieghts'; did you mean weights\?",
        ),
        (
            {"exits": 2, "sparsity": 0.5},
            r"^batches must be pairs \(images, labels\) for criterion 'snip', got \(\)$",
        ),
        (
            {"exits": 2, "sparsity": 0.5, "criterion": "erk", "pruning_steps": 0},
            "pruning_steps must be a positive integer, got 0",
        ),
        ({"exits": 2, "example_input": None}, r"example_input must be images, float \(batch, .*, got None"),
        (
            {"exits": 2, "example_input": IMAGES[:0]},
            r"example_input must be at least one image, got shape \(0, ",
        ),
        (
            {"exits": 2, "example_input": IMAGES[0]},
            r"example_input must be images, float \(batch, .*, got float32 of shape \(3, 8, 8\)$",
        ),
        (
            {"exits": 2, "example_input": IMAGES / 0},
            "example_input must be finite, got NaN or infinite values",
        ),
        (
            {
                "grouping": "channels",
                "reconstruct": True,
                "batches": [BATCHES[0], (IMAGES / 0, BATCHES[0][1])],
            },
            "batches must be finite with reconstruct=True, got NaN or infinite values in their images",
        ),
        ({"exits": 2, "branch_after": []}, r"branch_after must be 1 stages, .* got \[\]"),
        (
            {"exits": 3, "branch_after": [1]},
            r"branch_after must be 2 stages, .*1 to 2 or one of block1, block2, got \[1\]$",
        ),
        ({"exits": 2, "branch_after": [0]}, r"branch_after must be 1 stages, .* got \[0\]"),
        ({"exits": 2, "branch_after": [3]}, r"branch_after must be 1 stages, .* got \[3\]"),
        ({"exits": 2, "branch_after": ["bn"]}, r"branch_after must be 1 stages, .* got \['bn'\]"),
        (
            {"exits": 2, "branch_after": ["block9"]},
            r"branch_after must be .* one of block1, block2, got \['block9'\]$",
        ),
        ({"exits": 2, "branch_after": [1.5]}, r"branch_after must be 1 stages, .* got \[1.5\]"),
        ({"branch_after": 1}, "branch_after must be auto, late or a list such as .*, got 1$"),
        ({"branch_after": "block1"}, "branch_after must be auto, late or a list such as .*, got 'block1'$"),
        ({"branch_after": [1.0, 2]}, r"branch_after must be 2 stages, .*, got \[1.0, 2\]$"),
        ({"linear_exits": 2}, "linear_exits must be a list such as .*, got 2$"),
        ({"linear_exits": "block2"}, r"linear_exits must be a list such as .* got 'block2'$"),
        ({"stages": "block2"}, r"stages must be a list of names .* such as \['blocks.1'\], got 'block2'$"),
        ({"stages": [1, 2]}, r"stages must be a list of names of modules, .* got \[1, 2\]$"),
        ({"ratio": "abc"}, "ratio must be a list of numbers, such as .* got 'abc'$"),
        ({"ratio": ["a", 1, 1]}, r"ratio must be 3 positive numbers, .* got \['a', 1, 1\]$"),
        ({"sparsity": "half"}, r"sparsity must be the share .* got 'half'$"),
        ({"seed": "a"}, "seed must be an integer, got 'a'$"),
        ({"grouping": "channels", "budget": "1"}, "budget must be a positive number, got '1'$"),
        ({"example_input": "a"}, r"example_input must be images, float \(batch, .*, got 'a'$"),
        ({"example_input": (2, 3, 8, 8)}, r"example_input must be images, .*, got \(2, 3, 8, 8\)$"),
        (
            {"exits": 2, "grouping": "copies", "keep_shortcuts": True},
            "keep_shortcuts must be False unless grouping='weights', got True",
        ),
        (
            {"exits": 2, "stages": ["blok1", "block2"]},
            r"^stages must be distinct .*; there is no 'blok1', try",
        ),
    ],
    ids=lambda value: re.sub(r"\W+", " ", str(value)) if isinstance(value, dict) else "",
)
def test_a_bad_request_is_answered_in_one_line(
    model: nn.Module, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        nf.fission(model, **{"example_input": IMAGES} | options)
    assert "\n" not in str(raised.value)


def test_what_is_not_a_tensor_is_refused_by_name_where_a_network_is_deployed(model: nn.Module) -> None:
    net = nf.fission(model, 2, example_input=IMAGES)
    with pytest.raises(ValueError, match=r"^example_input must be images, float \(batch, .*, got None$"):
        nf.deploy(net, None)  # type: ignore[arg-type]


def test_a_network_of_linear_layers_is_told_of_stages_that_channels_divide_too() -> None:
    layers = [nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 5)]
    model = nn.Sequential(nn.Flatten(), *layers)
    with pytest.raises(ValueError, match=r"without any; pass stages=\['1', '5'\], or a netfission.Backbone"):
        nf.fission(model, 3, example_input=IMAGES)
    net = nf.fission(model, 3, grouping="channels", stages=["1", "5"], example_input=IMAGES)
    assert net(IMAGES).shape == (4, 3, 5)


class _LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(32, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(self.conv2(self.conv1(images).relu()).relu(), 2)
        logits: Tensor = self.fc3(self.fc2(self.fc1(features.flatten(1)).relu()).relu())
        return logits


@pytest.mark.parametrize("grouping", ["weights", "channels"])
@pytest.mark.parametrize("branch_after", [None, [1, 1]])
def test_a_network_of_one_stage_is_told_of_stages_that_work(grouping: str, branch_after: Any) -> None:
    settings: dict[str, Any] = {"grouping": grouping, "example_input": IMAGES, "branch_after": branch_after}
    with pytest.raises(
        ValueError, match=r"^exits must be 1 for a network of one stage \(.*, got 3;"
    ) as raised:
        nf.fission(_LeNet(), 3, **settings)
    names = re.findall(r"'(\w+)'", str(raised.value).partition("stages=")[2])
    assert nf.fission(_LeNet(), 3, **settings | {"stages": names}).stage_names == tuple(names)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_gradient_checkpointing_stays_in_whole_modules_and_changes_no_stage(
    name: str, small_model: Any
) -> None:
    model, images = small_model(f"timm/{name}", 5), torch.zeros(2, 3, 64, 64)
    expected = nf.fission(model, 2, example_input=images).stage_names
    model.set_grad_checkpointing(True)
    if name.startswith("vit"):
        with pytest.warns(UserWarning, match=r"^the model's gradient checkpointing is left out; "):
            net = nf.fission(model, 2, example_input=images)
    else:
        net = nf.fission(model, 2, example_input=images)
        assert any(getattr(part, "grad_checkpointing", False) for part in net.modules())
    assert net.stage_names == expected


def test_more_exits_than_stages_go_with_branch_points(model: nn.Module) -> None:
    net = nf.fission(model, 5, branch_after=[1, 1, 2, 2], example_input=IMAGES)
    logits: Tensor = net(IMAGES)
    assert logits.shape == (4, 5, 10)


def test_a_keyword_that_is_unknown_is_a_type_error(model: nn.Module) -> None:
    message = r"^keyword must be one of exits, .*, got 'exit'; did you mean exits or linear_exits\?$"
    with pytest.raises(TypeError, match=message):
        nf.fission(model, exit=3, example_input=IMAGES)  # type: ignore[call-arg]


class UnmaskedGrouping(Grouping):
    """One that forgets what pruning removed."""

    def split(self, stage: Any, kept: Any, shares: Any, generator: Any, scores: Any) -> StageSplit:
        return StageSplit([copy.deepcopy(stage.module) for _ in shares])


def test_a_grouping_that_ignores_pruning_is_refused(model: nn.Module) -> None:
    grouping = UnmaskedGrouping()
    assert nf.fission(model, 2, grouping=grouping, example_input=IMAGES)(IMAGES).shape == (4, 2, 10)
    message = (
        r"^grouping must be one whose paths hold only the weights that pruning kept, "
        r"got removed weights of \S+conv1\.weight; apply kept in its split$"
    )
    with pytest.raises(ValueError, match=message):
        nf.fission(model, 2, grouping=grouping, sparsity=0.5, criterion="magnitude", example_input=IMAGES)
