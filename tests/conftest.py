"""What all tests share.

What is slow to import is imported where it is used: the process that hands the tests to others reads this
file as well, and they wait for it.
"""

from __future__ import annotations

import functools
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from netfission.config import DataConfig, FissionConfig, ModelConfig, RunConfig, TrainingConfig
from netfission.utils.quick import lean_metrics, without_collection

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import nn

# No test depends on how fast the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Search for garbage seldom, and never in what the tests import: that takes a tenth of their time."""
    lean_metrics()
    with without_collection():
        result = yield
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    return result


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else some packages complain, as Python ends, that their objects are still there


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out those marked as thorough, and reverse the order, as none needs another one before it.

    `make matrix` asks for all tests, and in one row for the reverse order.
    """
    if not os.environ.get("NETFISSION_THOROUGH"):
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(pytest.mark.skip(reason="NETFISSION_THOROUGH=1 runs it"))
    if os.environ.get("NETFISSION_REVERSED_TESTS"):
        items.reverse()


def settings(**changes) -> RunConfig:
    """A run of seconds: 200 real digits, a small network, two epochs."""
    flat = RunConfig(
        DataConfig("digits", limit_per_class=20),
        ModelConfig("wrn-10-1"),
        FissionConfig(exits=2, sparsity=0.5, seed=3),
        TrainingConfig(epochs=2, batch_size=50, accelerator="cpu", pruning_batches=1),
    ).to_dict()
    return RunConfig.from_dict(flat | changes)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a finished run; not to be changed."""
    from netfission.runs.train import train

    path = tmp_path_factory.mktemp("runs") / "run"
    train(settings(), path, progress=False)
    return path


@pytest.fixture(scope="session")
def settings_of():
    """`settings` itself, for tests that change some."""
    return settings


def small_network(name: str, num_classes: int) -> nn.Module:
    """The network of this name with its stages and kinds of layers, but fewer blocks and channels.

    What divides, exports or deploys it runs the same code in a fraction of the time.
    """
    import timm
    import torch
    import torchvision
    from timm.models.regnet import RegNet, RegNetCfg
    from torch import nn
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
    from torchvision.models.vgg import VGG, make_layers

    from netfission.models import create_model

    library, _, model = name.rpartition("/")
    classes = {"num_classes": num_classes}
    if library == "torchvision" and model in ("resnet18", "resnet50"):
        return ResNet(BasicBlock if model == "resnet18" else Bottleneck, [1, 1, 1, 1], **classes)
    if library == "torchvision" and model == "densenet121":
        return torchvision.models.DenseNet(16, (2, 4, 8, 4), 32, **classes)
    if library == "torchvision" and model == "convnext_tiny":
        widths = [(40, 80, 1), (80, 160, 1), (160, 320, 2), (320, None, 1)]
        return ConvNeXt([CNBlockConfig(*width) for width in widths], 0.1, **classes)
    if library == "torchvision" and model == "vgg11_bn":
        widths = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]
        with torch.device("meta"):  # nine tenths of its weights are in the head, which is replaced
            network = VGG(nn.Identity(), init_weights=False, **classes)
        network.features = make_layers(widths, batch_norm=True)
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        network.classifier = nn.Sequential(
            nn.Linear(64, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, num_classes)
        )
        return network
    if library == "timm" and model == "regnety_002":
        return RegNet(RegNetCfg(depth=5, w0=24, wa=48.0, wm=2.2, group_size=8, se_ratio=0.25), **classes)
    if library == "timm" and model in _SHALLOW:
        family, make = _SHALLOW[model]
        make = getattr(getattr(timm.models, family), make)
        return make(model, channel_multiplier=0.5, depth_multiplier=0.3, **classes)
    if library == "timm" and model in _SMALL:
        return timm.create_model(model, **_SMALL[model], **classes)
    return create_model(name, num_classes)


_SHALLOW = {
    "efficientnet_b0": ("efficientnet", "_gen_efficientnet"),
    "mobilenetv2_100": ("efficientnet", "_gen_mobilenet_v2"),
    "mobilenetv3_small_100": ("mobilenetv3", "_gen_mobilenet_v3"),
}
_RESNET = {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64)}
_SMALL = {
    "resnet18": _RESNET,
    "resnet50": _RESNET,
    "resnext50_32x4d": {"layers": (1, 1, 1, 1)},  # its groups set its width
    "convnext_atto": {"depths": (1, 1, 2, 1)},
    "convnextv2_atto": {"depths": (1, 1, 2, 1)},
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 48, "depth": 6},
    "deit_tiny_patch16_224": {"img_size": 64, "embed_dim": 48, "depth": 6},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 4,
        "embed_dim": 24,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
    },
}


@pytest.fixture
def undrawn_figures(monkeypatch) -> None:
    """Figures are made, but not drawn, for tests that look at none: drawing takes most of a report's time."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "draw", lambda *_: None)


@pytest.fixture(scope="session")
def small_model():
    """`small_network` itself."""
    return small_network


@pytest.fixture(scope="session")
def one_table_of_operators():
    """Make PyTorch's table of ONNX operators once: every export makes it anew, in a fifth of its time."""
    registration = pytest.importorskip("torch.onnx._internal.exporter._registration")
    pytest.importorskip("onnxscript")
    registry = registration.ONNXRegistry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(functools.cache(registry.from_torchlib)))
        yield
