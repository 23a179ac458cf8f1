from typing import Any

import pytest
import torch
from torch import Tensor, nn

from netfission.pruning.synflow import synflow


def plain_network() -> nn.Module:
    """No bias, no batch norm: the networks that the conservation laws are stated for."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, groups=2, bias=False),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 7, bias=False),
            nn.ReLU(),
            nn.Linear(7, 5, bias=False),
        )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.ndim > 1}


def batch(*shape: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.full(shape, torch.nan), torch.full(shape[:1], -9))]


@pytest.mark.parametrize("share_removed", [0.0, 0.6])
def test_flow_is_conserved_from_layer_to_layer(share_removed: float, generator: torch.Generator) -> None:
    model = plain_network()
    weights = {
        name: weight * (torch.rand(weight.shape, generator=generator) >= share_removed)
        for name, weight in weights_of(model).items()
    }
    scores = synflow(model, weights, batch(3, 2, 8, 8), generator)
    sums = torch.stack([score.sum() for score in scores.values()])
    assert sums[0] > 0
    torch.testing.assert_close(sums, sums[:1].expand(4), rtol=1e-12, atol=0)


def test_flow_is_conserved_from_unit_to_unit(generator: torch.Generator) -> None:
    scores = list(
        synflow(plain_network(), weights_of(plain_network()), batch(1, 2, 8, 8), generator).values()
    )
    torch.testing.assert_close(scores[2].sum(1), scores[3].sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(scores[1].sum((1, 2, 3)), scores[2].sum(0), rtol=1e-12, atol=0)


def test_equals_the_sum_over_paths(generator: torch.Generator) -> None:
    """In a chain of matrices a weight's flow is the product of what reaches it and what leaves."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
    first, second = (value.detach().double().abs() for value in weights_of(model).values())
    bias = model[3].bias.detach().double().abs()

    scores = synflow(model, weights_of(model), batch(1, 3, 2, 2), generator)

    expected_first = torch.outer(second.sum(0), torch.ones(12, dtype=torch.float64)) * first
    expected_second = second * first.sum(1)
    torch.testing.assert_close(scores["1.weight"], expected_first)
    torch.testing.assert_close(scores["3.weight"], expected_second)
    assert bias.any()  # it adds to R, and to no gradient


def test_uses_eval_mode_and_absolute_buffers(
    tiny: Any, weights: dict[str, Tensor], generator: torch.Generator
) -> None:
    model = tiny(0.5)
    nn.init.constant_(model.bn.weight, -2.0)
    nn.init.constant_(model.bn.bias, -0.5)
    nn.init.constant_(model.bn.running_mean, -0.25)
    twin = tiny(0.0).eval()
    nn.init.constant_(twin.bn.weight, 2.0)
    nn.init.constant_(twin.bn.bias, 0.5)
    nn.init.constant_(twin.bn.running_mean, 0.25)
    for bias in (twin.conv2.bias, twin.fc.bias):
        bias.data.abs_()
    for name, weight in weights.items():
        twin.get_parameter(name).data = weight.abs()
    twin(torch.ones(1, 2, 7, 7, dtype=torch.float64)).sum().backward()

    scores = synflow(model, weights, batch(4, 2, 7, 7), generator)

    expected = {
        name: (weight.abs() * twin.get_parameter(name).grad).abs() for name, weight in weights.items()
    }
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)


def test_flow_beyond_float32_is_scored(generator: torch.Generator) -> None:
    layers = [nn.Linear(64, 64, bias=False) for _ in range(30)]
    for layer in layers:
        nn.init.constant_(layer.weight, 1.0)
    model = nn.Sequential(*layers)
    scores = synflow(model, weights_of(model), batch(1, 64), generator)
    # 64^31 paths, spread evenly over the weights of each layer
    for score in scores.values():
        torch.testing.assert_close(score, torch.full_like(score, 64.0**29))
    assert torch.finfo(torch.float32).max < 64.0**29


def test_models_in_single_precision_get_scores_in_double(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    scores = synflow(model, weights_of(model), batch(1, 1, 3, 3), generator)
    assert {score.dtype for score in scores.values()} == {torch.float64}
