import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import StdConv2d
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, MobileOneBlock, RepVggBlock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import netfission as nf
from netfission import grouping
from netfission.config import FissionConfig
from netfission.grouping import ChannelGrouping, StageSplit
from netfission.grouping.channels import assign_units
from netfission.grouping.widths import StageMacs, even_widths
from netfission.models import create_model
from netfission.models.cifar_resnet import BasicBlock
from netfission.profiling.cost import count
from netfission.profiling.macs import count_macs, run_counted
from netfission.surgery.backbone import cut
from netfission.surgery.masks import prunable_weights
from netfission.surgery.narrowing import ScatteredNorm

CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A network, the side of its images, its stages, and which of them miss the budget, as said beside."""

    model: str
    side: int = 64
    stages: tuple[str, ...] | None = None
    refused: tuple[int, ...] = ()  # too little inside to deal out
    off_budget: tuple[int, ...] = ()  # more than a twentieth of it is on the interface


CASES = [
    Case("torchvision/resnet18"),
    Case("torchvision/resnet50"),
    Case("torchvision/densenet121", off_budget=(3,)),  # the transition at its start is half of it
    Case("torchvision/mobilenet_v3_small", off_budget=(0,)),  # one depthwise block
    Case("torchvision/convnext_tiny"),
    Case("torchvision/vgg11_bn", refused=(0,)),
    Case("timm/resnet18"),
    Case("timm/resnext50_32x4d"),
    Case("timm/convnext_atto"),
    Case("timm/convnextv2_atto"),
    Case("timm/regnety_002", off_budget=(0,)),  # three groups of eight channels for two paths
    Case("timm/efficientnet_b0", off_budget=(0,)),  # one depthwise block
    Case("timm/mobilenetv2_100", refused=(0,)),  # the same without a gate
    Case("timm/mobilenetv3_small_100", off_budget=(0,)),
    Case("timm/vit_tiny_patch16_224"),
    Case("timm/deit_tiny_patch16_224"),
    Case("timm/swin_tiny_patch4_window7_224", 64, ("layers.0", "layers.1", "layers.2", "layers.3")),
    Case("cifar-resnet18-w16", 32),
    Case("wrn-10-1", 32),
]


@dataclass(frozen=True)
class Stage:
    """A stage whose weights hold their own index in their tensor, divided among two paths."""

    name: str
    module: nn.Module
    features: Tensor
    exact: list[nn.Module]
    even: list[nn.Module]
    repeated: set[str]
    off_budget: bool


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.model)
def stages(request: pytest.FixtureRequest, small_model: Callable[[str, int], nn.Module]) -> list[Stage]:
    case: Case = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_model(case.model, CLASSES)
        images = torch.randn(2, 3, case.side, case.side)
    backbone = cut(model, images, case.stages).eval()
    found = []
    with torch.no_grad():
        features = backbone.stem(images)
        for index, (name, stage) in enumerate(zip(backbone.stage_names, backbone.stages, strict=True)):
            following = stage(features)
            for weight in stage.parameters():
                weight.copy_(torch.arange(weight.numel()).view_as(weight))
            if index in case.refused:
                with pytest.raises(ValueError, match="stages must be divisible by channels"):
                    deal(stage, features)
            else:
                exact, even = deal(stage, features, exact=True), deal(stage, features)
                repeated = {layer.layer for layer in even.repeated}
                assert all(layer.reason for layer in even.repeated)
                above = index in case.off_budget
                found.append(Stage(name, stage, features, exact.paths, even.paths, repeated, above))
            features = following
    return found


def deal(
    stage: nn.Module, features: Tensor, exact: bool = False, shares: Sequence[float] = (1.0, 1.0)
) -> StageSplit:
    generator = torch.Generator().manual_seed(0)
    return ChannelGrouping(exact).split(grouping.Stage(stage, features), {}, shares, generator, {})


def macs(module: nn.Module, features: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(features[:1].clone())
    return counter.get_total_flops() // 2


def test_an_exact_partition_gives_every_weight_at_most_one_owner_and_every_channel_one(
    stages: list[Stage],
) -> None:
    for stage in stages:
        for name, weight in prunable_weights(stage.module).items():
            if name in stage.repeated:
                continue
            parts = [part.get_parameter(name) for part in stage.exact]
            every = torch.cat([part.flatten().long() for part in parts])
            assert len(every.unique()) == len(every), f"{name} has two owners"
            divided = [dim for dim in (0, 1) if parts[0].shape[dim] < weight.shape[dim]]
            if len(divided) == 1:  # where both sides are, what joins two paths' channels is nobody's
                assert len(every) == weight.numel(), f"{name} lost channels"


def test_the_paths_together_cost_what_the_stage_does(stages: list[Stage]) -> None:
    for stage in stages:
        budget = macs(stage.module, stage.features)
        ratio = sum(macs(part, stage.features) for part in stage.even) / budget
        assert (abs(ratio - 1) > 0.05) == stage.off_budget, (stage.name, ratio)


def test_paths_keep_the_interface_and_what_they_repeat_is_told(stages: list[Stage]) -> None:
    for stage in stages:
        with torch.no_grad():
            expected = stage.module.eval()(stage.features.clone())
            for part in stage.even:
                assert part.eval()(stage.features.clone()).shape == expected.shape
        for name, weight in prunable_weights(stage.module).items():
            whole = all(part.get_parameter(name).shape == weight.shape for part in stage.even)
            assert whole == (name in stage.repeated), name


def test_norms_and_biases_follow_their_channels() -> None:
    stage = nn.Sequential(BasicBlock(8, 16, 1))
    features = torch.zeros(2, 8, 6, 6)
    with torch.no_grad():
        for tensor in (*stage.parameters(), *stage.buffers()):
            tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
    for path in deal(stage, features).paths:
        block = path[0]
        channels = block.conv1.weight[:, 0, 0, 0] / (9 * 8)
        assert 0 < len(channels) < 16
        for tensor in (block.bn1.weight, block.bn1.bias, block.bn1.running_mean, block.bn1.running_var):
            assert torch.equal(tensor, channels)
        assert torch.equal(block.conv2.weight[0, :, 0, 0] / 9, channels)
        assert torch.equal(block.bn2.weight, torch.arange(16.0))


def test_widths_are_equal_multiples_of_the_block_where_there_are_enough_channels() -> None:
    net = nf.fission(
        create_model("cifar-resnet18", CLASSES),
        3,
        grouping="channels",
        example_input=torch.zeros(2, 3, 32, 32),
    )
    widths = [
        [block.conv1.out_channels for block in layer]
        for number, name in enumerate(("layer1", "layer2", "layer3", "layer4"))
        for stage in net.stage_copies(number).values()
        for layer in [getattr(stage, name)]
    ]
    assert widths == [[64, 64]] + [[64, 64]] * 2 + [[80, 80]] * 3 + [[160, 160]] * 3


def test_bottlenecks_get_more_width_than_a_partition_has() -> None:
    model = create_model("timm/resnet50", CLASSES)
    net = nf.fission(model, 3, grouping="channels", example_input=torch.zeros(2, 3, 64, 64))
    blocks = [stage.layer2[0] for stage in net.stage_copies(1).values()]
    assert sum(block.conv1.out_channels for block in blocks) > 128
    rows = torch.cat([block.conv1.weight for block in blocks])
    assert len(rows.flatten(1).unique(dim=0)) == 128  # all of them are used, some twice


def test_one_path_holds_the_stage_bit_for_bit() -> None:
    stage = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3))
    images = torch.randn(2, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    (path,) = ChannelGrouping().split(grouping.Stage(stage, images), {}, [1.0], generator, {}).paths
    assert torch.equal(path(images), stage(images))


def test_three_exits_learn_in_every_parameter() -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in ("cifar-resnet18-w16", "timm/regnety_002"):
        model = create_model(name, CLASSES)
        net = nf.fission(model, 3, grouping="channels", example_input=images).train()
        logits = net(images)
        F.cross_entropy(logits.flatten(0, 1), torch.arange(6) % CLASSES).backward()
        assert logits.shape == (2, 3, CLASSES)
        for parameter_name, parameter in net.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


def test_shares_follow_the_ratio_and_the_seed_decides() -> None:
    model = create_model("wrn-10-2", CLASSES)
    images = torch.zeros(2, 3, 32, 32)

    def last_widths(**more: object) -> tuple[list[int], Tensor]:
        net = nf.fission(model, 3, grouping="channels", example_input=images, **more)
        layers = [stage.block3[0].conv1 for stage in net.stage_copies(2).values()]
        return [layer.out_channels for layer in layers], layers[0].weight

    widths, weight = last_widths(ratio=[2, 1, 1], exact_partition=True)
    assert widths == [64, 32, 32]
    assert torch.equal(last_widths(ratio=[2, 1, 1], exact_partition=True)[1], weight)
    assert not torch.equal(last_widths(ratio=[2, 1, 1], exact_partition=True, seed=1)[1], weight)


def test_important_channels_are_assigned_in_turn() -> None:
    model = create_model("wrn-10-1", CLASSES)
    with torch.no_grad():
        for channel in range(64):  # ever smaller
            model.block3[0].conv1.weight[channel] = 64.0 - channel
            model.block3[0].conv2.weight[:, channel] = 64.0 - channel
    net = nf.fission(
        model,
        3,
        grouping="channels",
        assignment="importance",
        criterion="magnitude",
        example_input=torch.zeros(2, 3, 32, 32),
    )
    for stage in net.stage_copies(2).values():
        ranks = 64 - stage.block3[0].conv1.weight[:, 0, 0, 0]
        assert ranks.min() < 3  # one of the three best
        assert (ranks.sort().values.diff() == 3).all()  # and every third from there


def test_whole_channels_are_pruned_by_the_criterion_first() -> None:
    model = create_model("wrn-10-1", CLASSES)
    with torch.no_grad():
        for block in (model.block1[0], model.block2[0], model.block3[0]):
            block.conv1.weight[::2] *= 1e-3
            block.conv2.weight[:, ::2] *= 1e-3
    images = torch.zeros(2, 3, 32, 32)
    before = sum(weight.numel() for name, weight in prunable_weights(model).items() if name != "fc.weight")
    net = nf.fission(
        model, 2, grouping="channels", sparsity=0.3, criterion="magnitude", exact_partition=True,
        branch_after=["block2"], example_input=images,
    )  # fmt: skip
    trunk, branch = net.paths
    inner = [
        trunk.stages[0].block1[0],
        trunk.stages[1].block2[0],
        trunk.stages[2].block3[0],
        branch.stages[0].block3[0],
    ]
    for block in inner:
        assert (block.conv1.weight.abs().mean((1, 2, 3)) > 1e-2).any()
    removed = before - sum(
        weight.numel()
        for part in (net.stem, *trunk.stages, branch.stages[0])
        for name, weight in prunable_weights(part).items()
        if "shortcut" not in name or part is not branch.stages[0]
    )
    assert 0.3 * before <= removed < 0.3 * before + 1000
    assert not any("removed" in name for name, _ in net.named_buffers())  # no masks: the layers are smaller


@pytest.mark.parametrize("ratio", [None, [1, 1, 4]])
def test_every_path_keeps_a_unit_of_each_layer_at_any_sparsity(ratio: list[float] | None) -> None:
    model = create_model("cifar-resnet18-w16", CLASSES)
    arguments = {"grouping": "channels", "criterion": "magnitude", "exact_partition": True, "ratio": ratio}
    with pytest.warns(UserWarning, match=r"removes \d\d% of the weights, less than sparsity 0\.99"):
        net = nf.fission(model, 3, sparsity=0.99, example_input=torch.zeros(2, 3, 32, 32), **arguments)
    widths = [stage.layer4[1].conv1.out_channels for stage in net.stage_copies(3).values()]
    assert min(widths) == 1 and sum(widths) < 8


def test_pruned_weights_that_leave_a_layer_without_channels_are_refused() -> None:
    stage = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))
    kept = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in prunable_weights(stage).items()}
    divided = grouping.Stage(stage, torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"^sparsity must be low enough .* got no channels left of '0'"):
        ChannelGrouping().split(divided, kept, [1.0, 1.0], torch.Generator(), {})


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"ratio": [1, 1, 1000]}, r"got none of layer '.*conv1' for one of 3 paths"),
        (
            {"assignment": "random", "keep_shortcuts": True},
            "keep_shortcuts must be False unless grouping='weights', got True",
        ),
        ({"assignment": "size"}, "assignment must be one of importance, random, got 'size'"),
        (
            {"grouping": "weights", "exact_partition": True},
            "exact_partition must be False unless grouping='channels', got True",
        ),
        (
            {"grouping": "copies", "assignment": "importance"},
            "assignment must be 'random' unless grouping='channels', got 'importance'",
        ),
        (
            {"assignment": "importance", "criterion": "snip"},
            "^batches must be .* for criterion 'snip', got ",
        ),
    ],
)
def test_bad_settings_are_named(settings_: dict[str, object], message: str) -> None:
    model = create_model("cifar-resnet18-w16", CLASSES)
    arguments = {"grouping": "channels", "example_input": torch.zeros(2, 3, 32, 32)} | settings_
    with pytest.raises(ValueError, match=message):
        nf.fission(model, 3, **arguments)


def test_a_pretrained_network_keeps_its_weights_and_its_model() -> None:
    model = create_model("cifar-resnet18-w16", CLASSES)
    before = copy.deepcopy(model.state_dict())
    net = nf.fission(model, 2, grouping="channels", example_input=torch.zeros(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows = before["layer4.1.conv1.weight"].flatten(1)
    for stage in net.stage_copies(3).values():
        own = stage.layer4[1].conv1.weight.flatten(1)
        assert all((rows == row).all(1).any() for row in own)


class _MostlyWhole(nn.Module):
    def __init__(self, inner: int = 8) -> None:
        super().__init__()
        self.whole = nn.Conv2d(4, 4, 3, padding=1)
        self.divided = nn.Sequential(nn.Conv2d(4, inner, 1), nn.ReLU(), nn.Conv2d(inner, 4, 1))

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.whole(features)
        return F.max_pool2d(features + self.divided(features), 2)


def test_a_stage_that_costs_more_than_it_did_is_reported() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), _MostlyWhole(), _MostlyWhole(), head)
    arguments = {"stages": ["1", "2"], "example_input": torch.zeros(2, 3, 8, 8), "grouping": "channels"}
    with pytest.warns(UserWarning, match=r"stage '2': its 2 paths together need (1\.\d\d) times") as warned:
        net = nf.fission(model, 2, **arguments)
    image = torch.zeros(1, 4, 4, 4)
    macs = sum(count_macs(stage, image).dense for stage in net.stage_copies(1).values())
    assert f"need {macs / count_macs(model[2], image).dense:.2f} times" in str(warned[0].message)


def test_a_pruned_stage_is_compared_as_it_was_before() -> None:
    model, images = create_model("wrn-10-1", CLASSES), torch.randn(2, 3, 16, 16)
    net = nf.fission(
        model, 2, grouping="channels", sparsity=0.8, criterion="magnitude", example_input=images
    )  # a warning would be an error
    assert count_macs(net, images[:1]).dense < count_macs(model, images[:1]).dense


@pytest.mark.parametrize(
    ("inner", "width"),
    # At half their share, paths cost 1.08, 1.18 and 1.33 times the stage, at a quarter 0.89, 1.00 and 1.17.
    [(60, 7), (48, 4), (36, 6)],
)
def test_paths_that_repeat_much_are_narrower_than_half_their_share_if_it_suffices(
    inner: int, width: int
) -> None:
    macs = StageMacs(grouping.Stage(_MostlyWhole(inner), torch.zeros(1, 4, 8, 8)))
    assert even_widths(macs, [inner], [1], [1, 1, 1]) == [[width] * 3]


def test_a_grouping_is_a_value_that_cannot_be_changed() -> None:
    made = ChannelGrouping(overlap=0.5)
    with pytest.raises(FrozenInstanceError):
        made.cost = 2.0  # type: ignore[misc]
    assert {made, ChannelGrouping(overlap=0.5)} == {made}


def test_many_paths_of_layers_in_sequence_cost_what_the_stage_does() -> None:
    """Layers between two groups shrink twice, so that each path may have more than twice its share."""
    layers = nn.Sequential(*(nn.Conv2d(64, 64, 1) for _ in range(12)))
    macs = StageMacs(grouping.Stage(layers, torch.zeros(1, 64, 1, 1)))
    widths = even_widths(macs, [64] * 11, [1] * 11, [1] * 8)
    cost = sum(macs(units) for units in zip(*widths, strict=True))
    assert cost == pytest.approx(0.97 * macs([64] * 11), rel=0.02)
    assert all(width > 2 * 64 / 8 for width in widths[0])


class _Small(nn.Module):
    """Stages of falling size, of which one has no inner channels, and another standardises its weights."""

    def __init__(self, num_classes: int = CLASSES, in_channels: int = 3, whole: int | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            _Whole() if number == whole else BasicBlock(8, 8, 2) for number in range(4)
        )
        self.blocks[0].conv1 = StdConv2d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for block in self.blocks:
            features = block(features)
        return self.head(features)


class _Whole(nn.Module):
    """A layer in two parts, which a trace of the network leaves whole, as its code depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 1, 2)

    def forward(self, features: Tensor) -> Tensor:
        scale = 1.0 if bool((features > 1e9).any()) else 0.5
        return self.one(features) + scale * self.other(features)


@pytest.mark.parametrize(
    ("whole", "names"),
    [
        (None, ("blocks.0", "blocks.1", "blocks.2", "blocks.3")),
        (1, ("blocks.0", "blocks.2", "blocks.3")),
        (3, ("blocks.0", "blocks.1", "blocks.3")),
    ],
)
def test_a_stage_without_inner_channels_joins_another_and_is_restored(
    tmp_path: Path, whole: int | None, names: tuple[str, ...]
) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    net = nf.fission(_Small(whole=whole), 3, grouping="channels", example_input=images).eval()
    assert net.stage_names == names
    nf.Classifier.from_network(
        net, model=None, classes=list("abcde"), shape=(3, 64, 64), mean=[0.5] * 3, std=[0.5] * 3
    ).save_pretrained(tmp_path)
    loaded = nf.Classifier.from_pretrained(tmp_path, factory=partial(_Small, whole=whole)).network
    assert torch.equal(loaded(images), net(images))


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = BasicBlock(8, 8, 1)
        self.again = self.block

    def forward(self, features: Tensor) -> Tensor:
        return F.max_pool2d(self.again(self.block(features)), 2)


def plain_blocks(*, flat: bool) -> list[nn.Module]:
    """Convolution, batch norm and ReLU six times, at three sizes of the features."""
    layers: list[nn.Module] = []
    for (inputs, _), (outputs, stride) in itertools.pairwise(
        [(3, 1), (8, 1), (8, 2), (8, 1), (8, 2), (8, 1), (8, 1)]
    ):
        block = [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += block if flat else [nn.Sequential(*block)]
    return layers


@pytest.mark.parametrize(
    ("flat", "exits", "expected"),
    [(True, 3, ("3", "9", "15")), (False, 3, ("1", "3", "5")), (False, 2, ("1", "3", "5"))],
)
def test_single_layers_are_regrouped_into_stages_that_can_be_divided(
    flat: bool, exits: int, expected: tuple[str, ...]
) -> None:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    model = nn.Sequential(*plain_blocks(flat=flat), *head)
    images = torch.randn(2, 3, 16, 16)
    net = nf.fission(model, exits, grouping="channels", example_input=images)
    assert net.stage_names == expected
    ratio = run_counted(net, images[:1]).total.dense / run_counted(model, images[:1]).total.dense
    assert ratio < 1.1


def test_blocks_that_run_twice_are_saved_and_loaded(tmp_path: Path) -> None:
    def make(**_: object) -> nn.Module:
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), _Twice(), _Twice(), head)

    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    net = nf.fission(make(), 2, stages=["1", "2"], grouping="channels", example_input=images).eval()
    assert len(net.state_dict()) > len([*net.parameters(), *net.buffers()])
    nf.Classifier.from_network(
        net, model=None, classes=list("abcde"), shape=(3, 16, 16), mean=[0.5] * 3, std=[0.5] * 3
    ).save_pretrained(tmp_path)
    loaded = nf.Classifier.from_pretrained(tmp_path, factory=make).network
    assert torch.equal(loaded(images), net(images))


def _with_head(hidden: int) -> nn.Module:
    blocks = [BasicBlock(8, 8, 2) for _ in range(3)]
    head = [
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, hidden),
        nn.ReLU(),
        nn.Linear(hidden, CLASSES),
    ]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, *head).eval()


@pytest.mark.parametrize("name", ["channels", "weights", "copies"])
def test_a_head_whose_copies_cost_much_is_divided_by_channels(name: str, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for hidden, is_dear in ((3000, True), (90, False)):
        model = _with_head(hidden)
        net = nf.fission(model, 3, grouping=name, example_input=images).eval()
        widths = [path.head.get_submodule("6").out_features for path in net.exit_paths]
        is_divided = is_dear and name == "channels"
        assert sum(widths) <= hidden if is_divided else widths == [hidden] * 3
        macs = [count(network, images[:1]).size.macs_dense for network in (net, model)]
        assert (macs[0] <= 1.05 * macs[1]) == (name == "channels")
        assert torch.allclose(nf.deploy(net, images)(images), net(images), atol=1e-5)
        nf.Classifier.from_network(
            net, model=None, classes=list("abcde"), shape=(3, 16, 16), mean=[0.5] * 3, std=[0.5] * 3
        ).save_pretrained(tmp_path)
        loaded = nf.Classifier.from_pretrained(tmp_path, factory=lambda **_: _with_head(hidden)).network  # noqa: B023
        assert torch.equal(loaded(images), net(images))


def test_a_path_reads_a_part_of_a_head_without_norm_at_full_variance() -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = _with_head(3000)
    head = nf.fission(model, 3, grouping="channels", example_input=images).exit_paths[1].head
    last = head.get_submodule("8")
    norms = [float(weight.detach().norm()) ** 2 for weight in (last.weight, model[8].weight)]
    assert norms[0] / norms[1] == pytest.approx(1.0, abs=0.1)  # of a third of the inputs, times three


def test_the_summary_names_what_every_path_repeats() -> None:
    model = create_model("cifar-resnet18-w16", CLASSES)
    net = nf.fission(model, 3, grouping="channels", example_input=torch.zeros(2, 3, 32, 32))
    text = net.summary()
    assert "layer3: every path repeats layer3.0.shortcut.0.weight, " in text
    assert text.count(" + ") == 1 + 2 + 2 + 2  # layer2, layer3, layer4, head
    whole = nf.fission(model, 3, grouping="copies", example_input=torch.zeros(2, 3, 32, 32))
    assert "whole" not in whole.summary()


def _scattered(stage: nn.Module) -> bool:
    return any(isinstance(part, ScatteredNorm) for part in stage.modules())


def _rep_vgg_stage() -> nn.Module:
    return nn.Sequential(RepVggBlock(8, 24, stride=2), RepVggBlock(24, 24), RepVggBlock(24, 24))


def _mobile_one_stage() -> nn.Module:
    return nn.Sequential(
        MobileOneBlock(8, 8, 3, 2, group_size=1),  # depthwise and pointwise in turn
        MobileOneBlock(8, 24, 1),
        MobileOneBlock(24, 24, 3, group_size=1),
        MobileOneBlock(24, 24, 1, num_conv_branches=2),
    )


@pytest.mark.parametrize("make_stage", [_rep_vgg_stage, _mobile_one_stage])
def test_channels_that_identity_branches_tie_to_the_interface_are_divided(
    make_stage: Callable[[], nn.Module],
) -> None:
    stage = make_stage().eval()
    features = torch.randn(2, 8, 6, 6)
    split = deal(stage, features)
    assert abs(split.cost - 1) <= 0.05
    assert all(_scattered(path) and path(features).shape == stage(features).shape for path in split.paths)
    (whole,) = deal(stage, features, shares=[1.0]).paths
    assert not _scattered(whole)
    assert torch.equal(whole(features), stage(features))


def _identity_net(num_classes: int = CLASSES, in_channels: int = 3) -> nn.Module:
    """A tiny RepVGG, whose blocks have no inner channels."""
    stages = ((2, 16), (3, 32), (1, 48), (1, 64))
    blocks = tuple(ByoBlockCfg("rep", depth, width, gs=0) for depth, width in stages)
    return ByobNet(ByoModelCfg(blocks, stem_type="rep", stem_chs=16), num_classes, in_channels)


def test_a_network_with_identity_branches_is_divided_deployed_saved_and_loaded(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = _identity_net()
    net = nf.fission(model, 3, grouping="channels", example_input=images)
    assert net.stage_names == ("stages.0", "stages.1", "stages")
    scattered = [[_scattered(stage) for stage in net.stage_copies(number).values()] for number in range(3)]
    assert scattered == [
        [False],
        [True, True],
        [False, False, False],
    ]  # shared; divided; joined with the next
    assert count(net, images[:1]).size.macs_dense <= 1.05 * count(model, images[:1]).size.macs_dense
    net.train()(images).square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    logits = net.eval()(images)
    deployed = nf.deploy(net, images, joined=True)
    torch.testing.assert_close(deployed(images), logits, rtol=1e-4, atol=1e-4)
    nf.Classifier.from_network(
        net, model=None, classes=list("abcde"), shape=(3, 64, 64), mean=[0.5] * 3, std=[0.5] * 3
    ).save_pretrained(tmp_path)
    loaded = nf.Classifier.from_pretrained(tmp_path, factory=_identity_net).network
    assert torch.equal(loaded(images), logits)


@settings(deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_dealing_is_disjoint_until_it_has_to_borrow(units: int, widths: list[int]) -> None:
    widths = [min(width, units) for width in widths]
    if units < len(widths):
        return
    parts = assign_units(torch.arange(units).flip(0), widths)
    assert [len(part) for part in parts] == widths
    assert all(len(part.unique()) == len(part) for part in parts)
    together = torch.cat(parts)
    assert len(together.unique()) == min(units, sum(widths))
    if sum(widths) <= units:  # the first in the order are assigned
        assert together.min() == units - sum(widths)


@settings(deadline=None)
@given(st.integers(4, 60), st.lists(st.integers(1, 30), min_size=2, max_size=4), st.floats(0, 1))
def test_all_paths_hold_the_first_units_that_overlap(units: int, widths: list[int], overlap: float) -> None:
    widths = [min(width, units) for width in widths]
    order = torch.arange(units).flip(0)
    parts = assign_units(order, widths, overlap)
    assert [len(part.unique()) for part in parts] == widths
    common = round(overlap * min(widths))
    assert all(torch.equal(part[:common], order[:common]) for part in parts)
    others = torch.cat([part[common:] for part in parts])
    assert len(others.unique()) == min(units - common, len(others))


@pytest.mark.parametrize(("overlap", "equal"), [(1.0, True), (0.5, False)])
def test_paths_that_hold_the_same_channels_start_with_the_same_logits(overlap: float, equal: bool) -> None:
    torch.manual_seed(0)
    model, images = create_model("wrn-10-2", 10).eval(), torch.randn(2, 3, 16, 16)
    net = nf.fission(
        model, 2, grouping="channels", branch_after=[1], overlap=overlap, example_input=images
    ).eval()
    first, second = net(images).unbind(1)
    assert torch.equal(first, second) == equal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlap": 1.5}, r"^overlap must be a share of the channels, in \[0, 1\], got 1\.5$"),
        ({"overlap": float("nan")}, r"^overlap must be a share of the channels, in \[0, 1\], got nan$"),
        ({"overlap": 0.5, "exact_partition": True}, r"^overlap must be 0\.0 with exact_partition, got 0\.5$"),
        (
            {"overlap": 0.5, "grouping": "copies"},
            r"^overlap must be 0\.0 unless grouping='channels', got 0\.5$",
        ),
    ],
)
def test_a_share_that_cannot_overlap_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FissionConfig(**{"grouping": "channels"} | changes)


def test_a_stage_without_layers_is_refused_in_words() -> None:
    with pytest.raises(
        ValueError, match=r"^stages must be divisible by channels, got a stage without layers; "
    ):
        nf.fission(
            create_model("wrn-10-1", 10),
            2,
            grouping="channels",
            stages=["block3", "bn"],
            branch_after=[1],
            example_input=torch.zeros(2, 3, 8, 8),
        )
