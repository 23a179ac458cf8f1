from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netfission.config import FissionConfig, MethodConfig, TrainingConfig
from netfission.losses import EnsembleDistillationLoss
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.mimo import Mimo, draw_orders
from netfission.methods.registry import find_method
from netfission.models import create_model
from netfission.runs.lightning_module import TrainingModule

WRN = partial(create_model, "wrn-10-1", 10)
CONFIG = MethodConfig("mimo")
LOSS = EnsembleDistillationLoss(weight=0)


def plan(create=WRN, **changes) -> BuildPlan:
    return BuildPlan(
        partial(call_with_seed, create), replace(FissionConfig(exits=3), **changes), torch.zeros(2, 3, 8, 8)
    )


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_every_member_is_shown_every_image_as_often(batch, exits, repetitions, rho):
    orders = draw_orders(batch, exits, repetitions, rho)
    assert orders.shape == (exits, batch * repetitions)
    expected = torch.arange(batch).repeat_interleave(repetitions)
    assert torch.equal(orders.sort(dim=1).values, expected.expand(exits, -1))
    separate = int(batch * repetitions * (1 - rho))
    assert (orders[:, separate:] == orders[:1, separate:]).all()


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_any_share_of_equal_images_will_do(rho):
    find_method(replace(CONFIG, rho=rho)).check(FissionConfig(exits=3))  # no error


def test_members_orders_differ_where_they_may():
    torch.manual_seed(0)
    orders = draw_orders(50, 2, 2, 0.5)
    assert (orders[0, :50] != orders[1, :50]).any()
    assert not torch.equal(orders[0, 50:], orders[0, 50:].sort().values)


class Reader(nn.Module):
    """Tells every member's image, which is filled with its class, without fail; counts the images."""

    exits = 3

    def forward(self, images):
        self.places = len(images)
        members = images.unflatten(1, (3, -1))
        self.seen = members[:, :, 0, 0, 0].long()
        return 50 * F.one_hot(self.seen, 10).float()


def labelled(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(number)
    return labels.float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8), labels


@pytest.mark.parametrize("soft", [False, True])
def test_labels_go_with_the_images_that_each_member_is_shown(soft):
    images, labels = labelled(10)
    reader = Reader()
    outcome = find_method(replace(CONFIG, repetitions=2)).step(
        reader, images, F.one_hot(labels, 10).float() if soft else labels, LOSS
    )
    assert reader.places == 20
    assert outcome.logits.shape == (60, 1, 10)
    assert outcome.loss < 1e-6
    assert (reader.seen[:, 0] != reader.seen[:, 1]).any()


def test_the_loss_is_the_sum_of_the_members():
    network = find_method(CONFIG).build(plan())
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    torch.manual_seed(3)
    outcome = find_method(replace(CONFIG, rho=0.5)).step(network, images, labels, LOSS)
    torch.manual_seed(3)
    orders = draw_orders(4, 3, 4, 0.5)
    logits = network(torch.cat([images[order] for order in orders], dim=1))
    expected = sum(F.cross_entropy(logits[:, member], labels[orders[member]]) for member in range(3))
    torch.testing.assert_close(outcome.loss, expected)


def test_the_lightning_module_trains_it():
    network = find_method(CONFIG).build(plan())
    module = TrainingModule(network, TrainingConfig(), exits=3, method=find_method(CONFIG))
    outcome = module.method.step(module, torch.randn(4, 3, 8, 8), torch.arange(4), module.loss)
    assert outcome.logits.shape == (48, 1, 10)


def test_one_image_is_shown_to_all_members():
    network = find_method(CONFIG).build(plan()).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(network(images), network(torch.cat([images] * 3, dim=1)))
    other = torch.cat([images, images.flip(0), images], dim=1)
    assert not torch.allclose(network(images), network(other))


def test_members_ends_are_those_of_networks_of_their_own_seeds():
    network = find_method(CONFIG).build(plan(seed=2)).network
    alone = [plan().create(seed) for seed in (6, 7, 8)]
    first = torch.cat([each.conv1.weight for each in alone], dim=1)
    torch.testing.assert_close(network.conv1.weight * 3**0.5, first)
    assert torch.equal(network.fc.weight, torch.cat([each.fc.weight for each in alone]))
    assert torch.equal(network.fc.bias, torch.cat([each.fc.bias for each in alone]))
    assert (network.conv1.in_channels, network.fc.out_features) == (9, 30)
    state = alone[0].state_dict()
    inner = [name for name in state if name.startswith("block")]
    assert all(torch.equal(network.state_dict()[name], state[name]) for name in inner)


def test_a_convolution_may_give_the_logits():
    def create():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    network = find_method(CONFIG).build(plan(create))
    assert isinstance(network, Mimo)
    assert network(torch.randn(1, 3, 8, 8)).shape == (1, 3, 10)


class Concatenated(nn.Module):
    """Two last layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8)
        self.left = nn.Linear(8, 6)
        self.right = nn.Linear(8, 6)

    def forward(self, images):
        features = self.stem(images).flatten(1)
        return torch.cat([self.left(features), self.right(features)], dim=1)


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Linear(16, 10)),
            r"layer is a convolution of the images, without groups, got layer '1' \(Linear",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 6, 8, groups=3), nn.Flatten(), nn.Linear(6, 10)),
            r"layer is a convolution of the images, without groups, got layer '0' \(Conv2d",
        ),
        (
            Concatenated,
            r"whose last layer gives the logits, got logits of shape \(2, 3, 8\)",
        ),
    ],
)
def test_what_is_refused(create, message):
    with pytest.raises(ValueError, match=message):
        find_method(CONFIG).build(plan(create))
