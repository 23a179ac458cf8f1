from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from netfission.config import FissionConfig, MethodConfig, RunConfig
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.registry import check_settings, find_method
from netfission.models import create_model

WRN = partial(create_model, "wrn-10-1", 10)
CONFIG = MethodConfig("packed")


def plan(create=WRN, **changes) -> BuildPlan:
    return BuildPlan(
        partial(call_with_seed, create), replace(FissionConfig(exits=2), **changes), torch.zeros(2, 3, 8, 8)
    )


def member_of(network: nn.Module, member: int, alone: nn.Module) -> nn.Module:
    """Return a member as a separate network, with the shapes of `alone`."""
    state = {}
    for name, tensor in network.network.state_dict().items():
        expected = alone.state_dict()[name]
        if tensor.ndim:
            tensor = tensor.flatten()[: expected.numel() * 2].unflatten(0, (2, *expected.shape))[member]
        state[name] = tensor
    alone.load_state_dict(state)
    return alone


def channels_model(width: int):
    return lambda: nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, width, 3),
        nn.Conv2d(width, width, 3, groups=width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


@pytest.mark.parametrize("create", [WRN, partial(create_model, "cifar-resnet18-w16", 10), channels_model(32)])
@pytest.mark.parametrize("training", [False, True])
def test_members_as_wide_as_the_network_are_such_networks_side_by_side(create, training):
    # Two members, together twice as wide.
    made = plan(create)
    network = find_method(CONFIG).build(made).train(training)
    images = torch.randn(4, 3, 8, 8)
    alone = [member_of(network, member, made.create(0)).train(training) for member in range(2)]
    expected = torch.stack([each(images) for each in alone], dim=1)
    torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected[:, 0], expected[:, 1])


def test_widths_follow_alpha_and_are_rounded_up_for_the_members():
    network = find_method(replace(CONFIG, alpha=1.5)).build(plan(exits=3)).network
    assert (network.conv1.in_channels, network.conv1.out_channels, network.conv1.groups) == (3, 24, 1)
    conv = network.block3[0].conv1
    assert (conv.in_channels, conv.out_channels, conv.groups) == (48, 96, 3)
    assert network.bn.num_features == len(network.bn.running_mean) == 96
    assert network.fc.weight.shape == (3, 10, 32)
    rounded = find_method(CONFIG).build(plan(exits=3)).network
    assert (rounded.conv1.out_channels, rounded.block3[0].conv2.out_channels) == (33, 129)


@pytest.mark.parametrize(("width", "groups"), [(256, 6), (192, 4), (64, 2)])
def test_gamma_divides_convolutions_into_groups_of_no_fewer_than_64_channels(width, groups):
    network = find_method(replace(CONFIG, gamma=3, alpha=1.5)).build(plan(channels_model(width))).network
    assert network[0].groups == 1
    assert network[2].groups == groups
    assert network[3].groups == network[3].in_channels == width * 1.5  # each channel for itself
    assert network[6].weight.shape[0] == 2


def test_outputs_vary_as_the_networks_own_do():
    model = channels_model(96)()
    network = find_method(CONFIG).build(plan(channels_model(96), exits=4)).network
    fan_in = {0: 27, 2: 9 * 48, 3: 9, 6: 48}
    for number, inputs in fan_in.items():
        variance = model[number].weight.var() * model[number].weight[0].numel()
        torch.testing.assert_close(network[number].weight.var() * inputs, variance, rtol=0.2, atol=0)
    assert 0.05 < network[6].bias.std() / model[6].bias.std() < 2


def test_values_of_norms_are_kept():
    def create():
        norm = nn.BatchNorm2d(16)
        nn.init.constant_(norm.weight, 0.3)
        nn.init.constant_(norm.running_var, 2)
        return nn.Sequential(nn.Conv2d(3, 16, 8), norm, nn.Flatten(), nn.Linear(16, 10))

    norm = find_method(CONFIG).build(plan(create)).network[1]
    assert torch.equal(norm.weight, torch.full((32,), 0.3))
    assert torch.equal(norm.running_var, torch.full((32,), 2.0))


class Dense(nn.Module):
    """Concatenates channels, as DenseNets do."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.more = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        features = self.stem(images)
        return self.head(torch.cat([features, self.more(features)], dim=1).mean((2, 3)))


class Shuffle(nn.Module):
    def forward(self, features):
        return features.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def shuffling():
    norm = nn.BatchNorm2d(16)
    nn.init.zeros_(norm.weight)  # nothing comes through at first
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), norm, Shuffle(), nn.Conv2d(16, 16, 8), nn.Flatten(), nn.Linear(16, 10)
    )


def normed(norm: nn.Module):
    return lambda: nn.Sequential(nn.Conv2d(3, 16, 8), norm, nn.Flatten(), nn.Linear(16, 10))


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (Dense, "got layer 'head', where members read one another's channels"),
        (shuffling, "got layer '3', where members read one another's channels"),
        (
            normed(nn.GroupNorm(1, 32, affine=False)),
            "got layer '3', where members read one another's channels",
        ),
        (
            normed(nn.GroupNorm(4, 16)),
            r"norms and linear layers, got layer '1' \(GroupNorm\)",
        ),
    ],
)
def test_members_that_would_mix_are_refused(create, message):
    with pytest.raises(ValueError, match=message):
        find_method(CONFIG).build(plan(create))


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"), [(8, 24, "18 input and 48"), (24, 8, "48 input and 18")]
)
def test_groups_that_do_not_fit_are_refused(inputs, outputs, message):
    def grouped():
        layers = nn.Conv2d(3, inputs, 1), nn.Conv2d(inputs, outputs, 8, groups=4)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(outputs, 10))

    with pytest.raises(ValueError, match=f"can have 12 groups, got layer '1' of {message}"):
        find_method(CONFIG).build(plan(grouped, exits=3))


def test_widths_that_do_not_fit_are_refused():
    def flattened():
        return nn.Sequential(nn.Conv2d(3, 16, 5), nn.Flatten(), nn.Linear(256, 10))

    with pytest.raises(
        ValueError, match=r"^exits must be a divisor of the model's widths .*, got 3; try 2 or 4"
    ):
        find_method(CONFIG).build(plan(flattened, exits=3))
    assert find_method(CONFIG).build(plan(flattened, exits=4))(torch.rand(1, 3, 8, 8)).shape == (1, 4, 10)


def test_weights_of_a_file_are_refused():
    settings = {"method": "packed", "weights": "net.pt"}
    with pytest.raises(
        ValueError, match=r"^weights must be left out with method=packed, got 'net\.pt'; its members"
    ):
        check_settings(RunConfig.from_dict(settings))


def test_pretrained_weights_are_refused():
    model = create_model("wrn-10-1", 10)
    with pytest.raises(
        ValueError, match=r"^pretrained must be False with method=packed, got True; its members"
    ):
        find_method(CONFIG).build(plan(lambda: model))
