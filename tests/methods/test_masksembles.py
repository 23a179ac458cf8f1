from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netfission.config import FissionConfig, MethodConfig
from netfission.methods import masksembles
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.masksembles import Masked, draw_masks
from netfission.methods.registry import find_method
from netfission.models import create_model

WRN = partial(create_model, "wrn-10-1", 10)
CONFIG = MethodConfig("masksembles")


def plan(create=WRN, **changes) -> BuildPlan:
    return BuildPlan(
        partial(call_with_seed, create), replace(FissionConfig(exits=3), **changes), torch.zeros(2, 3, 8, 8)
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(10, 96), st.integers(2, 6), st.floats(1, 6), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_masks_are_equal_in_size_and_leave_no_channel_out(channels, members, scale, seed):
    masks = draw_masks(channels, members, scale, generator(seed))
    assert masks.shape == (members, channels)
    assert masks.dtype is torch.float32
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert masks.any(dim=0).all()
    (size,) = set(masks.sum(dim=1).tolist())
    # with this many ones in each, this many channels are left on average
    asked = channels / (scale * (1 - (1 - 1 / scale) ** members))
    assert size in {int(asked), int(asked) + 1}
    assert torch.equal(masks, draw_masks(channels, members, scale, generator(seed)))


def test_masks_overlap_as_those_of_independent_draws_do():
    masks = draw_masks(2000, 4, 2.0, generator())
    # Each is a half of about 2133 places, so that two share a quarter of them.
    assert masks.sum(dim=1).tolist() == [1066] * 4
    shared = (masks @ masks.T)[~torch.eye(4, dtype=torch.bool)]
    assert (shared - 533).abs().max() < 60


def test_a_scale_at_which_no_masks_are_found_is_refused(monkeypatch):
    monkeypatch.setattr(masksembles, "_TRIES", 0)
    with pytest.raises(
        ValueError, match=r"scale must be one at which 3 masks of 16 channels can be drawn, got 2"
    ):
        draw_masks(16, 3, 2.0, generator())


def test_with_scale_one_every_member_is_the_network_itself():
    network = find_method(replace(CONFIG, scale=1.0)).build(plan(seed=2)).eval()
    images = torch.randn(4, 3, 8, 8)
    alone = plan().create(2).eval()(images)
    torch.testing.assert_close(network(images), alone.unsqueeze(1).expand(-1, 3, -1))


def test_in_training_the_images_are_dealt_out_to_the_members():
    network = find_method(CONFIG).build(plan()).eval()
    images = torch.randn(5, 3, 8, 8)
    each = network(images)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.testing.assert_close(network(images)[:, 0], each[range(5), [0, 0, 1, 1, 2]])
    torch.testing.assert_close(network(images[:1]), each[:1, :1])


def test_all_layers_but_the_first_and_the_thin_have_masks():
    def create():
        return nn.Sequential(
            nn.Conv2d(3, 9, 3), nn.Conv2d(9, 12, 3), nn.Conv2d(12, 10, 4), nn.Flatten(), nn.Linear(10, 10)
        )

    network = find_method(CONFIG).build(plan(create)).network
    assert [isinstance(layer, Masked) for layer in network] == [False, False, True, False, True]
    assert not torch.equal(network[2].masks[0], network[2].masks[1])
    with pytest.raises(
        ValueError,
        match=r"^model with method=masksembles must be a network with inner layers of 10 channels",
    ):
        find_method(CONFIG).build(
            plan(lambda: nn.Sequential(nn.Conv2d(3, 9, 8), nn.Flatten(), nn.Linear(9, 10)))
        )


def test_channels_that_a_member_leaves_out_do_not_reach_it():
    masks = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    layer = Masked(nn.Conv2d(3, 2, 3), masks)
    images = torch.randn(4, 3, 5, 5)
    outputs = layer(images)
    images[:2, 1] = 7
    images[2:, 0] = 7
    assert torch.equal(layer(images), outputs)
    images[2:, 1] = 7
    assert not torch.equal(layer(images), outputs)
    tokens = Masked(nn.Linear(3, 2), masks)
    features = torch.randn(4, 6, 3)
    outputs = tokens(features)
    features[:2, :, 1] = 7
    assert torch.equal(tokens(features), outputs)
