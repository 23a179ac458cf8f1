import pytest
import torch
from torch import nn

from netfission.models import CifarResNet


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_220_132), (34, 21_328_292), (50, 23_705_252)])
def test_published_parameter_counts(depth: int, parameters: int) -> None:
    with torch.device("meta"):
        model = CifarResNet(depth, 100)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("depth", [18, 50])
def test_stages_keep_then_halve_the_resolution(depth: int) -> None:
    model = CifarResNet(depth, 7, in_channels=1, base_width=4)
    shapes = []
    for name in ("bn1", "layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:]))
        )
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    expansion = 4 if depth == 50 else 1
    stages = [(4 * expansion << i, 32 >> i, 32 >> i) for i in range(4)]
    assert shapes == [(4, 32, 32), *stages]


def test_traceable_and_input_untouched() -> None:
    model = CifarResNet(18, 5, base_width=4).eval()
    images = torch.randn(2, 3, 16, 16)
    before = images.clone()
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(images), model(images))
    assert torch.equal(images, before)


def test_initialised_by_he_over_fan_out() -> None:
    torch.manual_seed(0)
    model = CifarResNet(18, 10, base_width=32)
    conv = model.layer4[0].conv1
    expected = (2 / (conv.out_channels * 9)) ** 0.5
    assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(bool((m.weight == 1).all()) and not m.bias.any() for m in norms)


def test_every_parameter_gets_a_gradient() -> None:
    model = CifarResNet(50, 5, base_width=2)
    model(torch.randn(2, 3, 16, 16)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bad_depth_and_width() -> None:
    with pytest.raises(ValueError, match="depth must be one of 18, 34, 50, got 20"):
        CifarResNet(20, 10)
    with pytest.raises(ValueError, match="base_width must be a positive integer, got 0"):
        CifarResNet(18, 10, base_width=0)
