"""A budget is what the network with all its paths costs, relative to the model."""

import re
from functools import cache

import pytest
import torch
from torch import nn

import netfission as nf
from netfission.classifier.folder import NetworkSpec, network_state
from netfission.grouping.budget import meet_budget
from netfission.models import create_model
from netfission.profiling.macs import count_macs

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@cache
def model(name: str = "cifar-resnet18-w16") -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return create_model(name, 10)


def divided(
    budget: float | None = None, name: str = "cifar-resnet18-w16", *, exits: int = 3, **settings
) -> nf.FissionNetwork:
    settings = {"grouping": "channels", "example_input": IMAGES} | settings
    return nf.fission(model(name), exits, **settings | ({} if budget is None else {"budget": budget}))


def ratio(network: nn.Module, name: str = "cifar-resnet18-w16") -> float:
    return count_macs(network, IMAGES[:1]).dense / count_macs(model(name), IMAGES[:1]).dense


@pytest.mark.parametrize("budget", [0.4, 0.75, 1.3, 1.9])
def test_the_network_costs_its_budget(budget):
    assert ratio(divided(budget)) == pytest.approx(budget, rel=0.06)


def test_unequal_shares_and_late_exits_keep_the_budget():
    network = divided(0.8, ratio=[2.0, 1.0, 1.0], branch_after=["layer2", "layer3"])
    assert ratio(network) == pytest.approx(0.8, rel=0.05)
    first, second, _ = network.stage_copies(3).values()
    assert sum(p.numel() for p in first.parameters()) > 1.5 * sum(p.numel() for p in second.parameters())


@pytest.mark.parametrize("budget", [1.2, 1.5])
def test_very_unequal_paths_reach_a_larger_budget(budget):
    assert ratio(divided(budget, exits=2, ratio=[4.0, 1.0])) == pytest.approx(budget, rel=0.05)


def test_a_budget_that_steps_miss_is_told():
    with pytest.warns(
        UserWarning, match=r"^the network costs 0\.60 times the model, less than its budget of 0\.8"
    ):
        meet_budget(0.8, lambda cost: 0.6, lambda result: result, divided=0.5, copied=2.0, where="after b")


def test_products_of_attention_are_within_the_budget():
    name = "timm/test_vit"
    images = torch.rand(2, 3, 160, 160)
    network = divided(0.8, name, exits=2, example_input=images)
    whole = count_macs(model(name), images[:1]).dense
    assert count_macs(network, images[:1]).dense / whole == pytest.approx(0.8, rel=0.05)


def test_a_budget_of_1_changes_nothing():
    state, other = divided().state_dict(), divided(1.0).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_one_exit_has_no_budget_to_meet():
    network = nf.fission(model(), 1, grouping="channels", budget=0.5, example_input=IMAGES)
    assert ratio(network) == 1


def test_the_message_tells_a_budget_that_can_be_met():
    with pytest.raises(
        ValueError, match=r"^budget must be at least 0\.\d\d if exits leave after layer3, "
    ) as e:
        divided(0.3, branch_after=[3, 3])
    assert str(e.value).endswith("got 0.3; let them leave earlier")
    least = float(re.findall(r"0\.\d+", str(e.value))[0])
    assert ratio(divided(least, branch_after=[3, 3])) == pytest.approx(least, rel=0.05)


def test_more_than_whole_copies_is_refused():
    message = (
        r"^budget must be at most 2\.\d\d if exits leave after layer1, what whole copies cost, got 5\.0$"
    )
    with pytest.raises(ValueError, match=message):
        divided(5.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grouping": "weights"}, r"^budget must be 1\.0 unless grouping='channels', got 0\.5$"),
        ({"exact_partition": True}, r"^budget must be 1\.0 with exact_partition, got 0\.5$"),
    ],
)
def test_a_budget_beside_settings_without_one_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        divided(0.5, **settings)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_no_budget(budget):
    with pytest.raises(ValueError, match=r"^budget must be (a positive number|positive)"):
        divided(budget)


def test_a_saved_network_of_another_budget_is_the_same_again():
    network = divided(0.5).eval()
    fission = {"exits": 3, "grouping": "channels", "budget": 0.5}
    spec = NetworkSpec(
        "cifar-resnet18-w16", list("abcdefghij"), [3, 32, 32], [0.5] * 3, [0.2] * 3, fission, "0"
    )
    assert torch.equal(spec.restore(network_state(network))(IMAGES), network(IMAGES))


def test_what_widths_do_not_tell_is_measured():
    asked = []

    def divide(cost: float) -> float:
        asked.append(cost)
        return 0.5 + 0.9 * 0.5 * cost  # 10 % of the stages cost nothing

    reached = meet_budget(1.4, divide, lambda result: result, divided=0.5, copied=2.0, where="after block1")
    assert reached == pytest.approx(1.4, rel=0.05) and 1 < len(asked) <= 3
