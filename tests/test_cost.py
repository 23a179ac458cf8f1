import pytest
import torch
from torch import nn

import netfission as nf
from netfission.cost import cost, count_macs, count_parameters, inference_times
from netfission.pruning.masks import remove


def test_counts_of_a_small_network_by_hand():
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 7))
    assert count_parameters(network) == (2 * 4 * 9 + 4 + 700 + 7,) * 2
    dense = 25 * 2 * 4 * 9 + 700
    assert count_macs(network, torch.randn(1, 2, 5, 5)) == (dense, dense)

    conv = torch.ones(4, 2, 3, 3, dtype=torch.bool)
    conv.view(-1)[:10] = False
    linear = torch.ones(7, 100, dtype=torch.bool)
    linear[0] = False
    remove(network, {"0.weight": conv, "3.weight": linear})
    assert count_parameters(network) == (783, 783 - 110)
    assert count_macs(network, torch.randn(1, 2, 5, 5)) == (dense, dense - 10 * 25 - 100)


def test_removed_macs_of_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens):
            return self.attention(tokens, tokens, tokens)[0]

    network = Attention()
    tokens = torch.randn(1, 5, 8)
    dense, _ = count_macs(network, tokens)
    mask = torch.ones(24, 8, dtype=torch.bool)
    mask[:3] = False
    remove(network, {"attention.in_proj_weight": mask})
    assert count_macs(network, tokens) == (dense, dense - 5 * 24)


def test_weight_groups_cost_the_single_networks_effective_macs():
    from netfission.models import create_model

    model = create_model("wrn-10-1", 10)
    images = torch.randn(2, 3, 16, 16)
    network = nf.fission(model, 3, example_input=images)
    dense, effective = count_macs(network, images[:1])
    single, _ = count_macs(model, images[:1])
    heads = 2 * 64 * 10
    assert effective == single + heads
    assert dense > 1.5 * single


def test_cost_beside_a_reference():
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Dropout())
    reference = nn.Conv2d(3, 4, 3)
    network.train()
    network[2].eval()
    costs = cost(network, torch.randn(8, 3, 24, 24), reference=reference, rounds=5)
    assert costs["reference"].ratio == 1
    assert costs["network"].ratio > 1
    low, high = costs["network"].ratio_range
    assert low <= costs["network"].ratio <= high
    assert costs["network"].macs_dense == 22 * 22 * 27 * 64 + 20 * 20 * 576 * 64
    assert (network.training, network[2].training) == (True, False)
    assert cost(network, torch.randn(1, 3, 24, 24), rounds=1)["network"].ratio is None


def test_every_network_is_timed_in_every_round():
    calls = []

    class Note(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, images):
            calls.append((self.name, self.training))
            return images

    times = inference_times({"a": Note("a"), "b": Note("b")}, torch.zeros(1), rounds=2, warm_up=1)
    assert calls == [("a", False), ("b", False)] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_counting_does_not_change_the_network():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count_macs(network, torch.randn(1, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not network[1]._forward_hooks
    assert network.training


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_put_back_after_an_error(training):
    network = nn.Conv2d(3, 4, 3).train(training)
    with pytest.raises(RuntimeError):
        count_macs(network, torch.zeros(1, 5, 8, 8))
    assert network.training is training
