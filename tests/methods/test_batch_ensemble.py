from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netfission.config import FissionConfig, MethodConfig
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.batch_ensemble import RankOne
from netfission.methods.registry import find_method
from netfission.models import create_model

WRN = partial(create_model, "wrn-10-1", 10)
CONFIG = MethodConfig("batch-ensemble")


def plan(create=WRN, **changes) -> BuildPlan:
    return BuildPlan(
        partial(call_with_seed, create), replace(FissionConfig(exits=3), **changes), torch.zeros(2, 3, 8, 8)
    )


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_each_members_convolution_has_the_weight_times_the_outer_product(
    members, batch, stride, groups, bias
):
    layer = nn.Conv2d(4, 6, 3, stride, padding=1, groups=groups, bias=bias)
    ranked = RankOne(layer, members, generator())
    if bias:
        nn.init.normal_(ranked.bias)
    images = torch.randn(members, batch, 4, 5, 5)
    outputs = ranked(images.flatten(0, 1)).unflatten(0, (members, batch))
    for member in range(members):
        # in a grouped convolution each group of outputs reads its own part of the inputs
        of_inputs = ranked.r[member].view(groups, 1, 4 // groups).expand(groups, 6 // groups, 4 // groups)
        outer = ranked.s[member][:, None] * of_inputs.flatten(0, 1)
        member_bias = ranked.bias[member] if bias else None
        expected = F.conv2d(
            images[member], layer.weight * outer[..., None, None], member_bias, stride, 1, 1, groups
        )
        torch.testing.assert_close(outputs[member], expected)


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([(), (5,), (2, 3)]))
@settings(max_examples=20, deadline=None)
def test_each_members_linear_layer_has_the_weight_times_the_outer_product(members, batch, more):
    layer = nn.Linear(4, 6)
    bias = layer.bias
    ranked = RankOne(layer, members, generator())
    assert torch.equal(ranked.bias, bias.expand(members, 6))
    features = torch.randn(members, batch, *more, 4)
    outputs = ranked(features.flatten(0, 1)).unflatten(0, (members, batch))
    for member in range(members):
        weight = layer.weight * torch.outer(ranked.s[member], ranked.r[member])
        torch.testing.assert_close(outputs[member], F.linear(features[member], weight, bias))


@pytest.mark.parametrize("training", [True, False])
def test_with_fast_weights_of_one_every_member_is_the_network_itself(training):
    network = find_method(CONFIG).build(plan(seed=2)).train(training)
    for module in network.modules():
        if isinstance(module, RankOne):
            nn.init.ones_(module.r)
            nn.init.ones_(module.s)
    images = torch.randn(4, 3, 8, 8)
    alone = plan().create(2).train(training)(images)
    # in train mode batch norms take their statistics of all members, which are equal here
    torch.testing.assert_close(network(images), alone.unsqueeze(1).expand(-1, 3, -1))


def test_every_layer_has_fast_weights_about_one():
    network = find_method(CONFIG).build(plan())
    fast = [p.flatten() for name, p in network.named_parameters() if name.endswith((".r", ".s"))]
    assert (
        len(fast) == 2 * 10
    )  # convolutions: stem, two for each of three blocks, two shortcuts; one linear layer
    together = torch.cat(fast)
    assert abs(together.mean() - 1) < 0.05
    assert abs(together.std() - 0.5) < 0.05


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        tokens = self.patch(images).flatten(2).mT
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))


def test_attention_of_torch_is_refused():
    with pytest.raises(ValueError, match=r"got layer 'attention' \(MultiheadAttention\), which cannot have"):
        find_method(CONFIG).build(plan(Attentive))
