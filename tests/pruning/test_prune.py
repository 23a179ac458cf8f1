"""Exact counts, whatever the criterion; a layer that ends up empty is named."""

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import netfission as nf
from netfission.pruning.prune import CRITERIA, Criterion
from netfission.surgery.masks import prunable_weights

Batches = list[tuple[Tensor, Tensor]]


def kept_of(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.fixture
def net(tiny: Callable[[float], nn.Module]) -> nn.Module:
    return tiny(0.3)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("sparsity", [0.001, 0.1, 0.5, 0.777, 0.9, 0.98, 0.999])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_exactly_the_share_asked_for_is_removed(
    criterion: str, sparsity: float, steps: int, net: nn.Module, batches: Batches
) -> None:
    before = copy.deepcopy(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # 182 weights: layers may well be emptied
        kept = nf.prune(net, None, sparsity, criterion=criterion, batches=batches, steps=steps)
    assert list(kept) == ["conv1.weight", "conv2.weight", "fc.weight"]
    assert {name: mask.shape for name, mask in kept.items()} == {n: before[n].shape for n in kept}
    total = sum(mask.numel() for mask in kept.values())
    assert total - kept_of(kept) == round(sparsity * total)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_nothing_is_removed_at_sparsity_0(criterion: str, net: nn.Module) -> None:
    kept = nf.prune(net, None, 0.0, criterion=criterion)
    assert kept and all(mask.all() for mask in kept.values())


def test_only_the_weights_named_are_chosen_among(net: nn.Module) -> None:
    kept = nf.prune(net, ["conv2.weight", "conv1.weight"], 0.5, criterion="magnitude")
    assert list(kept) == ["conv2.weight", "conv1.weight"]
    scores = torch.cat([net.get_parameter(name).detach().abs().flatten() for name in kept])
    threshold = scores.sort().values[round(0.5 * len(scores))]
    for name, mask in kept.items():
        assert torch.equal(mask, net.get_parameter(name).abs() >= threshold)


@pytest.mark.parametrize("criterion", ["random", "erk", "snip"])
def test_the_seed_decides(criterion: str, net: nn.Module, batches: Batches) -> None:
    def choose(seed: int) -> Tensor:
        kept = nf.prune(net, None, 0.5, criterion=criterion, batches=batches, seed=seed)
        return torch.cat([mask.flatten() for mask in kept.values()])

    assert torch.equal(choose(0), choose(0))
    assert not torch.equal(choose(0), choose(1))


def test_synflow_prunes_in_100_steps_the_others_in_one(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module, batches: Batches
) -> None:
    for name, chosen in list(CRITERIA.items()):
        calls: list[int] = []

        def score(*arguments: Any, calls: list[int] = calls, inner: Any = chosen.score) -> dict[str, Tensor]:
            calls.append(1)
            return inner(*arguments)

        monkeypatch.setitem(CRITERIA, name, Criterion(score, chosen.needs, chosen.steps))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a small network has many scores of 0
            nf.prune(net, None, 0.3, criterion=name, batches=batches)
        assert len(calls) == (100 if name == "synflow" else 1)


@settings(deadline=None, max_examples=30)
@given(sparsity=st.floats(0.05, 0.95), steps=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_what_is_removed_stays_removed_though_scores_turn_about(
    sparsity: float, steps: int, seed: int
) -> None:
    """Scores that fall on what was kept and rise on what was removed must not bring a weight back."""
    weight = nn.Linear(20, 15, bias=False)
    nn.init.constant_(weight.weight, 1.0)
    generator = torch.Generator().manual_seed(seed)
    seen: list[Tensor] = []

    def turning(_model: nn.Module, weights: Mapping[str, Tensor], *_: Any) -> dict[str, Tensor]:
        seen.append(weights["weight"] != 0)
        noise = torch.rand(15, 20, generator=generator)
        return {"weight": noise - 10.0 * seen[-1]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CRITERIA, "random", Criterion(turning))
        kept = nf.prune(weight, None, sparsity, criterion="random", steps=steps)["weight"]
    masks = [*seen, kept]
    assert len(masks) == steps + 1
    assert seen[0].all()
    keep = 300 - round(sparsity * 300)
    for step, (before, after) in enumerate(itertools.pairwise(masks), start=1):
        assert not (after & ~before).any()
        assert abs(int(after.sum()) - 300 * (keep / 300) ** (step / steps)) <= 0.5 + 1e-9
    assert int(kept.sum()) == keep


def test_a_layer_emptied_by_pruning_is_named() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.copy_(torch.linspace(1, 2, 16).view(4, 4))
        net[1].weight.copy_(torch.linspace(0.1, 0.2, 16).view(4, 4))
    message = r"^pruning by magnitude at sparsity 0.4 removed every weight of 1 of 3 layers: 1\.weight$"
    with pytest.warns(UserWarning, match=message) as caught:
        kept = nf.prune(net, None, 0.4, criterion="magnitude")
    assert caught[0].filename == __file__
    assert not kept["1.weight"].any()
    nf.prune(net, None, 0.25, criterion="magnitude")  # a quarter leaves some: no warning


def test_a_choice_by_chance_is_reported_and_follows_the_seed() -> None:
    net = nn.Linear(20, 20, bias=False)
    nn.init.constant_(net.weight, 0.5)

    def choose(seed: int) -> Tensor:
        with pytest.warns(
            UserWarning, match=r"^100% of the weights kept .* score, 0.5, by magnitude: chance"
        ):
            return nf.prune(net, None, 0.5, criterion="magnitude", seed=seed)["weight"]

    assert torch.equal(choose(0), choose(0))
    assert not torch.equal(choose(0), choose(1))
    assert choose(0)[:10].any() and choose(0)[10:].any()


def test_equal_scores_that_are_all_kept_are_no_choice_by_chance() -> None:
    net = nn.Linear(20, 20, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.arange(400.0).view(20, 20) / 1000).clamp_(max=0.2)
    kept = nf.prune(net, None, 0.5, criterion="magnitude")["weight"]  # no warning
    assert torch.equal(kept, net.weight == net.weight.max())


def test_pruning_all_but_nothing(net: nn.Module) -> None:
    with pytest.warns(UserWarning, match="removed every weight of 3 of 3 layers: conv1.weight, conv2.weight"):
        kept = nf.prune(net, None, 0.9999, criterion="magnitude")
    assert kept_of(kept) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"^sparsity must be the share of weights to remove, in \[0, 1\), got 1\.0$"),
        ({"sparsity": -1e-9}, r"^sparsity must be .*, got -1e-09$"),
        ({"sparsity": float("nan")}, r"^sparsity must be .*, got nan$"),
        (
            {"criterion": "magnitud"},
            r"^criterion must be one of random, .*, got 'magnitud'; did you mean magnitude\?$",
        ),
        ({"criterion": "SNIP"}, rf"^criterion must be one of {', '.join(CRITERIA)}, got 'SNIP'$"),
        ({"criterion": "snip"}, r"^batches must be pairs \(images, labels\) for criterion 'snip', got \(\)$"),
        (
            {"criterion": "grasp", "batches": []},
            r"^batches must be .* for criterion 'grasp', got \[\]$",
        ),
        ({"criterion": "synflow"}, r"^batches must be pairs .* for criterion 'synflow', got \(\)$"),
        ({"steps": 0}, r"^steps must be a positive integer, got 0$"),
    ],
)
def test_a_bad_request_is_answered(net: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nf.prune(net, **{"sparsity": 0.5, "criterion": "magnitude"} | options)


def test_scores_that_are_not_numbers_are_refused(net: nn.Module, batches: Batches) -> None:
    images, labels = batches[0]
    with pytest.raises(
        ValueError,
        match=r"^pruning scores must be .*, got NaN in conv1.weight, conv2.weight, fc.weight; check",
    ):
        nf.prune(net, None, 0.5, criterion="snip", batches=[(images.fill_(torch.nan), labels)])


# --- more weights than float32 counts ---------------------------------------------------------------


WIDE_WEIGHTS = 17_092_461


@pytest.fixture(scope="session")
def wide() -> tuple[nn.Module, list[str], dict[str, Tensor]]:
    """Fast for its size: its matrices multiply two images of one pixel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(3, 31), nn.Linear(31, 4093), nn.Linear(4093, 4145), nn.Linear(4145, 100)
        )
    names = list(prunable_weights(model))[:3]
    return model, names, copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("criterion", ["magnitude", "erk", "synflow"])  # by layer, and in steps
def test_more_weights_than_float32_counts(
    wide: tuple[nn.Module, list[str], dict[str, Tensor]], criterion: str
) -> None:
    model, names, before = wide
    sparsity = 0.01  # so that those kept are too many as well
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(2, 3, 1, 1, generator=generator), torch.tensor([3, 97]))]
    steps = 2 if criterion == "synflow" else None  # 100 by default
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = nf.prune(model, names, sparsity, criterion=criterion, batches=batches, steps=steps)
    assert sum(before[name].numel() for name in names) == WIDE_WEIGHTS
    assert WIDE_WEIGHTS - kept_of(kept) == round(sparsity * WIDE_WEIGHTS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    # SynFlow may well do without a shortcut; what is emptied must be said, and nothing else. (Images this
    # small leave scores of 0 in the last stage, which is said too.)
    emptied = ", ".join(name for name, mask in kept.items() if not mask.any())
    messages = [str(warning.message) for warning in caught if "every weight of" in str(warning.message)]
    assert [message.rpartition(": ")[2] for message in messages] == [emptied] * bool(emptied)
