import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import netfission as nf
from netfission.grouping import Stage, WeightGrouping
from netfission.grouping.weights import apportion, partition
from netfission.models import create_model
from netfission.surgery.backbone import cut
from netfission.surgery.masks import kept_masks, prunable_weights

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FEW = settings(deadline=None, max_examples=60)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def largest_remainder(count: int, shares: list[int]) -> list[int]:
    """Hamilton's method in exact arithmetic; equal remainders go to the first."""
    quotas = [Fraction(count * share, sum(shares)) for share in shares]
    sizes = [quota.numerator // quota.denominator for quota in quotas]
    order = sorted(range(len(shares)), key=lambda i: (sizes[i] - quotas[i], i))
    for i in order[: count - sum(sizes)]:
        sizes[i] += 1
    return sizes


@FEW
@given(count=st.integers(0, 10_000), shares=st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_counts_are_exact_and_proportional(count: int, shares: list[int]) -> None:
    sizes = apportion(count, shares)
    assert sum(sizes) == count
    quotas = [Fraction(count * share, sum(shares)) for share in shares]
    assert all(abs(quota - size) < 1 for quota, size in zip(quotas, sizes, strict=True))
    # No remainder that was dropped is larger than one that was rounded up.
    up = [quota % 1 for quota, size in zip(quotas, sizes, strict=True) if size > quota]
    down = [quota % 1 for quota, size in zip(quotas, sizes, strict=True) if size < quota]
    assert min(up, default=1) >= max(down, default=0)


@FEW
@given(
    count=st.integers(0, 10_000),
    shares=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6),
)
def test_any_positive_shares_add_up(count: int, shares: list[float]) -> None:
    sizes = apportion(count, shares)
    assert sum(sizes) == count and min(sizes) >= 0
    assert all(
        abs(count * share / sum(shares) - size) < 1 + 1e-6 for size, share in zip(sizes, shares, strict=True)
    )


def test_counts_by_hand() -> None:
    assert apportion(10, [1.0, 1.0, 1.0]) == [4, 3, 3]
    assert apportion(10, [2.0, 1.0]) == [7, 3]
    assert apportion(1, [1.0, 1.0, 1.0]) == [1, 0, 0]
    assert apportion(7, [0.1, 0.2, 0.4]) == [1, 2, 4]
    assert apportion(0, [1.0, 5.0]) == [0, 0]


@FEW
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    shares=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_parts_are_disjoint_and_their_union_is_the_mask(
    shape: list[int], shares: list[int], density: float, seed: int
) -> None:
    mask = torch.rand(shape, generator=seeded(seed)) < density
    before = mask.clone()
    parts = partition(mask, shares, seeded(seed))
    assert torch.equal(mask, before)
    assert all(part.shape == mask.shape and part.dtype is torch.bool for part in parts)
    owners = torch.stack([part.int() for part in parts]).sum(0)
    assert torch.equal(owners, mask.int())
    assert [int(part.sum()) for part in parts] == apportion(int(mask.sum()), shares)
    again = partition(mask, shares, seeded(seed))
    assert all(torch.equal(*pair) for pair in zip(parts, again, strict=True))


def test_every_weight_is_as_likely_to_land_in_any_part() -> None:
    mask = torch.ones(6, dtype=torch.bool)
    generator = seeded()
    counts = sum(partition(mask, [1, 2], generator)[0].float() for _ in range(3000))
    assert ((counts - 1000).abs() < 5 * (3000 * 2 / 9) ** 0.5).all()  # 5 standard deviations


def test_each_tensor_is_dealt_out_by_itself() -> None:
    stage = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(2, 5))
    before = copy.deepcopy(stage.state_dict())
    state = torch.get_rng_state()
    parts = WeightGrouping().split(Stage(stage, IMAGES), {}, [3.0, 1.0], seeded(), {}).paths
    assert torch.equal(torch.get_rng_state(), state)
    assert list(stage.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in stage.state_dict().items())
    for name in ("0.weight", "1.weight", "3.weight"):
        total = before[name].numel()
        assert [int(kept_masks(part)[name].sum()) for part in parts] == largest_remainder(total, [3, 1])
        assert torch.equal(sum(part.get_parameter(name) for part in parts), before[name])
    for part in parts:
        for name in ("0.bias", "1.bias", "3.bias"):
            assert torch.equal(part.get_parameter(name), before[name])


def test_one_path_without_pruning_is_the_plain_stage() -> None:
    stage = nn.Sequential(nn.Conv2d(3, 4, 3))
    (part,) = WeightGrouping().split(Stage(stage, IMAGES), {}, [1.0], seeded(), {}).paths
    assert list(part.state_dict()) == list(stage.state_dict())
    assert part is not stage and part[0].weight is not stage[0].weight


# --- whole networks ---------------------------------------------------------------------------------


def model_() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model("wrn-10-1", 10)


NETWORKS: dict[str, dict[str, Any]] = {
    "two exits": {"exits": 2},
    "three exits": {"exits": 3},
    "ratio": {"exits": 3, "ratio": [4.0, 2.0, 1.0]},
    "sparsity": {"exits": 3, "sparsity": 0.7, "criterion": "random"},
    "one branch point": {"exits": 4, "branch_after": [1, 1, 2], "ratio": [1, 2, 3, 4]},
    "everything": {
        "exits": 4,
        "branch_after": [2, 1, 2],
        "sparsity": 0.5,
        "criterion": "erk",
        "ratio": [1, 2, 3, 4],
    },
    "erk keeps shortcuts": {"exits": 3, "sparsity": 0.5, "criterion": "erk", "keep_shortcuts": True},
    "keeps shortcuts": {"exits": 2, "branch_after": [1], "keep_shortcuts": True},
}


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("case", NETWORKS)
def test_groups_of_every_stage_are_disjoint_and_their_union_is_what_pruning_left(
    case: str, seed: int
) -> None:
    options = NETWORKS[case]
    model = model_()
    before = copy.deepcopy(model.state_dict())
    net = nf.fission(model, example_input=IMAGES, seed=seed, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    backbone = cut(model, IMAGES)
    names = [name for name in prunable_weights(backbone) if not name.startswith("head.")]
    kept = nf.prune(
        backbone,
        names,
        options.get("sparsity", 0.0),
        criterion=options.get("criterion", "random"),
        seed=seed,
    )
    ratio = options.get("ratio", [1] * options["exits"])
    shared = [0, *options.get("branch_after", range(1, options["exits"]))]
    dealt = 0
    for name, union in kept.items():
        part, _, parameter = name.partition(".")
        if part == "stem":
            assert torch.equal(kept_masks(net.stem)[parameter], union)
            continue
        index, _, parameter = parameter.partition(".")
        stages = [
            (path.stages[int(index) - first], share)
            for path, first, share in zip(net.paths, shared, ratio, strict=True)
            if first <= int(index)
        ]
        groups = [kept_masks(stage)[parameter] for stage, _ in stages]
        if options.get("keep_shortcuts") and "shortcut" in parameter:
            assert all(torch.equal(group, union) for group in groups)
        else:
            assert torch.equal(sum(group.int() for group in groups), union.int())
            counts = largest_remainder(int(union.sum()), [int(share) for _, share in stages])
            assert [int(group.sum()) for group in groups] == counts
            dealt += len(stages) > 1
        for (stage, _), group in zip(stages, groups, strict=True):
            assert torch.equal(stage.get_parameter(parameter), before[parameter] * group)
    assert dealt >= 3
    heads = [name for name in net.state_dict() if ".head." in name]
    assert heads and not any(name.endswith("_removed") for name in heads)


@pytest.mark.parametrize("grouping", ["weights", "copies"])
def test_the_seed_decides_and_nothing_else(grouping: str) -> None:
    def build(seed: int, global_seed: int) -> dict[str, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            net = nf.fission(
                model,
                3,
                grouping=grouping,
                sparsity=0.5,
                criterion="random",
                example_input=IMAGES,
                seed=seed,
            )
        return net.state_dict()

    model = model_()
    one, same, other = build(1, 1), build(1, 2), build(2, 1)
    assert list(one) == list(same) == list(other)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_layer_that_gets_no_weight_is_reported() -> None:
    backbone = nf.Backbone(
        nn.Linear(2, 2),
        [nn.Linear(2, 2, bias=False), nn.Linear(1, 1, bias=False)],
        nn.Linear(1, 3),
        ["wide", "narrow"],
    )
    backbone.stages[0].weight.data = torch.ones(1, 2)
    with pytest.warns(UserWarning, match=r"1 layers got none: weight of exit 1$"):
        nf.fission(backbone, 2, example_input=torch.ones(2, 2))
