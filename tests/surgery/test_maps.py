"""Networks of maps: a class for every pixel, with skip connections, dictionaries and sizes of images."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.models.segmentation.lraspp import LRASPP

import netfission as nf
from netfission.inference.deployment.convolution import FusedConv2d
from netfission.network import LinearMapExit
from netfission.profiling.macs import count_macs
from netfission.surgery.backbone import cut

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
OTHER_SIZE = torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(1))


def block(inputs: int, outputs: int) -> nn.Sequential:
    layers = (
        (nn.Conv2d(count, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        for count in (inputs, outputs)
    )
    return nn.Sequential(*(layer for three in layers for layer in three))


class UNet(nn.Module):
    """An encoder and a decoder whose features are concatenated (Ronneberger et al. 2015)."""

    def __init__(self, classes: int, widths: tuple[int, ...] = (12, 24, 48)) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.first = block(3, widths[0])
        self.down = nn.ModuleList(block(low, high) for low, high in pairs)
        self.up = nn.ModuleList(nn.Conv2d(high, low, 1) for low, high in pairs)
        self.join = nn.ModuleList(block(2 * low, low) for low, _ in pairs)
        self.classifier = nn.Conv2d(widths[0], classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        skips = [self.first(images)]
        for down in self.down:
            skips.append(down(F.max_pool2d(skips[-1], 2)))
        features = skips.pop()
        for up, join in zip(reversed(self.up), reversed(self.join), strict=True):
            skip = skips.pop()
            features = F.interpolate(up(features), size=skip.shape[-2:], mode="bilinear")
            features = join(torch.cat([skip, features], dim=1))
        return self.classifier(features)


class EarlySize(UNet):
    """Reads the size of the images before all layers, in three ways, and gives maps of that size."""

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        half = images.size()[2] // 2, images.size(3) // 2
        maps = super().forward(images)
        return F.interpolate(F.interpolate(maps, size=half), size=(height, width))


def fcn(block: type[BasicBlock | Bottleneck] = BasicBlock) -> nn.Module:
    """A small FCN of torchvision with an auxiliary head."""
    layers = ResNet(block, [1, 1, 1, 1], num_classes=2)
    body = IntermediateLayerGetter(layers, {"layer4": "out", "layer3": "aux"})
    return FCN(body, FCNHead(512 * block.expansion, 5), FCNHead(256 * block.expansion, 5))


def lraspp() -> nn.Module:
    """torchvision's LR-ASPP on a small MobileNetV3, whose features of two sizes its head reads."""
    features = models.mobilenet_v3_small(weights=None, dilated=True).features
    body = IntermediateLayerGetter(features, {"3": "low", "12": "high"})
    return LRASPP(body, low_channels=24, high_channels=576, num_classes=5, inter_channels=32)


MODELS = {"U-Net": lambda: UNet(5), "size": lambda: EarlySize(5), "FCN": fcn, "LR-ASPP": lraspp}


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A model of maps, and the same with three exits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[request.param]().eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model's auxiliary heads")
        return model, divided(model)


def divided(model: nn.Module, exits: int = 3, grouping: str = "channels") -> nn.Module:
    return nf.fission(model, exits, grouping=grouping, example_input=IMAGES).eval()


def maps_of(model: nn.Module, images: Tensor) -> Tensor:
    maps = model(images)
    return maps["out"] if isinstance(maps, dict) else maps


@pytest.mark.filterwarnings("ignore:the model's auxiliary heads")
@torch.no_grad()
def test_one_exit_is_the_model_for_images_of_any_size(pair: tuple[nn.Module, nn.Module]) -> None:
    model, _ = pair
    network = divided(model, exits=1)
    for images in (IMAGES, OTHER_SIZE):
        assert network(images).shape == (len(images), 1, 5, *images.shape[2:])
        assert network(images)[:, 0].equal(maps_of(model, images))


@pytest.mark.filterwarnings("ignore:the model's auxiliary heads")
def test_exits_are_independent_smaller_networks(pair: tuple[nn.Module, nn.Module]) -> None:
    model, network = pair
    maps = network(OTHER_SIZE)
    assert maps.shape == (1, 3, 5, *OTHER_SIZE.shape[2:])
    own = [[*path.stages[-1].parameters(), *path.head.parameters()] for path in network.exit_paths]
    for exit_ in range(3):
        others = [parameter for other in range(3) if other != exit_ for parameter in own[other]]
        total = maps[:, exit_].square().sum()
        gradients = torch.autograd.grad(total, [*own[exit_], *others], retain_graph=True)
        assert not any(gradient.any() for gradient in gradients[len(own[exit_]) :])
        assert gradients[len(own[exit_]) - 1].any()
    assert 0.9 < count_macs(network, IMAGES).dense / count_macs(cut(model, IMAGES), IMAGES).dense < 1.05
    whole, last = cut(model, IMAGES).stages[-1], network.paths[2].stages[-1]
    assert 2 * count(last) < count(whole)  # really removed


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def test_deployed_networks_give_the_same_maps(pair: tuple[nn.Module, nn.Module]) -> None:
    _, network = pair
    deployed = nf.deploy(network, IMAGES, joined=True)
    for images in (IMAGES, OTHER_SIZE):
        torch.testing.assert_close(deployed(images), network(images), rtol=1e-4, atol=1e-5)
    assert count(deployed) <= count(network)


@pytest.mark.parametrize("name", ["U-Net", "LR-ASPP"])
def test_joined_paths_that_pass_on_several_tensors_run_each_layer_once(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
    single, joined = (
        nf.deploy(nf.fission(model, exits, grouping="channels", example_input=IMAGES), IMAGES, joined=True)
        for exits in (1, 3)
    )
    layers, joined_layers = (
        sum(isinstance(layer, FusedConv2d) for layer in deployed.modules()) for deployed in (single, joined)
    )
    assert joined_layers == layers


def test_stages_of_decoders_are_found() -> None:
    names = ("down.0", "up.1", "up.0", "join.0")
    assert cut(UNet(5), IMAGES).stage_names == names
    within = nn.Sequential(UNet(5), nn.Identity())
    assert cut(within, IMAGES).stage_names == tuple(f"0.{name}" for name in names)
    model = models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
    assert cut(model, IMAGES).stage_names == ("backbone.1", "backbone.3", "backbone.6", "classifier.scale")


def test_auxiliary_maps_are_left_out() -> None:
    with pytest.warns(
        UserWarning, match=r"auxiliary heads \(aux\) are left out: exits replace them"
    ) as caught:
        backbone = cut(fcn(), IMAGES)
    assert caught[0].filename == __file__
    assert backbone.stage_names == (
        "backbone.layer1",
        "backbone.layer2",
        "backbone.layer3",
        "backbone",
    )
    assert not any(name.startswith("aux_classifier") for name, _ in backbone.named_parameters())


@pytest.mark.parametrize("grouping", ["weights", "copies"])
def test_other_groupings_divide_maps(grouping: str) -> None:
    assert divided(UNet(5), 2, grouping)(OTHER_SIZE).shape == (1, 2, 5, *OTHER_SIZE.shape[2:])


def test_pruning_and_reconstruction_read_labels_of_pixels() -> None:
    batches = [(IMAGES, torch.randint(5, (2, 64, 96), generator=torch.Generator().manual_seed(0)))]
    pruned = nf.fission(UNet(5), 2, sparsity=0.5, batches=batches)
    assert pruned(IMAGES).shape == (2, 2, 5, 64, 96)
    model = UNet(5).eval()
    settings = {"grouping": "channels", "branch_after": "late", "batches": batches}
    solved, cut_off = (
        nf.fission(model, 2, reconstruct=reconstruct, **settings)(IMAGES).mean(dim=1)
        for reconstruct in (True, False)
    )
    errors = [(maps - model(IMAGES)).square().mean() for maps in (solved, cut_off)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("name", ["U-Net", "size", "LR-ASPP"])
def test_linear_exits_give_maps_of_the_size_of_the_images(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
    settings = {"linear_exits": [1, 2], "linear_weight": 0.5, "reconstruct": True}
    batches = [(IMAGES, torch.zeros(2, 64, 96, dtype=torch.int64))]
    network = nf.fission(
        model, 1, grouping="channels", example_input=IMAGES, batches=batches, **settings
    ).eval()
    assert network.exit_weights == (1, 0.5, 0.5)
    deployed = nf.deploy(network, IMAGES)
    for images in (IMAGES, OTHER_SIZE):
        maps = network(images)
        assert maps.shape == (len(images), 3, 5, *images.shape[2:])
        assert maps[:, 0].equal(maps_of(model, images))
        torch.testing.assert_close(deployed(images), maps, rtol=1e-4, atol=1e-5)


def test_a_linear_exit_reads_all_maps_that_a_stage_passes_on() -> None:
    features = tuple(torch.randn(2, channels, 8, 12).requires_grad_() for channels in (4, 6))
    fine = torch.randn(2, 7, 32, 48)
    exit_ = LinearMapExit((fine, *features, torch.zeros(2, 3)), 5, IMAGES)
    logits = exit_((fine, *features, torch.zeros(2, 3)))
    first, second = exit_.linear
    at_corner = sum(
        layer.weight[:, :, 0, 0] @ tensor[0, :, 0, 0]
        for layer, tensor in zip((first, second), features, strict=True)
    )
    torch.testing.assert_close(logits[0, :, 0, 0], at_corner + first.bias)
    assert second.bias is None  # one is enough
    assert LinearMapExit((fine, fine), 5, IMAGES).maps == [0, 1]  # all that there is
    assert all(gradient.any() for gradient in torch.autograd.grad(logits.square().sum(), features))
    with pytest.raises(ValueError, match=r"maps .* for linear exits, got features of 2 dim"):
        LinearMapExit(torch.zeros(2, 3), 5, IMAGES)


def test_logits_of_linear_exits_have_the_size_of_other_images() -> None:
    """The finest map tells it: the coarsest is rounded the most."""
    exit_ = LinearMapExit(
        (torch.rand(1, 4, 45, 60), torch.rand(1, 8, 12, 15)), 5, torch.zeros(1, 3, 180, 240)
    )
    assert exit_((torch.rand(1, 4, 54, 72), torch.rand(1, 8, 14, 18))).shape == (1, 5, 216, 288)


def test_maps_of_one_class_are_refused() -> None:
    with pytest.raises(ValueError, match="UNet with one logit per pixel"):
        cut(UNet(1), IMAGES)
