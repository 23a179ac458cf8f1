"""One contract for every network, and a clear refusal for what cannot be cut."""

import copy
import pickle
import random
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

import netfission as nf
from netfission.inference.cascade import step_by_step
from netfission.models import create_model
from netfission.models.cifar_resnet import BasicBlock
from netfission.surgery.backbone import cut
from netfission.surgery.masks import prunable_weights
from netfission.surgery.stages import find_stages
from netfission.surgery.tracing import ModuleTracer, ShapeTracer, attempts, live_after, trace


@dataclass(frozen=True)
class Case:
    """A network, the side of its images, the stages asked for and those expected."""

    model: str
    side: int
    expected: tuple[str, ...]
    stages: tuple[str, ...] | None = None


RESNET = ("layer1", "layer2", "layer3", "layer4")
VIT = ("blocks.1", "blocks.3", "blocks.5")
SWIN = ("layers.0", "layers.1", "layers.2", "layers.3")
CASES = [
    Case("torchvision/resnet18", 64, RESNET),
    Case("torchvision/resnet50", 64, RESNET),
    Case(
        "torchvision/densenet121",
        64,
        ("features.denseblock1", "features.denseblock2", "features.denseblock3", "features"),
    ),
    Case("torchvision/mobilenet_v3_small", 64, ("features.1", "features.3", "features.8", "features")),
    Case("torchvision/convnext_tiny", 64, ("features.1", "features.3", "features.5", "features")),
    Case("torchvision/vgg11_bn", 64, ("features.6", "features.13", "features.20", "features.27")),
    Case("timm/resnet18", 64, RESNET),
    Case("timm/resnet50", 64, RESNET),
    Case("timm/convnext_atto", 64, ("stages.0", "stages.1", "stages.2", "stages")),
    Case("timm/regnety_002", 64, ("s1", "s2", "s3", "s4")),
    Case("timm/efficientnet_b0", 64, ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "bn2")),
    Case("timm/mobilenetv3_small_100", 64, ("blocks.0", "blocks.1", "blocks.3", "blocks")),
    Case("timm/vit_tiny_patch16_224", 64, VIT),
    Case("timm/swin_tiny_patch4_window7_224", 64, SWIN, stages=SWIN),
    Case("cifar-resnet18-w16", 32, RESNET),
    Case("wrn-10-1", 32, ("block1", "block2", "bn")),
]
CLASSES = 7


@dataclass(frozen=True)
class Cut:
    case: Case
    model: nn.Module
    before: dict[str, Tensor]
    images: Tensor
    backbone: nf.Backbone
    learning: dict[str, bool]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.model)
def given(request: pytest.FixtureRequest, small_model: Callable[[str, int], nn.Module]) -> Cut:
    case: Case = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_model(case.model, CLASSES)
        images = torch.randn(2, 3, case.side, case.side)
    before = copy.deepcopy(model.state_dict())
    return Cut(case, model, before, images, cut(model, images, case.stages), learning(model, images))


def run(model: nn.Module, images: Tensor, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the buffers afterwards by their names in the model cut; leaves `model` as it was."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train(training)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        output: Tensor = model(images.clone())
    cut_up = isinstance(model, nf.Backbone | nf.FissionNetwork)
    after = {original(name) if cut_up else name: b.clone() for name, b in model.named_buffers()}
    for buffer, value in before:
        buffer.copy_(value)
    for module, mode in modes:
        module.training = mode
    return output, after


def original(name: str) -> str:
    """`stages.0.layer1.0.bn1.weight` and `paths.1.stages.0.layer1.0.bn1.weight` → `layer1.0.bn1.weight`."""
    return re.sub(r"^(paths\.\d+\.)?(stem|stages\.\d+|head)\.", "", name)


def learning(model: nn.Module, images: Tensor) -> dict[str, bool]:
    """The parameters that the output depends on, and whether their gradient is other than 0.

    A residual branch whose last norm starts at 0 passes none back.
    """
    model = copy.deepcopy(model).train()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        F.cross_entropy(model(images.clone()), torch.tensor([0, 1])).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: bool(gradient.any()) for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_output_and_buffers_are_those_of_the_model_bit_for_bit(given: Cut, training: bool) -> None:
    expected, buffers = run(given.model, given.images, training)
    output, of_parts = run(given.backbone, given.images, training)
    assert expected.isfinite().all() and expected.any()
    assert torch.equal(output, expected)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in of_parts.items())
    before = {name: given.before.get(name, buffer) for name, buffer in buffers.items()}
    moved = {name for name, buffer in buffers.items() if not torch.equal(buffer, before[name])}
    assert moved <= set(of_parts)
    assert bool(moved) == (training and any(isinstance(m, nn.BatchNorm2d) for m in given.model.modules()))


def test_parameters_keep_their_names_and_values(given: Cut) -> None:
    names = [original(name) for name, _ in given.backbone.named_parameters()]
    assert len(set(names)) == len(names)
    for name, parameter in given.backbone.named_parameters():
        assert torch.equal(parameter, given.model.get_parameter(original(name)))
    assert set(given.learning) <= set(names) <= set(given.before)


def test_stages_are_found_and_each_holds_weights(given: Cut) -> None:
    assert given.backbone.stage_names == given.case.expected
    assert all(prunable_weights(stage) for stage in given.backbone.stages)
    assert prunable_weights(given.backbone.head)


def test_one_exit_is_the_model_bit_for_bit_and_the_model_is_left_alone(given: Cut) -> None:
    modes = [module.training for module in given.model.modules()]
    net = nf.fission(given.model, 1, stages=given.case.stages, example_input=given.images)
    assert given.model.state_dict().keys() == given.before.keys()
    assert all(torch.equal(value, given.before[name]) for name, value in given.model.state_dict().items())
    assert [module.training for module in given.model.modules()] == modes
    owned = {parameter.data_ptr() for parameter in given.model.parameters()}
    for made in (given.backbone, net):
        assert owned.isdisjoint(parameter.data_ptr() for parameter in made.parameters())
    for training in (False, True):
        expected, buffers = run(given.model, given.images, training)
        output, of_net = run(net, given.images, training)
        assert output.shape == (2, 1, CLASSES)
        assert torch.equal(output[:, 0], expected)
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in of_net.items())


def test_two_exits_train_every_parameter(given: Cut) -> None:
    net = nf.fission(given.backbone, 2, branch_after=[1], example_input=given.images).train()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        logits = net(given.images)
        F.cross_entropy(logits.flatten(0, 1), torch.tensor([0, 1, 2, 3])).backward()
    assert logits.shape == (2, 2, CLASSES)
    assert logits.isfinite().all()
    assert not torch.equal(logits[:, 0], logits[:, 1])
    removed = dict(net.named_buffers())
    for name, parameter in net.named_parameters():
        if original(name) not in given.learning:
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if f"{name}_removed" in removed:
            assert not parameter.grad[removed[f"{name}_removed"]].any(), name
            assert parameter.grad.any() or not given.learning[original(name)], name
    shared = {original(name) for name, _ in net.paths[0].named_parameters()}
    for name, _ in net.paths[1].named_parameters():
        assert original(name) in shared


# --- finding stages ---------------------------------------------------------------------------------


class Chain(nn.Module):
    """A stem, three stages of one resolution each and a classifier; subclasses spoil it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.stage1 = self.make_stage(4, 1)
            self.stage2 = self.make_stage(4, 2)
            self.stage3 = self.make_stage(4, 2)
            self.fc = nn.Linear(4, 5)

    @staticmethod
    def make_stage(width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.stage3(self.stage2(self.stage1(self.stem(images))))
        return features

    def classify(self, features: Tensor) -> Tensor:
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))


STAGES = ("stage1", "stage2", "stage3")
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_plain_chain() -> None:
    backbone = cut(Chain(), IMAGES)
    assert backbone.stage_names == STAGES
    assert [name for name, _ in backbone.stem.named_parameters()] == ["stem.weight", "stem.bias"]
    assert [name for name, _ in backbone.head.named_parameters()] == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("stages", [["stage2"], ["stage1", "stage3"], ["stage1.2", "stage2", "stage3.3"]])
def test_stages_by_name(stages: list[str]) -> None:
    model = Chain()
    backbone = cut(model, IMAGES, stages)
    assert backbone.stage_names == tuple(stages)
    assert torch.equal(backbone(IMAGES), model(IMAGES))
    names = [original(name) for name, _ in backbone.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_a_batch_of_one_will_do_as_example() -> None:
    class Pooled(Chain):
        def features(self, images: Tensor) -> Tensor:
            return super().features(F.adaptive_avg_pool2d(images, 1))

    assert cut(Pooled(), IMAGES[:1], ["stage1", "stage2"]).stage_names == ("stage1", "stage2")


def test_arguments_with_defaults_keep_them() -> None:
    class Optional(Chain):
        def forward(self, images: Tensor, scale: float = 2.0, extra: Tensor | None = None) -> Tensor:
            logits = super().forward(images) * scale
            return logits if extra is None else logits + extra

    model = Optional()
    backbone = cut(model, IMAGES)
    assert backbone.stage_names == STAGES
    assert torch.equal(backbone(IMAGES), model(IMAGES))


def test_data_dependent_control_flow_inside_a_module_is_left_whole() -> None:
    class Gate(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, features: Tensor) -> Tensor:
            output: Tensor = self.inner(features)
            return output if output.sum() > 0 else -output

    model = Chain()
    model.stage2 = nn.Sequential(Gate(model.stage2))
    backbone = cut(model, IMAGES)
    assert backbone.stage_names == STAGES
    for images in (IMAGES, -IMAGES, IMAGES.flip(0) * 3):
        assert torch.equal(run(backbone, images, False)[0], run(model, images, False)[0])


class _Skips(Chain):
    """Skips a stage at random in training, as LayerDrop does."""

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.stage1(self.stem(images))
        if self.training and random.random() < 0.1:
            return features
        return self.stage3(self.stage2(features))


class _SkipsWithin(nn.Sequential):
    def forward(self, features: Tensor) -> Tensor:
        return features if self.training and random.random() < 0.5 else super().forward(features)


@pytest.mark.parametrize("seed", range(3))
def test_a_draw_of_pythons_random_is_refused_whatever_its_state(seed: int) -> None:
    random.seed(seed)
    state = random.getstate()
    with pytest.raises(
        ValueError, match=r"^model must be .*, which draws from Python's random in train mode"
    ):
        cut(_Skips(), IMAGES[:2], list(STAGES))
    model = Chain()
    model.stage1.append(_SkipsWithin(nn.Conv2d(4, 4, 1)))
    cut(model, IMAGES[:2], list(STAGES))
    assert random.getstate() == state


def test_random_numbers_and_the_global_generator_are_left_alone() -> None:
    model = Chain()
    model.stage1.append(nn.Dropout(0.5))
    state = torch.get_rng_state()
    backbone = cut(model, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(run(backbone, IMAGES, True)[0], run(model, IMAGES, True)[0])


def test_a_frozen_norm_stays_frozen() -> None:
    model = Chain().train()
    model.stage1[2].eval()
    backbone = cut(model, IMAGES)
    modes = {original(name): module.training for name, module in backbone.named_modules()}
    assert not modes["stage1.2"] and modes["stage2.2"]


class FunctionalDropout(Chain):
    def classify(self, features: Tensor) -> Tensor:
        return super().classify(F.dropout(features, 0.5, self.training))


@pytest.mark.parametrize("training", [False, True])
def test_a_mode_passed_to_a_function_follows_the_cut_model(training: bool) -> None:
    model = FunctionalDropout().train(training)  # whatever its mode when it is cut
    backbone = cut(model, IMAGES)
    for part in (backbone, copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        for mode in (False, True, False):
            assert torch.equal(run(part, IMAGES, mode)[0], run(model, IMAGES, mode)[0])
    assert not torch.equal(run(backbone, IMAGES, True)[0], run(backbone, IMAGES, False)[0])


class BranchesOnShape(Chain):
    """Code that symbolic tracing cannot follow, and a table that every stage reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(64.0).view(8, 8) / 64)

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.stem(images)
        count, _, *sides = features.shape
        if min(sides) < 8:
            features = F.interpolate(features, size=8)
        table = self.table.view(1, 1, 8, 8) * 2
        first = self.stage1(features + table)
        second: Tensor = self.stage2(first * table)
        third: Tensor = self.stage3(second + table[:, :, ::2, ::2]).reshape(count, 4, 2, 2)
        return third


def test_a_model_that_branches_on_shapes_takes_any_number_of_images() -> None:
    model = BranchesOnShape()
    backbone = cut(model, IMAGES)
    assert backbone.stage_names == STAGES
    for count in (1, 2, 4):
        for training in (False, True):
            images = IMAGES[:count]
            assert torch.equal(run(backbone, images, training)[0], run(model, images, training)[0])
    net = nf.fission(model, 3, grouping="copies", example_input=IMAGES)
    tables = [buffer for buffer in net.buffers() if buffer.shape == (1, 1, 8, 8)]
    assert len({table.data_ptr() for table in tables}) == len(tables) > 1  # each part has its own
    net(IMAGES).sum().backward()


class Auxiliary(Chain):
    """A second head, with dropout, that runs in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 5))
        self.stage3.append(nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        features = self.stage2(self.stage1(self.stem(images)))
        extra = self.second(features.mean((2, 3))) if self.training else None
        logits = self.classify(self.stage3(features))
        return (logits, extra) if self.training else logits


def test_auxiliary_heads_are_left_out() -> None:
    model = Auxiliary().train()
    with pytest.warns(UserWarning, match=r"^the model's auxiliary heads \(second\) are left out") as caught:
        backbone = cut(model, IMAGES)
    assert caught[0].filename == __file__
    assert backbone.stage_names == STAGES
    assert not any("second" in name for name, _ in backbone.named_parameters())
    assert torch.equal(run(backbone, IMAGES, False)[0], run(model, IMAGES, False)[0])
    assert backbone.train()(IMAGES).shape == (4, 5)


# --- stages that are no part of the stem, and equal groups --------------------------------------------


class Blocks(nn.Module):
    """Equal blocks after a patch embedding; the last layers follow the blocks."""

    def __init__(self, blocks: int, tail: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
                for _ in range(blocks)
            )
        )
        self.last = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)) if tail else nn.ReLU()
        self.fc = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.last(self.blocks(self.stem(images)))
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("blocks", "tail", "exits", "expected"),
    [
        (12, False, 1, ("blocks.3", "blocks.7", "blocks.11")),
        (12, False, 4, ("blocks.2", "blocks.5", "blocks.8", "blocks.11")),
        (5, False, 3, ("blocks.0", "blocks.2", "blocks.4")),
        (6, True, 3, ("blocks.1", "blocks.3", "last")),
    ],
)
def test_equal_blocks_are_divided_into_equal_groups(
    blocks: int, tail: bool, exits: int, expected: tuple[str, ...]
) -> None:
    model = Blocks(blocks, tail)
    backbone = cut(model, IMAGES, exits=exits)
    assert backbone.stage_names == expected
    assert [name for name, _ in backbone.stem.named_parameters()] == ["stem.weight", "stem.bias"]
    assert nf.fission(model, exits, grouping="copies", example_input=IMAGES).stage_names == expected


class Stem(nn.Sequential):
    """Two layers in sequence, which are no stage."""


@pytest.mark.parametrize("spoil", ["stem", "downsample"])
def test_no_stage_lies_in_the_stem_or_is_one_downsampling_layer(spoil: str) -> None:
    model = Chain()
    if spoil == "stem":
        model.stem = Stem(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1))
        model.stage1.insert(0, nn.MaxPool2d(2))
        stages = STAGES
    else:
        model.stage2 = nn.Sequential(nn.Conv2d(4, 4, 2, 2))
        stages = ("stage1", "stage3")
    backbone = cut(model, IMAGES)
    assert backbone.stage_names == stages
    assert {name.partition(".")[0] for name, _ in backbone.stem.named_parameters()} == {"stem"}


class Unit(nn.Sequential):
    """Two layers that halve the sides of an image, with or without a branch around a third."""

    def __init__(self, inputs: int, branch: bool) -> None:
        super().__init__(nn.Conv2d(inputs, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.branch = nn.Conv2d(4, 4, 1) if branch else None

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self[2](self[1](self[0](images)))
        return features if self.branch is None else features + self.branch(features)


class Wide(Unit):
    pass


class Deep(Unit):
    pass


class Residual(nn.Sequential):
    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = features + super().forward(features)
        return result


class Row(nn.Sequential):
    """A layer that halves the sides of an image, and residual units."""

    def __init__(self, units: int) -> None:
        blocks = [Residual(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)) for _ in range(units)]
        super().__init__(nn.Conv2d(4, 4, 3, 2, 1), *blocks)


class Head(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([Unit(3, False), Unit(4, False), Wide(4, True), Deep(4, True), nn.Sequential(Unit(4, True))], "234"),
        ([Unit(3, False), Unit(4, True), Unit(4, True), Unit(4, True)], "0123"),  # blocks without a stem
        ([Unit(3, False), Unit(4, False), Unit(4, False)], "012"),  # no branch at all
        ([nn.Conv2d(3, 4, 3, 2, 1), Row(0), Row(1), Row(1), Row(1)], "1234"),  # as EfficientNets begin
    ],
)
def test_a_chain_before_the_first_branch_is_the_stem_unless_its_blocks_go_on(
    units: list[nn.Module], expected: str
) -> None:
    model = nn.Sequential(*units, Head())
    assert cut(model, torch.randn(2, 3, 64, 64)).stage_names == tuple(expected)


def by_pattern(coarse: bool) -> dict[str, str]:
    return {"stem": r"^stem|stage1\.", "blocks": r"^stage(\d)"}


def by_function(coarse: bool) -> Callable[[str], int]:
    return lambda name: int(name.partition(".")[0].removeprefix("stage")) - 1


def by_none(coarse: bool) -> None:
    raise AssertionError("coarse grouping is not implemented")


@pytest.mark.parametrize("group_matcher", [by_pattern, by_function, by_none])
def test_no_stage_lies_in_what_timm_calls_the_stem(
    group_matcher: Callable[[bool], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Chain()
    model.stage1, model.stage2, model.stage3 = Unit(4, True), Unit(4, True), Unit(4, True)
    model.stage4 = Unit(4, True)
    monkeypatch.setattr(
        Chain,
        "features",
        lambda self, images: self.stage4(self.stage3(self.stage2(self.stage1(self.stem(images))))),
    )
    images = torch.randn(2, 3, 64, 64)
    assert cut(model, images).stage_names == (*STAGES, "stage4")
    model.group_matcher = group_matcher  # type: ignore[assignment]
    stem = () if group_matcher is by_none else ("stage1",)
    assert cut(model, images).stage_names == tuple(s for s in (*STAGES, "stage4") if s not in stem)


class Permute(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, features: Tensor) -> Tensor:
        return features.permute(*self.dims)


class ToTokens(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2)


class ToMap(nn.Module):
    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, (self.side, self.side))


@pytest.mark.parametrize("kind", ["tokens", "channels last"])
def test_maps_and_tokens_of_one_number_of_positions_are_one_stage(kind: str) -> None:
    """In stages that embed maps of channels first, and mix them in another form."""
    modules: dict[str, nn.Module] = {}
    for number, side in ((1, 16), (2, 8), (3, 4)):
        channels = 3 if number == 1 else 4
        modules[f"embed{number}"] = nn.Sequential(
            nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)
        )
        tokens = kind == "tokens"
        modules[f"turn{number}"] = ToTokens() if tokens else Permute(0, 2, 3, 1)
        modules[f"mixer{number}"] = Residual(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        modules[f"back{number}"] = ToMap(side) if tokens else Permute(0, 3, 1, 2)
    model = nn.Sequential(OrderedDict(modules))
    model.add_module("head", Head())
    stages = cut(model, torch.randn(2, 3, 32, 32)).stage_names
    assert [name[-1] for name in stages] == ["1", "2", "3"]


class Encoder(nn.Module):
    """Blocks beside a parameter of their parent, which is read once."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.blocks = Blocks(6, False).blocks

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.blocks(features * self.positions)
        return result


def test_blocks_of_a_module_that_owns_parameters_are_found() -> None:
    model = Chain()
    model.stage1, model.stage2, model.stage3 = Encoder(), nn.Identity(), nn.Identity()
    assert cut(model, IMAGES).stage_names == tuple(f"stage1.blocks.{number}" for number in (1, 3, 5))


class _Encoder(nn.Module):
    """PyTorch's own transformer, whose code asks its input whether it is nested."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.encoder(self.patch(images).flatten(2).transpose(1, 2)).mean(1))
        return logits


@pytest.mark.parametrize("stages", [None, ["encoder.layers.1", "encoder.layers.3"]])
def test_the_layers_of_an_encoder_of_pytorch_can_end_stages(stages: list[str] | None) -> None:
    names = cut(_Encoder(), IMAGES[:2], stages).stage_names
    assert names == tuple(stages or (f"encoder.layers.{index}" for index in (0, 1, 3)))


def test_a_module_that_cannot_be_traced_leaves_those_around_it_traced() -> None:
    model = torchvision.models.VisionTransformer(32, 8, 6, 2, 16, 32, num_classes=5)
    images = torch.randn(2, 3, 32, 32)
    blocks = tuple(f"encoder.layers.encoder_layer_{number}" for number in (1, 3, 5))
    assert cut(model, images).stage_names == blocks


class _Again(nn.Module):
    """Blocks of falling size, of which one layer runs again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BasicBlock(8, 8, 2) for _ in range(4))
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks[0](images)
        features = self.blocks[1](self.again(features))
        return self.head(self.again(self.blocks[3](self.blocks[2](features))))


def test_no_stage_ends_between_two_uses_of_a_layer() -> None:
    images = torch.randn(2, 8, 32, 32)
    assert find_stages(_Again(), images)[:-1] == ["blocks.0"]
    assert cut(_Again(), images)(images).shape == (2, 5)


def test_a_view_that_nothing_reads_is_left_out() -> None:
    class Viewed(Chain):
        def features(self, images: Tensor) -> Tensor:
            images.view(-1)
            return super().features(images)

    graph = trace(Viewed(), ModuleTracer())
    assert all(node.op == "output" or node.users for node in graph.nodes)


def test_of_a_chain_one_value_is_live_after_each_layer() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).graph
    assert live_after(graph, set()) == {n: () if n.op == "output" else (n,) for n in graph.nodes}


def test_the_data_of_an_intermediate_is_freed_while_a_model_is_traced() -> None:
    alive: list[int] = []

    class Watched(ShapeTracer):
        def create_proxy(self, *args: object, **kwargs: object) -> object:
            alive.append(sum(isinstance(first, Tensor) for first, _ in self.values.values()))
            return super().create_proxy(*args, **kwargs)

    model = nn.Sequential(*(nn.Conv2d(3, 3, 1, bias=False) for _ in range(20)))
    images = torch.randn(2, 3, 8, 8)
    Watched((images, torch.cat([images, images[:1]]))).trace(model.eval())
    assert len(alive) == 21 and max(alive) <= 3


def test_data_is_not_kept_after_a_trace() -> None:
    *_, attempt = attempts(BranchesOnShape(), IMAGES)
    tracer, _ = attempt()
    assert isinstance(tracer, ShapeTracer)
    assert (4, 4, 8, 8) in {getattr(value, "sizes", ()) for value, _ in tracer.values.values()}
    assert not any(isinstance(value, Tensor) for value, _ in tracer.values.values())


# --- several live tensors ----------------------------------------------------------------------------


class SkipOverStage(Chain):
    def features(self, images: Tensor) -> Tensor:
        first = self.stage1(self.stem(images))
        second = self.stage2(first)
        features: Tensor = self.stage3(second + F.avg_pool2d(first, 2))
        return features


class TwoBranches(Chain):
    """Stages that read and return a list; the second tensor has two rows per image."""

    class Stage(nn.Module):
        def __init__(self, stage: nn.Module, in_place: bool) -> None:
            super().__init__()
            self.stage = stage
            self.rows = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
            self.in_place = in_place

        def forward(self, pair: list[Tensor]) -> list[Tensor]:
            pair[0] = self.stage(pair[0])
            rows = pair[0].mean((2, 3)).repeat_interleave(2, 0)
            before = pair[1].mul_(2) if self.in_place else pair[1] * 2
            return [pair[0], self.rows(before + rows[:, None])]

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.stage1 = self.Stage(self.stage1, in_place)
            self.stage2 = self.Stage(self.stage2, in_place)
            self.stage3 = self.Stage(self.stage3, in_place)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        count = images.shape[0]
        pair = [features, features.mean(3).transpose(1, 2).reshape(2 * count, -1, 4)]
        maps, rows = self.stage3(self.stage2(self.stage1(pair)))
        logits: Tensor = self.fc(maps.mean((2, 3)) + rows.reshape(count, -1, 4).sum(1))
        return logits


@pytest.mark.parametrize("make", [SkipOverStage, TwoBranches])
def test_parts_pass_on_several_tensors_with_a_row_per_image(make: Callable[[], Chain]) -> None:
    model = make()
    backbone = cut(model, IMAGES, None if make is TwoBranches else STAGES).eval()
    assert backbone.stage_names == STAGES
    features = backbone.stages[0](backbone.stem(IMAGES))
    if make is TwoBranches:
        assert [tuple(tensor.shape) for tensor in features] == [(4, 4, 8, 8), (4, 2, 4, 4)]
    else:
        features = backbone.stages[1](features)
        assert [tuple(tensor.shape) for tensor in features] == [(4, 4, 8, 8), (4, 4, 4, 4)]
    for count in (1, 3):
        for training in (False, True):
            images = IMAGES[:count]
            assert torch.equal(run(backbone, images, training)[0], run(model, images, training)[0])


@pytest.mark.parametrize("grouping", ["channels", "weights", "copies"])
def test_networks_of_several_live_tensors_are_divided_deployed_and_stopped_early(grouping: str) -> None:
    net, twin = (
        nf.fission(TwoBranches(in_place), 3, grouping=grouping, example_input=IMAGES)
        for in_place in (True, False)
    )
    net(IMAGES).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    twin(IMAGES)  # the statistics of norms move
    expected = twin.eval()(IMAGES).detach()
    assert torch.equal(net.eval()(IMAGES), expected)
    for joined in (False, True):
        assert torch.allclose(nf.deploy(net, IMAGES, joined=joined)(IMAGES), expected, atol=1e-5)
    order = list(range(3))
    confidence = step_by_step(expected, order, "margin")[1][:, 0]
    cascade = nf.Cascade(net, [float(confidence.median()), 0.0], order=order).eval()
    assert cascade.run(IMAGES).exits_used.unique().tolist() == [1, 2]
    alone = torch.cat([cascade(image[None]) for image in IMAGES])
    assert torch.allclose(cascade(IMAGES), alone, atol=1e-5)


# --- what is refused, and how -----------------------------------------------------------------------


class DataDependent(Chain):
    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        return self.classify(features if features.sum() > 0 else -features)


class OtherInTraining(Chain):
    def classify(self, features: Tensor) -> Tensor:
        return super().classify(features * 2 if self.training else features)


class TwoOutputs(Chain):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(images)
        return logits, logits


class TupleInTraining(Chain):
    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return (2 * logits, logits) if self.training else logits


class NamedOutput(Chain):
    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(images)}


class Tokens(Chain):
    def forward(self, images: Tensor) -> Tensor:
        return self.features(images).flatten(2)


class Tied(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.stage3[4].weight = self.stage1[4].weight


class TiedNorm(Chain):
    """One batch norm without parameters in two stages: its running statistics are shared all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1[2] = self.stage2[2] = nn.BatchNorm2d(4, affine=False)


class Recurrent(Chain):
    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.stage2(self.stage1(self.stage1(self.stem(images))))
        return features


class Unused(Chain):
    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.stage2(self.stage1(self.stem(images)))
        return features


class FrozenStem(Chain):
    def features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            stem = self.stem(images)
        features: Tensor = self.stage2(self.stage1(stem))
        return features


class HalfPrecision(Chain):
    def features(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features: Tensor = self.stage2(self.stage1(self.stem(images)))
        return features.float()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))


@pytest.mark.parametrize(
    ("model", "stages", "message"),
    [
        (
            DataDependent,
            None,
            r"^model must be traceable .*, got DataDependent \(.*\); pass stages=\[.*Backbone",
        ),
        (
            FrozenStem,
            None,
            r"^model must be traceable .*, got FrozenStem \(its code sets torch\.no_grad\(\) for a part of",
        ),
        (
            HalfPrecision,
            ["stage1", "stage2"],
            r"^model must be traceable .*, got HalfPrecision \(its code sets torch\.autocast\(\) for a part",
        ),
        (
            OtherInTraining,
            None,
            r"^model must be .*, got OtherInTraining, .* differs in train mode; move what depends on them",
        ),
        (
            TwoOutputs,
            None,
            r"^model must be a classifier whose output is one tensor .*, got TwoOutputs with output tuple",
        ),
        (
            NamedOutput,
            None,
            r"^model must be a classifier whose output is one tensor .*, got NamedOutput with output .*dict",
        ),
        (
            Tokens,
            None,
            r"one tensor \(batch, classes.*\), got Tokens with output shape \(2, 4, 4\) in eval mode$",
        ),
        (
            Chain,
            ["stage1", "stge2"],
            r"^stages must be distinct .*, got \['stage1', 'stge2'\]; there is no 'stge2', try \['stage1'",
        ),
        (Chain, [""], r"^stages must be distinct names of modules of Chain, got \[''\]"),
        (Chain, [], r"^stages must be distinct names of modules of Chain, got \[\]$"),
        (Chain, ["stage1", "stage1"], r"^stages must be distinct names .*, got \['stage1', 'stage1'\]$"),
        (
            Chain,
            ["stage2", "stage1"],
            r"^stages must be in the order the modules run, got \['stage2', 'stage1'\]$",
        ),
        (Recurrent, ["stage1", "stage2"], r"^stages must be modules that run once.*'stage1'.* try \['stage"),
        (Unused, list(STAGES), r"'stage3'.* cannot end a stage"),
        (Tied, None, r"^stages must be .*, got 'stage3.4.weight', used in 'stem' and in 'stage3'; untie it"),
        (
            TiedNorm,
            None,
            r"^stages must be .*, got 'stage\d.2.running_mean', used in 'stage1' and in 'stage2'; untie it",
        ),
        (
            mlp,
            None,
            r"^model must be a network in which stages are found, got Sequential without any; pass a netf",
        ),
        (
            lambda: nn.Sequential(*mlp(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)),
            None,
            r"got Sequential without any; pass stages=\['1', '2'\], or a netfission.Backbone of your own",
        ),
        (TupleInTraining, None, r"got TupleInTraining with output tuple in train mode alone; wrap it"),
        (
            lambda: timm.create_model("resnet18", features_only=True),
            None,
            r"got \w+ with output list in eval mode; it has no classifying layer: make it with num_classes=N",
        ),
        (
            lambda: timm.create_model("resnet18", num_classes=0, global_pool=""),
            None,
            r"got ResNet with output shape .*; it has no classifying layer: make it with num_classes=N",
        ),
    ],
)
def test_refused(model: Callable[[], nn.Module], stages: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        cut(model(), IMAGES[:2], stages)
    assert "\n" not in str(raised.value)


def convolutional(*, norm: bool) -> nn.Sequential:
    """A network whose last convolution gives one map per class, with or without a norm after it."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 8, 1), (8, 8, 2), (8, 5, 2)):
        layers += [nn.Conv2d(inputs, 8, 3, stride, 1), nn.ReLU(), nn.Conv2d(8, outputs, 1)]
        layers += [nn.BatchNorm2d(outputs) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def without_fc(name: str) -> nn.Module:
    model = create_model(name, CLASSES)
    model.fc = nn.Identity()
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("resnet18", num_classes=0),
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=0),  # ends with a convolution
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32),
        lambda: without_fc("torchvision/resnet18"),
    ],
    ids=["timm resnet", "timm mobilenet", "timm vit", "torchvision resnet"],
)
def test_a_feature_extractor_is_refused(make: Callable[[], nn.Module]) -> None:
    expected = (
        r"^model must be a classifier, got \w+ that ends without a classifying layer; give it one "
        r"\(num_classes=N\), or end the stages before that layer \(stages=\[…\]\)$"
    )
    with pytest.raises(ValueError, match=expected):
        cut(make(), torch.zeros(2, 3, 32, 32))


def test_classifying_layers_of_all_kinds_are_seen() -> None:
    replaced = timm.create_model("resnet18", num_classes=0)
    replaced.fc = nn.Linear(512, CLASSES)
    features = timm.create_model("test_resnet", num_classes=0)
    followed = nn.Sequential(features, nn.Linear(features.num_features, CLASSES))
    normalised = nn.Sequential(*convolutional(norm=False), nn.Linear(5, 5), nn.BatchNorm1d(5))
    for model in (replaced, followed, convolutional(norm=False), normalised):
        cut(model, torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"a classifying layer; .* end the stages before"):
        cut(convolutional(norm=True), torch.randn(2, 3, 32, 32))
    backbone = cut(convolutional(norm=True), torch.randn(2, 3, 32, 32), ["9", "11"])
    assert isinstance(backbone.head.get_submodule("12"), nn.Conv2d)


def test_parameters_shared_within_one_stage_are_fine() -> None:
    model = Chain()
    model.stage2[4].weight = model.stage2[1].weight
    backbone = cut(model, IMAGES)
    assert torch.equal(backbone(IMAGES), model(IMAGES))
    net = nf.fission(model, 2, example_input=IMAGES)
    (tied,) = {id(net.paths[1].get_parameter(f"stages.0.stage2.{i}.weight")) for i in (1, 4)}
    assert tied
    net(IMAGES).sum().backward()
    assert torch.equal(nf.fission(model, 1, example_input=IMAGES)(IMAGES)[:, 0], model(IMAGES))


@pytest.mark.parametrize("model", ["wrn-16-1", "timm/resnet18", "timm/vit_tiny_patch16_224"])
def test_the_names_suggested_do(model: str, small_model: Callable[[str, int], nn.Module]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = small_model(model, CLASSES)
    side = 64 if "vit" in model else 32
    images = torch.randn(2, 3, side, side)
    with pytest.raises(ValueError, match="there is no 'nothing', try") as raised:
        cut(network, images, ["nothing"])
    suggested = re.findall(r"'([^']+)'", str(raised.value).rpartition("try ")[2])
    assert len(suggested) > 1
    assert cut(network, images, suggested).stage_names == tuple(suggested)


def test_images_that_do_not_fit_the_model_are_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"^example_input must be accepted by the network, got float32 of shape \(2, 1, 8, 8\) \(",
    ) as raised:
        cut(Chain(), torch.randn(2, 1, 8, 8))
    assert "\n" not in str(raised.value)


def test_images_that_fit_eval_mode_alone_are_named() -> None:
    class Auxiliary(Chain):
        def classify(self, features: Tensor) -> Tensor:
            if self.training:
                F.avg_pool2d(features, 5)  # as auxiliary heads of Inception
            return super().classify(features)

    with pytest.raises(ValueError, match=r"^example_input must be accepted by the network, got .*too small"):
        cut(Auxiliary(), IMAGES)


# --- in-place operations at the beginning of a stage ------------------------------------------------


class AddsInPlace(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, features: Tensor) -> Tensor:
        return features.add_(1.0) if self.inplace else features + 1.0


FIRST: dict[str, Callable[[bool], nn.Module]] = {
    "relu": lambda inplace: nn.ReLU(inplace),
    "nested": lambda inplace: nn.Sequential(nn.Identity(), nn.Hardtanh(-0.1, 0.1, inplace)),
    "method": AddsInPlace,
    "dropout": lambda inplace: nn.Dropout(0.5, inplace),  # overwrites in train mode only
}


class PreActivation(Chain):
    def __init__(self, first: Callable[[bool], nn.Module], inplace: bool) -> None:
        super().__init__()
        for stage in (self.stage1, self.stage2, self.stage3):
            stage[0] = first(inplace)


def outcome(net: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits in eval mode, in train mode, and the gradients of all parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        calm = net.eval()(images.clone())
        logits = net.train()(images.clone())
        logits.square().sum().backward()
    return [calm.detach(), logits.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("branch_after", [[1], [2], [1, 1, 2]], ids=str)
@pytest.mark.parametrize("first", FIRST)
def test_a_stage_that_overwrites_its_input_leaves_the_other_paths_theirs(
    first: str, branch_after: list[int]
) -> None:
    spoilt, twin = (
        nf.fission(
            PreActivation(FIRST[first], inplace),
            len(branch_after) + 1,
            branch_after=branch_after,
            stages=STAGES,
            example_input=IMAGES,
        )
        for inplace in (True, False)
    )
    expected = outcome(twin, IMAGES)
    results = outcome(spoilt, IMAGES)
    assert len(results) == len(expected) > 2
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_a_stage_of_a_backbone_of_ones_own_may_overwrite_its_input_too() -> None:
    def build(inplace: bool) -> nn.Module:
        model = PreActivation(FIRST["method"], inplace)
        stages = [model.stage1, model.stage2, model.stage3]
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc)
        backbone = nf.Backbone(model.stem, stages, head, STAGES)
        return nf.fission(backbone, 2, grouping="copies", example_input=IMAGES)

    with torch.no_grad():
        spoilt, twin = (build(inplace).eval()(IMAGES.clone()) for inplace in (True, False))
    assert torch.equal(spoilt, twin)


def test_a_module_that_turns_gradients_off_within_itself_stays_whole() -> None:
    class NoGradients(nn.Sequential):
        def forward(self, features: Tensor) -> Tensor:
            with torch.no_grad():
                result: Tensor = super().forward(features)
            return result

    model = Chain()
    model.stage1 = NoGradients(*model.stage1)  # type: ignore[assignment]
    backbone = cut(model, torch.randn(2, 3, 8, 8), ["stage1", "stage2"])
    backbone(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is None for parameter in backbone.stages[0].parameters())
    assert all(parameter.grad is not None for parameter in backbone.stages[1].parameters())
