"""Features keep their spread in networks without normalisation, and all other networks keep their weights."""

from collections.abc import Callable
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

import netfission as nf
from netfission.models import create_model
from netfission.surgery.masks import apply_masks, kept_masks
from netfission.surgery.rescaling import keep_variance, unnormalised_weights

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STAGES = ("1", "2", "3")


def convolutions(inputs: int, width: int, count: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(count):
        conv = nn.Conv2d(width if number else inputs, width, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers)


def plain(norm: bool = False, width: int = 48, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stages = [convolutions(width, width, 3, norm) for _ in STAGES]
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
        return nn.Sequential(convolutions(3, width, 1, norm), *stages, head)


@torch.no_grad()
def spreads(net: nf.FissionNetwork) -> list[float]:
    """The standard deviation of the features before each head."""
    found: list[float] = []
    for path in net.exit_paths:
        path.head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].std().item()))
    net(IMAGES)
    return found


@pytest.mark.parametrize("grouping", ["weights", "channels"])
def test_features_before_the_heads_keep_their_spread(grouping: str) -> None:
    model = plain()
    with torch.no_grad():
        expected = model[:4](IMAGES).std().item()  # type: ignore[index]
    net = nf.fission(model, 3, grouping=grouping, example_input=IMAGES, stages=STAGES)
    for spread in spreads(net):  # a tenth of it and less if the weights keep their values
        assert expected / 2 < spread < 2 * expected


@pytest.mark.parametrize("norm", [False, True])
def test_only_divided_layers_without_norms_are_scaled(norm: bool) -> None:
    model = plain(norm)
    net = nf.fission(model, 3, example_input=IMAGES, stages=STAGES, ratio=(2, 1, 1))
    for exit_, path in enumerate(net.exit_paths):
        for index, stage in enumerate(path.stages, start=0 if exit_ == 0 else net.branch_after[exit_ - 1]):
            share = [1, 2 / 3, 1 / 2][index] if exit_ == 0 else [1, 1 / 3, 1 / 4][index]
            for name, mask in kept_masks(stage).items():
                given = model.get_parameter(name)
                factor = 1 if norm else 1 / sqrt(share)
                torch.testing.assert_close(
                    stage.get_parameter(name), factor * given * mask, rtol=2e-3, atol=0
                )
        for name, value in path.head.named_parameters():
            assert torch.equal(value, model.get_parameter(name))


@pytest.mark.parametrize(
    "make", [lambda: create_model("cifar-resnet18-w16", 5), lambda: create_model("wrn-10-1", 5)]
)
@pytest.mark.parametrize("grouping", ["weights", "channels"])
def test_networks_with_norms_keep_their_weights_bit_for_bit(
    make: Callable[[], nn.Module], grouping: str
) -> None:
    model = make()
    values = {name: set(parameter.flatten().tolist()) for name, parameter in model.named_parameters()}
    net = nf.fission(model, 3, grouping=grouping, example_input=IMAGES)
    for path in net.exit_paths:
        for part in (*path.stages, path.head):
            for name, parameter in part.named_parameters():
                assert set(parameter[parameter != 0].tolist()) <= values[name], name


@pytest.mark.parametrize("grouping", ["weights", "channels"])
def test_one_exit_and_shared_stages_are_the_models(grouping: str) -> None:
    model = plain()
    one = nf.fission(model, 1, grouping=grouping, example_input=IMAGES, stages=STAGES)
    assert torch.equal(one(IMAGES)[:, 0], model(IMAGES))
    net = nf.fission(model, 2, grouping=grouping, example_input=IMAGES, stages=STAGES, branch_after=[2])
    shared = net.exit_paths[0].stages[1](net.exit_paths[0].stages[0](net.stem(IMAGES)))
    assert torch.equal(shared, model[:3](IMAGES))  # type: ignore[index]


@pytest.mark.parametrize("grouping", ["weights", "channels"])
def test_what_pruning_removes_is_not_made_up_for(grouping: str) -> None:
    model = plain()
    options = {"grouping": grouping, "example_input": IMAGES, "stages": STAGES}
    net = nf.fission(model, 1, sparsity=0.5, criterion="magnitude", **options)  # type: ignore[arg-type]
    for number, stage in enumerate(net.exit_paths[0].stages, start=1):
        for name, parameter in stage.named_parameters():
            given = model.get_parameter(name)
            assert name.startswith(f"{number}.")
            assert set(parameter[parameter != 0].tolist()) <= set(given.flatten().tolist())


def test_outputs_that_pruning_emptied_do_not_count() -> None:
    stage, path = nn.Linear(4, 4, bias=False), nn.Linear(2, 2, bias=False)
    kept = torch.tensor([[True] * 4, [True] * 4, [False] * 4, [False] * 4])
    before = path.weight.detach().clone()
    keep_variance(path, stage, {"weight": kept}, {"weight"})
    torch.testing.assert_close(path.weight.detach(), before * sqrt(2))  # 2 of 4 inputs


def test_a_layer_that_got_no_weights_stays_empty() -> None:
    stage, path = nn.Linear(4, 1), nn.Linear(4, 1)
    apply_masks(path, {"weight": torch.zeros(1, 4, dtype=torch.bool)})
    keep_variance(path, stage, {}, {"weight"})
    assert not path.weight.any()


class RmsNormOfOnesOwn(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features / features.square().mean(dim=-1, keepdim=True).sqrt()


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.BatchNorm1d(3), ["2.weight"]),
        (RmsNormOfOnesOwn(), ["2.weight"]),
        (nn.ReLU(), ["0.weight", "2.weight"]),
        (nn.LocalResponseNorm(2), ["0.weight", "2.weight"]),
    ],
)
def test_layers_after_the_last_norm_are_found(norm: nn.Module, expected: list[str]) -> None:
    network = nn.Sequential(nn.Linear(2, 3), norm, nn.Linear(3, 2))
    assert sorted(unnormalised_weights(network, torch.rand(2, 3, 2))) == expected
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert all(module.training for module in network.modules())
