"""The same weights give the same outputs in torch_uncertainty, whose layers are another implementation."""

import re
import warnings
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import nn

from netfission.config import FissionConfig, MethodConfig
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.batch_ensemble import RankOne
from netfission.methods.masksembles import Masked
from netfission.methods.mimo import draw_orders
from netfission.methods.packed import PackedLinear
from netfission.methods.registry import find_method
from netfission.models import create_model

pytestmark = pytest.mark.skipif(find_spec("torch_uncertainty") is None, reason="needs the extra peers")


def library(part: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(f"torch_uncertainty.{part}")


def build(method: str, exits: int) -> nn.Module:
    create = partial(call_with_seed, partial(create_model, "cifar-resnet18-w16", 10))
    plan = BuildPlan(create, FissionConfig(exits=exits), torch.zeros(2, 3, 8, 8))
    network = find_method(MethodConfig(method)).build(plan)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network


def resnet(kind: str, exits: int, **settings) -> nn.Module:
    """The library's ResNet-18 of a quarter of the width."""
    make = getattr(library("models.classification"), f"{kind}_resnet")
    return make(
        in_channels=3, num_classes=10, arch=18, num_estimators=exits, width_multiplier=0.25, conv_bias=False,
        style="cifar", **settings,
    )  # fmt: skip


def compare(network: nn.Module, peer: nn.Module, exits: int, *names: tuple[str, str]) -> None:
    """Load the peer with the network's weights, called as it calls them, and run both on images."""
    state = {}
    for name, tensor in network.network.state_dict().items():
        for layer, theirs in names:
            name = re.sub(layer, theirs, name)
        state[name] = tensor
    peer.load_state_dict(state)
    images = torch.randn(4, 3, 8, 8)
    outputs = peer.eval()(images).unflatten(0, (exits, 4)).transpose(0, 1)
    torch.testing.assert_close(network.eval()(images), outputs)
    assert (outputs[:, 0] - outputs[:, 1]).abs().max() > 1e-2


def test_batch_ensemble():
    names = [
        (r"^fc\.layer", "linear.linear"),
        ("^fc", "linear"),
        (r"\.layer\.", ".conv."),
        (r"\.([rs])$", r".\1_group"),
    ]
    peer = resnet("batched", 3)
    for stage in (peer.layer2, peer.layer3, peer.layer4):  # whose shortcuts the library leaves plain
        stage[0].shortcut[0] = library("layers").BatchConv2d.from_conv2d(stage[0].shortcut[0], 3)
    compare(build("batch-ensemble", 3), peer, 3, *names)


def test_packed():
    names = [(r"(conv\d|shortcut\.0)\.", r"\1.conv."), ("^fc", "linear")]
    compare(build("packed", 4), resnet("packed", 4, alpha=2, gamma=1), 4, *names)


def test_mimo():
    compare(build("mimo", 3), resnet("mimo", 3), 3, ("^fc", "linear"))


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_orders_of_mimo(rho):
    images, labels = torch.arange(7.0).view(7, 1), torch.arange(7)
    torch.manual_seed(2)
    shown, _ = library("transforms").MIMOBatchFormat(3, rho, 4)((images, labels))
    torch.manual_seed(2)
    assert torch.equal(draw_orders(7, 3, 4, rho), shown.view(3, 28).long())


@pytest.mark.parametrize("groups", [1, 2])
def test_layers_of_batch_ensemble(groups):
    layers = library("layers")
    generator = torch.Generator().manual_seed(0)
    peer = layers.BatchConv2d(4, 6, 3, 3, stride=2, padding=1, groups=groups)
    layer = RankOne(nn.Conv2d(4, 6, 3, 2, 1, groups=groups), 3, generator)
    linear, linear_layer = layers.BatchLinear(4, 6, 3), RankOne(nn.Linear(4, 6), 3, generator)
    for one, other, inner in ((peer, layer, "conv"), (linear, linear_layer, "linear")):
        nn.init.normal_(other.bias)
        one.load_state_dict(
            {
                f"{inner}.weight": other.layer.weight,
                "r_group": other.r,
                "s_group": other.s,
                "bias": other.bias,
            }
        )
    images, features = torch.randn(6, 4, 5, 5), torch.randn(6, 4)
    torch.testing.assert_close(layer(images), peer(images))
    torch.testing.assert_close(linear_layer(features), linear(features))


def test_masks():
    peer = library("layers").MaskedConv2d(12, 6, 3, num_estimators=3, scale=2.0)
    layer = Masked(nn.Conv2d(12, 6, 3), peer.mask.masks.float())
    peer.conv.load_state_dict(layer.layer.state_dict())
    images = torch.randn(6, 12, 5, 5)
    torch.testing.assert_close(layer(images), peer(images))


def test_packed_linear():
    peer = library("layers").PackedLinear(6, 9, alpha=2, num_estimators=3)
    layer = PackedLinear(peer.weight.detach(), peer.bias.detach())
    for features in (torch.randn(2, 12), torch.randn(2, 5, 12)):
        torch.testing.assert_close(layer(features), peer(features))
