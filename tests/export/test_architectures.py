"""Networks of every kind come back and leave as they were; `benchmarks/exports.py` tries larger ones too."""

import itertools
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import exports

SMALL = [
    "cifar-resnet18-w16",
    "wrn-10-1",
    "torchvision/densenet121",
    "torchvision/mobilenet_v3_small",
    "torchvision/vgg11_bn",
    "timm/resnet18",
    "timm/convnext_atto",
    "timm/convnextv2_atto",
    "timm/regnety_002",
    "timm/test_efficientnet",
    "timm/mobilenetv3_small_100",
    "timm/vit_tiny_patch16_224",
]


@pytest.fixture
def measure(small_model, monkeypatch):
    """`exports.measure` of small networks of these names on small images."""

    def create(model, num_classes, in_channels):
        assert in_channels == 3
        return small_model(model, num_classes)

    def run(model, grouping, formats):
        monkeypatch.setitem(exports.MODELS, model, (64, None))
        with warnings.catch_warnings():
            # The paths of some stages cost more than the stage; and PyTorch's own exporter warns.
            warnings.simplefilter("ignore")
            return exports.measure(exports.build_classifier(model, grouping), model, formats)

    monkeypatch.setattr(exports, "create_single", create)
    return run


# The layers of a path have widths of their own by channels alone.
@pytest.mark.parametrize(
    ("model", "grouping"),
    [
        *((model, "channels") for model in SMALL),
        *itertools.product(
            ["wrn-10-1", "timm/regnety_002", "timm/vit_tiny_patch16_224"],
            [grouping for grouping in exports.GROUPINGS if grouping != "channels"],
        ),
    ],
)
def test_a_saved_network_of_any_kind_comes_back_bit_for_bit(model, grouping, measure):
    assert measure(model, grouping, []) == {"loaded": True}


@pytest.mark.parametrize(
    ("model", "format"),
    [
        pytest.param("timm/convnext_atto", "onnx", marks=pytest.mark.thorough),
        ("timm/regnety_002", "onnx"),
        ("timm/test_vit", "onnx"),
        pytest.param("timm/test_vit", "pt2", marks=pytest.mark.thorough),
    ],
)
def test_other_than_plain_convolutions_are_exported(model, format, measure):
    assert measure(model, "channels", [format])[format]["difference"] < 1e-5
