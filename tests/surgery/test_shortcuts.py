import copy

import pytest
import torch
from torch import Tensor, nn

import netfission as nf
from netfission.models import create_model
from netfission.models.cifar_resnet import BasicBlock
from netfission.surgery.masks import kept_masks
from netfission.surgery.shortcuts import shortcut_weights

FEATURES = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Sum(nn.Module):
    """Branches that are added."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, features: Tensor) -> Tensor:
        first, *others = (branch(features) for branch in self.branches)
        for other in others:
            first += other
        return first


def layer() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1)


def main() -> nn.Sequential:
    return nn.Sequential(layer(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), layer())


@pytest.mark.parametrize(
    ("stage", "found"),
    [
        (BasicBlock(4, 8, 2), {"shortcut.0.weight"}),
        (Sum(main(), nn.Sequential(nn.AvgPool2d(1), layer())), {"branches.1.1.weight"}),
        (Sum(layer(), main()), {"branches.0.weight"}),
        (
            nn.Sequential(Sum(main(), layer()), Sum(layer(), main())),
            {"0.branches.1.weight", "1.branches.0.weight"},
        ),
        (Sum(main(), nn.Identity()), set()),
        (Sum(layer(), layer()), set()),  # neither is the main branch
        (Sum(main(), main()), set()),
        (nn.Sequential(layer(), nn.ReLU()), set()),
        (nn.Flatten(), set()),
    ],
    ids=["block", "pooled", "first", "blocks", "identity", "alike", "deep", "chain", "no weights"],
)  # fmt: skip
def test_a_shortcut_is_one_layer_beside_a_main_branch(stage: nn.Module, found: set[str]) -> None:
    before = copy.deepcopy(stage.state_dict())
    assert shortcut_weights(stage, FEATURES) == found
    assert all(torch.equal(value, before[name]) for name, value in stage.state_dict().items())
    assert all(parameter.grad is None for parameter in stage.parameters())


@pytest.mark.parametrize(
    ("model", "some"), [("timm/resnet10t", True), ("wrn-10-1", True), ("timm/convnext_atto", False)]
)
def test_keep_shortcuts_goes_by_the_graph_not_by_names(model: str, some: bool) -> None:
    net = nf.fission(create_model(model, 5), 2, keep_shortcuts=True, example_input=torch.randn(2, 3, 64, 64))
    last = net.paths[1].stages[-1]
    whole = {name for name, mask in kept_masks(last).items() if mask.all()}
    assert all("shortcut" in name or "downsample" in name for name in whole)
    assert bool(whole) == some  # ConvNeXt's downsample is its main path
