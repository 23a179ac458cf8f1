"""Convolutions that standardise their weights are recognised, divided, and scaled by their gain."""

import copy

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

import netfission as nf
from netfission.surgery.coupling import find_coupling, kept_indices
from netfission.surgery.narrowing import narrowed
from netfission.surgery.rescaling import keep_variance
from netfission.surgery.standardised import leave_out_standardisation, standardises


@pytest.mark.parametrize(
    "size", [1, 3]
)  # weights of mean 0 make 0 of constant features if the kernel is 1 × 1
def test_layers_that_standardise_are_told_from_others(size: int) -> None:
    for kind in (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame):
        assert standardises(kind(6, 4, size))
    assert not standardises(nn.Conv2d(6, 4, size)) and not standardises(Conv2dSame(6, 4, size))
    assert not standardises(nn.Linear(6, 4))


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2dSame])
def test_standardised_layers_are_divided_as_norms_over_channels_are(kind: type[nn.Conv2d]) -> None:
    stage = nn.Sequential(kind(4, 12, 1), nn.SiLU(), kind(12, 12, 3, stride=2), nn.SiLU(), kind(12, 4, 1))
    coupling = find_coupling(stage, torch.randn(2, 4, 9, 9))
    assert [(group.layer, group.units) for group in coupling.groups] == [("0", 12), ("2", 12)]
    half = torch.arange(12) < 6
    narrow = narrowed(stage, kept_indices(coupling.groups, [half, half]))
    with torch.no_grad():
        for layers in (stage, narrow):
            for layer in layers[::2]:
                leave_out_standardisation(layer)
        for layer in (stage[2], stage[4]):
            layer.weight[:, 6:] = 0
        features = torch.randn(2, 4, 9, 9)
        assert torch.allclose(narrow(features), stage(features), atol=1e-6)


def test_the_gain_of_a_standardised_layer_keeps_the_variance() -> None:
    stage = nn.Sequential(ScaledStdConv2d(8, 8, 1))
    path = nn.Sequential(ScaledStdConv2d(2, 8, 1))
    weight = copy.deepcopy(path[0].weight)
    keep_variance(path, stage, {}, {"0.weight"})
    assert torch.equal(path[0].weight, weight)  # its scale makes no difference
    assert torch.equal(path[0].gain, torch.full((8, 1, 1, 1), 2.0))


def test_a_stage_needs_channels_for_the_paths_that_run_through_it() -> None:
    def stage(units: int) -> nn.Sequential:
        inner = nn.Conv2d(8, 8, 3, padding=1, groups=units, bias=False)
        return nn.Sequential(nn.Conv2d(8, 8, 1), inner, nn.Conv2d(8, 8, 1), nn.MaxPool2d(2))

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    modules = [nn.Conv2d(3, 8, 3), nn.Sequential(stage(8), stage(2), stage(8)), head]
    net = nf.fission(nn.Sequential(*modules), 3, grouping="channels", example_input=torch.randn(2, 3, 32, 32))
    assert len(net.stage_names) == 3 and "1.1" in net.stage_names  # two paths run through it
