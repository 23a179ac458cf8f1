"""Whole channels go, the least important first, and no more than asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import netfission as nf
from netfission.pruning.prune import CRITERIA, score, select_units
from netfission.surgery.coupling import find_coupling
from netfission.surgery.masks import prunable_weights

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Sequential):
    """Two internal groups in a row, of 8 and 6 channels, between an entry and an exit."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.Conv2d(4, 8, 3, bias=False),
            nn.ReLU(),
            nn.Conv2d(8, 6, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(6, 5, 1, bias=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def groups_of(net: Net):
    inner = nn.Sequential(*list(net)[:6])
    return find_coupling(inner, IMAGES).groups


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_is_left_is_whole_channels(criterion: str, net: Net) -> None:
    groups = groups_of(net)
    kept = nf.prune(
        net, sparsity=0.4, criterion=criterion, batches=[(IMAGES, torch.arange(4))], steps=2, groups=groups
    )
    total = sum(mask.numel() for mask in kept.values())
    left = sum(int(mask.sum()) for mask in kept.values())
    assert 0.45 * total < left <= total - round(0.4 * total)
    for name, mask in kept.items():  # a block of rows and columns
        rows, columns = mask.flatten(2).any(2).any(1), mask.flatten(2).any(2).any(0)
        assert torch.equal(
            mask, (rows[:, None] & columns[None]).view(*mask.shape[:2], 1, 1).expand_as(mask)
        ), name
    for first, second in (("1.weight", "3.weight"), ("3.weight", "5.weight")):
        assert torch.equal(kept[first].any(3).any(2).any(1), kept[second].any(3).any(2).any(0))


def test_the_weakest_channel_goes_first(net: Net) -> None:
    with torch.no_grad():
        net[1].weight[3] *= 1e-3
        net[3].weight[:, 3] *= 1e-3
    kept = nf.prune(net, sparsity=0.01, criterion="magnitude", groups=groups_of(net))
    assert not kept["1.weight"][3].any() and not kept["3.weight"][:, 3].any()
    assert sum(int((~mask).sum()) for mask in kept.values()) == net[1].weight[3].numel() + 6


@settings(deadline=None, max_examples=30)
@given(st.floats(0.0, 1.0), st.integers(0, 1000))
def test_one_unit_more_would_be_one_too_many(share: float, seed: int) -> None:
    net = Net()
    groups = groups_of(net)
    generator = torch.Generator().manual_seed(seed)
    weights = prunable_weights(net)
    scores = {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
    everything = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
    total = sum(mask.numel() for mask in everything.values())
    keep = round(share * total)
    kept = select_units(scores, everything, groups, keep)
    left = sum(int(mask.sum()) for mask in kept.values())
    alive = torch.cat([group.sums(kept) for group in groups])
    if (alive > 0).any():
        assert left <= keep
    if left < total:
        biggest = max(float(group.sums(everything).max()) for group in groups)
        assert left > keep - biggest
    again = select_units(scores, kept, groups, left)
    assert all(torch.equal(again[name], mask) for name, mask in kept.items())


@pytest.mark.parametrize("floors", [(1, 1, 1), (2, 3, 4), (4, 8, 0)])
def test_groups_keep_their_strongest_units(floors: tuple[int, ...], net: Net) -> None:
    groups = groups_of(net)
    everything = {name: torch.ones_like(w, dtype=torch.bool) for name, w in prunable_weights(net).items()}
    scores = score(net, list(everything), "magnitude")
    kept = select_units(scores, everything, groups, 0, floors)
    for group, floor in zip(groups, floors, strict=True):
        means = group.sums(scores) / group.sums(everything)
        left = group.sums(kept).nonzero().squeeze(1)
        if all(floors):  # an emptied group takes the other's weights with it
            assert sorted(left.tolist()) == sorted(means.topk(floor).indices.tolist())
    unbound = select_units(scores, everything, groups, 500)
    assert all(group.sums(unbound).count_nonzero() >= 2 for group in groups)
    for name, mask in select_units(scores, everything, groups, 500, [2, 2, 2]).items():
        assert torch.equal(mask, unbound[name])


def test_a_sparsity_that_whole_units_cannot_reach_is_reported(net: Net) -> None:
    with pytest.warns(UserWarning, match=r"^pruning whole channels removes \d\d% of the weights, less than "):
        kept = nf.prune(net, sparsity=0.99, criterion="magnitude", groups=groups_of(net), floors=[2, 2, 2])
    assert all(mask.any() for mask in kept.values())


def test_scores_are_the_criterions_and_see_the_pruned_network(net: Net) -> None:
    names = ["1.weight", "3.weight"]
    scores = score(net, names, "magnitude")
    assert list(scores) == names
    assert torch.equal(scores["1.weight"], net[1].weight.abs())
    kept = {name: torch.zeros_like(net.get_parameter(name), dtype=torch.bool) for name in names}
    assert not any(of_layer.any() for of_layer in score(net, names, "magnitude", kept=kept).values())
    with pytest.raises(ValueError, match=r"^batches must be pairs .* for criterion 'snip', got \(\)$"):
        score(net, names, "snip")


def test_scores_that_are_nan_are_refused(net: Net) -> None:
    with torch.no_grad():
        net[1].weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"^pruning scores must be numbers, got NaN; check the images"):
        nf.prune(net, sparsity=0.5, criterion="magnitude", groups=groups_of(net))
