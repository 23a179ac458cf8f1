import pytest
import torch
import torch.nn.functional as F

from netfission.models import WideResNet
from netfission.models.wide_resnet import PreActivationBlock


@pytest.mark.parametrize(
    ("depth", "width", "classes", "parameters"),
    # Published to one decimal: 36.5 M (also with 10 classes), 0.7 M and 8.9 M.
    [
        (28, 10, 100, 36_536_884),
        (28, 10, 10, 36_479_194),
        (16, 2, 10, 691_674),
        (40, 4, 10, 8949210),
    ],
)
def test_published_parameter_counts(depth: int, width: int, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = WideResNet(depth, width, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_stages_keep_then_halve_the_resolution() -> None:
    model = WideResNet(16, 2, 7, in_channels=1)
    shapes = []
    for name in ("conv1", "block1", "block2", "block3"):
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:]))
        )
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert shapes == [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)]


def test_block_against_its_formula() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 8, 8)
    for outputs, stride in ((6, 1), (10, 2)):
        block = PreActivationBlock(6, outputs, stride).train()
        before = x.clone()
        activated = F.batch_norm(x, None, None, training=True).clamp(min=0)
        hidden = F.conv2d(activated, block.conv1.weight, stride=stride, padding=1)
        hidden = F.batch_norm(hidden, None, None, training=True).clamp(min=0)
        residual = F.conv2d(hidden, block.conv2.weight, padding=1)
        identity = x if block.shortcut is None else F.conv2d(activated, block.shortcut.weight, stride=stride)
        torch.testing.assert_close(block(x), identity + residual)
        assert torch.equal(x, before)


def test_traceable() -> None:
    model = WideResNet(10, 1, 5).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = WideResNet(10, 4, 10)
    conv = model.block3[0].conv1
    expected = (2 / (conv.out_channels * 9)) ** 0.5
    assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert not model.fc.bias.any()


@pytest.mark.parametrize("depth", [4, 27, 0, -2])
def test_bad_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 4 .*, got {depth}"):
        WideResNet(depth, 2, 10)


def test_bad_width() -> None:
    with pytest.raises(ValueError, match="width must be a positive integer, got 0"):
        WideResNet(16, 0, 10)
