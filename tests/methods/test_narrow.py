import copy
from dataclasses import replace
from functools import partial
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from netfission.config import FissionConfig, MethodConfig
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.narrow import NarrowBranches
from netfission.methods.registry import find_method
from netfission.models import create_model
from netfission.profiling.macs import count_macs

CONFIG = MethodConfig("narrow")


def plan(model: str = "wrn-10-1", side: int = 8, **changes) -> BuildPlan:
    create = partial(call_with_seed, partial(create_model, model, 10))
    return BuildPlan(create, replace(FissionConfig(exits=3), **changes), torch.rand(2, 3, side, side))


def build(made: BuildPlan | None = None, config: MethodConfig = CONFIG, **changes) -> NarrowBranches:
    network = find_method(config).build(made or plan(**changes))
    assert isinstance(network, NarrowBranches)
    return network


def layers_of(branch: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    """By their names in the model."""
    return {
        name.partition(".")[2]: layer for name, layer in branch.named_modules() if isinstance(layer, kind)
    }


def test_branches_have_the_widths_and_groups_of_the_paper():
    network = build(plan("wrn-10-2"))
    for branch, groups in zip(network.branches, (1, 2, 3), strict=True):
        convolutions = layers_of(branch, nn.Conv2d)
        widths = [groups * round(width * sqrt(groups / 3) / groups) for width in (64, 128)]
        for block, width, inputs in zip(("block2.0", "block3.0"), widths, (32, widths[0]), strict=True):
            first, second, shortcut = (
                convolutions[f"{block}.{name}"] for name in ("conv1", "conv2", "shortcut")
            )
            assert (first.in_channels, first.out_channels) == (inputs, width)
            assert (second.in_channels, second.out_channels) == (width, width)
            assert second.groups == groups
            # 32 shared channels cannot be divided by 3.
            assert first.groups == (groups if inputs % groups == 0 else 1)
            assert (shortcut.groups, shortcut.out_channels) == (1, width)
        (head,) = layers_of(branch, nn.Linear).values()
        assert (head.in_features, head.out_features) == (widths[1], 10)


@pytest.mark.parametrize(("model", "exits"), [("cifar-resnet18-w16", 3), ("cifar-resnet18-w16", 2)])
def test_all_branches_together_cost_what_the_network_costs(model, exits):
    made = plan(model, 32, exits=exits)
    macs = count_macs(build(made), made.example).dense
    assert 0.95 < macs / count_macs(made.create(0), made.example).dense < 1.10


def test_the_shared_stage_is_the_network_s_own_and_runs_once():
    network = build(seed=2).eval()
    model = plan().create(2).eval()
    images = torch.rand(1, 3, 8, 8)
    calls = []
    network.shared.register_forward_hook(lambda module, inputs, output: calls.append(output))
    logits = network(images)
    (features,) = calls
    assert torch.equal(features, model.block1(model.conv1(images)))
    assert torch.equal(logits, torch.stack([branch(features) for branch in network.branches], dim=1))
    assert logits.shape == (1, 3, 10)
    first, second, third = logits[0]
    assert not torch.allclose(first, second) and not torch.allclose(second, third)


def test_branches_leave_after_the_stage_that_is_asked_for():
    network = build(branch_after=["block2", 2])
    assert len(network.shared) == 3  # the stem and two stages
    assert next(iter(layers_of(network.branches[2], nn.Conv2d).values())).in_channels == 32
    assert not any(name.startswith("block2") for name in layers_of(network.branches[0], nn.Conv2d))


def test_new_weights_keep_the_variance_of_what_their_layer_gives():
    network = build(plan("wrn-10-4"))
    model = plan("wrn-10-4").create(0)
    for branch in network.branches:
        for name, layer in layers_of(branch, nn.Conv2d).items():
            old = model.get_submodule(name)
            expected = old.weight.std().item() * old.weight[0].numel() ** 0.5
            gain = layer.weight.std().item() * layer.weight[0].numel() ** 0.5
            assert gain == pytest.approx(expected, rel=0.05)
            assert layer.weight.mean().abs() < 0.1 * layer.weight.std()
        for norm in layers_of(branch, nn.BatchNorm2d).values():
            assert (norm.weight == 1).all() and (norm.bias == 0).all()
            assert (norm.running_mean == 0).all() and (norm.running_var == 1).all()


@settings(max_examples=8, deadline=None)
@given(groups=st.lists(st.integers(1, 5), min_size=2, max_size=3), seed=st.integers(0, 100))
def test_any_groups_make_a_network_that_its_seed_repeats(groups, seed):
    config = replace(CONFIG, branch_groups=groups)
    made = plan(exits=len(groups), seed=seed)
    before = torch.get_rng_state()
    network = build(made, config)
    assert torch.equal(torch.get_rng_state(), before)
    again = build(config=config, exits=len(groups), seed=seed)
    images = torch.rand(2, 3, 8, 8)
    logits = network.train()(images)
    assert torch.equal(logits, again.train()(images))
    assert logits.isfinite().all()
    for branch, number in zip(network.branches, groups, strict=True):
        assert layers_of(branch, nn.Conv2d)["block3.0.conv2"].groups == number


def test_copies_and_loaded_states_answer_alike():
    network = build(seed=1)
    network(torch.rand(4, 3, 8, 8)).sum().backward()  # moves the batch norms' statistics
    fresh = build(seed=7)
    fresh.load_state_dict(network.state_dict())
    images = torch.rand(3, 3, 8, 8)
    expected = network.eval()(images)
    assert torch.equal(fresh.eval()(images), expected)
    assert torch.equal(copy.deepcopy(network)(images), expected)


def test_it_learns_from_its_ensemble_by_default():
    assert find_method(CONFIG).distillation == 1.0


class Net(nn.Module):
    """Two stages and a head; the second stage and the head are given."""

    def __init__(self, second: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 1))
        self.second = second
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits."""
        logits: Tensor = self.head(self.second(self.first(self.stem(images))))
        return logits


def made_of(second: nn.Module, head: nn.Module | None = None) -> BuildPlan:
    head = head or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    config = FissionConfig(exits=2, stages=["first", "second"])
    return BuildPlan(
        lambda seed: call_with_seed(lambda: Net(second, head), seed), config, torch.rand(2, 3, 8, 8)
    )


def test_depthwise_convolutions_and_hidden_linear_layers_narrow_too():
    second = nn.Sequential(
        nn.Conv2d(12, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 24, 1)
    )
    head = nn.Sequential(
        nn.Flatten(), nn.Linear(24 * 64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10)
    )
    network = build(made_of(second, head))
    of_two = network.branches[1]
    _, depthwise, last = layers_of(of_two, nn.Conv2d).values()
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (24, 24, 24)
    assert last.groups == 2
    of_one = network.branches[0]
    _, depthwise, _ = layers_of(of_one, nn.Conv2d).values()
    assert (depthwise.groups, depthwise.out_channels) == (17, 17)
    hidden, logits = layers_of(of_one, nn.Linear).values()
    assert (hidden.in_features, hidden.out_features, logits.out_features) == (17 * 64, 14, 10)
    assert network(torch.rand(5, 3, 8, 8)).shape == (5, 2, 10)


class Shift(nn.Module):
    """Adds numbers of a shape of its own, without owning them."""

    def forward(self, features: Tensor) -> Tensor:
        return features + features.new_ones(24, 1, 1)


CONV = nn.Conv2d(12, 24, 3, padding=1)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            nn.Sequential(CONV, nn.GroupNorm(2, 24)),
            r"batch norms and linear layers, got layer 'second\.1' \(GroupNorm\)",
        ),
        (
            nn.Conv2d(12, 24, 3, padding=1, groups=4),
            r"one group or depthwise ones, got layer 'second' of 4 groups",
        ),
        (
            nn.Sequential(CONV, Shift()),
            "^model with method=narrow must be .*, got an error at other widths",
        ),
    ],
)
def test_layers_that_cannot_be_narrowed_are_named(second, message):
    with pytest.raises(ValueError, match=message):
        build(made_of(second))


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"exits": 1}, CONFIG, "^exits must be at least 2 with method=narrow, got 1$"),
        (
            {"sparsity": 0.5},
            CONFIG,
            r"^sparsity must be 0\.0 with method=narrow, got 0\.5; it does not prune$",
        ),
        (
            {"ratio": [2, 1, 1]},
            CONFIG,
            r"^ratio must be left out with method=narrow, got \[2, 1, 1\]; its branches",
        ),
        (
            {"branch_after": [1, 2]},
            CONFIG,
            r"^branch_after must be the same stage for all .*=narrow, got \[1, 2\]$",
        ),
        ({"branch_after": [5, 5]}, CONFIG, r"branch_after must be 2 stages, .*, got \[5, 5\]"),
        (
            {},
            replace(CONFIG, branch_groups=[1, 2]),
            r"^branch_groups must be 3 positive integers, one per branch, got \[1, 2\]$",
        ),
        (
            {},
            replace(CONFIG, branch_groups=[1, 0, 2]),
            r"^branch_groups must be positive integers, .* \[1, 0, 2\]$",
        ),
    ],
)
def test_what_is_refused(changes, config, message):
    with pytest.raises(ValueError, match=message):
        build(config=config, **changes)
